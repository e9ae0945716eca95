"""The KV cache is written in place: the compiled program holds no copy of it. The norms of its keys are kept."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdpp_jax import UnifiedMax, models
from fdpp_jax.decode_loop import decode_step
from fdpp_jax.models import KVCache, LlamaConfig
from fdpp_jax.models.cache import write_piece, write_prompt, write_token

CONFIG = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
CAPACITY = 37  # no other array has an axis of this size


@pytest.fixture(scope="module")
def split() -> tuple[Any, Any]:
    return nnx.split(models.random_model(CONFIG, jnp.float32))


def step(
    graphdef: Any, state: Any, tokens: jax.Array, cache: KVCache, phi: jax.Array, *, redo_old: bool = False
) -> tuple[jax.Array, KVCache]:
    """One decode step with its recompute, which writes the same slots again (redo_old: into the cache from before)."""
    model = nnx.merge(graphdef, state)
    logits, new, overflow, _ = model.decode(tokens, cache, softmax=UnifiedMax(phi))

    def redo(logits: jax.Array, new: KVCache) -> tuple[jax.Array, KVCache]:
        del logits
        before = cache if redo_old else KVCache(new.keys, new.values, cache.lengths)
        return model.decode(tokens, before)[:2]

    logits, cache = jax.lax.cond(overflow, redo, lambda logits, new: (logits, new), logits, new)
    return logits.argmax(-1).astype(jnp.int32), cache


def compile_steps(split: Any, batch: int, *, loop: bool, donate: bool = True, redo_old: bool = False) -> Any:
    graphdef, state = split

    def run(state: Any, tokens: jax.Array, cache: KVCache, phi: jax.Array) -> Any:
        def body(_: Any, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
            return step(graphdef, state, *carry, phi, redo_old=redo_old)

        return jax.lax.fori_loop(0, 5, body, (tokens, cache)) if loop else body(0, (tokens, cache))

    cache = KVCache.create(CONFIG, batch, CAPACITY, jnp.float32)
    args = (state, jnp.zeros(batch, jnp.int32), cache, jnp.float32(6.0))
    return jax.jit(run, donate_argnums=(2,) if donate else ()).lower(*args).compile()


def cache_copies(compiled: Any, batch: int) -> list[str]:
    """Instructions of the compiled program that copy an array of the cache's shape, in any layout.

    Attention's own transposed operands, which XLA's batched matmul on the CPU wants, have another shape.
    """
    shape = f"{batch},{CAPACITY},{CONFIG.num_key_value_heads},{CONFIG.head_dim}"
    return re.findall(rf"^.*\[{shape}\][^=]* copy(?:-start)?\(.*$", compiled.as_text(), re.MULTILINE)


def is_in_place(compiled: Any, batch: int) -> bool:
    """The program returns the cache in the buffers that it came in, and copies none of it on the way."""
    array_bytes = batch * CAPACITY * CONFIG.num_key_value_heads * CONFIG.head_dim * 4
    aliased = compiled.memory_analysis().alias_size_in_bytes >= 2 * CONFIG.num_hidden_layers * array_bytes
    return aliased and not cache_copies(compiled, batch)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_donated_step_copies_no_cache(split: Any, batch: int, loop: bool) -> None:
    compiled = compile_steps(split, batch, loop=loop)
    assert is_in_place(compiled, batch)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("wrong", [{"donate": False}, {"redo_old": True}])
def test_copies_are_seen_where_there_are_some(split: Any, batch: int, wrong: dict[str, bool]) -> None:
    """The test above can fail."""
    compiled = compile_steps(split, batch, loop=True, **wrong)
    assert not is_in_place(compiled, batch)
    if jax.default_backend() == "cpu":  # a GPU fuses some of them
        assert len(cache_copies(compiled, batch)) >= 2 * CONFIG.num_hidden_layers


@pytest.mark.parametrize("phi", [6.0, 300.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_recomputed_steps_give_the_same_tokens(split: Any, batch: int, phi: float) -> None:
    graphdef, state = split
    model = nnx.merge(graphdef, state)
    cache = KVCache.create(CONFIG, batch, CAPACITY, jnp.float32)
    tokens, exact_tokens = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32)
    exact_cache = cache
    run = jax.jit(lambda state, *args: step(graphdef, state, *args))
    exact = nnx.jit(lambda model, *args: model.decode(*args))
    for _ in range(4):
        tokens, cache = run(state, tokens, cache, jnp.float32(phi))
        logits, exact_cache, *_ = exact(model, exact_tokens, exact_cache)
        exact_tokens = logits.argmax(-1).astype(jnp.int32)
        np.testing.assert_array_equal(tokens, exact_tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), cache, exact_cache)


def true_norms(cache: KVCache, lengths: Any) -> list[np.ndarray]:
    """max |k| [B, K] of each layer's stored keys below the lengths."""
    live = np.arange(cache.capacity) < np.asarray(lengths)[:, None]
    stored = [np.where(live[:, :, None, None], np.asarray(keys, np.float64), 0.0) for keys in cache.keys]
    return [np.linalg.norm(keys, axis=-1).max(axis=1) for keys in stored]


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_norms_are_those_of_the_live_keys_as_stored(dtype: Any) -> None:
    graphdef, state = nnx.split(models.random_model(CONFIG, dtype))
    lengths = jnp.array([6, 1, 3])
    tokens = jnp.arange(18).reshape(3, 6) % CONFIG.vocab_size  # also where they are padding

    @jax.jit
    def run(state: Any, softmaxes: list[UnifiedMax]) -> tuple[KVCache, list[KVCache], list[jax.Array]]:
        model = nnx.merge(graphdef, state)
        cache = KVCache.create(CONFIG, 3, CAPACITY, dtype, with_key_norms=True)
        prefilled, caches, redone = model.prefill(tokens, lengths, cache)[1], [], []
        cache = prefilled
        for i, softmax in enumerate(softmaxes):
            _, cache, is_redone = decode_step(model, tokens[:, i], cache, softmax)
            caches, redone = [*caches, cache], [*redone, is_redone]
        return prefilled, caches, redone

    softmaxes = [UnifiedMax.bound(), UnifiedMax(6.0), UnifiedMax(300.0), UnifiedMax.bound(), None, UnifiedMax.bound()]
    prefilled, caches, redone = run(state, softmaxes)
    assert [bool(is_redone) for is_redone in redone] == [False, False, True, False, False, False]
    for num_steps, cache in enumerate([prefilled, *caches]):
        np.testing.assert_array_equal(cache.lengths, lengths + num_steps)
        for norms, expected in zip(cache.key_max_norms, true_norms(cache, cache.lengths), strict=True):
            np.testing.assert_allclose(norms, expected, rtol=1e-6)
    padded = true_norms(prefilled, [6, 6, 6])
    assert any((norms > kept * 1.001).any() for norms, kept in zip(padded, prefilled.key_max_norms, strict=True))


@pytest.mark.parametrize("lengths", [[0], [4], [0, 4, 2], [3, 3, 3]])
def test_write_token_touches_one_slot_a_row(lengths: list[int]) -> None:
    rng = np.random.default_rng(0)
    cache = rng.standard_normal((len(lengths), 5, 2, 8)).astype(np.float32)
    fresh = rng.standard_normal((len(lengths), 1, 2, 8)).astype(np.float32)
    expected = cache.copy()
    for row, length in enumerate(lengths):
        expected[row, length] = fresh[row, 0]
    np.testing.assert_array_equal(write_token(jnp.asarray(cache), fresh, jnp.array(lengths)), expected)


@pytest.mark.parametrize(
    ("starts", "lengths"), [([0], [3]), ([2, 0, 4], [2, 3, 0]), ([5, 4, 2], [0, 1, 3]), ([0, 0, 0], [0, 0, 0])]
)
def test_write_piece_touches_the_live_tokens_slots(starts: list[int], lengths: list[int]) -> None:
    """Also where the padding would reach beyond the last slot."""
    rng = np.random.default_rng(0)
    cache = rng.standard_normal((len(lengths), 5, 2, 8)).astype(np.float32)
    fresh = rng.standard_normal((len(lengths), 3, 2, 8)).astype(np.float32)
    expected = cache.copy()
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        expected[row, start : start + length] = fresh[row, :length]
    written = jax.jit(write_piece)(cache, fresh, jnp.array(starts), jnp.array(lengths))
    np.testing.assert_array_equal(written, expected)


def test_a_resized_cache_is_a_copy() -> None:
    cache = KVCache.create(CONFIG, 2, 5, jnp.float32)
    keys = tuple(jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(cache.keys))
    cache = KVCache(keys, keys, jnp.array([4, 1]))
    for capacity in (5, 8):
        copy = jax.jit(KVCache.resized, static_argnums=1, static_argnames="with_key_norms")(
            cache, capacity, with_key_norms=True
        )
        assert copy.capacity == capacity
        for x, y in zip(copy.keys + copy.values, cache.keys + cache.values, strict=True):
            np.testing.assert_array_equal(x[:, :5], y)
            assert not x[:, 5:].any()
            assert x.unsafe_buffer_pointer() != y.unsafe_buffer_pointer()
        for norms, expected in zip(copy.key_max_norms, true_norms(cache, cache.lengths), strict=True):
            np.testing.assert_allclose(norms, expected, rtol=1e-6)
    assert cache.resized(6).key_max_norms == ()
    with pytest.raises(ValueError, match="expected a capacity of at least the cache's 5, got 4"):
        cache.resized(4)


def test_write_prompt_fills_the_first_slots() -> None:
    cache = write_prompt(jnp.zeros((2, 5, 1, 4)), jnp.ones((2, 3, 1, 4)))
    np.testing.assert_array_equal(cache[:, :, 0, 0], [[1, 1, 1, 0, 0]] * 2)


def test_cache_is_a_pytree_of_its_arrays() -> None:
    cache = KVCache.create(CONFIG, 2, 5, jnp.bfloat16)
    with_norms = KVCache.create(CONFIG, 2, 5, jnp.bfloat16, with_key_norms=True)
    assert [(norms.shape, norms.dtype) for norms in with_norms.key_max_norms] == 2 * [((2, 2), jnp.float32)]
    assert (cache.batch, cache.capacity) == (2, 5)
    assert len(jax.tree.leaves(cache)) == 2 * CONFIG.num_hidden_layers + 1
    assert {leaf.dtype for leaf in cache.keys + cache.values} == {jnp.dtype(jnp.bfloat16)}
    assert len({leaf.unsafe_buffer_pointer() for leaf in cache.keys + cache.values}) == 2 * CONFIG.num_hidden_layers
