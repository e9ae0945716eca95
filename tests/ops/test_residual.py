"""The log-sum-exp that attention returns on request, and the merge of parts that is built on it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import fdpp_jax
from fdpp_jax import UnifiedMax, merge_attention_states

op = functools.partial(fdpp_jax.dot_product_attention, return_residual=True)
BATCH, LENGTH, CAPACITY, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 2, 3, 24, 4, 2, 16


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((BATCH, LENGTH, NUM_HEADS, HEAD_DIM), np.float32)
    key, value = rng.standard_normal((2, BATCH, CAPACITY, NUM_KV_HEADS, HEAD_DIM), np.float32)
    return jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)


@pytest.mark.parametrize("softmax", [None, UnifiedMax(1.0), UnifiedMax(200.0), UnifiedMax.bound()], ids=str)
def test_is_jax_nns(softmax):
    """Where jax.nn has all arguments; in float32 here, since jax.nn rounds to the dtype of the keys."""
    bias = jnp.asarray(np.random.default_rng(1).standard_normal((1, NUM_HEADS, LENGTH, CAPACITY), np.float32))
    arguments = dict(bias=bias, is_causal=True, scale=0.4, key_value_seq_lengths=jnp.array([CAPACITY, 2]))
    with jax.default_matmul_precision("highest"):
        expected = jax.nn.dot_product_attention(*inputs(), **arguments, return_residual=True)
    for ours, theirs in zip(op(*inputs(), **arguments, softmax=softmax), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


def test_is_float32_whatever_the_query_is():
    out, lse = op(*(x.astype(jnp.bfloat16) for x in inputs()))
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    assert lse.shape == (BATCH, LENGTH, NUM_HEADS)


def directional(f, arrays, direction, step=1e-4):
    """The derivative of f along direction, in float64."""
    ends = [
        f(*(np.asarray(x, np.float64) + h * d for x, d in zip(arrays, direction, strict=True))) for h in (step, -step)
    ]
    return (ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize("softmax", [None, UnifiedMax(1.0), UnifiedMax(-200.0)], ids=str)
@pytest.mark.parametrize("with_starts", [False, True])
def test_gradients_of_both_results(softmax, with_starts):
    """Rows that see no key add nothing to it."""
    rng = np.random.default_rng(0)
    arrays = *inputs(), jnp.linspace(-1.0, 1.0, NUM_HEADS)
    weights = rng.standard_normal(arrays[0].shape), rng.standard_normal(arrays[0].shape[:3])
    lengths = np.array([20, 2])
    starts = np.array([7, 2]) if with_starts else None

    def loss(query, key, value, sinks, attention, xp, **arguments):
        out, lse = attention(query, key, value, sinks=sinks, **arguments)
        return (out * weights[0]).sum() + xp.where(xp.isneginf(lse), 0.0, lse * weights[1]).sum()

    ours = dict(key_value_seq_lengths=jnp.asarray(lengths), softmax=softmax)
    ours |= dict(key_value_seq_starts=jnp.asarray(starts)) if with_starts else {}
    grads = jax.jit(jax.grad(functools.partial(loss, attention=op, xp=jnp, **ours), argnums=(0, 1, 2, 3)))(*arrays)
    exact = functools.partial(
        loss, attention=oracle.attention_and_log_sum, xp=np, lengths=lengths, starts=starts, is_causal=False
    )
    for i in range(4):
        direction = [np.zeros(x.shape) for x in arrays]
        direction[i] = rng.standard_normal(arrays[i].shape)
        with np.errstate(invalid="ignore"):
            expected = directional(exact, arrays, direction)
        np.testing.assert_allclose(np.vdot(grads[i], direction[i]), expected, rtol=1e-4, atol=1e-4)


def test_vmap_and_jit():
    query, key, value = (jnp.stack([x, x[::-1]]) for x in inputs())
    out, lse = jax.jit(jax.vmap(functools.partial(op, softmax=UnifiedMax())))(query, key, value)
    expected = oracle.attention_and_log_sum(*inputs())
    for i, flip in enumerate((slice(None), slice(None, None, -1))):
        np.testing.assert_allclose(out[i], expected[0][flip], atol=1e-5)
        np.testing.assert_allclose(lse[i], expected[1][flip], atol=1e-5)


# ---- merging


@pytest.mark.parametrize("with_sinks", range(4))
def test_parts_merge_to_the_whole(with_sinks):
    """Parts of unequal lengths, one of them empty for a row, and one for both; in any order; sinks in any; jitted."""
    query, key, value = inputs()
    starts, ends = [[0, 0], [5, 7], [9, 7], [20, 12]], [[5, 7], [9, 7], [20, 12], [20, 12]]
    sinks = jnp.linspace(-1.0, 1.0, NUM_HEADS)
    of_part = [sinks if i == with_sinks else None for i in range(4)]
    parts = [
        op(query, key, value, key_value_seq_starts=start, key_value_seq_lengths=end, sinks=sinks_of_part)
        for start, end, sinks_of_part in zip(starts, ends, of_part, strict=True)
    ]
    expected = oracle.attention_and_log_sum(query, key, value, [20, 12], sinks=sinks)
    merge = jax.jit(merge_attention_states)
    for order in ([0, 1, 2, 3], [3, 2, 0, 1]):
        out, lse = functools.reduce(lambda a, b: merge(*a, *b), [parts[i] for i in order])
        np.testing.assert_allclose(out, expected[0], atol=2e-6)
        np.testing.assert_allclose(lse, expected[1], atol=2e-6)


def test_a_part_without_keys_changes_nothing_and_two_give_zeros():
    query, key, value = inputs()
    state = op(query, key, value)
    nothing = jnp.zeros_like(state[0]), jnp.full_like(state[1], -jnp.inf)
    for pair in ((state, nothing), (nothing, state)):
        for merged, expected in zip(merge_attention_states(*pair[0], *pair[1]), state, strict=True):
            np.testing.assert_array_equal(merged, expected)
    out, lse = merge_attention_states(*nothing, *nothing)
    assert not out.any()
    assert jnp.isneginf(lse).all()
    grads = jax.grad(lambda *x: merge_attention_states(*x)[0].sum(), argnums=(0, 1, 2, 3))(*nothing, *nothing)
    assert all(jnp.isfinite(grad).all() for grad in grads)


def test_scores_of_any_size_merge():
    out = jnp.ones((3, 4)), 3 * jnp.ones((3, 4))
    lse = jnp.array([1e4, -1e4, 300.0]), jnp.array([1e4, -1e4, -300.0])
    merged, log_sum = merge_attention_states(out[0], lse[0], out[1], lse[1])
    np.testing.assert_allclose(merged[:, 0], [2.0, 2.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(log_sum, np.logaddexp(*(np.asarray(x, np.float64) for x in lse)), rtol=1e-6)


def test_a_merge_of_two_dtypes_is_refused():
    lse = jnp.zeros(3)
    with pytest.raises(ValueError, match="out_a and out_b must have one dtype, got bfloat16 and float32"):
        merge_attention_states(jnp.ones((3, 4), jnp.bfloat16), lse, jnp.ones((3, 4)), lse)


def test_gradient_through_a_merge_is_that_of_the_whole():
    query, key, value = inputs()

    def whole(arrays):
        out, lse = op(*arrays)
        return (out**2).sum() + jnp.sin(lse).sum()

    def halves(arrays):
        query, key, value = arrays
        first, second = (op(query, key[:, x], value[:, x], softmax=UnifiedMax()) for x in (slice(9), slice(9, None)))
        out, lse = merge_attention_states(*first, *second)
        return (out**2).sum() + jnp.sin(lse).sum()

    for a, b in zip(*(jax.grad(f)((query, key, value)) for f in (whole, halves)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_outs_keep_their_dtype():
    state = op(*(x.astype(jnp.bfloat16) for x in inputs()))
    out, lse = merge_attention_states(*state, *state)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(out.astype(np.float32), state[0].astype(np.float32), atol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(out_b=jnp.zeros((2, 4))), r"out_b must be floating point \[..., H\] as out_a's.*got float32 of \(2, 4\)"),
        (dict(lse_a=jnp.zeros((3, 4))), r"lse_a must be floating point \[...\], out_a's without H"),
        (dict(lse_a=None), r"^lse_a must be an array \[\.\.\.\]; got NoneType$"),
        (dict(out_a=[[0.0]]), r"^out_a must be an array \[\.\.\., H\]; got list$"),
        (dict(lse_b=jnp.zeros(3, int)), r"lse_b must be .* got int32 of \(3,\)"),
    ],
)
def test_errors(change, message):
    state = dict(out_a=jnp.zeros((3, 4)), lse_a=jnp.zeros(3), out_b=jnp.zeros((3, 4)), lse_b=jnp.zeros(3))
    with pytest.raises(ValueError, match=message):
        merge_attention_states(**(state | change))
