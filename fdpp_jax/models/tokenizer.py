"""Text to tokens and back, by the checkpoint's tokenizer.json, tokenizer.model, or vocab.json and merges.txt."""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

import tokenizers

from fdpp_jax.json_fields import BOOL
from fdpp_jax.models import byte_level_bpe
from fdpp_jax.models.loading import list_files, read_optional_json, refuse_pointers, resolve
from fdpp_jax.models.sentencepiece_model import SentencePieceModel
from fdpp_jax.models.text_stream import TextStream
from fdpp_jax.models.tokenizer_json import TokenizerJson, read_tokenizer
from fdpp_jax.models.tokenizer_settings import AddedToken, eos_ids, read_added_tokens, setting, special_token

# ChatGLM3's own tokens, which its code numbers from the end of the SentencePiece vocabulary on. ChatGLM2 has the first
# five, and rows of its embedding for the others as well.
_CHATGLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_CHATGLM_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *_CHATGLM_ROLES)
# What every text starts with; "sop" alone is in "philosopher" too.
_CHATGLM_PREFIX = ("[gMASK]", "sop")
# With whose turn an answer is over.
_CHATGLM_TURNS = ("<|user|>", "<|observation|>")
_JSON, _MODEL = "tokenizer.json", "tokenizer.model"


class _Backend(Protocol):
    """Text to tokens and back, whatever the file format."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id, added tokens included."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text, with what the file itself adds to every text or without."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""

    def token(self, token_id: int) -> str:
        """A token as the file spells it."""

    @property
    def is_prefix_stable(self) -> bool:
        """Whether the text of the first tokens is how the whole text begins, but for U+FFFD at its end."""


class Tokenizer:
    """A checkpoint's tokenizer, which knows its special tokens.

    Args:
      backend: What tokenizer.json or tokenizer.model holds.
      prefix: Tokens that every text starts with, beside those that the backend itself adds.
      eos_ids: Tokens that end a text.
      num_rows: Rows of the model's embedding, None if unknown.
    """

    def __init__(
        self,
        backend: _Backend,
        *,
        prefix: Sequence[int] = (),
        eos_ids: Sequence[int] = (),
        num_rows: int | None = None,
    ):
        self._backend = backend
        self._prefix = list(prefix)
        self.eos_ids = tuple(eos_ids)
        self._num_rows = num_rows

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id, added tokens included."""
        return self._backend.vocab_size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, BOS included where the checkpoint asks for it; a chat template has its own.

        Raises:
          ValueError: The text is not valid Unicode, or a token has no row in the model's embedding; names it and its
            text.
        """
        if not text.isascii() and (half := re.search("[\ud800-\udfff]", text)):
            raise ValueError(f"expected a text in Unicode, got half of a surrogate pair at character {half.start()}")
        ids = self._backend.encode(text, add_special_tokens=add_special_tokens)
        if add_special_tokens and ids[: len(self._prefix)] != self._prefix:
            ids = self._prefix + ids
        if self._num_rows is not None and max(ids, default=0) >= self._num_rows:
            beyond = next(i for i in ids if i >= self._num_rows)
            raise ValueError(
                f"the text has {self._backend.token(beyond)!r}, which is token {beyond}; the model's vocabulary ends "
                f"at {self._num_rows - 1}"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return self._backend.decode([int(i) for i in ids])

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """Decodes tokens as they come, so that no text is given out twice or taken back.

        Args:
          prompt: Token ids that go before. Their text is left out, but for the bytes of a character that they do not
            end. Push them instead to get their text as well.
        """
        return TextStream(self.decode, is_prefix_stable=self._backend.is_prefix_stable, prompt=prompt)


def has_tokenizer(directory: pathlib.Path) -> bool:
    """Whether a checkpoint has files of a tokenizer, good or bad."""
    return any((directory / name).is_file() for name in (_JSON, _MODEL, byte_level_bpe.VOCAB, byte_level_bpe.MERGES))


def load_tokenizer(path_or_hub_id: str | pathlib.Path, vocab_size: int | None = None) -> Tokenizer:
    """Loads a checkpoint's tokenizer.

    It is tokenizer.json, else a SentencePiece tokenizer.model, else vocab.json with merges.txt. Tokens that
    tokenizer_config.json or added_tokens.json adds have the ids that these files give.

    Args:
      path_or_hub_id: A directory with one of these, or a hub id.
      vocab_size: Rows of the model's embedding. A tokenizer may have more tokens: `encode` refuses a text that has
        one of them.

    Raises:
      ValueError: No or a malformed tokenizer, added tokens that contradict it, or end-of-sequence ids beyond the
        model's vocabulary.
      NotImplementedError: A tokenizer.model, and sentencepiece is not installed; a kind of tokenizer that is not built
        from vocab.json.
    """
    directory = resolve(path_or_hub_id)
    if not has_tokenizer(directory):
        raise ValueError(
            f"expected {_JSON}, {_MODEL}, or {byte_level_bpe.VOCAB} with {byte_level_bpe.MERGES} in {directory}, "
            f"found {list_files(directory)}"
        )
    if (directory / _JSON).is_file():
        tokenizer = _from_json(directory, vocab_size)
    elif (directory / _MODEL).is_file():
        tokenizer = _from_sentencepiece(directory, vocab_size)
    else:
        tokenizer = _from_byte_level_bpe(directory, vocab_size)
    if vocab_size is not None:
        _check_eos(tokenizer, vocab_size, directory)
    return tokenizer


def _from_json(directory: pathlib.Path, num_rows: int | None) -> Tokenizer:
    refuse_pointers(directory, [_JSON])
    path = directory / _JSON
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a tokenizer: {error}") from error
    return _with_settings(read_tokenizer(text, read_added_tokens(directory), path), path, num_rows)


def _from_byte_level_bpe(directory: pathlib.Path, num_rows: int | None) -> Tokenizer:
    end = byte_level_bpe.END_OF_TEXT
    added = {end.content: end} | read_added_tokens(directory)
    path = directory / byte_level_bpe.VOCAB
    text = json.dumps(byte_level_bpe.read_byte_level_bpe(directory))
    return _with_settings(read_tokenizer(text, added, path), path, num_rows)


def _with_settings(tokenizer: tokenizers.Tokenizer, path: pathlib.Path, num_rows: int | None) -> Tokenizer:
    """A tokenizer of the package, with BOS and EOS as the other files ask."""
    add_bos, eos = setting(path.parent, "add_bos_token", BOOL), eos_ids(path.parent)
    if eos is None:
        eos = () if special_token(path.parent, "eos_token") is None else (_token_id(tokenizer, path, "eos_token"),)
    return Tokenizer(
        TokenizerJson(tokenizer, add_special_tokens=add_bos is not False),
        prefix=[_token_id(tokenizer, path, "bos_token")] if add_bos else [],
        eos_ids=eos,
        num_rows=num_rows,
    )


def _from_sentencepiece(directory: pathlib.Path, num_rows: int | None) -> Tokenizer:
    refuse_pointers(directory, [_MODEL])
    model = SentencePieceModel(
        directory / _MODEL,
        legacy=setting(directory, "legacy", BOOL) is not False,
        add_prefix_space=setting(directory, "add_prefix_space", BOOL) is not False,
    )
    processor = model.processor
    bos, eos, unk = processor.bos_id(), processor.eos_id(), processor.unk_id()  # -1: the file has none
    own = [AddedToken(processor.id_to_piece(i), special=True) for i in (bos, eos, unk) if i >= 0]
    added = {token.content: token for token in own} | read_added_tokens(directory)
    aliases: Mapping[str, Sequence[int]] = {}
    prefix = [bos] if setting(directory, "add_bos_token", BOOL) is not False and bos >= 0 else []
    turns: tuple[int, ...] = ()
    if read_optional_json(directory, "config.json").get("model_type") == "chatglm":
        ids = {token: processor.vocab_size() + i for i, token in enumerate(_CHATGLM_TOKENS)}
        prefix = [ids[token] for token in _CHATGLM_PREFIX]
        turns = tuple(ids[token] for token in _CHATGLM_TURNS)
        added = {text: token for text, token in added.items() if text not in ids}
        added |= {role: AddedToken(role, id=ids[role], special=True) for role in _CHATGLM_ROLES}
        aliases = {"".join(_CHATGLM_PREFIX): prefix}
    model.add(added, aliases)
    found = eos_ids(directory)
    if found is None:
        found = (eos,) if eos >= 0 else ()
    return Tokenizer(model, prefix=prefix, eos_ids=tuple(dict.fromkeys(found + turns)), num_rows=num_rows)


def _check_eos(tokenizer: Tokenizer, vocab_size: int, directory: pathlib.Path) -> None:
    """A text must be able to end."""
    if any(not 0 <= i < vocab_size for i in tokenizer.eos_ids):
        raise ValueError(
            f"the end-of-sequence ids {list(tokenizer.eos_ids)} in {directory} exceed the vocabulary of {vocab_size}"
        )


def _token_id(tokenizer: tokenizers.Tokenizer, path: pathlib.Path, name: str) -> int:
    """Id of a special token."""
    text = special_token(path.parent, name)
    token_id: int | None = None if text is None else tokenizer.token_to_id(text)
    if token_id is None:
        raise ValueError(f"{path.parent} names {name} {text!r}, which {path.name} does not have")
    return token_id
