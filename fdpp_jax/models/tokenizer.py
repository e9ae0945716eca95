"""Text to tokens and back, by the checkpoint's tokenizer.json."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from fdpp_jax.models.loading import list_files, read_json, resolve


class Tokenizer:
    """A thin wrapper of `tokenizers.Tokenizer` that knows the checkpoint's special tokens.

    Args:
      tokenizer: What tokenizer.json holds.
      bos_id: Token that every text starts with; None leaves it to tokenizer.json.
      add_special_tokens: Whether tokenizer.json's own template (often just BOS) applies.
      eos_ids: Tokens that end a text.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        add_special_tokens: bool = True,
        eos_ids: Sequence[int] = (),
    ):
        self._tokenizer = tokenizer
        self._bos_id = bos_id
        self._add_special_tokens = add_special_tokens
        self.eos_ids = tuple(eos_ids)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, BOS included where the checkpoint asks for it."""
        ids = self._tokenizer.encode(text, add_special_tokens=self._add_special_tokens).ids
        if self._bos_id is not None and ids[:1] != [self._bos_id]:
            ids = [self._bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def load_tokenizer(path_or_hub_id: str | pathlib.Path, vocab_size: int | None = None) -> Tokenizer:
    """Loads a checkpoint's tokenizer.

    Args:
      path_or_hub_id: A directory with tokenizer.json, or a hub id.
      vocab_size: Rows of the model's embedding, to check that the two belong together.

    Raises:
      ValueError: No or a malformed tokenizer.json, or one with ids beyond the model's vocabulary.
    """
    directory = resolve(path_or_hub_id)
    path = directory / "tokenizer.json"
    if not path.is_file():
        hint = ""
        if (directory / "tokenizer.model").is_file():
            hint = "; a SentencePiece tokenizer.model alone is not enough: convert it with Hugging Face transformers"
        raise ValueError(f"expected tokenizer.json in {directory}, found {list_files(directory)}{hint}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer: {error}") from error
    settings = _optional_json(directory, "tokenizer_config.json")
    add_bos = settings.get("add_bos_token")
    bos_id = None
    if add_bos:
        bos_id = _token_id(backend, settings.get("bos_token"), "bos_token")
    tokenizer = Tokenizer(
        backend,
        bos_id=bos_id,
        add_special_tokens=add_bos is not False,
        eos_ids=_eos_ids(directory, backend, settings),
    )
    if vocab_size is not None:
        _check_vocabulary(tokenizer, vocab_size, directory)
    return tokenizer


def _check_vocabulary(tokenizer: Tokenizer, vocab_size: int, directory: pathlib.Path) -> None:
    """Tokens must have a row in the embedding; rows without a token are padding."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer in {directory} has {tokenizer.vocab_size} tokens, the model's vocabulary only {vocab_size}"
        )
    if any(not 0 <= i < vocab_size for i in tokenizer.eos_ids):
        raise ValueError(
            f"the end-of-sequence ids {list(tokenizer.eos_ids)} in {directory} exceed the vocabulary of {vocab_size}"
        )


def _eos_ids(directory: pathlib.Path, backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """generation_config.json knows best (Llama 3 has three), then config.json, then the tokenizer's settings."""
    for name in ("generation_config.json", "config.json"):
        eos = _optional_json(directory, name).get("eos_token_id")
        if eos is not None:
            return tuple(eos) if isinstance(eos, list) else (eos,)
    token = settings.get("eos_token")
    return () if token is None else (_token_id(backend, token, "eos_token"),)


def _token_id(backend: tokenizers.Tokenizer, token: str | Mapping[str, Any] | None, what: str) -> int:
    """Id of a special token, which tokenizer_config.json gives as text or as {"content": text, ...}."""
    text = token["content"] if isinstance(token, Mapping) else token
    token_id = None if text is None else backend.token_to_id(text)
    if token_id is None:
        raise ValueError(f"tokenizer_config.json names {what} {text!r}, which tokenizer.json does not have")
    return token_id


def _optional_json(directory: pathlib.Path, name: str) -> dict[str, Any]:
    return read_json(directory, name) if (directory / name).is_file() else {}
