"""Attention of many queries per sequence over a cache, with a unified max or online softmax, for Hopper (Mosaic GPU).

A tile has 128 rows, the queries of one head, or of a group of heads (`packs_group`). Two warpgroups with 64 rows each
compute, and a third one loads. Both consumers go through the same key blocks:

    s [64, block_kv] = Q K^T        p = e^(s - phi)        o [64, H] += p V

They take turns on the tensor cores: while one computes its weights p, the other has its products. With phi fixed, a
step depends on none before, and o is never rescaled. With phi=None there is online softmax. Blocks that a mask, a
window or the lengths hide from all queries of the tile are not read. Only blocks that some of them see in part are
masked.

Where a denominator left the safe window, the row is NaN, and the CTA computes its rows again with online softmax.

A CTA has one tile of 128 rows, or takes tiles in turn (`config.num_ctas`) and so loads the next while it computes one.

Roles: `blocks` (which keys a tile sees), `rows` (one warpgroup's rows), `loader`, `tiles` (those of a CTA), `refs`.

Source: FlashDecoding++ (arXiv 2311.01282), section 3, and FlashAttention-3 (arXiv 2407.08608), sections 3.1 and 3.2.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.pallas.parts import cache_tiles, ring
from fdpp_jax.pallas.prefill_attention import tiles
from fdpp_jax.pallas.prefill_attention.blocks import Block, block_of
from fdpp_jax.pallas.prefill_attention.loader import drain, load
from fdpp_jax.pallas.prefill_attention.refs import Facts, GlobalRefs, SharedRefs
from fdpp_jax.pallas.prefill_attention.rows import consume
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions
from fdpp_jax.plans.hopper_prefill import (
    CONSUMERS,
    MAX_TILES,
    ROWS,
    PrefillAttentionConfig,
    num_ctas,
    num_narrow_stages,
)
from fdpp_jax.plans.manual_axes import vary_as_operands
from fdpp_jax.plans.shapes import round_up

# Per thread, of the loader and of a consumer; 168 each before. Widening takes registers of the loader.
_REGISTERS, _REGISTERS_WIDENING = (40, 232), (88, 208)


@functools.partial(jax.jit, static_argnames=("options", "config", "recompute", "interpret"))
@vary_as_operands
def prefill_attention(
    arrays: AttentionArrays,
    options: AttentionOptions,
    config: PrefillAttentionConfig,
    *,
    recompute: bool = False,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Any:
    """softmax(scale * q k^T) v for many query tokens per sequence.

    Args:
      arrays: query [B, T, N, H] bfloat16 or float16; key and value in its dtype, or int8 or float8_e4m3fn with scales,
        [B, S, K, H] or pages; phi None is online softmax. No bias, mask or traced scale.
      options: Static facts.
      config: Blocks and stages.
      recompute: Recompute rows outside the safe window; else they are NaN.
      interpret: Runs the kernel interpreted on the CPU.

    Returns:
      [B, T, N, H] in the query's dtype; with options.return_residual the pair of this and the rows' log-sum-exp
      [B, T, N] float32.
    """
    batch, query_length, num_heads, head_dim = arrays.query.shape
    num_kv_heads = arrays.key.shape[2]
    group = num_heads // num_kv_heads
    pack = group if config.packs_group else 1
    facts = Facts(
        config=config,
        options=options,
        num_ctas=0,
        batch=batch,
        num_rows=query_length * pack,
        row_heads=num_heads // pack,
        pack=pack,
        row_heads_per_kv_head=group // pack,
        padded_dim=round_up(head_dim, 64),
        capacity=arrays.capacity,
        recompute=recompute and arrays.phi is not None,
        is_interpreted=interpret is not None,
    )
    facts = facts._replace(num_ctas=num_ctas(config, facts.num_tiles))
    operands = _operands(arrays, facts)
    if facts.is_persistent and not facts.is_interpreted:
        operands["counter"] = tiles.counter()
    row_heads = facts.row_heads
    results: dict[str, Any] = dict(out=jax.ShapeDtypeStruct(operands["q"].shape, arrays.query.dtype))
    if options.return_residual:
        results["log_sum"] = jax.ShapeDtypeStruct((batch, row_heads, facts.num_blocks * config.block_q), jnp.float32)

    def body(*refs: jax.Ref, **smem: jax.Ref) -> None:
        gmem = GlobalRefs(**dict(zip((*operands, *results), refs, strict=True)))
        _attend(gmem, SharedRefs(**smem), facts)

    outs = plgpu.kernel(
        body,
        out_type=list(results.values()),
        scratch_types=_scratch(arrays, facts),
        grid=(facts.num_ctas,),
        grid_names=("cta",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name=f"prefill_attention_{'online' if arrays.phi is None else 'unified'}",
    )(*operands.values())

    def by_query(rows: jax.Array) -> jax.Array:  # [B, R, M, ...] -> [B, T, N, ...]
        rows = rows[:, : facts.num_rows]
        if pack == 1:
            return rows
        rows = rows.reshape(batch, query_length, pack, row_heads, *rows.shape[3:]).swapaxes(2, 3)
        return rows.reshape(batch, query_length, num_heads, *rows.shape[4:])

    if not options.return_residual:
        return by_query(outs[0])
    return by_query(outs[0]), by_query(outs[1].swapaxes(1, 2))


def _operands(arrays: AttentionArrays, facts: Facts) -> dict[str, Any]:
    """The kernel's operands, by the names of their refs in `GlobalRefs`."""
    query, key, value = arrays.query, arrays.key, arrays.value
    batch, query_length, num_heads, head_dim = query.shape
    pack, row_heads = facts.pack, facts.row_heads

    def padded(x: jax.Array) -> jax.Array:  # TMA takes tiles of 8 rows; lengths that are multiples of 8 save this copy
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0))) if x.shape[1] % 8 else x

    def by_head(x: jax.Array) -> jax.Array:  # [1 or B, N] -> as phi and sinks are in `GlobalRefs`
        if pack == 1:
            return x
        x = x.reshape(x.shape[0], row_heads, 1, pack)
        rows = jnp.broadcast_to(x, (*x.shape[:2], query_length, pack)).reshape(*x.shape[:2], facts.num_rows)
        return jnp.pad(rows, ((0, 0), (0, 0), (0, -facts.num_rows % facts.config.block_q)))

    if pack > 1:
        query = query.reshape(batch, query_length, row_heads, pack, head_dim).swapaxes(2, 3)
        query = query.reshape(batch, facts.num_rows, row_heads, head_dim)
    operands: dict[str, Any] = dict(q=padded(query), k=padded(key), v=padded(value))
    for name, array in (
        ("lengths", arrays.lengths),
        ("starts", arrays.starts),
        ("offset", arrays.query_offset),
        ("pages", arrays.page_table),
    ):
        if array is not None:
            operands[name] = array.astype(jnp.int32)
    if arrays.phi is not None:
        phi = arrays.phi.astype(jnp.float32)
        is_one = phi.ndim == 0 and pack == 1
        operands["phi"] = phi.reshape(1) if is_one else by_head(jnp.broadcast_to(phi, (batch, num_heads)))
    if arrays.sinks is not None:
        operands["sinks"] = by_head(arrays.sinks.astype(jnp.float32)[None])
    if arrays.key_scale is not None:
        operands |= dict(k_scale=arrays.key_scale, v_scale=arrays.value_scale)
    return operands


def _scratch(arrays: AttentionArrays, facts: Facts) -> dict[str, Any]:
    """The kernel's shared memory and barriers, by the names of their refs in `SharedRefs`."""
    config, dtype, padded_dim = facts.config, arrays.query.dtype, facts.padded_dim
    key, head_dim = arrays.key, arrays.query.shape[3]
    num_boxes = cache_tiles.num_boxes(None if arrays.page_table is None else key.shape[1], config.block_kv)
    transforms = ring.tile_transforms(head_dim, dtype)
    tile = plgpu.SMEM((config.num_stages, config.block_kv, padded_dim), dtype, transforms=transforms)
    narrow: dict[str, Any] = {}
    num_arrivals = num_boxes
    if key.dtype.itemsize == 1:
        shape = num_narrow_stages(head_dim), config.block_kv, padded_dim
        narrow["narrow"] = plgpu.SMEM(shape, key.dtype, transforms=ring.tile_transforms(head_dim, key.dtype))
        num_arrivals = 1  # the loader's
        if arrays.key_scale is not None and arrays.key_scale.ndim == 3:
            factors = plgpu.SMEM((config.num_stages, config.block_kv), jnp.float32)
            scales = plgpu.SMEM((*shape[:2], cache_tiles.SCALE_HEADS), jnp.float32)
            narrow |= dict(k_factors=factors, v_factors=factors, narrow_scales=scales)
            num_boxes *= 2
        narrow["narrow_ready"] = plgpu.Barrier(num_arrivals=num_boxes, num_barriers=shape[0])
    loaded = plgpu.Barrier(num_arrivals=num_arrivals, num_barriers=config.num_stages)
    consumed = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=config.num_stages)
    everyone = plgpu.Barrier(num_arrivals=CONSUMERS)
    num_places, lists = 1, {}
    if facts.is_persistent:
        num_places = config.query_places(padded_dim, key.dtype.itemsize)
        lists = dict(
            q_free=plgpu.Barrier(num_barriers=num_places * CONSUMERS),
            tiles=plgpu.SMEM((MAX_TILES + 1,), jnp.int32),
            tile_failed=plgpu.SMEM((CONSUMERS, MAX_TILES), jnp.int32),
        )
    return dict(
        q=plgpu.SMEM((num_places, CONSUMERS, ROWS, padded_dim), dtype, transforms=transforms),
        k=tile,
        v=tile,
        by_row=plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
        has_failed=plgpu.SMEM((CONSUMERS,), jnp.int32),
        q_ready=plgpu.Barrier(num_barriers=num_places * CONSUMERS),
        k_ready=loaded,
        v_ready=loaded,
        k_free=consumed,
        v_free=consumed,
        turn=everyone,
        cleared=everyone,
        verdict=everyone,
        **narrow,
        **lists,
    )


def _attend(gmem: GlobalRefs, smem: SharedRefs, facts: Facts) -> None:
    """One CTA."""
    warpgroup = lax.axis_index("warpgroup")
    loader_registers, consumer_registers = _REGISTERS if smem.narrow is None else _REGISTERS_WIDENING
    consume_all: Any = functools.partial(tiles.consume_all, gmem, smem, facts, warpgroup)
    load_all: Any = functools.partial(tiles.load_all, gmem, smem, facts)
    if not facts.is_persistent:
        block = block_of(gmem, facts, lax.axis_index("cta"))
        consume_all = functools.partial(_consume_one, gmem, smem, facts, block, warpgroup)
        load_all = functools.partial(_load_one, gmem, smem, facts, block)

    @pl.when(warpgroup < CONSUMERS)
    def _consume() -> None:
        plgpu.set_max_registers(consumer_registers, action="increase")
        consume_all()

    @pl.when(warpgroup == CONSUMERS)
    def _load() -> None:
        plgpu.set_max_registers(loader_registers, action="decrease")
        load_all()


def _consume_one(gmem: GlobalRefs, smem: SharedRefs, facts: Facts, block: Block, warpgroup: jax.Array) -> None:
    """The rows of one warpgroup, where a CTA has one tile."""
    work = functools.partial(consume, gmem, smem, facts, block, warpgroup)
    has_failed = work()
    if facts.recompute:
        smem.has_failed[warpgroup] = has_failed
        plgpu.barrier_arrive(smem.verdict)
        _if_failed(smem, functools.partial(work, is_again=True))


def _load_one(gmem: GlobalRefs, smem: SharedRefs, facts: Facts, block: Block) -> None:
    """The keys and values of a CTA that has one tile."""

    def load_and_drain() -> None:
        load(gmem, smem, facts, block)
        drain(smem, facts, block.end - block.begin)

    load_and_drain()
    if facts.recompute:
        _if_failed(smem, load_and_drain)


def _if_failed(smem: SharedRefs, work: Callable[[], Any]) -> None:
    """Once both consumers have written their rows: work() where a row of the CTA has failed."""
    plgpu.barrier_wait(smem.verdict)
    pl.when(smem.has_failed[0] + smem.has_failed[1] > 0)(lambda: (work(), None)[1])
