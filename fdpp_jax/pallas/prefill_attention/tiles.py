"""CTAs of `prefill_attention` that take many tiles in turn, a tile being 128 rows of a head.

A CTA claims its next tile where it has begun one, so tiles of any cost keep all CTAs busy. Its loader is ahead of its
consumers: the next tile's first keys and its queries come while the last tile's rows are computed and written. Tiles
with failed rows are computed again once the CTA has no others.

The loader claims, and lists the CTA's tiles in shared memory. That a tile is listed is known by its queries. For tile j
of a CTA, counted from 0 with the end of the list among them, the consumers wait once for `q_ready`, and arrive once
at `q_free` for tile j + 1.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from fdpp_jax.pallas.parts.registers import THREAD
from fdpp_jax.pallas.prefill_attention.blocks import Block, block_of
from fdpp_jax.pallas.prefill_attention.loader import drain, load
from fdpp_jax.pallas.prefill_attention.refs import Facts, GlobalRefs, Past, SharedRefs
from fdpp_jax.pallas.prefill_attention.rows import consume, free_place, place_of, query_box
from fdpp_jax.plans.hopper_prefill import CONSUMERS, MAX_TILES

# A thread of the last warp claims: the first warp issues the loads meanwhile.
_CLAIM = f"""{{{THREAD}
  .reg .pred is_mine, has_room;
  .reg .b32 tile, address;
  setp.eq.u32 is_mine, thread, 96;
  setp.lt.and.s32 has_room, $2, {MAX_TILES}, is_mine;
  mov.u32 tile, NUM_TILES;
  @has_room atom.relaxed.gpu.global.add.u32 tile, [$0], 1;
  @has_room add.u32 tile, tile, NUM_CTAS;
  mad.lo.u32 address, $2, 4, $1;
  @is_mine st.shared.u32 [address], tile;
}}"""


def counter() -> jax.Ref:
    """Of the tiles that are claimed, beyond the first of each CTA."""
    found: jax.Ref = jax.new_ref(jnp.zeros((1,), jnp.int32))
    return found


def load_all(gmem: GlobalRefs, smem: SharedRefs, facts: Facts) -> None:
    """Claims tiles, and loads their queries, keys and values."""
    assert smem.tiles is not None
    listed = smem.tiles

    def await_places(tile: jax.Array) -> None:
        assert smem.q_free is not None
        for i in range(CONSUMERS):
            plgpu.barrier_wait(smem.q_free.at[place_of(smem, tile, i)])

    def load_queries(block: Block, tile: jax.Array) -> None:
        pl.when(tile > 0)(lambda: await_places(tile))
        for i in range(CONSUMERS):
            place = smem.q.at[lax.rem(tile, jnp.int32(smem.q.shape[0])), i]
            ready = smem.q_ready.at[place_of(smem, tile, i)]
            plgpu.copy_gmem_to_smem(gmem.q.at[query_box(block, i, facts)], place, ready)

    def load_tile(block: Block, past: Past) -> None:
        load(gmem, smem, facts, block, past, functools.partial(load_queries, block, past.tiles))

    def step(carry: tuple[jax.Array, Past]) -> tuple[jax.Array, Past]:
        index, past = carry
        _claim(gmem.counter, listed, index, past.tiles + 1, facts)
        block = block_of(gmem, facts, index)
        load_tile(block, past)
        plgpu.commit_smem()  # the number is there, for all threads
        return listed[past.tiles + 1], _after(past, block)

    first = lax.axis_index("cta")
    listed[0] = first
    plgpu.commit_smem()
    past = _while_tiles(step, first, facts)
    await_places(past.tiles)
    for i in range(CONSUMERS):  # the list has an end
        plgpu.barrier_arrive(smem.q_ready.at[place_of(smem, past.tiles, i)])
    past = past._replace(tiles=past.tiles + 1)
    if facts.recompute:
        past = _redo(gmem, smem, facts, past, load_tile)
    drain(smem, facts, past.blocks)
    await_places(past.tiles)


def consume_all(gmem: GlobalRefs, smem: SharedRefs, facts: Facts, warpgroup: jax.Array) -> None:
    """Computes and writes the rows of one warpgroup of all tiles of the CTA."""

    def await_queries(tile: jax.Array) -> None:
        plgpu.barrier_wait(smem.q_ready.at[place_of(smem, tile, warpgroup)])

    def await_tile(tile: jax.Array) -> jax.Array:
        """The number of a tile of the CTA, once its queries are there."""
        assert smem.tiles is not None
        await_queries(tile)
        index: jax.Array = smem.tiles[tile]
        return index

    def step(carry: tuple[jax.Array, Past]) -> tuple[jax.Array, Past]:
        index, past = carry
        block = block_of(gmem, facts, index)
        has_failed = consume(gmem, smem, facts, block, warpgroup, past)
        if facts.recompute:
            assert smem.tile_failed is not None
            smem.tile_failed[warpgroup, past.tiles] = has_failed
            smem.has_failed[warpgroup] = smem.has_failed[warpgroup] | has_failed
        past = _after(past, block)
        return await_tile(past.tiles), past

    def redo_tile(block: Block, past: Past) -> None:
        await_queries(past.tiles)
        consume(gmem, smem, facts, block, warpgroup, past, is_again=True)

    if facts.recompute:
        smem.has_failed[warpgroup] = jnp.int32(0)
    past = _while_tiles(step, await_tile(jnp.int32(0)), facts)
    past = past._replace(tiles=past.tiles + 1)
    free_place(smem, past.tiles, warpgroup)
    if facts.recompute:
        plgpu.barrier_arrive(smem.verdict)
        _redo(gmem, smem, facts, past, redo_tile)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _claim(counter: jax.Ref | None, listed: jax.Ref, index: jax.Array, tile: jax.Array, facts: Facts) -> None:
    """Lists the next tile of the CTA as its tile of this number, or a number that is no tile's; commit_smem() waits."""
    if counter is None:  # interpreted
        listed[tile] = index + facts.num_ctas
        return
    text = _CLAIM.replace("NUM_TILES", str(facts.num_tiles)).replace("NUM_CTAS", str(facts.num_ctas))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))
    def emit(_: mgpu.LaunchContext, counter: ir.Value, listed: ir.Value, tile: mgpu.FragmentedArray) -> None:
        place = llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(listed))
        mgpu.utils.inline_ptx(text, mgpu.utils.memref_ptr(counter), place, tile.registers.item(), has_side_effects=True)

    emit(counter, listed, tile)


def _while_tiles(
    step: Callable[[tuple[jax.Array, Past]], tuple[jax.Array, Past]], first: jax.Array, facts: Facts
) -> Past:
    """step() from tile to tile, until the list ends; returns what the CTA then has had."""
    start = first, Past(jnp.int32(0), jnp.int32(0))
    past: Past = lax.while_loop(lambda carry: carry[0] < facts.num_tiles, step, start)[1]
    return past


def _after(past: Past, block: Block) -> Past:
    return Past(past.tiles + 1, past.blocks + block.end - block.begin)


def _redo(gmem: GlobalRefs, smem: SharedRefs, facts: Facts, past: Past, work: Callable[[Block, Past], None]) -> Past:
    """Once all tiles are written: work() for those that have failed rows; returns what the CTA then has had."""
    assert smem.tiles is not None
    assert smem.tile_failed is not None
    listed, tile_failed = smem.tiles, smem.tile_failed
    plgpu.barrier_wait(smem.verdict)
    has_failed = smem.has_failed[0] + smem.has_failed[1] > 0
    pl.when(has_failed)(lambda: plgpu.wait_smem_to_gmem(0))  # stores to the places of those that may be under way

    def step(i: jax.Array, past: Past) -> Past:
        is_failed = tile_failed[0, i] + tile_failed[1, i] > 0
        block = block_of(gmem, facts, listed[i])
        pl.when(is_failed)(lambda: work(block, past))
        following = _after(past, block)
        return Past(*(jnp.where(is_failed, new, old) for new, old in zip(following, past, strict=True)))

    found: Past = lax.fori_loop(0, jnp.where(has_failed, past.tiles - 1, 0), step, past)
    return found
