"""dot_product_attention: answers, recompute and transformations, on whatever device there is."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import fdpp_jax
from fdpp_jax import UnifiedMax

DTYPES = ["float32", "bfloat16", "float16"]


SOFTMAX = {
    "online": None,
    "unified": UnifiedMax(1.0),
    "overflowing": UnifiedMax(-150.0),
    "underflowing": UnifiedMax(150.0),
    "bound": UnifiedMax.bound(),
    "by head": UnifiedMax(jnp.linspace(-120.0, 120.0, 8)),
}


def decode_inputs(dtype, lengths=(100, 1, 0, 104), seed=0, **changes):
    sizes = dict(batch=len(lengths), capacity=104, num_heads=8, num_kv_heads=2, head_dim=64) | changes
    query, key, value = oracle.attention_inputs(seed, dtype=dtype, lengths=lengths, **sizes)
    return query[:, None], key, value, jnp.asarray(lengths)


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_agrees_with_float64_whatever_the_policy(dtype, softmax):
    query, key, value, lengths = decode_inputs(dtype)
    out = jax.jit(fdpp_jax.dot_product_attention)(
        query, key, value, key_value_seq_lengths=lengths, softmax=SOFTMAX[softmax]
    )
    assert out.shape == query.shape
    assert out.dtype == dtype
    expected = oracle.attention(query[:, 0], key, value, lengths)
    assert oracle.relative_error(out[:, 0], expected) < oracle.TOLERANCE[dtype]


@pytest.mark.parametrize("query_scale", [1e-4, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_that_of_online_softmax_at_any_score(dtype, query_scale):
    query, key, value, lengths = decode_inputs(dtype, query_scale=query_scale)
    expected = oracle.attention(query[:, 0], key, value, lengths)

    def error(softmax):
        out = fdpp_jax.dot_product_attention(query, key, value, key_value_seq_lengths=lengths, softmax=softmax)
        return oracle.relative_error(out[:, 0], expected)

    assert error(UnifiedMax(0.0)) <= 1.5 * error(None) + 1e-6


def test_without_lengths_all_keys_are_live():
    query, key, value, _ = decode_inputs("float32", lengths=(104,))
    out = fdpp_jax.dot_product_attention(query, key, value, softmax=UnifiedMax())
    assert oracle.relative_error(out[:, 0], oracle.attention(query[:, 0], key, value)) < oracle.TOLERANCE["float32"]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"is_causal": True},
        {"local_window_size": 3},
        {"local_window_size": (5, 0), "is_causal": True},
        {"scale": 0.3},
    ],
)
@pytest.mark.parametrize("query_length", [7, 24])
def test_longer_queries_agree_with_jax_nn(query_length, arguments):
    keys = jax.random.split(jax.random.key(1), 3)
    query = jax.random.normal(keys[0], (2, query_length, 4, 64))
    key, value = (jax.random.normal(k, (2, 24, 2, 64)) for k in keys[1:])
    with jax.default_matmul_precision("highest"):  # a GPU would multiply jax.nn's float32 as TF32
        expected = jax.nn.dot_product_attention(query, key, value, **arguments)
    for softmax in (None, UnifiedMax()):
        out = fdpp_jax.dot_product_attention(query, key, value, softmax=softmax, **arguments)
        np.testing.assert_allclose(out, expected, atol=5e-6 if jax.default_backend() == "gpu" else 2e-6)


def test_lengths_of_queries_and_keys():
    keys = jax.random.split(jax.random.key(1), 3)
    query = jax.random.normal(keys[0], (2, 6, 4, 64))
    key, value = (jax.random.normal(k, (2, 24, 2, 64)).at[0, 9:].set(jnp.nan) for k in keys[1:])
    out = fdpp_jax.dot_product_attention(
        query, key, value, query_seq_lengths=jnp.array([6, 4]), key_value_seq_lengths=jnp.array([9, 24])
    )
    alone = fdpp_jax.dot_product_attention(query[:1], key[:1, :9], value[:1, :9])
    np.testing.assert_allclose(out[:1], alone, atol=1e-6)
    assert not out[1, 4:].any()
    assert out[1, :4].any(axis=(1, 2)).all()


def test_soft_cap():
    query, key, value, _ = decode_inputs("float32", lengths=(104,))
    capped = fdpp_jax.dot_product_attention(query, key, value, logits_soft_cap=2.0)[0, 0, 0]
    scores = np.asarray(key[0, :, 0] @ query[0, 0, 0], np.float64) / 8
    weights = np.exp(2 * np.tanh(scores / 2))
    np.testing.assert_allclose(capped, weights @ value[0, :, 0] / weights.sum(), atol=1e-5)


def test_vmap_folds_into_the_batch():
    query, key, value, lengths = decode_inputs("bfloat16")
    stack = lambda x: jnp.stack([x, x[::-1]])  # noqa: E731

    def attend(query, key, value, lengths):
        return fdpp_jax.dot_product_attention(
            query, key, value, key_value_seq_lengths=lengths, softmax=UnifiedMax(150.0)
        )

    out = jax.jit(jax.vmap(attend))(*(stack(x) for x in (query, key, value, lengths)))
    for i, flip in enumerate((slice(None), slice(None, None, -1))):
        expected = oracle.attention(query[flip, 0], key[flip], value[flip], lengths[flip])
        assert oracle.relative_error(out[i, :, 0], expected) < oracle.TOLERANCE["bfloat16"]


@pytest.mark.slow
@pytest.mark.parametrize("phi", [6.0, 300.0, -300.0])
def test_scan_and_gradient(phi):
    """NaN beyond the lengths, and of rows that left the window, is in no gradient."""
    query, key, value, lengths = decode_inputs("float32", lengths=(100, 7))
    dirty = key, value
    key, value = jnp.nan_to_num(key), jnp.nan_to_num(value)

    def loss(query, key, value, attention, **arguments):
        return (attention(query, key, value, key_value_seq_lengths=lengths, **arguments) ** 2).sum()

    grad = jax.grad(loss, argnums=(0, 1, 2))
    with jax.default_matmul_precision("highest"):  # a GPU would multiply jax.nn's float32 as TF32
        theirs = grad(query, key, value, jax.nn.dot_product_attention)
    ours = grad(query, *dirty, fdpp_jax.dot_product_attention, softmax=UnifiedMax(phi))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 if jax.default_backend() == "gpu" else 1e-5)

    def step(carry, _):
        return fdpp_jax.dot_product_attention(carry, key, value, softmax=UnifiedMax(phi)), None

    assert jnp.isfinite(jax.lax.scan(step, query, length=3)[0]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kernel_gradient_is_the_references(dtype):
    query, key, value, lengths = decode_inputs(dtype, lengths=(100, 7))
    key, value = jnp.nan_to_num(key), jnp.nan_to_num(value)

    def loss(query, key, value, implementation):
        out = fdpp_jax.dot_product_attention(
            query, key, value, key_value_seq_lengths=lengths, softmax=UnifiedMax(), implementation=implementation
        )
        return (out.astype(jnp.float32) ** 2).sum()

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    for ours, theirs in zip(grad(query, key, value, "mosaic_gpu"), grad(query, key, value, "xla"), strict=True):
        assert oracle.relative_error(ours, theirs) < 3 * oracle.TOLERANCE[dtype]


QUERY = jnp.zeros((2, 1, 4, 64))


KEY = jnp.zeros((2, 16, 2, 64))


def test_a_window_as_wide_as_can_be_hides_nothing():
    query, key, value, lengths = decode_inputs("float32", lengths=(100, 7))
    arguments = dict(key_value_seq_lengths=lengths, query_offset=lengths - 1)
    plain = fdpp_jax.dot_product_attention(query, key, value, **arguments)
    for size in (2**31 - 1, 2**40, (2**31 - 1, 0)):
        out = fdpp_jax.dot_product_attention(query, key, value, local_window_size=size, **arguments)
        np.testing.assert_array_equal(out, plain)


def test_a_named_implementation_runs_or_says_why_not():
    with pytest.raises(NotImplementedError, match=r"'mosaic_gpu' cannot run .*(float32|are for sm_90)"):
        fdpp_jax.dot_product_attention(QUERY, KEY, KEY, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=r"'triton' cannot run .*(float32|no kernel for cpu)"):
        fdpp_jax.dot_product_attention(QUERY, KEY, KEY, implementation="triton")
    with pytest.raises(NotImplementedError, match="gemv takes one row, got M = 2"):
        fdpp_jax.flat_matmul(jnp.zeros((2, 8)), jnp.zeros((8, 4)), implementation="gemv")
