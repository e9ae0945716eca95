"""What a call of attention must hold: one clear error for each thing that is wrong."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdpp_jax
from fdpp_jax import UnifiedMax

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
        ((QUERY, KEY, KEY, {"key_value_seq_starts": jnp.array([-1, 3])}), r"starts must lie in 0..16; got -1..3"),
        ((QUERY, KEY, KEY, {"key_value_seq_starts": jnp.array([0, 17])}), r"starts must lie in 0..16; got 0..17"),
        ((QUERY, KEY, KEY, {"key_value_seq_starts": jnp.array([0])}), r"starts must be \[B=2\] integers; got \(1,\)"),
        ((QUERY, KEY, KEY, {"key_value_seq_starts": jnp.zeros(2)}), r"starts must be \[B=2\] integers; got .* float32"),
        ((QUERY, KEY, KEY, {"query_seq_lengths": jnp.array([0.0, 1.0])}), "integers; got .* float32"),
        ((QUERY, KEY, KEY, {"implementation": "cuda"}), "mosaic_gpu, triton, cudnn, xla; got 'cuda'"),
        ((QUERY, KEY, KEY, {"softmax": 6.0}), "None or a UnifiedMax; got 6.0"),
        ((QUERY, KEY, KEY, {"logits_soft_cap": 0.0}), "must be positive; got 0.0"),
        ((QUERY, KEY, KEY, {"logits_soft_cap": math.inf}), "logits_soft_cap must be a finite number, .* got inf"),
        ((QUERY, KEY, KEY, {"scale": "wide"}), "scale must be a finite number, .* got 'wide'"),
        ((QUERY, KEY, KEY, {"return_residual": 1}), "return_residual must be True or False; got 1"),
        ((QUERY, KEY, KEY, {"is_causal": "no"}), "is_causal must be True or False; got 'no'"),
        *(
            ((QUERY, KEY, KEY, {"local_window_size": size}), "integer w >= 0 or .left, right. of such; got")
            for size in (-1, 3.5, True, (1, 2, 3), (), (4, -1), (None, 0))
        ),
        ((QUERY, KEY, KEY, {"key_value_seq_lengths": [3, 17]}), r"must lie in 0..16; got 3..17"),
        (
            (QUERY, KEY, KEY, {"query_offset": np.array([0, 2**33])}),
            r"must lie in -1073741824..1073741824; got 0..8589934592",
        ),
        ((QUERY, KEY, KEY, {"key_value_seq_lengths": 3}), r"must be \[B=2\] integers; got \(\)"),
        ((QUERY.tolist(), KEY, KEY, {}), r"^query must be an array \[B, T, N, H\]; got list$"),
        ((QUERY, None, KEY, {}), r"^key must be an array \[B, S, K, H\]; got NoneType$"),
        ((QUERY, KEY, 1.0, {}), r"^value must be an array \[B, S, K, H\]; got float$"),
        ((QUERY, KEY, jax.random.split(jax.random.key(0)), {}), r"^value must be an array .* got \w+$"),
        ((QUERY, None, KEY, {"page_table": TABLE}), r"^key must be an array \[P, page_size, K, H\]; got NoneType$"),
        *(
            (
                (QUERY, KEY, KEY, {name: [[1], [1, 2]]}),
                rf"^{name} must be an array, or lists of .* got \[\[1\], \[1, 2\]\]$",
            )
            for name in (
                "bias",
                "mask",
                "sinks",
                "query_offset",
                "page_table",
                "key_scale",
                "value_scale",
                "key_max_norm",
            )
            + ("query_seq_lengths", "key_value_seq_lengths", "key_value_seq_starts")
        ),
        ((QUERY, INT8, INT8, {"key_scale": [1, None], "value_scale": [1, 1]}), r"got \(\(2,\), 'object'\)"),
        (
            (QUERY, INT8, INT8, {"key_scale": ["a", "b"], "value_scale": [1, 1]}),
            r"got \(\(2,\), '\w+'\) and .*'float32'",
        ),
        ((QUERY, INT8, INT8, {"key_scale": [1, 1, 1], "value_scale": [1, 1, 1]}), r"got \(\(3,\), 'float32'\)"),
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


POLICIES = [None, UnifiedMax(jnp.full((1, 1), 6.0)), UnifiedMax.bound()]


@pytest.mark.parametrize("softmax", POLICIES, ids=["online", "phi", "bound"])
@pytest.mark.parametrize("empty", ["B", "T", "S", "N", "TS", "BTSN"])
def test_an_axis_of_length_0_is_answered_as_jax_does(empty, softmax):
    """Without a key, zeros; without a row, nothing. Heads of keys and the head dim must be there."""
    size = dict(B=2, T=3, S=5, N=4) | dict.fromkeys(empty, 0)
    query = jnp.ones((size["B"], size["T"], size["N"], 64))
    key = jnp.ones((size["B"], size["S"], 2, 64))
    expected = jax.nn.dot_product_attention(query, key, key)
    rows = jnp.zeros(size["B"], jnp.int32)
    lengths = dict(query_seq_lengths=rows, key_value_seq_lengths=rows, query_offset=rows)
    features = dict(is_causal=True, local_window_size=2, logits_soft_cap=3.0, sinks=jnp.zeros(size["N"]))
    for arguments in ({"key_max_norm": jnp.ones((size["B"], 2))}, lengths | features):
        out = fdpp_jax.dot_product_attention(query, key, key, softmax=softmax, **arguments)
        assert out.shape == expected.shape
        assert not jnp.any(out)

    def total(*arrays):
        return jax.vmap(functools.partial(fdpp_jax.dot_product_attention, softmax=softmax))(*arrays).sum()

    grads = jax.jit(jax.grad(total, (0, 1, 2)))(query[None], key[None], key[None])
    assert [grad.shape for grad in grads] == [(1, *query.shape), (1, *key.shape), (1, *key.shape)]
    assert not any(jnp.any(grad) for grad in grads)
    pool, table = jnp.ones((1, 16, 2, 64)), jnp.zeros((size["B"], min(size["S"], 1)), jnp.int32)
    assert fdpp_jax.dot_product_attention(query, pool, pool, page_table=table, softmax=softmax).shape == query.shape


def test_only_pages_of_live_keys_must_be_in_the_pool():
    table, lengths = TABLE.at[:, 1:].set(99), [16, 3]
    out = fdpp_jax.dot_product_attention(QUERY, KEY, KEY, page_table=table, key_value_seq_lengths=lengths)
    assert out.shape == QUERY.shape
    table = TABLE.at[:, 0].set(99)
    arguments = dict(page_table=table, key_value_seq_lengths=[40, 3], key_value_seq_starts=[16, 16])
    assert fdpp_jax.dot_product_attention(QUERY, KEY, KEY, **arguments).shape == QUERY.shape
    with pytest.raises(ValueError, match=r"got 99 as page 0 of sequence 0"):
        fdpp_jax.dot_product_attention(QUERY, KEY, KEY, **(arguments | dict(key_value_seq_starts=[15, 16])))


@pytest.mark.parametrize("scales", [[2.0, 3.0], [2, 3], [[[1.0, 2.0]] * 16] * 2])
def test_lists_are_scales(scales):
    query, key = jnp.ones((2, 1, 4, 64)), jnp.ones((2, 16, 2, 64), jnp.int8)
    call = functools.partial(fdpp_jax.dot_product_attention, query, key, key)
    arrays = jnp.asarray(scales, jnp.float32)
    expected = call(key_scale=arrays, value_scale=arrays)
    assert jnp.array_equal(call(key_scale=scales, value_scale=scales), expected)
    assert jnp.array_equal(call(key_scale=scales, value_scale=arrays), expected)
    of_one = scales if arrays.ndim == 1 else scales[0]
    one = fdpp_jax.dot_product_attention(query[0], key[0], key[0], key_scale=of_one, value_scale=of_one)
    assert jnp.array_equal(one, expected[0])


def test_lengths_known_inside_jit_are_checked_too():
    lengths = jnp.array([3, 17])
    with pytest.raises(ValueError, match=r"must lie in 0\.\.16"):
        jax.jit(lambda query: fdpp_jax.dot_product_attention(query, KEY, KEY, key_value_seq_lengths=lengths))(QUERY)
