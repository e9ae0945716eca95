"""Every family against an independent implementation (tests/fixtures/make_fixtures.py), in float32.

test_llama_parity.py looks closer at what all families share.
"""

import functools
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdpp_jax
from fdpp_jax import UnifiedMax, models

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures"
NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/expected.npz"))


@functools.cache
def load(name: str) -> tuple[models.CausalLM, dict[str, np.ndarray]]:
    return models.load(FIXTURES / name, jnp.float32), dict(np.load(FIXTURES / name / "expected.npz"))


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_every_position(name: str) -> None:
    model, expected = load(name)
    logits = nnx.jit(lambda model, tokens: model(tokens))(model, expected["tokens"])
    live = np.arange(logits.shape[1]) < expected["prompt_lengths"][:, None]
    np.testing.assert_allclose(logits[live], expected["logits"][live], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_of_a_batch_of_unequal_lengths(name: str) -> None:
    model, expected = load(name)
    steps = expected["greedy"].shape[1]
    assert steps == 64
    softmax = UnifiedMax.bound()  # which has norms in the cache besides
    arguments = dict(max_new_tokens=steps, softmax=softmax)
    for prefill_chunk_size in (None, 5):
        result = fdpp_jax.generate(
            model,
            expected["tokens"],
            expected["prompt_lengths"],
            prefill_chunk_size=prefill_chunk_size,
            **arguments,
        )
        np.testing.assert_array_equal(result.tokens, expected["greedy"])
