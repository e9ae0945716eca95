"""Text to tokens and back, by the checkpoint's tokenizer.json or its SentencePiece tokenizer.model."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import tokenizers

from fdpp_jax.json_fields import BOOL, INDEX, TEXT, Kind, read_optional_field
from fdpp_jax.models.loading import list_files, read_optional_json, resolve

# ChatGLM3's own tokens, which its code numbers from the end of the SentencePiece vocabulary on. ChatGLM2 has the first
# five, and rows of its embedding for the others as well.
_CHATGLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_CHATGLM_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *_CHATGLM_ROLES)
# What every text starts with; "sop" alone is in "philosopher" too.
_CHATGLM_PREFIX = ("[gMASK]", "sop")
# With whose turn an answer is over.
_CHATGLM_TURNS = ("<|user|>", "<|observation|>")
_SETTINGS = "tokenizer_config.json"
_EOS_IDS = Kind(
    "a token's id or a list of them",
    lambda value: all(map(INDEX.holds, value)) if isinstance(value, list) else INDEX.holds(value),
)
_TOKEN = Kind(
    'text or {"content": text}',
    lambda value: TEXT.holds(value.get("content") if isinstance(value, dict) else value),
)


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
          ValueError: A token has no row in the model's embedding; names the token and its text.
        """
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


class _TokenizerJson:
    """What tokenizer.json holds, with or without its own template (often just BOS)."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, add_special_tokens: bool):
        self._tokenizer = tokenizer
        self._add_special_tokens = add_special_tokens

    @property
    def vocab_size(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens and self._add_special_tokens).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def token(self, token_id: int) -> str:
        return str(self._tokenizer.id_to_token(token_id))


class _SentencePiece:
    """What tokenizer.model holds, the tokens a text may name, and how many the checkpoint's code adds behind it."""

    def __init__(self, processor: Any, *, named: Mapping[str, Sequence[int]], num_added: int):
        self._processor = processor
        self._named = named
        self._num_added = num_added
        self._pattern = re.compile(f"({'|'.join(map(re.escape, named)) or '(?!)'})")

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size() + self._num_added

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        del add_special_tokens  # it adds none
        # SentencePiece spells <s> and </s> in a text out; chat templates mean the tokens, as tokenizer.json reads them.
        ids: list[int] = []
        for part in self._pattern.split(text):
            ids += self._named[part] if part in self._named else self._processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        # SentencePiece refuses an id behind its vocabulary: an added token, or a padding row of the embedding.
        known = self._processor.vocab_size()
        return self._processor.decode([i for i in ids if 0 <= i < known and not self._processor.is_unknown(i)])

    def token(self, token_id: int) -> str:
        if token_id < self._processor.vocab_size():
            return str(self._processor.id_to_piece(token_id))
        return next((text for text, ids in self._named.items() if list(ids) == [token_id]), f"<{token_id}>")


def load_tokenizer(path_or_hub_id: str | pathlib.Path, vocab_size: int | None = None) -> Tokenizer:
    """Loads a checkpoint's tokenizer.

    A SentencePiece tokenizer.model serves where there is no tokenizer.json. Tokens that other files add to it are not
    known, except ChatGLM's.

    Args:
      path_or_hub_id: A directory with tokenizer.json or tokenizer.model, or a hub id.
      vocab_size: Rows of the model's embedding. A tokenizer may have more tokens: `encode` refuses a text that has
        one of them.

    Raises:
      ValueError: No or a malformed tokenizer, or one whose end-of-sequence ids lie beyond the model's vocabulary.
      NotImplementedError: A tokenizer.model, and sentencepiece is not installed.
    """
    directory = resolve(path_or_hub_id)
    if (directory / "tokenizer.json").is_file():
        tokenizer = _from_json(directory, vocab_size)
    elif (directory / "tokenizer.model").is_file():
        tokenizer = _from_sentencepiece(directory, vocab_size)
    else:
        raise ValueError(f"expected tokenizer.json or tokenizer.model in {directory}, found {list_files(directory)}")
    if vocab_size is not None:
        _check_eos(tokenizer, vocab_size, directory)
    return tokenizer


def _from_json(directory: pathlib.Path, num_rows: int | None) -> Tokenizer:
    path = directory / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer: {error}") from error
    # Settings of the training may be saved with it. A prompt is never shortened or padded by a file.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    add_bos, eos_ids = _add_bos(directory), _eos_ids(directory)
    if eos_ids is None:
        eos_ids = (
            () if special_token(directory, "eos_token") is None else (_token_id(tokenizer, directory, "eos_token"),)
        )
    return Tokenizer(
        _TokenizerJson(tokenizer, add_special_tokens=add_bos is not False),
        prefix=[_token_id(tokenizer, directory, "bos_token")] if add_bos else [],
        eos_ids=eos_ids,
        num_rows=num_rows,
    )


def _from_sentencepiece(directory: pathlib.Path, num_rows: int | None) -> Tokenizer:
    path = directory / "tokenizer.model"
    try:
        import sentencepiece
    except ImportError as error:
        raise NotImplementedError(f"{path} needs sentencepiece: pip install 'fdpp-jax[sentencepiece]'") from error
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} is not a tokenizer: {error}") from error
    bos, eos = processor.bos_id(), processor.eos_id()  # -1: the file has none
    if read_optional_json(directory, "config.json").get("model_type") == "chatglm":
        added = {token: processor.vocab_size() + i for i, token in enumerate(_CHATGLM_TOKENS)}
        prefix = [added[token] for token in _CHATGLM_PREFIX]
        named = {role: [added[role]] for role in _CHATGLM_ROLES}
        named["".join(_CHATGLM_PREFIX)] = prefix
        backend = _SentencePiece(processor, named=named, num_added=len(added))
        turns = tuple(added[token] for token in _CHATGLM_TURNS)
    else:
        named = {processor.id_to_piece(i): [i] for i in (bos, eos) if i >= 0}
        backend = _SentencePiece(processor, named=named, num_added=0)
        prefix = [bos] if _add_bos(directory) is not False and bos >= 0 else []
        turns = ()
    eos_ids = _eos_ids(directory)
    if eos_ids is None:
        eos_ids = (eos,) if eos >= 0 else ()
    eos_ids = tuple(dict.fromkeys(eos_ids + turns))
    return Tokenizer(backend, prefix=prefix, eos_ids=eos_ids, num_rows=num_rows)


def _check_eos(tokenizer: Tokenizer, vocab_size: int, directory: pathlib.Path) -> None:
    """A text must be able to end."""
    if any(not 0 <= i < vocab_size for i in tokenizer.eos_ids):
        raise ValueError(
            f"the end-of-sequence ids {list(tokenizer.eos_ids)} in {directory} exceed the vocabulary of {vocab_size}"
        )


def _eos_ids(directory: pathlib.Path) -> tuple[int, ...] | None:
    """generation_config.json knows best (Llama 3 has three), then config.json; None where both are silent."""
    for name in ("generation_config.json", "config.json"):
        eos = read_optional_field(read_optional_json(directory, name), "eos_token_id", _EOS_IDS, directory / name)
        if eos is not None:
            return tuple(eos) if isinstance(eos, list) else (eos,)
    return None


def _add_bos(directory: pathlib.Path) -> bool | None:
    """Whether a text starts with BOS; None where the checkpoint does not say."""
    add_bos: bool | None = read_optional_field(
        read_optional_json(directory, _SETTINGS), "add_bos_token", BOOL, directory / _SETTINGS
    )
    return add_bos


def special_token(directory: pathlib.Path, name: str) -> str | None:
    """The text of a special token such as bos_token, None where the checkpoint names none.

    Raises:
      ValueError: It is neither text nor {"content": text, ...}.
    """
    for file in (_SETTINGS, "special_tokens_map.json"):  # the second is all that old checkpoints have
        token = read_optional_field(read_optional_json(directory, file), name, _TOKEN, directory / file)
        if token is not None:
            return str(token["content"] if isinstance(token, dict) else token)
    return None


def _token_id(tokenizer: tokenizers.Tokenizer, directory: pathlib.Path, name: str) -> int:
    """Id of a special token."""
    text = special_token(directory, name)
    token_id: int | None = None if text is None else tokenizer.token_to_id(text)
    if token_id is None:
        raise ValueError(f"{directory} names {name} {text!r}, which tokenizer.json does not have")
    return token_id
