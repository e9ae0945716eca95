"""What `generate` and `stream` give."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from fdpp_jax.models import Tokenizer
from fdpp_jax.prompts import PromptCache


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """What `generate` returns.

    Attributes:
      tokens: [B, max_new_tokens] int32 new tokens. After a row's end: the first of eos_ids, or 0.
      lengths: [B] int32 new tokens that count, the end-of-sequence token included.
      recomputed_steps: Decode steps of which a row, or all, was redone, having left the safe window.
      softmax_reason: Which softmax it began with, and why, in one line.
      is_online: Whether the decode steps began with online softmax.
      online_from: The decode step from which on all ran with online softmax, since too many were redone; None: none,
        or all did from the start. Steps that ran while this was found out are before it.
      decode_steps: Decode steps that ran; the first token comes from the prefill.
      prefill_seconds: From the start to the first token on the host, without compilation.
      decode_seconds: The time of all decode steps, until their tokens are on the host, without compilation. Of the time
        that a stream's consumer takes, only that in which steps run counts.
      compile_seconds: Spent tracing and compiling; 0 when the shapes were seen before.
      cache_capacity: Slots a row of the KV cache had, S: what the attention kernel was planned for.
      prompts: The tokens of each prompt; behind a cache, with those in front that the cache had no keys of.
      cached_tokens: [B] int32 tokens before them whose keys and values a cache held.
      tokenizer: What makes texts of tokens: the one that was given, or finds the model's; None: there is none.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    recomputed_steps: int
    softmax_reason: str
    is_online: bool
    online_from: int | None
    decode_steps: int
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    cache_capacity: int
    prompts: list[list[int]]
    cached_tokens: np.ndarray
    tokenizer: Callable[[], Tokenizer | None] = dataclasses.field(repr=False, compare=False)
    kept_cache: PromptCache | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def cache(self) -> PromptCache:
        """What a next call goes on from, where this one kept it.

        Raises:
          ValueError: It did not.
        """
        if self.kept_cache is None:
            raise ValueError("this result has no cache: generate with return_cache=True, or behind a cache")
        return self.kept_cache

    @property
    def token_lists(self) -> list[list[int]]:
        """The new tokens of each row that count, as lists."""
        return [row[:length].tolist() for row, length in zip(self.tokens, self.lengths, strict=True)]

    @functools.cached_property
    def texts(self) -> list[str] | None:
        """The text that each row adds to its prompt's, without special tokens; None where there is no tokenizer.

        Raises:
          ValueError: The tokenizer beside the model's checkpoint is malformed.
        """
        tokenizer = self.tokenizer()
        if tokenizer is None:
            return None
        texts = []
        for prompt, tokens in zip(self.prompts, self.token_lists, strict=True):
            stream = tokenizer.stream(prompt)
            texts.append(stream.push(tokens) + stream.finish())
        return texts


@dataclasses.dataclass(frozen=True)
class StreamChunk:
    """What is new in a stream.

    Attributes:
      tokens: [B, n] int32 new tokens.
      lengths: [B] int32 new tokens that count, from the start of the stream on.
      texts: The text that each row has got; a character comes once it is complete. None where the prompts were tokens
        and no tokenizer was given.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    texts: list[str] | None = None
