"""The text of tokens as they come, of one row or of a batch: what is given out is never taken back."""

import itertools
from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
# U+FFFD that the bytes of one unfinished character may decode to: one a byte, and the fourth would end it.
_MAX_UNFINISHED = 3
# With more tokens than this, all but the last are let go, so that a long text costs no more a token than a short one.
_MAX_TOKENS, _KEPT_TOKENS = 64, 16


class TextStream:
    """Text of tokens that come one after the other.

    All that `push` and `finish` give, joined, is the text of all tokens decoded at once. A character comes out once all
    of its bytes are there.

    Args:
      decode: From token ids to text.
      is_prefix_stable: Whether the text of the first tokens is always how the whole text begins, but for U+FFFD at its
        end. If not, all text waits for `finish`.
      prompt: Token ids that go before, whose text is left out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], *, is_prefix_stable: bool, prompt: Sequence[int] = ()):
        self._decode = decode
        self._is_prefix_stable = is_prefix_stable
        self._ids: list[int] = []
        self._num_given = 0  # characters of these ids' text
        self._before = "" if is_prefix_stable else decode(prompt)
        self.push(prompt)

    def push(self, ids: Sequence[int]) -> str:
        """Takes more tokens, and gives the text that is new and final."""
        self._ids += ids
        if not self._is_prefix_stable:
            return ""
        text = self._decode(self._ids)
        unfinished = min(_MAX_UNFINISHED, len(text) - len(text.rstrip(_REPLACEMENT)))
        new = text[self._num_given : len(text) - unfinished]
        self._num_given += len(new)
        if len(self._ids) > _MAX_TOKENS and not unfinished:
            self._let_go()
        return new

    def finish(self) -> str:
        """The rest of the text; no tokens may follow."""
        text = self._decode(self._ids)
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, self._before, strict=False))
        return text[self._num_given + len(list(alike)) :]

    def _let_go(self) -> None:
        """Keeps the last tokens alone, which tell that what follows is not at the text's beginning."""
        kept = self._ids[-_KEPT_TOKENS:]
        if text := self._decode(kept):
            self._ids, self._num_given = kept, len(text)


class TextRows:
    """The text of each row of a batch whose rows end one after the other.

    Args:
      streams: One for each row.
    """

    def __init__(self, streams: Sequence[TextStream]):
        self._streams = streams
        self._done = [0] * len(streams)
        self._num_tokens = 0

    def push(self, rows: Sequence[Sequence[int]], lengths: Sequence[int], is_over: bool) -> list[str]:
        """What more tokens, as many of each row, add to it; of a row `lengths` count in all.

        With its last token a row's text is whole: where fewer count than there are, or where all is over.
        """
        self._num_tokens += len(rows[0])
        texts = []
        for i, (stream, tokens, length) in enumerate(zip(self._streams, rows, lengths, strict=True)):
            text = stream.push(tokens[: length - self._done[i]])
            has_ended = is_over or length < self._num_tokens
            texts.append(text + stream.finish() if has_ended else text)
            self._done[i] = length
        return texts
