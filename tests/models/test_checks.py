"""What prefill, extend and decode refuse before any work starts, and what they take besides arrays."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdpp_jax import UnifiedMax, models
from fdpp_jax.models import KVCache, LlamaConfig
from fdpp_jax.models.checks import positive_int
from fdpp_jax.models.opt import OPTConfig
from fdpp_jax.models.plans import plan_prefill, prefill_plans

SIZES = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
)
CONFIG = LlamaConfig(**SIZES)
TOKENS = np.arange(10).reshape(2, 5)
METHODS = ("prefill", "extend")


@pytest.fixture(scope="module")
def model() -> models.CausalLM:
    return models.random_model(CONFIG, jnp.float32)


def cache_of(model: models.CausalLM, lengths: Any = (0, 0), capacity: int = 8) -> KVCache:
    cache = KVCache.create(model.config, 2, capacity, model.dtype)
    return dataclasses.replace(cache, lengths=jnp.asarray(lengths, jnp.int32))


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("as_array", [jnp.asarray, np.asarray, list])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([5, 6], r"lengths must be within \d\.\.5 \(the width of tokens\), got \[5, 6\]"),
        ([-1, 5], r"lengths must be within \d\.\.5 \(the width of tokens\), got \[-1, 5\]"),
        ([1.0, 5.0], r"expected integer lengths \[B\], got float(32|64) of shape \(2,\)"),
        ([True, True], r"expected integer lengths \[B\], got bool of shape \(2,\)"),
        ([[1], [5]], r"expected integer lengths \[B\], got int(32|64) of shape \(2, 1\)"),
        ([1, 2, 3], r"lengths of shape \(3,\) do not match a cache of 2 rows"),
    ],
)
def test_lengths(model: models.CausalLM, method: str, lengths: Any, message: str, as_array: Any, chunk_size: Any):
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(TOKENS, as_array(lengths), cache_of(model), prefill_chunk_size=chunk_size)


def test_only_what_goes_behind_a_cache_may_be_empty(model: models.CausalLM) -> None:
    with pytest.raises(ValueError, match=r"lengths must be within 1\.\.5 \(the width of tokens\), got \[0, 5\]"):
        model.prefill(TOKENS, jnp.array([0, 5]), cache_of(model))
    logits, cache = model.extend(TOKENS, jnp.array([0, 5]), cache_of(model, (8, 3)))
    assert cache.lengths.tolist() == [8, 8]
    assert np.isfinite(logits[1]).all()


def test_what_the_cache_has_no_room_for(model: models.CausalLM) -> None:
    message = r"a cache of capacity 8 has no room for 6 cached and 3 new tokens in row 1"
    with pytest.raises(ValueError, match=message):
        model.extend(TOKENS, [5, 3], cache_of(model, (3, 6)))
    for size in (1, 2):
        with pytest.raises(ValueError, match=message):
            model.extend(TOKENS, [5, 3], cache_of(model, (3, 6)), prefill_chunk_size=size)
    with pytest.raises(ValueError, match=r"no room for 8 cached and 1 new tokens in row 0"):
        model.decode([1, 2], cache_of(model, (8, 7)))
    with pytest.raises(ValueError, match=r"lengths of a cache must be within 0\.\.8 \(its capacity\), got \[-1, 9\]"):
        model.extend(TOKENS, [0, 0], cache_of(model, (-1, 9)))


def test_positions_that_the_table_does_not_have() -> None:
    config = OPTConfig(**SIZES, max_position_embeddings=6)
    model = models.random_model(config, jnp.float32)
    message = r"max_position_embeddings=6 leaves no position for 4 cached and 3 new tokens in row 1"
    with pytest.raises(ValueError, match=message):
        model.extend(TOKENS, [5, 3], cache_of(model, (1, 4)))
    with pytest.raises(ValueError, match="leaves no position for 6 cached and 1 new tokens in row 0"):
        model.decode([1, 2], cache_of(model, (6, 4)))
    with pytest.raises(ValueError, match="leaves no position for 0 cached and 7 new tokens in row 0"):
        model.prefill(np.zeros((2, 8), int), [7, 1], cache_of(model), prefill_chunk_size=2)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((2, 0), int), r"expected at least one token, got tokens of shape \(2, 0\)"),
        (np.zeros((0, 3), int), r"expected at least one token, got tokens of shape \(0, 3\)"),
        ([[], []], r"expected integer tokens \[B, T\], got float64 of shape \(2, 0\)"),
        ([[1, 2], [3]], r"expected integer tokens \[B, T\], got \[\[1, 2\], \[3\]\]"),
        (["ab", "cd"], r"expected integer tokens \[B, T\], got <U2 of shape \(2,\)"),
        (None, r"expected integer tokens \[B, T\], got object of shape \(\)"),
        ([[1.0], [2.0]], r"expected integer tokens \[B, T\], got float64 of shape \(2, 1\)"),
    ],
)
def test_tokens(model: models.CausalLM, tokens: Any, message: str) -> None:
    for method in METHODS:
        with pytest.raises(ValueError, match=message):
            getattr(model, method)(tokens, [1, 1], cache_of(model))
    with pytest.raises(ValueError, match=message):
        model(tokens)
    with pytest.raises(ValueError, match=r"expected (integer tokens \[B\]|at least one token), got "):
        model.decode(tokens, cache_of(model))
    with pytest.raises(ValueError, match=r"expected at least one token, got tokens of shape \(0,\)"):
        model.decode(np.zeros(0, int), cache_of(model))


def test_tokens_beyond_the_vocabulary(model: models.CausalLM) -> None:
    for token in (-1, 40):
        message = rf"tokens must be within 0\.\.39, got {token}"
        tokens = np.where(TOKENS == 3, token, TOKENS)
        for method in METHODS:
            with pytest.raises(ValueError, match=message):
                getattr(model, method)(tokens, [4, 5], cache_of(model))
            getattr(model, method)(tokens, [3, 5], cache_of(model))  # where it is padding
        with pytest.raises(ValueError, match=message):
            model.decode([1, token], cache_of(model))


@pytest.mark.parametrize("softmax", ["auto", 6.0, UnifiedMax])
def test_softmax_is_a_policy(model: models.CausalLM, softmax: Any) -> None:
    message = (
        rf"^softmax must be None or a UnifiedMax \(\"auto\" is generate's alone\), got {re.escape(repr(softmax))}$"
    )
    for method in METHODS:
        for size in (None, 2):
            with pytest.raises(ValueError, match=message):
                getattr(model, method)(TOKENS, [5, 5], cache_of(model), softmax=softmax, prefill_chunk_size=size)
    with pytest.raises(ValueError, match=message):
        model.decode([1, 2], cache_of(model), softmax=softmax)
    with pytest.raises(ValueError, match=message):
        model.prefill_plan(2, 5, 8, softmax)


def test_a_cache_is_one_of_this_model(model: models.CausalLM) -> None:
    deeper, wider = (dataclasses.replace(CONFIG, **{name: 4}) for name in ("num_hidden_layers", "head_dim"))
    for cache, got in (
        (None, "NoneType"),
        (cache_of(model).keys, "tuple"),
        (KVCache, "type"),
        (KVCache.create(deeper, 2, 8, jnp.float32), r"4 layers of \[2, 8, 2, 8\]"),
        (KVCache.create(wider, 2, 8, jnp.float32), r"2 layers of \[2, 8, 2, 4\]"),
        (KVCache((), (), jnp.zeros(2, jnp.int32)), "0 layers"),
    ):
        message = rf"^cache must be a KVCache of this model, 2 layers of \[B, S, K=2, H=8\]; got {got}$"
        for method in METHODS:
            with pytest.raises(ValueError, match=message):
                getattr(model, method)(TOKENS, [5, 5], cache)
        with pytest.raises(ValueError, match=message):
            model.decode([1, 2], cache)


def test_lists_are_arrays(model: models.CausalLM) -> None:
    for method in METHODS:
        call = getattr(model, method)
        for size in (None, 2):
            logits, cache = call(TOKENS.tolist(), [5, 3], cache_of(model), prefill_chunk_size=size)
            arrays = jnp.asarray(TOKENS), jnp.array([5, 3])
            expected, expected_cache = call(*arrays, cache_of(model), prefill_chunk_size=size)
            np.testing.assert_array_equal(logits, expected)
            np.testing.assert_array_equal(cache.lengths, expected_cache.lengths)
    np.testing.assert_array_equal(model(TOKENS.tolist()), model(jnp.asarray(TOKENS)))
    for x, y in zip(model.decode([1, 2], cache)[:1], model.decode(jnp.array([1, 2]), cache)[:1], strict=True):
        np.testing.assert_array_equal(x, y)


def test_numbers_that_are_traced_are_not_checked(model: models.CausalLM) -> None:
    """And those that are known are, inside a jitted function as well."""
    wrong = jnp.array([9, 9])
    for method in METHODS:
        call = getattr(model, method)
        jax.eval_shape(lambda lengths, call=call: call(TOKENS, lengths, cache_of(model)), wrong)
        with pytest.raises(ValueError, match="lengths must be within"):
            jax.eval_shape(lambda tokens, call=call: call(tokens, np.array([9, 9]), cache_of(model)), TOKENS)
    full = cache_of(model, (8, 8))
    jax.eval_shape(lambda cache: model.extend(TOKENS, [5, 5], cache), full)
    jax.eval_shape(lambda cache: model.decode([1, 2], cache), full)
    jax.eval_shape(lambda tokens: model(tokens), jnp.array([[99]]))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2.5, "must be an integer of at least 1, got 2.5"),
        ("3", "must be an integer of at least 1, got '3'"),
        (True, "must be an integer of at least 1, got True"),
        (0, "must be at least 1, got 0"),
        (-1, "must be at least 1, got -1"),
    ],
)
def test_sizes_that_are_no_positive_integers(model: models.CausalLM, value: Any, message: str) -> None:
    for method in METHODS:
        with pytest.raises(ValueError, match=f"^prefill_chunk_size {message}$"):
            getattr(model, method)(TOKENS, [5, 5], cache_of(model), prefill_chunk_size=value)
    sizes: dict[str, Any] = dict(batch=1, length=8, capacity=8, device="H200")
    for name in ("batch", "length", "capacity"):
        with pytest.raises(ValueError, match=f"^{name} {message}$"):
            plan_prefill(CONFIG, **sizes | {name: value}, has_unified_max=True, is_behind_cache=False, chunk_size=None)
        with pytest.raises(ValueError, match=f"^{name} {message}$"):
            prefill_plans(CONFIG, **sizes | {name: value})
    with pytest.raises(ValueError, match=f"^prefill_chunk_size {message}$"):
        prefill_plans(CONFIG, **sizes, chunk_size=value)
    for name in ("batch", "capacity"):
        with pytest.raises(ValueError, match=f"^{name} {message}$"):
            models.model_plans(CONFIG, **dict(batch=1, capacity=8, device="H200") | {name: value})
        with pytest.raises(ValueError, match=f"^{name} {message}$"):
            KVCache.create(CONFIG, **dict(batch=1, capacity=8, dtype=jnp.float32) | {name: value})
    with pytest.raises(ValueError, match=f"^capacity {message}$"):
        cache_of(model).resized(value)


def test_integers_of_other_libraries() -> None:
    assert [positive_int("n", value) for value in (3, np.int64(3), jnp.int32(3))] == [3, 3, 3]  # type: ignore[arg-type]


def test_a_symbolic_batch_is_exported(model: models.CausalLM) -> None:
    def prefilled(tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        cache = KVCache.create(CONFIG, tokens.shape[0], 8, model.dtype)
        return model.prefill(tokens, lengths, cache)[0]

    (batch,) = jax.export.symbolic_shape("batch")
    shapes = jax.ShapeDtypeStruct((batch, 5), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)
    exported = jax.export.export(jax.jit(prefilled))(*shapes)
    tokens, lengths = jnp.asarray(TOKENS, jnp.int32), jnp.array([5, 3], jnp.int32)
    np.testing.assert_allclose(exported.call(tokens, lengths), prefilled(tokens, lengths), rtol=0, atol=1e-5)
