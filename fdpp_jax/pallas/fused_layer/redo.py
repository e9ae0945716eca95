"""Attention of a unit whose sums left the safe window: again, with its rows' maxima, on CUDA cores.

The ring has weights in it by now. So keys and values are loaded straight into registers: slow, and hardly ever needed.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.pallas.fused_layer.refs import GlobalRefs, present
from fdpp_jax.pallas.fused_layer.shares import BLOCK_KV, AttentionFacts, Segment
from fdpp_jax.pallas.parts import handover
from fdpp_jax.pallas.parts.accumulators import LAYOUT
from fdpp_jax.pallas.parts.registers import load
from fdpp_jax.pallas.parts.scores import LOG2E, LOWEST, capped

_KEY = LAYOUT.reduce(1)  # a value per key
_COLUMN = LAYOUT.reduce(0)  # a value per column of a head


def redo(gmem: GlobalRefs, facts: AttentionFacts, segment: Segment, *, is_interpreted: bool) -> None:
    """Writes the exact result of all rows of a unit, and marks it as redone."""
    keys, values = present(gmem.attended_keys), present(gmem.attended_values)
    attended, options = present(gmem.attended), facts.options
    base = lax.div(jnp.int32(segment.low), jnp.int32(BLOCK_KV))
    unit = segment.sequence * facts.num_kv_heads + segment.kv_head
    end = lax.div(segment.high + (BLOCK_KV - 1), jnp.int32(BLOCK_KV))

    def place(tile: jax.Array) -> jax.Array:
        """The first key that is loaded for a tile; loads must stay within the cache."""
        return jnp.minimum(tile * BLOCK_KV, facts.capacity - BLOCK_KV)

    def is_live(tile: jax.Array, shape: tuple[int, ...], layout: Any) -> jax.Array:
        position = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) + place(tile)
        return (position >= jnp.maximum(segment.low, tile * BLOCK_KV)) & (position < segment.high)

    def block(cache: jax.Ref, tile: jax.Array, i: int) -> jax.Array:
        """64 columns of a tile [64, 64], in float32; dead keys may be anything."""
        columns = pl.ds(segment.kv_head * facts.head_dim + 64 * i, 64)
        found = load(cache.at[segment.sequence, pl.ds(place(tile), BLOCK_KV), columns], LAYOUT, optimized=False)
        return found.astype(jnp.float32)

    def redo_row(row: jax.Array, _: None) -> None:
        head = segment.kv_head * facts.group + row

        def scores(tile: jax.Array) -> jax.Array:
            """[64] in base 2, the lowest where a key is dead."""
            s = jnp.float32(0.0)
            for i in range(facts.num_blocks):
                query = present(gmem.attending).at[unit, row, pl.ds(64 * i, 64)]
                q = load(query, _COLUMN, optimized=False).astype(jnp.float32)
                s = s + (block(keys, tile, i) * lax.broadcast_in_dim(q, (BLOCK_KV, 64), [1])).sum(axis=1)
            if options.logits_soft_cap is None:
                s = s * (options.scale * LOG2E)
            else:
                s = capped(s, options.scale, options.logits_soft_cap)
            return jnp.where(is_live(tile, (BLOCK_KV,), _KEY), s, LOWEST)

        lowest = plgpu.layout_cast(jnp.full((BLOCK_KV,), LOWEST, jnp.float32), _KEY)
        largest = lax.fori_loop(base, end, lambda tile, x: jnp.maximum(x, scores(tile)), lowest).max()
        nothing = plgpu.layout_cast(jnp.zeros((BLOCK_KV,), jnp.float32), _KEY)
        den = lax.fori_loop(base, end, lambda tile, x: x + jnp.exp2(scores(tile) - largest), nothing).sum()
        for i in range(facts.num_blocks):

            def add(tile: jax.Array, num: jax.Array, i: int = i) -> jax.Array:
                p = jnp.exp2(scores(tile) - largest)
                live = is_live(tile, num.shape, LAYOUT)
                v = jnp.where(live, block(values, tile, i), 0.0)
                return num + v * lax.broadcast_in_dim(p, num.shape, [0])

            num = plgpu.layout_cast(jnp.zeros((BLOCK_KV, 64), jnp.float32), LAYOUT)
            num = lax.fori_loop(base, end, add, num).sum(axis=0) / den
            place_of = attended.at[segment.sequence, pl.ds(head * facts.head_dim + 64 * i, 64)]
            if is_interpreted:
                place_of[...] = num.astype(place_of.dtype)
            else:
                handover.store(num.astype(jnp.bfloat16), place_of)

    lax.fori_loop(0, facts.group, redo_row, None)
    if gmem.redone is not None:
        gmem.redone[segment.sequence, segment.kv_head] = jnp.int32(1)
