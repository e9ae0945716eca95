"""The prompts of `generate` and `stream`: a padded array, lists of tokens or texts, checked and padded to one array.

They may stand behind what a cache holds.
"""

import dataclasses
import itertools
import weakref
from collections.abc import Sequence
from typing import SupportsIndex, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from fdpp_jax.models import CausalLM, DecoderConfig, KVCache, Tokenizer, load_tokenizer
from fdpp_jax.models.checks import positive_int
from fdpp_jax.models.tokenizer import has_tokenizer

# A text, texts, token ids of one or several prompts, or a right-padded array [B, T].
type PromptsLike = str | Sequence[str] | Sequence[Sequence[int]] | Sequence[np.ndarray] | np.ndarray | jax.Array

_MIN_BUCKET = 16
# Of models that were given texts, or whose tokens became texts.
_TOKENIZERS: "weakref.WeakKeyDictionary[CausalLM, Tokenizer]" = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class PromptCache:
    """What `generate` keeps of a batch for the next call. That call copies what it needs: a cache serves many calls.

    Attributes:
      kv: Keys and values of each row's first kv.lengths[b] tokens. It lies on the device for as long as it is held.
      tokens: The tokens of each row: prompts and what continued them. Those that kv lacks are the first of the next
        prefill, such as the last one that was drawn, which has not been through the model.
    """

    kv: KVCache = dataclasses.field(repr=False)
    tokens: list[list[int]]

    def matched(self, prompts: PromptsLike, prompt_lengths: object = None) -> "tuple[PromptCache, list[list[int]]]":
        """The cache cut to what prompts begin with, and what is left of each, at least a token.

        With both, a call of `generate` gives what it would give of the whole prompts.

        Args:
          prompts: The tokens of whole prompts, a list of each prompt's or a padded array [B, T], one for each row.
            A text is encoded first, `tokenizer.encode(text)`: a cache has no tokenizer.
          prompt_lengths: [B] integers of a padded array. None: T for every row.

        Raises:
          ValueError: They are texts, there are not as many as rows, one is empty, or they are no tokens.
        """
        if are_texts(prompts):
            raise ValueError("expected prompts of tokens, which a tokenizer makes of texts, got texts")
        padded, lengths = _padded(prompts, prompt_lengths)
        _check_rows(len(padded), self)
        whole = [row[:length].tolist() for row, length in zip(padded, lengths, strict=True)]
        rows = zip(whole, self.tokens, np.asarray(self.kv.lengths), strict=True)
        counts = [_num_alike(prompt[:-1], tokens[:length]) for prompt, tokens, length in rows]
        pairs = list(zip(whole, counts, strict=True))
        kv = dataclasses.replace(self.kv, lengths=jnp.asarray(counts, jnp.int32))
        return PromptCache(kv, [prompt[:n] for prompt, n in pairs]), [prompt[n:] for prompt, n in pairs]


def _check_rows(num_prompts: int, cache: PromptCache) -> None:
    if num_prompts != len(cache.tokens):
        raise ValueError(f"expected as many prompts as the cache has rows, {len(cache.tokens)}, got {num_prompts}")


def _num_alike(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return sum(1 for _ in alike)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Checked prompts.

    Attributes:
      tokens: [B, T] int32 to prefill, zeros behind each prompt; T is a power of two, or the model's limit.
      lengths: [B] int32 tokens of each prompt.
      cached: [B] int32 tokens before them that a cache holds.
      width: Slots for the longest row, cached tokens included: a power of two, or the model's limit.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    cached: np.ndarray
    width: int

    def rows(self) -> list[list[int]]:
        """The tokens of each prompt."""
        return [row[:length].tolist() for row, length in zip(self.tokens, self.lengths, strict=True)]


def are_texts(prompts: PromptsLike) -> TypeGuard[str | Sequence[str]]:
    """Whether prompts are a text or several, and no tokens.

    Raises:
      ValueError: Texts and something else.
    """
    if isinstance(prompts, str):
        return True
    if not isinstance(prompts, list | tuple) or not any(isinstance(prompt, str) for prompt in prompts):
        return False
    if not all(isinstance(prompt, str) for prompt in prompts):
        kinds = sorted({type(prompt).__name__ for prompt in prompts})
        raise ValueError(f"expected prompts that are all texts or all tokens, got {' and '.join(kinds)}")
    return True


def tokenizer_of(model: CausalLM) -> Tokenizer | None:
    """The tokenizer beside the model's checkpoint, read once; None where there is none.

    Raises:
      ValueError: It is malformed.
    """
    if model not in _TOKENIZERS:
        if model.checkpoint is None or not has_tokenizer(model.checkpoint):
            return None
        _TOKENIZERS[model] = load_tokenizer(model.checkpoint, vocab_size=model.config.vocab_size)
    return _TOKENIZERS[model]


def needed_tokenizer(model: CausalLM) -> Tokenizer:
    """The tokenizer beside the model's checkpoint.

    Raises:
      ValueError: There is none, or it is malformed.
    """
    tokenizer = tokenizer_of(model)
    if tokenizer is None:
        where = "was not loaded from a checkpoint" if model.checkpoint is None else f"has none in {model.checkpoint}"
        raise ValueError(f"texts need a tokenizer, and the model {where}: pass tokens, or tokenizer=")
    return tokenizer


def encoded(prompts: str | Sequence[str], tokenizer: Tokenizer, *, add_special_tokens: bool = True) -> list[list[int]]:
    """The tokens of one text or several; without special tokens where they go on with a text.

    Raises:
      ValueError: No text, or one without tokens.
    """
    texts = [prompts] if isinstance(prompts, str) else prompts
    rows = [tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"expected prompts of at least one token, got none for prompt {i}, {texts[i]!r}")
    return rows


def check_prompts(
    config: DecoderConfig,
    prompts: PromptsLike,
    prompt_lengths: object = None,
    *,
    max_new_tokens: SupportsIndex,
    cache: PromptCache | None = None,
) -> Prompts:
    """Prompts of tokens, padded for the model.

    Args:
      config: The model's.
      prompts: Token ids: a padded array [B, T], or a list of each prompt's.
      prompt_lengths: [B] integers of a padded array; None: T for every row.
      max_new_tokens: How many more the model must have positions for.
      cache: What stands before them. Its tokens that it has no keys of go in front of the prompts.

    Raises:
      ValueError: They don't fit each other or the model.
    """
    max_new_tokens = positive_int("max_new_tokens", max_new_tokens)
    tokens, lengths = _padded(prompts, prompt_lengths)
    live = np.arange(tokens.shape[1]) < lengths[:, None]  # [B, T]
    unknown = tokens[live & ((tokens < 0) | (tokens >= config.vocab_size))]
    if unknown.size:
        raise ValueError(f"tokens must be within 0..{config.vocab_size - 1}, got {int(unknown[0])}")
    cached = np.zeros_like(lengths)
    if cache is not None:
        _check_rows(len(lengths), cache)
        cached = np.asarray(cache.kv.lengths)
        waiting = [row[length:] for row, length in zip(cache.tokens, cached, strict=True)]
        tokens, lengths = _padded(
            [before + row[:length].tolist() for before, row, length in zip(waiting, tokens, lengths, strict=True)], None
        )
    longest, total, limit = int(lengths.max()), int((cached + lengths).max()), config.max_position_embeddings
    if total + max_new_tokens > limit:
        behind = "" if cache is None else " with the cache's"
        raise ValueError(
            f"prompt of {total} tokens{behind} and {max_new_tokens=} need {total + max_new_tokens} positions, "
            f"the model has {limit} (max_position_embeddings)"
        )
    live = np.arange(tokens.shape[1]) < lengths[:, None]
    padded = np.zeros((len(lengths), _bucket(longest, limit)), np.int32)
    padded[:, :longest] = np.where(live, tokens, 0)[:, :longest]
    return Prompts(padded, lengths.astype(np.int32), cached.astype(np.int32), _bucket(total, limit))


def _bucket(num_tokens: int, limit: int) -> int:
    """A power of two, so that few programs serve all prompts, or the limit."""
    return min(max(_MIN_BUCKET, 1 << (num_tokens - 1).bit_length()), limit)


def _padded(prompts: PromptsLike, prompt_lengths: object) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, T], anything behind each prompt, and lengths [B]."""
    rows = [_row(i, row) for i, row in enumerate(prompts)] if isinstance(prompts, list | tuple) else []
    for i, row in enumerate(rows):
        if row.ndim == 1 and not row.size:
            raise ValueError(f"expected prompts of at least one token, got none for prompt {i}")
    if len({row.shape for row in rows}) > 1:
        if prompt_lengths is not None:
            raise ValueError("prompt_lengths belong to a padded array [B, T], got lists of unequal lengths as well")
        for i, row in enumerate(rows):
            if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
                raise ValueError(f"tokens must be lists of integers, got {prompts[i]!r} for prompt {i}")
        lengths = np.array([row.size for row in rows])
        tokens = np.zeros((len(rows), lengths.max()), np.int64)
        for padded, row in zip(tokens, rows, strict=True):
            padded[: row.size] = row
        return tokens, lengths
    if isinstance(prompts, list | tuple) and not rows:
        raise ValueError("expected at least one prompt, got none")
    tokens = np.asarray(prompts)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or tokens.size == 0:
        raise ValueError(f"tokens must be integers [B, T], got {tokens.dtype} of shape {tokens.shape}")
    batch, width = tokens.shape
    lengths = np.full(batch, width) if prompt_lengths is None else np.asarray(prompt_lengths)
    if lengths.shape != (batch,) or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"prompt_lengths must be integers [{batch}], got {lengths.dtype} of shape {lengths.shape}")
    if lengths.min() < 1 or lengths.max() > width:
        raise ValueError(f"prompt_lengths must be within 1..{width} (the width of tokens), got {lengths.tolist()}")
    return tokens, lengths


def _row(index: int, prompt: object) -> np.ndarray:
    """One prompt of a list as an array."""
    try:
        return np.asarray(prompt)
    except ValueError:  # lists of unequal lengths
        raise ValueError(f"tokens must be lists of integers, got {prompt!r} for prompt {index}") from None
