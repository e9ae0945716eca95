"""bias and mask of the attention op: jax.nn's places and broadcasting, what runs them, and Flax's attention layers."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import fdpp_jax
from fdpp_jax import UnifiedMax, heuristics
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions, attention_shape
from fdpp_jax.plans.shapes import AttentionShape

BATCH, LENGTH, CAPACITY, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 2, 5, 12, 4, 2, 16
op = fdpp_jax.dot_product_attention


def inputs(seed=0, query_length=LENGTH):
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((BATCH, query_length, NUM_HEADS, HEAD_DIM), np.float32)
    key, value = rng.standard_normal((2, BATCH, CAPACITY, NUM_KV_HEADS, HEAD_DIM), np.float32)
    return jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)


def bias_of(*shape):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape, np.float32) * 3)


def mask_of(*shape):
    """Every row sees a key: what one that sees none gives is told apart below."""
    mask = np.random.default_rng(2).random(shape) < 0.6
    mask[..., 0] = True
    return jnp.asarray(mask)


def test_bias_and_mask_stand_where_jax_nn_has_them():
    ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (op, jax.nn.dot_product_attention))
    assert [(x.name, x.kind, x.default) for x in ours[:5]] == [(x.name, x.kind, x.default) for x in theirs[:5]]


SHAPES = [
    ((BATCH, NUM_HEADS, LENGTH, CAPACITY), (BATCH, 1, LENGTH, CAPACITY)),
    ((1, NUM_HEADS, 1, CAPACITY), (1, NUM_HEADS, LENGTH, 1)),
    ((NUM_HEADS, LENGTH, CAPACITY), (LENGTH, CAPACITY)),
    ((1, 1, 1, 1), (BATCH, 1, 1, CAPACITY)),
    (None, (BATCH, NUM_HEADS, LENGTH, CAPACITY)),
    ((NUM_HEADS, 1, 1), None),
]


@pytest.mark.parametrize(
    ("bias", "mask", "arguments"),
    [
        *((*x, {}) for x in SHAPES),
        *(pytest.param(*x, dict(is_causal=True, scale=0.3), marks=pytest.mark.slow) for x in SHAPES[::2]),
        *(pytest.param(*x, dict(local_window_size=(3, 1)), marks=pytest.mark.slow) for x in SHAPES[1::2]),
    ],
)
def test_agrees_with_jax_nn(bias, mask, arguments):
    arrays = *inputs(), bias and bias_of(*bias), mask and mask_of(*mask)
    lengths = jnp.array([CAPACITY, 9])
    with jax.default_matmul_precision("highest"):
        expected = jax.nn.dot_product_attention(*arrays, **arguments, key_value_seq_lengths=lengths)
    call = jax.jit(lambda softmax, *x: op(*x, **arguments, key_value_seq_lengths=lengths, softmax=softmax))
    for softmax in (None, UnifiedMax(1.0), UnifiedMax(200.0), UnifiedMax.bound()):
        np.testing.assert_allclose(call(softmax, *arrays), expected, atol=5e-6)


def test_gradients_are_jax_nns():
    arrays = *inputs(), bias_of(1, NUM_HEADS, LENGTH, CAPACITY)
    mask = mask_of(BATCH, 1, LENGTH, CAPACITY)

    def loss(arrays, attention, **arguments):
        return (attention(*arrays, mask, **arguments) ** 2).sum()

    with jax.default_matmul_precision("highest"):
        theirs = jax.grad(loss)(arrays, jax.nn.dot_product_attention)
    for softmax in (None, UnifiedMax(200.0)):
        for a, b in zip(jax.grad(loss)(arrays, op, softmax=softmax), theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("hidden_by", ["mask", "bias", "both"])
@pytest.mark.parametrize("softmax", [None, UnifiedMax(1.0), UnifiedMax.bound()])
def test_a_row_that_sees_no_key_is_zero_and_harms_no_gradient(hidden_by, softmax):
    query, key, value = inputs()
    seen = mask_of(BATCH, NUM_HEADS, LENGTH, CAPACITY).at[0, 1, 2].set(False).at[1, :, 0].set(False)
    bias = jnp.where(seen, 1.0, -jnp.inf) if hidden_by != "mask" else None
    mask = seen if hidden_by != "bias" else None
    attend = lambda query, key, value: op(query, key, value, bias, mask, softmax=softmax)  # noqa: E731
    out, log_sum = attend(query, key, value), oracle.attention_and_log_sum(query, key, value, mask=seen)[1]
    assert oracle.relative_error(out, oracle.attention(query, key, value, bias=bias, mask=mask)) < 2e-6
    np.testing.assert_array_equal(np.asarray(out).any(axis=-1), np.isfinite(log_sum))
    for grad in jax.grad(lambda *x: attend(*x).sum(), argnums=(0, 1, 2))(query, key, value):
        assert jnp.isfinite(grad).all()


def test_nan_that_a_mask_hides_is_not_seen():
    query, key, value = inputs()
    mask = mask_of(1, NUM_KV_HEADS, 1, CAPACITY).repeat(2, axis=1)  # each key/value head hides keys of its own
    dead = ~mask[0, ::2, 0].T[None, :, :, None]  # [1, S, K, 1]
    expected = op(query, key, value, None, mask)
    out = op(query, *(jnp.where(dead, jnp.nan, x) for x in (key, value)), None, mask)
    np.testing.assert_array_equal(out, expected)


def test_with_everything_else():
    """Pages, scales, sinks, soft cap, offset: all that plain XLA has."""
    query, key, value = inputs(query_length=1)
    capacity = 16
    key, value = (jnp.pad(x, ((0, 0), (0, capacity - CAPACITY), (0, 0), (0, 0))) for x in (key, value))
    bias, mask = bias_of(BATCH, NUM_HEADS, 1, capacity), mask_of(BATCH, 1, 1, capacity)
    lengths = jnp.array([11, 4])
    arguments = dict(bias=bias, mask=mask, logits_soft_cap=2.0, sinks=jnp.linspace(-1, 1, NUM_HEADS))
    *pools, table = oracle.paged(0, [key, value], lengths, 16)
    out = op(query, *pools, **arguments, page_table=table, key_value_seq_lengths=lengths, softmax=UnifiedMax())
    assert oracle.relative_error(out, oracle.attention(query, key, value, lengths, **arguments)) < 2e-6
    caches = [oracle.quantised(x, "int8", "head") for x in (key, value)]
    arguments |= dict(key_scale=caches[0][1], value_scale=caches[1][1])
    out = op(query, caches[0][0], caches[1][0], **arguments, key_value_seq_lengths=lengths)
    expected = oracle.attention(query, caches[0][0], caches[1][0], lengths, **arguments)
    assert oracle.relative_error(out, expected) < 2e-6


def test_vmap_over_the_mask():
    query, key, value = inputs()
    masks = jnp.stack([mask_of(BATCH, 1, LENGTH, CAPACITY), ~mask_of(BATCH, 1, LENGTH, CAPACITY)])
    out = jax.vmap(lambda mask: op(query, key, value, mask=mask, softmax=UnifiedMax()))(masks)
    for one, mask in zip(out, masks, strict=True):
        assert oracle.relative_error(one, oracle.attention(query, key, value, mask=mask)) < 2e-6


@pytest.mark.parametrize(
    ("shape", "reason"),
    [(dict(has_bias=True), "takes no bias"), (dict(has_mask=True), "takes no mask")],
    ids=["bias", "mask"],
)
@pytest.mark.parametrize("query_length", [1, 512])
def test_the_plan_says_why_no_kernel_runs(shape, reason, query_length):
    shape = AttentionShape(2, query_length, 1024, 8, 8, 128, has_lengths=False, **shape)
    plan = heuristics.plan_attention(shape, "H200")
    assert (plan.backend, plan.algorithm) == ("xla", "reference")
    assert "cuDNN" in plan.reason
    assert reason in plan.reason
    with pytest.raises(NotImplementedError, match=f"{'decode' if query_length == 1 else 'prefill'} kernel {reason}"):
        heuristics.plan_attention(shape, "H200", "mosaic_gpu")


def test_the_shape_of_a_call_has_them():
    arrays = AttentionArrays(*inputs(), bias=bias_of(1, 1, 1, 1))
    assert attention_shape(arrays, AttentionOptions(1.0), is_online=True).has_bias
    assert not attention_shape(arrays, AttentionOptions(1.0), is_online=True).has_mask


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(mask=mask_of(LENGTH, CAPACITY).astype(jnp.float32)), r"mask must be bool, .* got float32"),
        (dict(mask=mask_of(3, 1, LENGTH, CAPACITY)), r"mask must broadcast to \[B, N, T, S\] = \[2, 4, 5, 12\]; got"),
        (dict(mask=mask_of(1, NUM_KV_HEADS, 1, CAPACITY)), r"mask must broadcast to"),
        (dict(bias=bias_of(1, 1, 1, LENGTH)), r"bias must broadcast to"),
        (dict(bias=bias_of(1, 1, 1, 1, CAPACITY)), r"bias must broadcast to"),
        (dict(bias=mask_of(LENGTH, CAPACITY)), r"bias must be real numbers; got bool"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        op(*inputs(), **arguments)


# ---- Flax


def attention_fn(query, key, value, bias=None, mask=None, is_causal=False, deterministic=True, **_):
    """As in the README: Flax's masks may be float32, and it passes arguments of dropout."""
    assert deterministic, "dot_product_attention has no dropout"
    mask = None if mask is None else mask.astype(bool)
    return fdpp_jax.dot_product_attention(query, key, value, bias, mask, is_causal=is_causal)


def linen_layers(attention, **options):
    both = (
        nn.MultiHeadDotProductAttention(4, **options),
        nn.MultiHeadDotProductAttention(4, attention_fn=attention, **options),
    )
    x = jax.random.normal(jax.random.key(0), (2, 6, 32))
    return x, [(layer, layer.init(jax.random.key(1), x, x)) for layer in both]


@pytest.mark.parametrize(("attention", "dtype"), [(op, bool), (attention_fn, bool), (attention_fn, jnp.float32)])
def test_linen_layer(attention, dtype):
    x, layers = linen_layers(attention)
    padding = nn.make_attention_mask(jnp.ones((2, 6)), jnp.arange(6) < jnp.array([[6], [4]]), dtype=dtype)
    for mask in (None, nn.combine_masks(nn.make_causal_mask(jnp.ones((2, 6))), padding, dtype=dtype), padding):
        expected, out = (layer.apply(variables, x, x, mask=mask) for layer, variables in layers)
        np.testing.assert_allclose(out, expected, atol=1e-5)


def test_linen_decoding():
    x, layers = linen_layers(attention_fn, decode=True)
    outs = []
    for layer, variables in layers:
        cache, steps = variables["cache"], []
        for t in range(6):
            token = x[:, t : t + 1]
            mask = jnp.arange(6) != jnp.array([1, 3])[:, None]  # a token that none sees
            mask = (mask | (jnp.arange(6) == t))[:, None, None]
            out, updated = layer.apply(
                {"params": variables["params"], "cache": cache}, token, token, mask=mask, mutable=["cache"]
            )
            cache = updated["cache"]
            steps.append(out)
        outs.append(jnp.concatenate(steps, axis=1))
    np.testing.assert_allclose(*outs, atol=1e-5)


@pytest.mark.parametrize("decode", [False, True])
def test_nnx_layer(decode):
    x = jax.random.normal(jax.random.key(0), (2, 6, 32))
    outs = []
    for options in ({}, dict(attention_fn=attention_fn)):
        layer = nnx.MultiHeadAttention(4, 32, rngs=nnx.Rngs(0), decode=decode, **options)
        if not decode:
            causal = nnx.make_causal_mask(jnp.ones((2, 6)))
            outs.append(jnp.concatenate([layer(x), layer(x, mask=causal), layer(x, is_causal=True)]))
            continue
        layer.init_cache(x.shape)
        mask = jnp.arange(6)[None, None, None] != 1
        steps = [layer(x[:, t : t + 1], mask=None if t == 1 else mask) for t in range(6)]
        outs.append(jnp.concatenate(steps, axis=1))
    np.testing.assert_allclose(*outs, atol=1e-5)
