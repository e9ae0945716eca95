"""How long `stream`, the loop of `generate`, takes per token: the best token, and the kinds of sampling."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fdpp_jax.generation import stream
from fdpp_jax.models import CausalLM

# Options of `stream` by the name of a line.
_KINDS: Mapping[str, dict[str, Any]] = {
    "generate, greedy": {},
    "generate, temperature": {"temperature": 1.0},
    "generate, top-k 50": {"temperature": 1.0, "top_k": 50},
    "generate, top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "generate, top-k 50, top-p 0.9": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
}


def generate_timers(model: CausalLM, batch: int, context: int, steps: int) -> dict[str, Callable[[], float]]:
    """By name: a call that decodes random prompts and returns the seconds per step, on the wall clock.

    The time is from the first token, which the prefill gives, to the last one, so that it has what the host does
    between chunks of steps.

    Args:
      model: The model.
      batch: Prompts.
      context: Tokens of a row at the end, the new ones included.
      steps: New tokens of a row, 2 at least.
    """
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, context - steps))

    def seconds_per_step(options: dict[str, Any]) -> float:
        chunks = stream(model, prompts, max_new_tokens=steps, **options)
        next(chunks)
        started = time.perf_counter()
        for _ in chunks:
            pass
        return (time.perf_counter() - started) / (steps - 1)

    return {name: functools.partial(seconds_per_step, options) for name, options in _KINDS.items()}
