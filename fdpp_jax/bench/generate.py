"""How long `generate` takes per token behind the first one: greedy, and with kinds of sampling."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fdpp_jax.generation import generate
from fdpp_jax.models import CausalLM

# What a kind of sampling takes of `generate`.
KINDS: Mapping[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "top-k": {"temperature": 1.0, "top_k": 50},
    "top-p": {"temperature": 1.0, "top_p": 0.9},
    "top-k-top-p": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
}


def generate_timers(
    model: CausalLM, batch: int, context: int, steps: int, kinds: Sequence[str]
) -> dict[str, Callable[[], float]]:
    """By name: a call that decodes random prompts and returns the seconds per step, on the wall clock.

    The time is from the first token, which the prefill gives, to the return of `generate`, so that it has what the host
    does between chunks of steps.

    Args:
      model: The model.
      batch: Prompts.
      context: Tokens of a row at the end, the new ones included.
      steps: New tokens of a row, 2 at least.
      kinds: Which of KINDS.
    """
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, context - steps))

    def seconds_per_step(options: dict[str, Any]) -> float:
        started = time.perf_counter()
        result = generate(model, prompts, max_new_tokens=steps, **options)
        behind_first = time.perf_counter() - started - result.compile_seconds - result.prefill_seconds
        return behind_first / (steps - 1)

    return {f"generate, {kind}": functools.partial(seconds_per_step, KINDS[kind]) for kind in kinds}
