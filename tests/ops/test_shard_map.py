"""Ops within `jax.shard_map` over all or some axes of a mesh, as Hopper GPUs would run them."""

import functools

import jax
import jax.numpy as jnp
import oracle
import pytest
from hopper_case import attention_arrays, bf16, collectives, mesh, put
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fdpp_jax
from fdpp_jax import UnifiedMax

pytestmark = [
    pytest.mark.usefixtures("fresh_interpreter"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]
TOLERANCE = oracle.TOLERANCE["bfloat16"]


def attend(query, key, value, lengths, softmax=UnifiedMax(), **options):  # noqa: B008
    return fdpp_jax.dot_product_attention(query, key, value, key_value_seq_lengths=lengths, softmax=softmax, **options)


def expected_of(query, key, value, lengths):
    return oracle.attention(query[:, 0], key, value, lengths)[:, None]


def with_starts_and_residual(query, key, value, lengths, starts, softmax=UnifiedMax()):  # noqa: B008
    arguments = dict(key_value_seq_lengths=lengths, key_value_seq_starts=starts, softmax=softmax)
    return fdpp_jax.dot_product_attention(query, key, value, **arguments, return_residual=True)


@pytest.mark.parametrize("axis_names", [{"a", "b"}, {"a"}], ids=["manual", "one axis manual"])
def test_shards_within_shard_map(hopper, axis_names):
    over = mesh()
    arrays = attention_arrays()
    heads = "b" if "b" in axis_names else None
    specs = P("a", None, heads), P("a", None, heads), P("a", None, heads), P("a")
    call = jax.shard_map(attend, mesh=over, in_specs=specs, out_specs=specs[0], axis_names=axis_names)
    sharded = [put(over, x, "a", *([None, "b"] if x.ndim > 1 else [])) for x in arrays]
    compiled = jax.jit(call).lower(*sharded).compile()
    assert not collectives(compiled)
    assert hopper[-1][0] == (2, 1, 2, 64)
    assert oracle.relative_error(compiled(*sharded), expected_of(*arrays)) < TOLERANCE


_RESTS = {
    "keys": (("a",), ("a", "b"), ("a", "b")),
    "head dim": (("a", None, None, "b"), ("a", None, None, "b"), ("a", None, None, "b")),
    "queries": (("a", "b"), ("a",), ("a",)),
    "heads of the cache": (("a", None, None, "b"), ("a", None, "b"), ("a", None, "b")),
    "sequences of the cache": (("a",), (("a", "b"),), (("a", "b"),)),
}


@pytest.mark.parametrize("specs", _RESTS.values(), ids=_RESTS)
@pytest.mark.parametrize("manual", ["a", "b"])
def test_attention_beside_manual_axes_is_right_however_its_arrays_lie(hopper, specs, manual):
    """Axes that must be whole are sharded over the mesh axis that is not manual."""
    over = mesh(sizes=(2, 2))
    arrays = bf16(0, 4, 2, 8, 64), bf16(1, 4, 32, 4, 64), bf16(2, 4, 32, 4, 64)
    names = {"a": manual, "b": "b" if manual == "a" else "a", ("a", "b"): ("a", "b") if manual == "a" else ("b", "a")}
    sharded = [put(over, x, *(names.get(s) for s in spec)) for x, spec in zip(arrays, specs, strict=True)]
    is_causal = specs == _RESTS["queries"]
    attend = functools.partial(fdpp_jax.dot_product_attention, is_causal=is_causal, softmax=UnifiedMax())
    call = jax.shard_map(attend, mesh=over, in_specs=P(manual), out_specs=P(manual), axis_names={manual})
    expected = jax.nn.dot_product_attention(*arrays, is_causal=is_causal)
    assert oracle.relative_error(jax.jit(call)(*sharded), expected) < TOLERANCE
    assert hopper


@pytest.mark.parametrize("page_spec", [("b",), (None, "b"), (None, None, "b")], ids=["pool", "page", "heads"])
def test_pages_beside_manual_axes(hopper, page_spec):
    over = mesh(sizes=(2, 2))
    query, key, value, lengths = attention_arrays()
    pages, table = [x.reshape(8, 16, 4, 64) for x in (key, value)], jnp.arange(8).reshape(4, 2)

    def call(query, key, value, lengths, table):
        return attend(query, key, value, lengths, page_table=table)

    specs = P("a"), P(), P(), P("a"), P("a")
    sharded = [put(over, x, "a") for x in (query, lengths, table)]
    sharded[1:1] = [put(over, x, *page_spec) for x in pages]
    call = jax.shard_map(call, mesh=over, in_specs=specs, out_specs=P("a"), axis_names={"a"})
    out = jax.jit(call)(*sharded)
    assert hopper
    assert oracle.relative_error(out, expected_of(query, key, value, lengths)) < TOLERANCE


@pytest.mark.parametrize(("x_spec", "w_spec"), [(("a", "b"), ("b",)), (("a",), ("b",)), (("a", "b"), (None, "b"))])
def test_matmul_beside_manual_axes(hopper, x_spec, w_spec):
    over = mesh()
    x, w = bf16(0, 4, 256), bf16(1, 256, 128)
    call = jax.shard_map(fdpp_jax.flat_matmul, mesh=over, in_specs=(P("a"), P()), out_specs=P("a"), axis_names={"a"})
    out = jax.jit(call)(put(over, x, *x_spec), put(over, w, *w_spec))
    assert hopper
    assert oracle.relative_error(out, jnp.dot(x, w)) < 2 * TOLERANCE


def test_two_axes_beside_a_manual_one(hopper):
    """Of one size, so that the compiler's shardings do not tell which is which."""
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, got {jax.device_count()}")
    over = jax.make_mesh((2, 2, 2), ("x", "a", "y"), axis_types=(AxisType.Auto,) * 3)
    arrays = attention_arrays()
    specs = (("a", "y"), None, "x"), ("a", "x", "y"), ("a", None, "x", "y"), ("a",)
    sharded = [put(over, x, *spec) for x, spec in zip(arrays, specs, strict=True)]
    call = jax.shard_map(attend, mesh=over, in_specs=P("a"), out_specs=P("a"), axis_names={"a"})
    assert oracle.relative_error(jax.jit(call)(*sharded), expected_of(*arrays)) < TOLERANCE
    assert hopper


@pytest.mark.parametrize(
    "softmax",
    [pytest.param(None, id="online", marks=pytest.mark.slow), pytest.param(UnifiedMax(1.0), id="unified")],
)
@pytest.mark.parametrize("manual", ["a", "b"])
def test_attention_where_explicit_axes_are_beside_manual_ones(hopper, manual, softmax):
    other = "b" if manual == "a" else "a"
    over = mesh(AxisType.Explicit, sizes=(2, 2))
    arrays = attention_arrays()
    plain = functools.partial(attend, softmax=softmax, implementation="xla")

    def loss(call):
        return lambda query, *rest: (call(query, *rest).astype(jnp.float32) ** 2).sum()

    expected = jax.jit(jax.grad(loss(plain), argnums=(0, 1, 2)))(*arrays)
    with jax.set_mesh(over):
        sharded = [put(over, x, manual, *([None, other] if x.ndim > 1 else [])) for x in arrays]
        for op in (functools.partial(attend, softmax=softmax), jax.vmap(functools.partial(attend, softmax=softmax))):
            call = jax.jit(jax.shard_map(op, in_specs=P(manual), out_specs=P(manual), axis_names={manual}))
            assert oracle.relative_error(call(*sharded), expected_of(*arrays)) < TOLERANCE
            assert jax.eval_shape(call, *sharded).sharding.spec == P(manual, None, other, None)
            grads = jax.jit(jax.grad(loss(call), argnums=(0, 1, 2)))(*sharded)
            for ours, theirs in zip(grads, expected, strict=True):
                assert oracle.relative_error(ours, theirs) < 2 * TOLERANCE
    assert hopper[0][0] == (2, 1, 4, 64)


def test_matmul_where_explicit_axes_are_beside_manual_ones(hopper):
    over = mesh(AxisType.Explicit, sizes=(2, 2))
    x, w = bf16(0, 4, 256), bf16(1, 256, 128)
    specs = (("a",), (None, "b")), (("a", "b"), ("b",))
    with jax.set_mesh(over):
        for x_spec, w_spec in specs:
            call = jax.shard_map(fdpp_jax.flat_matmul, in_specs=(P("a"), P()), out_specs=P("a"), axis_names={"a"})
            out = jax.jit(call)(put(over, x, *x_spec), put(over, w, *w_spec))
            assert out.sharding.spec == P("a", "b" if w_spec[0] is None else None)
            assert oracle.relative_error(out, jnp.dot(x, w)) < 2 * TOLERANCE
    assert hopper[0] == ((2, 256), (256, 64))


def test_results_vary_as_the_operands_do(hopper):
    """Loop carries, branches and gradients; and a result that varies is not taken for one that does not."""
    over = mesh()
    query, key, value, lengths = attention_arrays()
    w = bf16(3, 64, 64) / 8
    spec = P("a", None, "b")

    def body(query, key, value, lengths, w):
        def step(_, carry):
            out = attend(carry, key, value, lengths)
            return fdpp_jax.flat_matmul(out, w)

        out = jax.lax.fori_loop(0, 2, step, query)
        return jax.lax.cond(lengths.sum() > 0, lambda: attend(out, key, value, lengths), lambda: out)

    specs = (spec, spec, spec, P("a"), P())
    call = jax.shard_map(body, mesh=over, in_specs=specs, out_specs=spec)
    out = jax.jit(call)(query, key, value, lengths, w)
    assert jnp.isfinite(out).all()
    grads = jax.jit(jax.grad(lambda *x: call(*x[:3], lengths, x[3]).astype(jnp.float32).sum(), argnums=(0, 1, 2, 3)))
    plain = jax.grad(lambda *x: body(*x[:3], lengths, x[3]).astype(jnp.float32).sum(), argnums=(0, 1, 2, 3))
    for ours, theirs in zip(grads(query, key, value, w), plain(query, key, value, w), strict=True):
        assert oracle.relative_error(ours, theirs) < 0.1
    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(jax.shard_map(body, mesh=over, in_specs=specs, out_specs=P()))(query, key, value, lengths, w)


def test_keys_over_devices_are_merged_by_their_residuals(hopper):
    """Each device attends to its share of the keys, and merges the results of all."""
    over = mesh()
    query, key, value, lengths = attention_arrays()

    def body(query, key, value, lengths):
        share = key.shape[1]
        live = jnp.clip(lengths - jax.lax.axis_index("b") * share, 0, share)
        out, log_sum = with_starts_and_residual(query, key, value, live, jnp.zeros_like(live))
        outs, log_sums = (jax.lax.all_gather(x, "b") for x in (out, log_sum))
        merged = outs[0], log_sums[0]
        for state in zip(outs[1:], log_sums[1:], strict=True):
            merged = fdpp_jax.merge_attention_states(*merged, *state)
        return merged[0]

    specs = P("a"), P("a", "b"), P("a", "b"), P("a")
    call = jax.shard_map(body, mesh=over, in_specs=specs, out_specs=P("a", "b"))
    out = jax.jit(call)(query, key, value, lengths)
    assert hopper[-1] == ((2, 1, 8, 64), (2, 8, 4, 64))
    for device in range(4):  # all have the same
        assert oracle.relative_error(out[:, device, None], expected_of(query, key, value, lengths)) < TOLERANCE
