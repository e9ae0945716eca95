"""A SentencePiece tokenizer.model, and the tokens that a checkpoint adds to it."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fdpp_jax.models.tokenizer_settings import AddedToken

# SentencePiece's space.
_SPACE = "\u2581"
# Appended to a model: normalizer_spec (field 3 of ModelProto) with add_dummy_prefix (its field 3) false. Where a field
# is there twice, the last one counts.
_NO_DUMMY_PREFIX = bytes([3 << 3 | 2, 2, 3 << 3, 0])


class SentencePieceModel:
    """What tokenizer.model holds, and the tokens that a text may name.

    Args:
      path: The file.
      legacy: Whether each part of a text between two named tokens starts with a space of its own, as the whole text
        does. Checkpoints say so, or are silent, where they were trained with that.
      add_prefix_space: Whether a text starts with a space of its own, where `legacy` does not say so.
    """

    is_prefix_stable = True

    def __init__(self, path: pathlib.Path, *, legacy: bool, add_prefix_space: bool):
        content = path.read_bytes()
        self.processor = _processor(content, path)
        self._path = path
        self._legacy = legacy
        # Of what follows a named token.
        self._inner = self.processor if legacy else _processor(content + _NO_DUMMY_PREFIX, path)
        self._first = self.processor if add_prefix_space else self._inner
        self._named: dict[str, Sequence[int]] = {}
        self._text_of: dict[int, str] = {}  # of added tokens that SentencePiece does not know
        self._special: set[int] = set()
        self._pattern = _pattern({})

    @property
    def vocab_size(self) -> int:
        return max([self.processor.vocab_size() - 1, *self._text_of]) + 1

    def add(self, tokens: Mapping[str, AddedToken], aliases: Mapping[str, Sequence[int]] | None = None) -> None:
        """Adds tokens that a text may name.

        Args:
          tokens: By text. Those without an id count where SentencePiece has them.
          aliases: Texts that stand for several tokens.

        Raises:
          ValueError: A token contradicts the file, or another one.
        """
        for text, token in tokens.items():
            known = self._id(text)
            number = known if token.id is None else token.id
            if number is None:
                continue
            if known not in (None, number):
                raise ValueError(
                    f"{self._path.parent} adds {text!r} as token {number}, which is {known} in {self._path.name}"
                )
            if known is None and (number < self.processor.vocab_size() or number in self._text_of):
                raise ValueError(
                    f"{self._path.parent} adds {text!r} as token {number}, which is {self.token(number)!r} besides"
                )
            self._named[text] = [number]
            if known is None:
                self._text_of[number] = text
            if token.special:
                self._special.add(number)
        self._named |= aliases or {}
        self._pattern = _pattern({text: tokens.get(text, AddedToken(text)) for text in self._named})

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        del add_special_tokens  # it adds none
        # SentencePiece spells <s> and </s> in a text out; chat templates mean the tokens, as tokenizer.json reads them.
        ids: list[int] = []
        begin = 0
        for match in self._pattern.finditer(text):
            named = self._named[match[match.lastindex or 0]]
            before = text[begin : match.start()]
            # The space that a text starts with is left out where a special token comes first.
            starts = begin == 0 and (before != "" or not self._special.issuperset(named))
            ids += [*self._encode_part(before, starts_text=starts), *named]
            begin = match.end()
        return ids + self._encode_part(text[begin:], starts_text=begin == 0 and text != "")

    def decode(self, ids: Sequence[int]) -> str:
        parts: list[list[int]] = [[]]
        texts = []
        for i in ids:
            if i in self._special:
                continue
            if i in self._text_of:
                texts.append(self._text_of[i])
                parts.append([])
            # SentencePiece refuses an id behind its vocabulary: a padding row of the embedding.
            elif 0 <= i < self.processor.vocab_size() and not self.processor.is_unknown(i):
                parts[-1].append(i)
        decoded = [self._first.decode(parts[0]), *map(self._inner.decode, parts[1:])]
        return "".join(piece for pair in zip(decoded, [*texts, ""], strict=True) for piece in pair)

    def token(self, token_id: int) -> str:
        if token_id < self.processor.vocab_size():
            return str(self.processor.id_to_piece(token_id))
        return self._text_of.get(token_id, f"<{token_id}>")

    def _id(self, text: str) -> int | None:
        """A piece's id; SentencePiece gives that of the unknown piece to all others."""
        found: int = self.processor.piece_to_id(text)
        return found if self.processor.id_to_piece(found) == text else None

    def _encode_part(self, text: str, *, starts_text: bool) -> list[int]:
        if self._legacy:
            return self.processor.encode(text)
        prefix = _SPACE * (starts_text and self._first is self.processor)
        text = prefix + text.replace(_SPACE, " ")
        if not text.startswith((_SPACE, " ")):
            return self._inner.encode(text)
        # SentencePiece may drop spaces at the beginning, so something stands before them.
        guard = self.processor.id_to_piece(self.processor.unk_id())
        return self._inner.encode(guard + text)[len(self._inner.encode(guard)) :]


def _processor(content: bytes, path: pathlib.Path) -> Any:
    """The file's SentencePiece."""
    try:
        import sentencepiece
    except ImportError as error:
        raise NotImplementedError(f"{path} needs sentencepiece: pip install 'fdpp-jax[sentencepiece]'") from error
    if not content:  # of which SentencePiece makes an empty processor
        raise ValueError(f"{path} is not a tokenizer: it is empty")
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise ValueError(f"{path} is not a tokenizer: {error}") from error


def _pattern(tokens: Mapping[str, AddedToken]) -> re.Pattern[str]:
    """What finds named tokens in a text, the longest first, with the white space that belongs to them."""
    choices = []
    for text in sorted(tokens, key=len, reverse=True):
        token = tokens[text]
        word = rf"(?<!\w)({re.escape(text)})(?!\w)" if token.single_word else f"({re.escape(text)})"
        choices.append(r"\s*" * token.lstrip + word + r"\s*" * token.rstrip)
    return re.compile("|".join(choices) or "(?!)")
