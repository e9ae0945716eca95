"""The public ops: answers, recompute, transformations and errors, on whatever device there is."""

import functools
import math

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


@pytest.mark.parametrize("leading", [(), (3,), (2, 2)])
@pytest.mark.parametrize("w_order", ["kn", "nk"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_agrees_with_float64(dtype, w_order, leading):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (*leading, 256)).astype(dtype)
    w = jax.random.normal(keys[1], (256, 128)).astype(dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    matmul = functools.partial(fdpp_jax.flat_matmul, w_order=w_order)
    w = w if w_order == "kn" else w.T
    out = jax.jit(matmul)(x, w)
    assert out.dtype == dtype
    assert oracle.relative_error(out, expected) < oracle.TOLERANCE[dtype]
    out = matmul(x, w, out_dtype=jnp.float32)
    assert out.dtype == jnp.float32
    assert oracle.relative_error(out, expected) < 2e-6


@pytest.mark.parametrize("w_order", ["kn", "nk"])
@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0)])
def test_matmul_under_vmap_and_grad(mapped, w_order):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (5, 3, 64) if mapped[0] == 0 else (3, 64), jnp.bfloat16)
    w = jax.random.normal(keys[1], (5, 64, 32) if mapped[1] == 0 else (64, 32), jnp.bfloat16)
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    w = w if w_order == "kn" else w.mT
    flat_matmul = functools.partial(fdpp_jax.flat_matmul, w_order=w_order)
    out = jax.jit(jax.vmap(flat_matmul, mapped))(x, w)
    assert oracle.relative_error(out, expected) < oracle.TOLERANCE["bfloat16"]

    def grads(matmul):
        return jax.grad(lambda x, w: (jax.vmap(matmul, mapped)(x, w).astype(jnp.float32) ** 2).sum(), (0, 1))(x, w)

    def dot(x, w):
        return jnp.dot(x, w if w_order == "kn" else w.T)

    for ours, theirs in zip(grads(flat_matmul), grads(dot), strict=True):
        assert oracle.relative_error(ours, theirs) < 2 * oracle.TOLERANCE["bfloat16"]


QUERY = jnp.zeros((2, 1, 4, 64))
KEY = jnp.zeros((2, 16, 2, 64))
INT8 = KEY.astype(jnp.int8)
SCALE = jnp.ones(2)
TABLE = jnp.zeros((2, 3), jnp.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((QUERY[0], KEY, KEY, {}), r"query must have 4 axes .* got shape \(1, 4, 64\)"),
        ((QUERY, KEY[:, :, :1].repeat(3, 2), KEY[:, :, :1].repeat(3, 2), {}), "key has 3 heads, .* query's 4"),
        ((QUERY, KEY.astype(jnp.bfloat16), KEY, {}), "one shape .* and dtype; got bfloat16 .* and float32"),
        ((QUERY.astype(jnp.bfloat16), KEY, KEY, {}), "one floating-point dtype, or key and value be int8 or float8"),
        ((QUERY.astype(int), INT8, INT8, {}), "one floating-point dtype"),
        ((QUERY.astype(jnp.float8_e4m3fn),) + 2 * (KEY.astype(jnp.float8_e4m3fn),) + ({},), "one floating-point dtype"),
        ((QUERY, KEY, KEY[:, :8], {}), "key and value must have one shape"),
        ((QUERY, KEY[:1], KEY[:1], {}), r"key must be \[B=2, S, K, H=64\]"),
        ((QUERY, KEY, KEY, {"key_value_seq_lengths": jnp.array([3, 17])}), r"must lie in 0..16; got 3..17"),
        ((QUERY, KEY, KEY, {"key_value_seq_lengths": jnp.array([-1, 3])}), r"must lie in 0..16; got -1..3"),
        ((QUERY, KEY, KEY, {"key_value_seq_lengths": jnp.array([3])}), r"must be \[B=2\] integers"),
        ((QUERY, KEY, KEY, {"query_seq_lengths": jnp.array([0.0, 1.0])}), "integers; got .* float32"),
        ((QUERY, KEY, KEY, {"implementation": "cuda"}), "mosaic_gpu, triton, xla; got 'cuda'"),
        ((QUERY, KEY, KEY, {"softmax": 6.0}), "None or a UnifiedMax; got 6.0"),
        ((QUERY, KEY, KEY, {"logits_soft_cap": 0.0}), "must be positive; got 0.0"),
        ((QUERY, KEY, KEY, {"logits_soft_cap": math.inf}), "logits_soft_cap must be a finite number, .* got inf"),
        ((QUERY, KEY, KEY, {"scale": "wide"}), "scale must be a finite number, .* got 'wide'"),
        ((QUERY, KEY, KEY, {"is_causal": "no"}), "is_causal must be True or False; got 'no'"),
        *(
            ((QUERY, KEY, KEY, {"local_window_size": size}), "integer w >= 0 or .left, right. of such; got")
            for size in (-1, 3.5, True, (1, 2, 3), (), (4, -1), (None, 0))
        ),
        ((QUERY, KEY, KEY, {"key_value_seq_lengths": [3, 17]}), r"must lie in 0..16; got 3..17"),
        ((QUERY, KEY, KEY, {"key_value_seq_lengths": 3}), r"must be \[B=2\] integers; got \(\)"),
        ((QUERY.tolist(), KEY, KEY, {}), "one floating-point dtype"),
        ((QUERY.astype(jnp.float8_e5m2),) + 2 * (KEY.astype(jnp.float8_e5m2),) + ({},), "one floating-point dtype"),
        ((QUERY[..., :0], KEY[..., :0], KEY[..., :0], {}), "head dim, .* of at least 1"),
        ((QUERY, KEY[:0], KEY[:0], {"page_table": TABLE}), "pages in a pool, of at least 1"),
        ((QUERY, KEY, KEY, {"page_table": TABLE + 2}), r"pages 0..1 for live keys; got 2 as page 0 of sequence 0"),
        ((QUERY, KEY, KEY, {"query_offset": jnp.zeros(2)}), r"query_offset must be \[B=2\] integers; got .* float32"),
        ((QUERY, KEY, KEY, {"sinks": jnp.zeros(2)}), r"sinks must be \[N=4\] of floating point; got float32 of \(2,\)"),
        ((QUERY, KEY, KEY, {"sinks": jnp.zeros(4, int)}), r"sinks must be \[N=4\] of floating point; got int32"),
        ((QUERY, KEY, KEY, {"key_max_norm": SCALE}), r"key_max_norm must be \[B=2, K=2\] of floating point"),
        (
            (QUERY, KEY, KEY, {"softmax": UnifiedMax(jnp.zeros(3))}),
            r"broadcast to \[B, N\] = \[2, 4\], got",
        ),
        ((QUERY, INT8, INT8, {}), r"must be float32 \(2,\) or \(2, 16, 2\), both alike, .* int8; got None and None"),
        ((QUERY, INT8, INT8, {"key_scale": SCALE}), r"both alike, .* got \(\(2,\), 'float32'\) and None"),
        ((QUERY, INT8, INT8, {"key_scale": SCALE, "value_scale": KEY[..., 0]}), "both alike"),
        ((QUERY, INT8, INT8, {"key_scale": KEY, "value_scale": KEY}), r"got \(\(2, 16, 2, 64\), 'float32'\)"),
        ((QUERY, INT8, INT8) + ({"key_scale": INT8[0, 0, :, 0], "value_scale": INT8[0, 0, :, 0]},), "'int8'"),
        ((QUERY, KEY, KEY, {"key_scale": SCALE, "value_scale": SCALE}), "must be None for a cache of float32, .* got"),
        ((QUERY, KEY, KEY, {"page_table": TABLE[0]}), r"page_table must be \[B=2, pages\] integers; got \(3,\)"),
        ((QUERY, KEY, KEY, {"page_table": TABLE[:1]}), r"page_table must be \[B=2, pages\] integers; got \(1, 3\)"),
        ((QUERY, KEY, KEY, {"page_table": TABLE + 0.5}), "integers; got .* float32"),
        (
            (QUERY, KEY[:, :8], KEY[:, :8], {"page_table": TABLE}),
            r"must hold 16, 32, 64, 128, 256 keys; got",
        ),
        ((QUERY, KEY[..., :8], KEY[..., :8], {"page_table": TABLE}), r"key must be \[P, page_size, K, H=64\]"),
        (
            (QUERY, KEY, KEY, {"page_table": TABLE, "key_value_seq_lengths": jnp.array([3, 49])}),
            r"must lie in 0..48; got 3..49",
        ),
    ],
)
def test_attention_says_what_is_wrong(arguments, message):
    *arrays, keywords = arguments
    with pytest.raises(ValueError, match=message):
        fdpp_jax.dot_product_attention(*arrays, **keywords)


def test_a_window_as_wide_as_can_be_hides_nothing():
    query, key, value, lengths = decode_inputs("float32", lengths=(100, 7))
    arguments = dict(key_value_seq_lengths=lengths, query_offset=lengths - 1)
    plain = fdpp_jax.dot_product_attention(query, key, value, **arguments)
    for size in (2**31 - 1, 2**40, (2**31 - 1, 0)):
        out = fdpp_jax.dot_product_attention(query, key, value, local_window_size=size, **arguments)
        np.testing.assert_array_equal(out, plain)


def test_only_pages_of_live_keys_must_be_in_the_pool():
    table, lengths = TABLE.at[:, 1:].set(99), [16, 3]
    out = fdpp_jax.dot_product_attention(QUERY, KEY, KEY, page_table=table, key_value_seq_lengths=lengths)
    assert out.shape == QUERY.shape


def test_lengths_known_inside_jit_are_checked_too():
    lengths = jnp.array([3, 17])
    with pytest.raises(ValueError, match=r"must lie in 0\.\.16"):
        jax.jit(lambda query: fdpp_jax.dot_product_attention(query, KEY, KEY, key_value_seq_lengths=lengths))(QUERY)


@pytest.mark.parametrize(
    ("x", "w", "keywords", "message"),
    [
        ((2, 8), (9, 4), {}, r"x \[..., K\] and w \[K, N\]"),
        ((2, 8), (8,), {}, r"x \[..., K\] and w \[K, N\]"),
        ((2, 8), (8, 4), {"w_order": "nk"}, r"w \[N, K\]; got x.shape=\(2, 8\) and w.shape=\(8, 4\) with w_order='nk'"),
        ((2, 8), (4, 8), {"w_order": "kn"}, r"w \[K, N\]; got .* with w_order='kn'"),
        ((2, 8), (8,), {"w_order": "nk"}, r"w \[N, K\]; got"),
        ((2, 8), (8, 4), {"w_order": "NK"}, "w_order must be one of kn, nk; got 'NK'"),
        ((2, 8), (8, 4), {"w_order": None}, "w_order must be one of kn, nk; got None"),
        ((2, 8), (8, 4), {"implementation": "fast"}, "gemv, flat, xla; got 'fast'"),
    ],
)
def test_matmul_says_what_is_wrong(x, w, keywords, message):
    with pytest.raises(ValueError, match=message):
        fdpp_jax.flat_matmul(jnp.zeros(x), jnp.zeros(w), **keywords)
    with pytest.raises(ValueError, match="one floating-point dtype"):
        fdpp_jax.flat_matmul(jnp.zeros((2, 8)), jnp.zeros((8, 4), jnp.bfloat16))


def test_a_named_implementation_runs_or_says_why_not():
    with pytest.raises(NotImplementedError, match=r"'mosaic_gpu' cannot run .*float32|no kernel for"):
        fdpp_jax.dot_product_attention(QUERY, KEY, KEY, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="no Triton kernels"):
        fdpp_jax.dot_product_attention(QUERY, KEY, KEY, implementation="triton")
    with pytest.raises(NotImplementedError, match="gemv takes one row, got M = 2"):
        fdpp_jax.flat_matmul(jnp.zeros((2, 8)), jnp.zeros((8, 4)), implementation="gemv")


@pytest.mark.gpu
@pytest.mark.parametrize("w_order", ["kn", "nk"])
@pytest.mark.parametrize("implementation", ["gemv", "flat", "xla"])
def test_named_matmuls_agree_on_the_gpu(implementation, w_order):
    x = jax.random.normal(jax.random.key(0), (1, 512), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (512, 208), jnp.bfloat16)
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    w = w if w_order == "kn" else w.T
    out = fdpp_jax.flat_matmul(x, w, w_order=w_order, out_dtype=jnp.float32, implementation=implementation)
    assert oracle.relative_error(out, expected) < 2e-6
