"""Our LLaMA against transformers' (tests/fixtures/make_fixtures.py), in float32."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdpp_jax import UnifiedMax, models
from fdpp_jax.models import KVCache, LlamaConfig, LlamaForCausalLM, RopeScaling
from fdpp_jax.models.rotary import inverse_frequencies, rotate, rotation_at

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures"
TINY = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)


@pytest.fixture(scope="module", params=["llama2_mha", "llama3_gqa"])
def case(request: pytest.FixtureRequest) -> tuple[LlamaForCausalLM, dict[str, np.ndarray]]:
    folder = FIXTURES / request.param
    return models.load(folder, jnp.float32), dict(np.load(folder / "expected.npz"))


def tiny_model(**changes: Any) -> LlamaForCausalLM:
    return models.random_model(dataclasses.replace(TINY, **changes), jnp.float32)


def live(lengths: np.ndarray, width: int) -> np.ndarray:
    return np.arange(width) < lengths[:, None]


@nnx.jit
def prefill(
    model: LlamaForCausalLM, tokens: jax.Array, lengths: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    return model.prefill(tokens, lengths, cache)


@functools.partial(nnx.jit, static_argnames=("implementation",))
def decode(model: LlamaForCausalLM, tokens: jax.Array, cache: KVCache, softmax: Any, implementation: Any = None) -> Any:
    return model.decode(tokens, cache, softmax=softmax, implementation=implementation)


def greedy(model: LlamaForCausalLM, expected: dict[str, np.ndarray], softmax: Any, implementation: Any = None) -> Any:
    """Greedy continuations of the right-padded batch, and how many steps said overflow or redone."""
    tokens, lengths = expected["tokens"], expected["prompt_lengths"]
    steps = expected["greedy"].shape[1]
    cache = KVCache.create(model.config, len(tokens), tokens.shape[1] + steps, model.dtype)
    logits, cache = prefill(model, tokens, lengths, cache)
    out, overflows = [logits.argmax(-1)], 0
    for _ in range(steps - 1):
        logits, cache, overflow, redone = decode(model, out[-1], cache, softmax, implementation)
        overflows += int(overflow | redone)
        out.append(logits.argmax(-1))
    np.testing.assert_array_equal(cache.lengths, lengths + steps - 1)
    return np.stack(out, axis=1), overflows


def test_logits_of_every_position(case: Any) -> None:
    model, expected = case
    logits = nnx.jit(lambda model, tokens: model(tokens))(model, expected["tokens"])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)


def test_prefill_gives_the_last_live_token(case: Any) -> None:
    model, expected = case
    tokens, lengths = expected["tokens"], expected["prompt_lengths"]
    cache = KVCache.create(model.config, len(tokens), tokens.shape[1], model.dtype)
    logits, cache = prefill(model, tokens, lengths, cache)
    np.testing.assert_allclose(logits, expected["logits"][np.arange(len(tokens)), lengths - 1], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(cache.lengths, lengths)


@pytest.mark.parametrize(
    ("softmax", "implementation"), [(None, None), (UnifiedMax(), None), (UnifiedMax.bound(), None), (None, "xla")]
)
def test_greedy_tokens(case: Any, softmax: Any, implementation: Any) -> None:
    model, expected = case
    tokens, overflows = greedy(model, expected, softmax, implementation)
    np.testing.assert_array_equal(tokens, expected["greedy"])
    assert overflows == 0


def test_decode_logits_match_the_whole_sequence(case: Any) -> None:
    """A row that grows through the cache gives the logits of one pass over all of it."""
    model, expected = case
    tokens, logits = expected["tokens"], expected["logits"]
    cache = KVCache.create(model.config, len(tokens), tokens.shape[1], model.dtype)
    _, cache = prefill(model, tokens[:, :1], np.ones(len(tokens), np.int32), cache)
    for t in range(1, tokens.shape[1]):
        step, cache, *_ = decode(model, tokens[:, t], cache, UnifiedMax())
        np.testing.assert_allclose(step, logits[:, t], rtol=0, atol=1e-4)


@pytest.mark.parametrize("phi", [-300.0, 300.0])
def test_overflow_is_reported_and_redoing_is_idempotent(case: Any, phi: float) -> None:
    model, expected = case
    tokens, lengths = expected["tokens"], expected["prompt_lengths"]
    cache = KVCache.create(model.config, len(tokens), 16, model.dtype)
    _, cache = prefill(model, tokens, lengths, cache)
    exact, exact_cache, *said = decode(model, tokens[:, 0], cache, None)
    assert not any(said)
    _, dirty, overflow, redone = decode(model, tokens[:, 0], cache, UnifiedMax(phi))
    assert overflow
    assert not redone  # by a kernel, which float32 has none of
    redone, redone_cache, *_ = decode(model, tokens[:, 0], KVCache(dirty.keys, dirty.values, cache.lengths), None)
    np.testing.assert_array_equal(redone, exact)
    jax.tree.map(np.testing.assert_array_equal, redone_cache, exact_cache)


def test_padding_changes_nothing(case: Any) -> None:
    model, expected = case
    tokens, lengths = expected["tokens"], expected["prompt_lengths"]
    cache = KVCache.create(model.config, len(tokens), tokens.shape[1], model.dtype)
    logits, _ = prefill(model, tokens, lengths, cache)
    other = np.where(live(lengths, tokens.shape[1]), tokens, 7)
    other_logits, _ = prefill(model, other, lengths, cache)
    np.testing.assert_array_equal(other_logits, logits)


def test_split_and_merge_under_jit(case: Any) -> None:
    model, expected = case
    graphdef, state = nnx.split(model)
    logits = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))(state, expected["tokens"])
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)


def test_gradient_of_scoring_matches_a_finite_difference() -> None:
    model = tiny_model(qkv_bias=True, o_bias=True, mlp_bias=True)
    graphdef, state = nnx.split(model, nnx.Param)
    tokens = jnp.arange(10).reshape(2, 5)

    def loss(state: nnx.State) -> jax.Array:
        logits = nnx.merge(graphdef, state)(tokens)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1).mean()

    @jax.jit
    def slopes(state: nnx.State) -> tuple[nnx.State, jax.Array, jax.Array]:
        """The gradient, its squared length, and the loss's slope along it by central difference."""
        grads = jax.grad(loss)(state)
        squared = sum((g * g).sum() for g in jax.tree.leaves(grads))
        step = 1e-2 / jnp.sqrt(squared)
        ahead, behind = (loss(jax.tree.map(lambda p, g, s=s: p + s * g, state, grads)) for s in (step, -step))
        return grads, squared, (ahead - behind) / (2 * step)

    grads, squared, slope = slopes(state)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads) if g.ndim == 2)
    np.testing.assert_allclose(slope, squared, rtol=2e-2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_follows_float32(dtype: Any) -> None:
    folder = FIXTURES / "llama3_gqa"
    expected = np.load(folder / "expected.npz")
    model = models.load(folder, dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(dtype)}
    logits = np.asarray(nnx.jit(lambda model, tokens: model(tokens))(model, expected["tokens"]))
    assert np.corrcoef(logits.ravel(), expected["logits"].ravel())[0, 1] > 0.999


def test_rotation_turns_the_halves() -> None:
    x = np.random.default_rng(0).standard_normal((1, 3, 2, TINY.head_dim)).astype(np.float32)
    turned = np.asarray(rotate(jnp.asarray(x), *rotation_at(TINY, jnp.array([[0, 5, 70]]))))
    half = TINY.head_dim // 2
    angles = np.array([0, 5, 70])[:, None] * 10000.0 ** (-np.arange(half) / half)
    expected = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[None, :, None]
    np.testing.assert_allclose(turned, np.concatenate([expected.real, expected.imag], -1), atol=1e-5)


def test_linear_scaling_divides_every_frequency() -> None:
    scaled = dataclasses.replace(TINY, rope_scaling=RopeScaling("linear", factor=4.0))
    np.testing.assert_allclose(inverse_frequencies(scaled), inverse_frequencies(TINY) / 4)


def test_llama3_scaling_keeps_short_wavelengths_and_divides_long_ones() -> None:
    config = models.PRESETS["llama-3.1-8b"]
    plain = inverse_frequencies(dataclasses.replace(config, rope_scaling=None))
    ratio = inverse_frequencies(config) / plain
    wavelengths = 2 * np.pi / plain
    np.testing.assert_allclose(ratio[wavelengths < 8192 / 4], 1)
    np.testing.assert_allclose(ratio[wavelengths > 8192 / 1], 1 / 8, rtol=1e-6)
    assert np.all(np.diff(ratio) <= 1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, c: m(jnp.zeros(3, jnp.int32)), r"expected integer tokens \[B, T\]"),
        (lambda m, c: m(jnp.zeros((1, 3))), "got float32"),
        (lambda m, c: m.prefill(jnp.zeros((2, 9), jnp.int32), jnp.ones(2, jnp.int32), c), "9 tokens .* capacity 8"),
        (lambda m, c: m.prefill(jnp.zeros((3, 4), jnp.int32), jnp.ones(3, jnp.int32), c), "cache of 2 rows"),
        (lambda m, c: m.prefill(jnp.zeros((2, 4), jnp.int32), jnp.ones((2, 1), jnp.int32), c), r"lengths \[B\]"),
        (lambda m, c: m.decode(jnp.zeros((2, 1), jnp.int32), c), r"expected integer tokens \[B\]"),
        (lambda m, c: m.decode(jnp.zeros(3, jnp.int32), c), "cache of 2 rows"),
        (lambda m, c: m.decode(jnp.zeros(2, jnp.int32), c, implementation="flat"), "None or 'xla', got 'flat'"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        call(model, KVCache.create(model.config, 2, 8, model.dtype))


def test_bad_cache_size() -> None:
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        KVCache.create(TINY, 0, 4, jnp.float32)
