"""Which blocks of keys a tile of `prefill_attention` reads, and which keys of them its queries see."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.pallas.prefill_attention.refs import Facts, GlobalRefs, Past, SharedRefs
from fdpp_jax.plans.hopper_prefill import CONSUMERS, ROWS


class Block(NamedTuple):
    """A tile's rows, and the blocks of keys that they see: [begin, end), of which [inner, outer) are seen whole."""

    batch: jax.Array
    head: jax.Array  # of the rows
    kv_head: jax.Array
    first_row: jax.Array
    offset: jax.Array | int
    length: jax.Array | int
    start: jax.Array | int
    low: jax.Array | int  # keys [low, high) are seen by a query of the tile
    high: jax.Array
    begin: jax.Array
    inner: jax.Array
    outer: jax.Array
    end: jax.Array


def bounds(position: Any, start: Any, length: Any, facts: Facts) -> tuple[Any, Any]:
    """[low, high) of the keys that a query at a position sees."""
    low, high = start, length
    if facts.options.is_causal:
        high = jnp.minimum(high, position + 1)
    if facts.options.local_window_size is not None:
        left, right = facts.options.local_window_size
        low = jnp.maximum(low, position - left)
        high = jnp.minimum(high, position + right + 1)
    return low, high


def block_of(gmem: GlobalRefs, facts: Facts, tile: jax.Array) -> Block:
    """That of a tile."""
    config = facts.config
    batch, head, number = _place(tile, facts)
    first_row = number * config.block_q
    length = facts.capacity if gmem.lengths is None else jnp.minimum(gmem.lengths[batch], facts.capacity)
    start = 0 if gmem.starts is None else jnp.maximum(gmem.starts[batch], 0)
    offset = 0 if gmem.offset is None else gmem.offset[batch]
    last_row = jnp.minimum(first_row + config.block_q, facts.num_rows) - 1
    low, inner_high = bounds(offset + query_of(first_row, facts), start, length, facts)
    inner_low, high = bounds(offset + query_of(last_row, facts), start, length, facts)
    high = jnp.maximum(jnp.int32(high), 0)
    width = jnp.int32(config.block_kv)
    end = lax.div(high + width - 1, width)
    begin = jnp.minimum(lax.div(jnp.int32(low), width), end)
    inner = jnp.clip(lax.div(jnp.int32(inner_low) + width - 1, width), begin, end)
    outer = jnp.clip(lax.div(jnp.maximum(jnp.int32(inner_high), 0), width), inner, end)
    kv_head = lax.div(head, jnp.int32(facts.row_heads_per_kv_head))
    return Block(batch, head, kv_head, first_row, offset, length, start, low, high, begin, inner, outer, end)


def _place(index: jax.Array, facts: Facts) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sequence, head and block of rows of a tile.

    `heads_together` heads take turns; those left over come before all others. Of these the last rows are first: with a
    causal mask they have most keys to read, and what ends last should be short.
    """
    num_blocks, num_heads = jnp.int32(facts.num_blocks), facts.batch * facts.row_heads
    together = min(facts.config.heads_together, num_heads)
    rest = num_heads % together
    is_rest = index < rest * num_blocks
    index -= jnp.where(is_rest, 0, rest * num_blocks)
    section = lax.div(index, together * num_blocks)
    index -= section * (together * num_blocks)
    first_head = jnp.where(is_rest, 0, rest + section * together)
    num_here = jnp.where(is_rest, max(rest, 1), together)
    head = first_head + lax.rem(index, num_here)
    row_heads = jnp.int32(facts.row_heads)
    return lax.div(head, row_heads), lax.rem(head, row_heads), num_blocks - 1 - lax.div(index, num_here)


def number_of(i: jax.Array, block: Block, past: Past | None) -> jax.Array:
    """The number of key block i of a tile among all blocks of the CTA."""
    number = i - block.begin
    return number if past is None else number + past.blocks


def slot_of(i: jax.Array, block: Block, past: Past | None, facts: Facts) -> jax.Array:
    """The slot of key block i of a tile in the ring, which runs on from tile to tile."""
    return lax.rem(number_of(i, block, past), jnp.int32(facts.config.num_stages))


def query_of(row: jax.Array, facts: Facts) -> jax.Array:
    """The query of a row."""
    return row if facts.pack == 1 else lax.div(row, jnp.int32(facts.pack))


def is_live(
    shape: tuple[int, ...], first_key: jax.Array, first_row: jax.Array, block: Block, facts: Facts, has_low: bool
) -> Any:
    """Which keys of a block each row sees: [64, block_kv] bool."""
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, shape, layout=plgpu.Layout.WGMMA)
    key = iota(1) + first_key
    if not facts.has_positions:
        position = block.offset
    elif facts.pack == 1:
        position = iota(0) + (block.offset + first_row)
    else:
        row = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=plgpu.Layout.WGMMA.reduce(1))
        position = lax.broadcast_in_dim(query_of(row + first_row, facts) + block.offset, shape, [0])
    low, high = bounds(position, block.start, block.length, facts)
    is_live = key < high
    return is_live & (key >= low) if has_low else is_live


def clear_dead_values(
    smem: SharedRefs, slot: jax.Array, first_key: jax.Array, block: Block, facts: Facts, warpgroup: jax.Array
) -> None:
    """Zeroes values of a block that no query of the tile sees: 0 * NaN would be NaN. Each warpgroup clears a part."""
    width = facts.config.block_kv

    def clear(part: int) -> None:
        values = smem.v.at[slot, pl.ds(part * ROWS, ROWS)]
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS, facts.padded_dim), 0, layout=plgpu.Layout.WGMMA)
        row += first_key + part * ROWS
        loaded = plgpu.load(values, layout=plgpu.Layout.WGMMA)
        values[...] = jnp.where((row >= block.low) & (row < block.high), loaded, jnp.zeros_like(loaded))
        plgpu.commit_smem()

    @pl.when((first_key + width > block.high) | (first_key < block.low))
    def _clear() -> None:
        for part in range(width // ROWS):
            pl.when(warpgroup == part % CONSUMERS)(functools.partial(clear, part))
        plgpu.barrier_arrive(smem.cleared)
        plgpu.barrier_wait(smem.cleared)
