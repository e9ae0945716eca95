"""The warpgroup of `prefill_attention` that loads: it keeps the ring of key and value blocks full.

Keys and values of 8 bits come into a narrow ring first. The warpgroup copies them from there to the ring of 16 bits,
which is all that the tensor cores see, while the consumers compute.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.pallas.parts import cache_tiles, ring
from fdpp_jax.pallas.prefill_attention.blocks import Block, number_of, slot_of
from fdpp_jax.pallas.prefill_attention.refs import Facts, GlobalRefs, Past, SharedRefs
from fdpp_jax.plans.hopper_prefill import ROWS


class _Route(NamedTuple):
    """The way of keys, or of values, from the cache to the ring; scales and factors where each token has scales."""

    cache: jax.Ref
    scales: jax.Ref | None
    tile: jax.Ref
    factors: jax.Ref | None
    ready: ring.Barrier
    free: ring.Barrier


def load(
    gmem: GlobalRefs,
    smem: SharedRefs,
    facts: Facts,
    block: Block,
    past: Past | None = None,
    after_first: Callable[[], None] | None = None,
) -> None:
    """All key and value blocks of a tile; once the first of them is on its way, after_first()."""
    routes = (
        _Route(gmem.k, gmem.k_scale, smem.k, smem.k_factors, smem.k_ready, smem.k_free),
        _Route(gmem.v, gmem.v_scale, smem.v, smem.v_factors, smem.v_ready, smem.v_free),
    )

    def await_slot(i: jax.Array, free: ring.Barrier) -> jax.Array:
        """The slot of block i, once it is free."""
        slot = slot_of(i, block, past, facts)
        is_used = number_of(i, block, past) >= facts.config.num_stages
        pl.when(is_used)(lambda: plgpu.barrier_wait(free.at[slot]))
        return slot

    def end_step(i: jax.Array) -> None:
        if after_first is not None:
            pl.when(i == block.begin)(after_first)

    def boxes_of(i: jax.Array) -> list[cache_tiles.Box]:
        return list(cache_tiles.boxes(gmem.k, gmem.pages, block.batch, i, facts.config.block_kv))

    def copy(route: _Route, tile: jax.Ref, ready: ring.Barrier, boxes: list[cache_tiles.Box]) -> None:
        dims = pl.ds(block.batch * 0, facts.padded_dim)  # a traced start: TMA fills with zeros beyond the axis
        for box in boxes:
            source = route.cache.at[box.page, pl.ds(box.start, box.size), block.kv_head, dims]
            plgpu.copy_gmem_to_smem(source, tile.at[box.rows], ready)

    def stream() -> None:
        """Blocks in the queries' type."""

        def step(i: jax.Array, _: None) -> None:
            boxes = boxes_of(i)  # looked up before the wait
            for route in routes:
                slot = await_slot(i, route.free)
                copy(route, route.tile.at[slot], route.ready.at[slot], boxes)
            end_step(i)

        lax.fori_loop(block.begin, block.end, step, None)

    def stream_narrow(narrow: jax.Ref, narrow_ready: ring.Barrier) -> None:
        """Blocks of 8 bits."""
        num_narrow = narrow.shape[0]
        places = 0, num_narrow - 1

        def fetch(i: jax.Array, turn: int) -> None:
            route, place, boxes = routes[turn], places[turn], boxes_of(i)
            copy(route, narrow.at[place], narrow_ready.at[place], boxes)
            if route.scales is not None and smem.narrow_scales is not None:
                for box in boxes:
                    heads = cache_tiles.scale_heads(block.kv_head)
                    source = route.scales.at[box.page, pl.ds(box.start, box.size), heads]
                    plgpu.copy_gmem_to_smem(source, smem.narrow_scales.at[place, box.rows], narrow_ready.at[place])

        def step(i: jax.Array, _: None) -> None:
            for turn, (route, place) in enumerate(zip(routes, places, strict=True)):
                slot = await_slot(i, route.free)
                plgpu.barrier_wait(narrow_ready.at[place])
                for part in range(facts.config.block_kv // ROWS):
                    rows = pl.ds(part * ROWS, ROWS)
                    wide = cache_tiles.load_wide(narrow.at[place, rows], cache_tiles.WIDENING, route.tile.dtype)
                    route.tile.at[slot, rows][...] = wide
                if route.factors is not None and smem.narrow_scales is not None:
                    route.factors.at[slot][...] = cache_tiles.factors(
                        smem.narrow_scales, place, block.kv_head, is_interpreted=facts.is_interpreted
                    )
                plgpu.commit_smem()  # all threads have read the narrow block
                plgpu.barrier_arrive(route.ready.at[slot])
                # What follows in its place.
                following = (i + 1, turn) if num_narrow == 2 else (i + turn, 1 - turn)
                pl.when(following[0] < block.end)(functools.partial(fetch, *following))
            end_step(i)

        for turn in range(num_narrow):
            pl.when(block.end > block.begin)(functools.partial(fetch, block.begin, turn))
        lax.fori_loop(block.begin, block.end, step, None)

    if smem.narrow is None:
        stream()
    else:
        stream_narrow(smem.narrow, smem.narrow_ready)
    if after_first is not None:
        pl.when(block.end == block.begin)(after_first)


def drain(smem: SharedRefs, facts: Facts, num_blocks: jax.Array) -> None:
    """Until the consumers have read all blocks: a CTA must not end while an arrival at its barriers is pending."""
    for free in (smem.k_free, smem.v_free):
        ring.drain(free, num_blocks, facts.config.num_stages)
