"""Kernels within jax.shard_map, which checks what values vary over: traced and lowered, not run."""

import functools

import jax
import jax.numpy as jnp
import pytest
from hopper_case import attention_arrays, bf16, mesh
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from fdpp_jax import heuristics
from fdpp_jax.pallas.decode_attention.kernel import attend
from fdpp_jax.pallas.flat_matmul import flat_matmul
from fdpp_jax.pallas.fused_layer import fused_layer, fused_qkv, handover
from fdpp_jax.pallas.gemv import gemv
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions, LayerCache, LayerWeights, attention_shape
from fdpp_jax.plans.shapes import LayerShape, LayerSpec, MatmulShape

INTERPRET = {"lowered": None, "interpreted": plgpu.InterpretGPUParams()}


def check(body, arrays, specs, out_specs):
    """body's results vary as they should, within a loop and a branch, and as `out_specs` say."""
    over = mesh(sizes=(2, 1))

    def in_loop(*arrays):
        first = jax.tree.map(jnp.zeros_like, body(*arrays))
        out = lax.fori_loop(0, 2, lambda _, carry: body(*arrays), first)
        return lax.cond(jnp.isnan(jax.tree.leaves(out)[0]).any(), lambda: body(*arrays), lambda: out)

    in_loop_varies = jax.shard_map(in_loop, mesh=over, in_specs=specs, out_specs=out_specs)
    traced = jax.jit(in_loop_varies).trace(*arrays)
    with pytest.raises(ValueError, match="out_specs"):
        jax.eval_shape(jax.shard_map(body, mesh=over, in_specs=specs, out_specs=P()), *arrays)
    return traced


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("returns_residual", [False, True])
def test_attention(interpret, recompute, returns_residual):
    query, key, value, lengths = attention_arrays()
    options = AttentionOptions(0.125, return_residual=returns_residual)
    shard = AttentionArrays(query[:2], key[:2], value[:2], lengths[:2])
    config = heuristics.plan_attention(attention_shape(shard, options, is_online=False), "H200").config

    def body(query, key, value, lengths, redone):
        starts = lengths // 2 if returns_residual else None
        arrays = AttentionArrays(query, key, value, lengths, jnp.float32(1), starts=starts)
        call = functools.partial(attend, arrays, options, config, interpret=INTERPRET[interpret])
        return call(recompute=True, redone=redone) if recompute else call()

    specs = (P("a"),) * 4 + (P(),)
    check(body, (query, key, value, lengths, jnp.zeros((2, 4), jnp.int32)), specs, P("a"))


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize(("kernel", "rows"), [(flat_matmul, 4), (gemv, 1)])
def test_matmul(interpret, kernel, rows):
    config = heuristics.plan_matmul(MatmulShape(rows, 256, 128), "H200", kernel.__name__.split("_")[0]).config
    body = functools.partial(kernel, config=config, out_dtype="bfloat16", interpret=INTERPRET[interpret])
    check(body, (bf16(0, 2 * rows, 256), bf16(1, 256, 128)), (P("a"), P()), P("a"))


@pytest.mark.parametrize("interpret", INTERPRET)
def test_fused_layer(interpret):
    shape = LayerShape(4, 256, 512, 4, 2, 64)
    config = heuristics.plan_layer(shape, "H200").config
    weights = LayerWeights(
        input_norm=bf16(4, 256),
        qkv=bf16(5, 512, 256),
        o=bf16(0, 256, 256),
        mlp_norm=bf16(1, 256),
        mlp_in=bf16(2, 1024, 256),
        mlp_out=bf16(3, 256, 512),
    )
    cache = LayerCache(bf16(6, 8, 32, 2, 64), bf16(7, 8, 32, 2, 64), jnp.zeros(8, jnp.int32), jnp.ones((2, 8, 32)))
    keywords = dict(spec=LayerSpec(), config=config, interpret=INTERPRET[interpret])

    def body(attended, hidden, weights, cache):
        following, left = fused_qkv(hidden, weights, cache, handover(shape, config), **keywords)
        cache = cache._replace(keys=following.keys, values=following.values)
        hidden, following, _ = fused_layer(attended, hidden, weights, weights, cache, left, **keywords)
        return hidden, following

    cache_specs = LayerCache(P("a"), P("a"), P("a"), P(None, "a"))
    arrays = bf16(8, 8, 4, 64), bf16(9, 8, 256), weights, cache
    check(body, arrays, (P("a"), P("a"), P(), cache_specs), P("a"))
