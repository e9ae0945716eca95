"""Ops over a mesh as Hopper GPUs would run them: no device gathers what it does not need, each plans its shard."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hopper_case import attention_arrays, bf16, collectives, mesh, put
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fdpp_jax
from fdpp_jax import UnifiedMax, heuristics
from fdpp_jax.ops import partition, xla
from fdpp_jax.ops.kernel_call import AttentionFunction
from fdpp_jax.plans import device as devices
from fdpp_jax.plans.calls import AttentionOptions

pytestmark = [
    pytest.mark.usefixtures("fresh_interpreter"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]
TOLERANCE = oracle.TOLERANCE["bfloat16"]


def attend(query, key, value, lengths, softmax=UnifiedMax(), **options):  # noqa: B008
    return fdpp_jax.dot_product_attention(query, key, value, key_value_seq_lengths=lengths, softmax=softmax, **options)


def expected_of(query, key, value, lengths):
    return oracle.attention(query[:, 0], key, value, lengths)[:, None]


# ---- attention


@pytest.mark.parametrize(
    ("sizes", "batch", "heads", "kv_heads", "shard"),
    [
        ({}, "a", "b", "b", (2, 2, 1)),
        ({"num_heads": 4}, "a", "b", "b", (2, 1, 1)),
        ({"num_kv_heads": 1}, "a", "b", None, (2, 2, 1)),
        ({"batch": 8}, ("a", "b"), None, None, (1, 8, 4)),
        ({"batch": 3}, None, "b", "b", (3, 2, 1)),
        ({}, "a", "b", None, (2, 2, 1)),
        ({}, "a", None, "b", (2, 2, 1)),
    ],
    ids=["GQA", "MHA", "MQA", "sequences", "heads", "whole cache", "whole query"],
)
def test_attention_of_shards_needs_no_communication(hopper, sizes, batch, heads, kv_heads, shard):
    arrays = attention_arrays(**sizes)
    over, specs = mesh(), ((batch, None, heads), (batch, None, kv_heads), (batch, None, kv_heads), (batch,))
    sharded = [put(over, x, *spec) for x, spec in zip(arrays, specs, strict=True)]
    compiled = jax.jit(attend).lower(*sharded).compile()
    assert not collectives(compiled)
    (call,) = hopper
    assert (call[0][0], call[0][2], call[1][2]) == shard
    assert oracle.relative_error(compiled(*sharded), expected_of(*arrays)) < TOLERANCE


def test_a_share_of_a_large_group_has_a_kernel(hopper):
    """All 128 queries of the one key/value head are more than the kernel's rows."""
    arrays = attention_arrays(num_heads=128, num_kv_heads=1)
    over = mesh()
    sharded = [put(over, x, *spec) for x, spec in zip(arrays, (("a", None, "b"), ("a",), ("a",), ("a",)), strict=True)]
    out = jax.jit(attend)(*sharded)
    assert hopper[-1][0] == (2, 1, 32, 64)
    assert oracle.relative_error(out, expected_of(*arrays)) < TOLERANCE


def test_more_shards_than_key_value_heads_gather_no_cache(hopper):
    arrays = attention_arrays(num_kv_heads=2)
    over = mesh()
    sharded = [put(over, x, *spec) for x, spec in zip(arrays, (("a", None, "b"), ("a",), ("a",), ("a",)), strict=True)]
    compiled = jax.jit(attend).lower(*sharded).compile()
    assert collectives(compiled) == {"all-gather": 1}  # of the query
    assert oracle.relative_error(compiled(*sharded), expected_of(*arrays)) < TOLERANCE


@pytest.mark.parametrize("recompute", ["kernel", "cond"])
def test_a_shard_that_left_the_window_is_redone(hopper, recompute):
    arrays = attention_arrays(num_heads=4)
    over = mesh()
    specs = ("a", None, "b"), ("a", None, "b"), ("a", None, "b"), ("a",)
    sharded = [put(over, x, *spec) for x, spec in zip(arrays, specs, strict=True)]
    softmax = UnifiedMax(jnp.array([-150.0, 1.0, 150.0, 1.0]), recompute)
    compiled = jax.jit(attend).lower(*sharded, softmax).compile()
    assert not collectives(compiled)
    assert oracle.relative_error(compiled(*sharded, softmax), expected_of(*arrays)) < TOLERANCE


def test_pages_sinks_and_scales_follow_the_rule(hopper):
    query, key, value, lengths = attention_arrays()
    arguments = dict(
        page_table=jnp.arange(8).reshape(4, 2)[::-1],
        sinks=jnp.linspace(-2, 2, 8),
        query_offset=lengths - 1,
        key_scale=jnp.linspace(0.01, 0.02, 4),
        value_scale=jnp.linspace(0.02, 0.01, 4),
        softmax=UnifiedMax.bound(),
        key_max_norm=jnp.full((4, 4), 30.0),
    )
    key, value = ((10 * x).astype(jnp.int8).reshape(8, 16, 4, 64) for x in (key, value))
    expected = jax.jit(functools.partial(attend, implementation="xla"))(query, key, value, lengths, **arguments)
    over = mesh()
    specs = dict(
        page_table=("a",),
        sinks=("b",),
        query_offset=("a",),
        key_scale=("b",),
        value_scale=("b",),
        key_max_norm=("a", "b"),
    )
    arguments |= {name: put(over, arguments[name], *spec) for name, spec in specs.items()}
    arrays = (
        put(over, query, "a", None, "b"),
        *(put(over, x, None, None, "b") for x in (key, value)),
        put(over, lengths, "a"),
    )
    compiled = jax.jit(attend).lower(*arrays, **arguments).compile()
    assert not collectives(compiled)
    assert hopper[-1] == ((2, 1, 2, 64), (8, 16, 1, 64))
    assert oracle.relative_error(compiled(*arrays, **arguments), expected) < TOLERANCE


def test_gradient_and_vmap_of_shards(hopper):
    arrays = attention_arrays()
    over = mesh()
    specs = ("a", None, "b"), ("a", None, "b"), ("a", None, "b"), ("a",)
    sharded = [put(over, x, *spec) for x, spec in zip(arrays, specs, strict=True)]

    def grad(implementation):
        def loss(query, key, value, lengths):
            out = attend(query, key, value, lengths, implementation=implementation)
            return (out.astype(jnp.float32) ** 2).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))

    compiled = grad(None).lower(*sharded).compile()
    assert not collectives(compiled)
    for ours, theirs in zip(compiled(*sharded), grad("xla")(*arrays), strict=True):
        assert oracle.relative_error(ours, theirs) < 2 * TOLERANCE
    stack = lambda x, spec: put(over, jnp.stack([x, x[::-1]]), None, *spec)  # noqa: E731
    stacked = [stack(x, spec) for x, spec in zip(arrays, specs, strict=True)]
    compiled = jax.jit(jax.vmap(attend)).lower(*stacked).compile()
    assert not collectives(compiled)
    assert hopper[-1][0] == (4, 1, 2, 64)
    for i, flip in enumerate((slice(None), slice(None, None, -1))):
        expected = expected_of(*(x[flip] for x in arrays))
        assert oracle.relative_error(compiled(*stacked)[i], expected) < TOLERANCE


def with_starts_and_residual(query, key, value, lengths, starts, softmax=UnifiedMax()):  # noqa: B008
    arguments = dict(key_value_seq_lengths=lengths, key_value_seq_starts=starts, softmax=softmax)
    return fdpp_jax.dot_product_attention(query, key, value, **arguments, return_residual=True)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_starts_and_residual_are_sharded_as_the_query(hopper, kind):
    arrays = *attention_arrays(), jnp.array([0, 1, 2, 11])
    over = mesh(kind)
    specs = ("a", None, "b"), ("a", None, "b"), ("a", None, "b"), ("a",), ("a",)
    expected = jax.jit(with_starts_and_residual)(*arrays)
    with jax.set_mesh(over):
        sharded = [put(over, x, *spec) for x, spec in zip(arrays, specs, strict=True)]
        compiled = jax.jit(with_starts_and_residual).lower(*sharded).compile()
        assert not collectives(compiled)
        assert hopper[-1][0] == (2, 1, 2, 64)
        outs = compiled(*sharded)
        grad = jax.jit(jax.grad(lambda *x: sum(y.astype(jnp.float32).sum() for y in with_starts_and_residual(*x))))
        grads = grad(*sharded), grad(*arrays)
        if kind == AxisType.Explicit:
            types = jax.eval_shape(with_starts_and_residual, *sharded)
            assert [x.sharding.spec for x in types] == [P("a", None, "b", None), P("a", None, "b")]
    for ours, theirs in zip((*outs, grads[0]), (*expected, grads[1]), strict=True):
        assert oracle.relative_error(ours, theirs) < TOLERANCE


@pytest.mark.parametrize(
    ("num_kv_heads", "kind"),
    [
        *(pytest.param(num_kv_heads, AxisType.Auto, marks=pytest.mark.slow) for num_kv_heads in (8, 1)),
        (4, AxisType.Auto),
        (4, AxisType.Explicit),
    ],
)
def test_bias_and_mask_are_sharded_where_they_are_whole(hopper, kind, num_kv_heads):
    """An axis of size 1 is on every device."""
    query, key, value, lengths = attention_arrays(num_kv_heads=num_kv_heads)
    heads = "b" if num_kv_heads > 1 else None
    biases = (bf16(3, 1, 8, 1, 32), (None, "b")), (bf16(4, 4, 1, 1, 32), ("a",)), (bf16(5, 4, 8, 1, 1), ("a", "b"))
    mask = jnp.arange(32)[None, None, None] % 4 > 0

    def call(query, key, value, lengths, bias, mask):
        return attend(query, key, value, lengths, bias=bias, mask=mask)

    over = mesh(kind)
    for bias, bias_spec in biases:
        arrays = query, key, value, lengths, bias, mask
        expected = jax.jit(call)(*arrays)
        specs = ("a", None, "b"), ("a", None, heads), ("a", None, heads), ("a",), bias_spec, ()
        with jax.set_mesh(over):
            sharded = [put(over, x, *spec) for x, spec in zip(arrays, specs, strict=True)]
            compiled = jax.jit(call).lower(*sharded).compile()
            assert not {"all-gather", "all-to-all"} & set(collectives(compiled))
            assert oracle.relative_error(compiled(*sharded), expected) < TOLERANCE
    assert not hopper


@pytest.mark.parametrize("num_kv_heads", [8, 4, 1])
def test_the_rule_takes_bias_and_mask_of_any_size(hopper, num_kv_heads):
    """Of the primitive itself: no kernel of today takes them, and what XLA computes it partitions alone."""
    query, key, value, lengths = attention_arrays(num_kv_heads=num_kv_heads)
    names = "query", "key", "value", "lengths", "bias", "mask", "starts"
    options = AttentionOptions(0.125, return_residual=True)
    function = AttentionFunction(options, names, True, None, None)
    bias, mask = bf16(3, 1, 8, 1, 32), jnp.arange(128).reshape(4, 1, 1, 32) % 4 > 0
    arrays = query, key, value, lengths, bias, mask, jnp.array([0, 1, 2, 3])
    over, device = mesh(), devices.planned()
    heads = "b" if num_kv_heads > 1 else None
    specs = ("a", None, "b"), ("a", None, heads), ("a", None, heads), ("a",), (None, "b"), ("a",), ("a",)

    def call(*arrays):
        return partition.bind(function, function._rule(function, arrays), device, *arrays)

    sharded = [put(over, x, *spec) for x, spec in zip(arrays, specs, strict=True)]
    compiled = jax.jit(call).lower(*sharded).compile()
    assert not collectives(compiled)
    outs = compiled(*sharded)
    assert [x.sharding.spec for x in outs] == [P("a", None, "b"), P("a", None, "b")]
    for ours, theirs in zip(outs, function(device, *arrays), strict=True):
        assert oracle.relative_error(ours, theirs) < TOLERANCE
    assert not hopper


def test_mapped_queries_of_shards_share_their_cache(hopper):
    query, key, value, lengths = attention_arrays()
    queries = jnp.stack([query, -query, query[::-1]])
    over = mesh()
    specs = (None, "a", None, "b"), ("a", None, "b"), ("a", None, "b"), ("a",)
    sharded = [put(over, x, *spec) for x, spec in zip((queries, key, value, lengths), specs, strict=True)]
    compiled = jax.jit(jax.vmap(attend, (0, None, None, None))).lower(*sharded).compile()
    assert not collectives(compiled)
    assert hopper[-1] == ((2, 1, 6, 64), (2, 32, 1, 64))
    for out, one in zip(compiled(*sharded), queries, strict=True):
        assert oracle.relative_error(out, expected_of(one, key, value, lengths)) < TOLERANCE


def test_shards_of_cudnn_have_its_own_gradient(hopper, monkeypatch):
    """A stand-in of cuDNN, of many queries; one device's forward pass is the same in both, so that XLA runs it once."""
    calls = []
    attention = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    cudnn = jax.custom_vjp(attention)

    def forward(*arrays):
        calls.append("forward")
        return attention(*arrays), arrays

    def backward(arrays, grad):
        calls.append(grad.shape)
        return jax.vjp(attention, *arrays)[1](grad)

    cudnn.defvjp(forward, backward)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(xla, "_cudnn", lambda arrays, _: cudnn(arrays.query, arrays.key, arrays.value))
    arrays = bf16(0, 4, 64, 8, 64), bf16(1, 4, 64, 4, 64), bf16(2, 4, 64, 4, 64)
    over = mesh()
    sharded = [put(over, x, "a", None, "b") for x in arrays]

    def grads(op):
        return jax.jit(jax.grad(lambda *arrays: (op(*arrays).astype(jnp.float32) ** 2).sum(), argnums=(0, 1, 2)))

    compiled = grads(fdpp_jax.dot_product_attention).lower(*sharded).compile()
    assert not collectives(compiled)
    assert calls == ["forward", "forward", (2, 64, 2, 64)]
    for ours, theirs in zip(compiled(*sharded), grads(attention)(*arrays), strict=True):
        assert oracle.relative_error(ours, theirs) < TOLERANCE
    stacked = [jnp.stack([x, x]) for x in arrays]
    assert jnp.isfinite(grads(jax.vmap(fdpp_jax.dot_product_attention))(*stacked)[0]).all()
    assert jnp.isfinite(jax.jvp(fdpp_jax.dot_product_attention, arrays, arrays)[1]).all()


@pytest.mark.parametrize("moved", [(0,), (0, 1, 2)], ids=["query", "all"])
def test_the_gradient_of_one_key_value_head_is_that_of_all_its_group(hopper, monkeypatch, moved):
    """A stand-in of cuDNN. The heads of the query alone are sharded: each device's is a part of the sum."""
    attention = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(xla, "_cudnn", lambda arrays, _: attention(arrays.query, arrays.key, arrays.value))
    arrays = bf16(0, 4, 64, 8, 64), bf16(1, 4, 64, 1, 64), bf16(2, 4, 64, 1, 64)
    over = mesh()
    sharded = [put(over, x, "a", None, spec) for x, spec in zip(arrays, ("b", None, None), strict=True)]

    def grads(op):
        return jax.jit(jax.grad(lambda *arrays: (op(*arrays).astype(jnp.float32) ** 2).sum(), argnums=moved))

    compiled = grads(fdpp_jax.dot_product_attention).lower(*sharded).compile()
    assert bool(collectives(compiled)) == (len(moved) > 1)
    for ours, theirs in zip(compiled(*sharded), grads(attention)(*arrays), strict=True):
        assert oracle.relative_error(ours, theirs) < TOLERANCE


# ---- matmul


@pytest.mark.parametrize(
    ("x_spec", "w_spec", "expected", "shard"),
    [
        (("a",), (None, "b"), {}, ((2, 256), (256, 32))),
        (("a", "b"), ("b",), {"all-reduce": 1}, ((2, 64), (64, 128))),
        ((), (("a", "b"),), {"all-reduce": 1}, ((4, 32), (32, 128))),
        ((), (), {}, ((4, 256), (256, 128))),
    ],
    ids=["M and N", "M and K", "K", "whole"],
)
@pytest.mark.parametrize("w_order", ["kn", "nk"])
def test_matmul_of_shards(hopper, x_spec, w_spec, expected, shard, w_order):
    x, w = bf16(0, 4, 256), bf16(1, 256, 128)
    if w_order == "nk":
        w, w_spec, shard = w.T, (*w_spec, None, None)[1::-1], (shard[0], shard[1][::-1])
    over = mesh()
    sharded = put(over, x, *x_spec), put(over, w, *w_spec)
    compiled = jax.jit(functools.partial(fdpp_jax.flat_matmul, w_order=w_order)).lower(*sharded).compile()
    assert collectives(compiled) == expected
    assert hopper == [shard]
    product = np.asarray(x, np.float64) @ np.asarray(w if w_order == "kn" else w.T, np.float64)
    out = compiled(*sharded)
    assert out.dtype == x.dtype
    assert oracle.relative_error(out, product) < TOLERANCE


def test_leading_axes_are_sharded_too(hopper):
    x, w = bf16(0, 2, 2, 256), bf16(1, 256, 128)
    over = mesh()
    sharded = put(over, x, "a", None, "b"), put(over, w, "b")
    compiled = jax.jit(fdpp_jax.flat_matmul).lower(*sharded).compile()
    assert collectives(compiled) == {"all-reduce": 1}
    assert hopper == [((2, 64), (64, 128))]
    assert oracle.relative_error(compiled(*sharded), jnp.dot(x, w)) < 2 * TOLERANCE


@pytest.mark.parametrize(
    ("x_spec", "w_spec", "shard"),
    [(("a",), (None, "b"), ((2, 256), (256, 32))), (("a", "b"), ("b",), ((2, 64), (64, 128)))],
    ids=["N", "K"],
)
def test_a_shard_has_a_kernel_where_the_whole_call_has_none(hopper, monkeypatch, x_spec, w_spec, shard):
    (_, k), (_, n) = shard
    plan = heuristics.plan_matmul

    def plan_of_few(shape, device, implementation=None):
        return plan(shape, device, implementation if (shape.k, shape.n) == (k, n) else "xla")

    monkeypatch.setattr(heuristics, "plan_matmul", plan_of_few)
    over = mesh()
    x, w = bf16(0, 4, 256), bf16(1, 256, 128)
    out = jax.jit(fdpp_jax.flat_matmul)(put(over, x, *x_spec), put(over, w, *w_spec))
    assert hopper == [shard]
    assert oracle.relative_error(out, jnp.dot(x, w)) < 2 * TOLERANCE


# ---- explicit axes


def test_results_are_typed_on_explicit_meshes(hopper):
    over = mesh(AxisType.Explicit)
    arrays = attention_arrays()
    specs = ("a", None, "b"), ("a", None, "b"), ("a", None, "b"), ("a",)
    with jax.set_mesh(over):
        sharded = [put(over, x, *spec) for x, spec in zip(arrays, specs, strict=True)]
        found = jax.eval_shape(attend, *sharded)
        assert found.sharding.spec == P("a", None, "b", None)
        compiled = jax.jit(attend).lower(*sharded).compile()
        assert not collectives(compiled)
        assert hopper[-1][0] == (2, 1, 2, 64)
        assert oracle.relative_error(compiled(*sharded), expected_of(*arrays)) < TOLERANCE
        grads = jax.jit(jax.grad(lambda *arrays: attend(*arrays).astype(jnp.float32).sum(), argnums=(0, 1)))(*sharded)
        assert [grad.sharding.spec for grad in grads] == [P("a", None, "b", None)] * 2
        x, w = put(over, bf16(0, 4, 256), "a"), put(over, bf16(1, 256, 128), None, "b")
        out = jax.jit(fdpp_jax.flat_matmul)(x, w)
        assert out.sharding.spec == P("a", "b")
        assert oracle.relative_error(out, jnp.dot(np.asarray(x), np.asarray(w))) < 2 * TOLERANCE
        x, w = put(over, bf16(0, 4, 256), None, "b"), put(over, bf16(1, 256, 128), "b")
        assert jax.jit(fdpp_jax.flat_matmul)(x, w).sharding.spec == P(None, None)
