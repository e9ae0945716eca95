"""Attention with a unified max, as the fused layer's first phase: what each of its warpgroups does.

Keys and values come through the ring of weights, so weights of o follow them without a pause. With phi fixed, a CTA's
sums add to those of the others in any order, and no CTA agrees with another on a maximum.

    s [64 keys, rows] = K [64, H] @ q^T [H, rows]
    num [H, rows]    += V^T [H, 64] @ p [64, rows],   p = e^(s - phi)

Sums go as a product's do: to the warpgroup for results, which hands them to the owner or merges them (`shares`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax import unified_max
from fdpp_jax.pallas.fused_layer.redo import redo
from fdpp_jax.pallas.fused_layer.refs import GlobalRefs, SharedRefs, present
from fdpp_jax.pallas.fused_layer.shares import BLOCK_KV, MAX_COLUMNS, AttentionFacts, Segment, Shares
from fdpp_jax.pallas.parts import accumulators, grid_sync, overlap, registers
from fdpp_jax.pallas.parts.accumulators import LAYOUT
from fdpp_jax.pallas.parts.registers import load
from fdpp_jax.pallas.parts.scores import LOG2E, capped

_ROW = LAYOUT.reduce(0)  # a value per query row
_LOADED_TOGETHER = 4  # helpers whose sums are on their way at once

type Sums = tuple[jax.Array, ...]  # blocks [64, rows]: of H the parts of num, then the denominators' terms by key


class Attention:
    """Attention of one CTA."""

    def __init__(
        self, gmem: GlobalRefs, smem: SharedRefs, facts: AttentionFacts, *, is_interpreted: bool, awaits_grid: bool
    ):
        self.gmem, self.smem, self.facts = gmem, smem, facts
        self.is_interpreted, self.awaits_grid = is_interpreted, awaits_grid
        self.cta = lax.axis_index("cta")
        self.shares = Shares(present(gmem.lengths), facts, self.cta)

    # The warpgroup that streams weights

    def stream_tiles(self, done: jax.Array, *, is_helpers: bool) -> jax.Array:
        """Loads the tiles of keys and values; `done` stages were loaded before, and are with these."""
        return self.shares.for_segments(self._stream_tiles, done, is_helpers=is_helpers)

    def _stream_tiles(self, segment: Segment, done: jax.Array) -> jax.Array:
        def load(tile: jax.Array, done: jax.Array) -> jax.Array:
            # The launch before writes the new key and value, and no others.
            is_newest = (tile + 1) * BLOCK_KV >= segment.high
            pl.when(is_newest)(functools.partial(overlap.await_predecessor, is_interpreted=self.is_interpreted))
            for part in range(self.facts.stages_per_tile):
                self._load_stage(segment, tile, part, done + part)
            return done + self.facts.stages_per_tile

        return lax.fori_loop(segment.first, segment.last, load, done)

    def _load_stage(self, segment: Segment, tile: jax.Array, part: int, item: jax.Array) -> None:
        smem, facts, num_stages = self.smem, self.facts, self.smem.w.shape[0]
        slot = lax.rem(item, jnp.int32(num_stages))
        pl.when(item >= num_stages)(lambda: plgpu.barrier_wait(smem.w_free.at[slot]))
        keys = pl.ds(tile * BLOCK_KV, BLOCK_KV)  # of which TMA fills those beyond the cache with zeros
        width = min(facts.head_dim, MAX_COLUMNS)
        for half in range(2):
            of_values, first = divmod((2 * part + half) * width, facts.head_dim)
            cache = present((self.gmem.attended_keys, self.gmem.attended_values)[of_values])
            source = cache.at[segment.sequence, keys, pl.ds(segment.kv_head * facts.head_dim + first, width)]
            target = present(smem.kv).at[slot, half]
            plgpu.copy_gmem_to_smem(source, target, smem.w_ready.at[slot])

    # The warpgroup that streams inputs

    def stream_queries(self, done: jax.Array, *, is_helpers: bool) -> jax.Array:
        """Loads the queries of the CTA's units; `done` were loaded before, and are with these."""
        return self.shares.for_segments(self._load_query, done, is_helpers=is_helpers)

    def _load_query(self, segment: Segment, done: jax.Array) -> jax.Array:
        smem, facts = self.smem, self.facts

        @pl.when(segment.last > segment.first)
        def _load() -> None:
            slot = lax.rem(done, jnp.int32(2))
            pl.when(done >= 2)(lambda: plgpu.barrier_wait(present(smem.q_free).at[slot]))
            unit, zero = segment.sequence * facts.num_kv_heads + segment.kv_head, self.cta * 0
            # Pallas allows a box that reaches beyond the group if its start is traced.
            source = present(self.gmem.attending).at[unit, pl.ds(zero, facts.num_rows), pl.ds(zero, facts.head_dim)]
            plgpu.copy_gmem_to_smem(source, present(smem.q).at[slot], present(smem.q_ready).at[slot])

        return done + (segment.last > segment.first).astype(jnp.int32)

    # The warpgroup that multiplies

    def attend(
        self, done: tuple[jax.Array, jax.Array, jax.Array], *, is_helpers: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Leaves the sums of the CTA's segments in y. done: stages of the ring, queries, and products before."""
        return self.shares.for_segments(self._attend, done, is_helpers=is_helpers)

    def _attend(
        self, segment: Segment, done: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        smem, facts = self.smem, self.facts
        stages_done, queries_done, products_done = done
        is_there = segment.last > segment.first

        @pl.when(is_there)
        def _attend() -> None:
            q_slot = lax.rem(queries_done, jnp.int32(2))
            plgpu.barrier_wait(present(smem.q_ready).at[q_slot])
            sums = self._sums(segment, stages_done, q_slot)
            plgpu.barrier_arrive(present(smem.q_free).at[q_slot])
            pl.when(products_done > 0)(lambda: plgpu.barrier_wait(smem.y_free))
            for i, block in enumerate(sums):
                target = smem.y.at[pl.ds(i * facts.block_size, facts.block_size)]
                accumulators.leave(block, target, is_interpreted=self.is_interpreted)
            plgpu.barrier_arrive(smem.y_ready)

        count = is_there.astype(jnp.int32)
        stages = facts.stages_per_tile * (segment.last - segment.first)
        return stages_done + stages, queries_done + count, products_done + count

    def _sums(self, segment: Segment, stages_done: jax.Array, q_slot: jax.Array) -> Sums:
        smem, facts, num_stages = self.smem, self.facts, jnp.int32(self.smem.w.shape[0])
        query: Any = present(smem.q).at[q_slot]
        weights: Any = present(smem.p)
        phi = self._phi(segment)
        shape = BLOCK_KV, facts.num_rows

        def slot_of(tile: jax.Array, stage: int) -> jax.Array:
            first = stages_done + (tile - segment.first) * facts.stages_per_tile
            return lax.rem(first + stage, num_stages)

        def half(tile: jax.Array, part: int) -> Any:
            """Half a stage of the ring: columns from MAX_COLUMNS * part on of keys, then of values."""
            return present(smem.kv).at[slot_of(tile, part // 2), part % 2]

        parts_per_head = max(1, facts.head_dim // MAX_COLUMNS)
        width = min(facts.head_dim, MAX_COLUMNS)

        def step(tile: jax.Array, sums: Sums) -> Sums:
            def scores(acc: Any) -> jax.Array:
                for part in range(parts_per_head):
                    if part % 2 == 0:
                        plgpu.barrier_wait(smem.w_ready.at[slot_of(tile, part // 2)])
                    plgpu.wgmma(acc, half(tile, part), query.at[:, pl.ds(part * width, width)].transpose((1, 0)))
                return acc[...]

            p, rounded = self._weights(pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32)), tile, segment, phi)
            weights.transpose((1, 0))[...] = p
            for part in range(parts_per_head):
                if (parts_per_head + part) % 2 == 0:
                    plgpu.barrier_wait(smem.w_ready.at[slot_of(tile, (parts_per_head + part) // 2)])
                self._clear_dead(half(tile, parts_per_head + part), tile, segment)
            plgpu.commit_smem()

            def product(*accs: Any) -> tuple[jax.Array, ...]:
                for i, acc in enumerate(accs):
                    part, within = divmod(64 * i, width)
                    values = half(tile, parts_per_head + part).at[:, pl.ds(within, 64)]
                    plgpu.wgmma(acc, values.transpose((1, 0)), weights.transpose((1, 0)))
                return tuple(acc[...] for acc in accs)

            found = pl.run_scoped(product, *[plgpu.ACC((64, facts.num_rows), jnp.float32)] * facts.num_blocks)
            for stage in range(facts.stages_per_tile):
                plgpu.barrier_arrive(smem.w_free.at[slot_of(tile, stage)])
            *nums, den = sums
            return *(num + new for num, new in zip(nums, found, strict=True)), den + rounded

        zeros = plgpu.layout_cast(jnp.zeros((64, facts.num_rows), jnp.float32), LAYOUT)
        return lax.fori_loop(segment.first, segment.last, step, (zeros,) * (facts.num_blocks + 1))

    def _phi(self, segment: Segment) -> jax.Array:
        """[] or [rows], in base 2."""
        phi = present(self.gmem.phi)
        if phi.ndim == 1:
            return phi[0] * LOG2E
        return load(phi.at[segment.sequence, segment.kv_head], _ROW, optimized=False) * LOG2E

    def _weights(self, s: jax.Array, tile: jax.Array, segment: Segment, phi: jax.Array) -> tuple[jax.Array, jax.Array]:
        """e^(s - phi) of a tile's products s [64 keys, rows], in bfloat16, and as rounded in float32."""
        options = self.facts.options
        if options.logits_soft_cap is None:
            s = s * (options.scale * LOG2E)
        else:
            s = capped(s, options.scale, options.logits_soft_cap)
        position = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=LAYOUT) + tile * BLOCK_KV
        is_live = position < segment.high
        if options.local_window_size is not None:
            is_live &= position >= segment.low
        shift = phi if phi.ndim == 0 else lax.broadcast_in_dim(phi, s.shape, [1])
        p = jnp.where(is_live, jnp.exp2(s - shift), 0.0).astype(jnp.bfloat16)
        # The denominator sums up the weights as rounded: an error that is common to both cancels.
        return p, p.astype(jnp.float32)

    def _clear_dead(self, values: Any, tile: jax.Array, segment: Segment) -> None:
        """Zeroes values of dead keys, which may be NaN: 0 * NaN would be NaN."""
        low, high = segment.low - tile * BLOCK_KV, segment.high - tile * BLOCK_KV

        @pl.when((low > 0) | (high < BLOCK_KV))
        def _clear() -> None:
            for first in range(0, values.shape[1], 64):
                block = values.at[:, pl.ds(first, 64)]
                found = load(block, LAYOUT)
                row = plgpu.broadcasted_iota(jnp.int32, found.shape, 0, layout=LAYOUT)
                block[...] = jnp.where((row >= low) & (row < high), found, jnp.zeros_like(found))

    # The warpgroup for results

    def finish(self, *, is_helpers: bool) -> None:
        """Hands the CTA's sums to an owner, or merges and writes those of its units."""
        work = self._help if is_helpers else self._own
        self.shares.for_segments(lambda segment, _: work(segment), None, is_helpers=is_helpers)

    def _taken(self) -> Sums:
        plgpu.barrier_wait(self.smem.y_ready)
        sums = self._left(self.smem.y)
        plgpu.barrier_arrive(self.smem.y_free)
        return sums

    def _left(self, source: jax.Ref) -> Sums:
        facts = self.facts
        return tuple(
            accumulators.left(
                source.at[pl.ds(i * facts.block_size, facts.block_size)],
                facts.num_rows,
                is_partner=False,
                is_interpreted=self.is_interpreted,
            )
            for i in range(facts.num_blocks + 1)
        )

    def _help(self, segment: Segment) -> None:
        @pl.when(segment.last > segment.first)
        def _help() -> None:
            facts, sums = self.facts, self._taken()
            for i, block in enumerate(sums):
                place = pl.ds(i * facts.block_size, facts.block_size)
                target = present(self.gmem.attention_sums).at[self.cta, place]
                accumulators.leave(block, target, is_interpreted=self.is_interpreted)
            if self.awaits_grid:
                grid_sync.count(self.gmem.helper_counters.at[0, self.cta])

    def _own(self, segment: Segment) -> None:
        facts = self.facts
        sums = self._merged(segment, self._taken())
        *nums, terms = sums
        den = terms.sum(axis=0)
        den_min, den_max = unified_max.window(jnp.bfloat16, facts.capacity)
        # NaN where a value as large as 1e18 made a sum infinite.
        checked = den + sum((num - num).sum(axis=0) for num in nums)
        is_safe = (checked >= den_min) & (checked <= den_max)
        if facts.num_rows > facts.group:
            is_safe |= plgpu.broadcasted_iota(jnp.int32, (facts.num_rows,), 0, layout=_ROW) >= facts.group
        failed = registers.any_nonzero(jnp.where(is_safe, 0.0, 1.0), _ROW, is_interpreted=self.is_interpreted)

        @pl.when(failed == 0)
        def _store() -> None:
            factor = lax.broadcast_in_dim(1.0 / den, terms.shape, [1])
            head = segment.kv_head * facts.group
            shape = facts.group, facts.head_dim
            place = pl.ds(head * facts.head_dim, facts.group * facts.head_dim)
            target = present(self.gmem.attended).at[segment.sequence, place]
            for i, num in enumerate(nums):
                accumulators.store(
                    num * factor,
                    target,
                    jnp.int32(64 * i),
                    height=64,
                    is_interpreted=self.is_interpreted,
                    shape=shape,
                )

        @pl.when(failed != 0)
        def _redo() -> None:
            redo(self.gmem, facts, segment, is_interpreted=self.is_interpreted)

        if self.awaits_grid:
            _, num_x_tiles, _, block_k = self.smem.x.shape
            heads_per_chunk = num_x_tiles * block_k // facts.head_dim
            first_head = segment.kv_head * facts.group
            grid_sync.count_parts(self.gmem.result_counters.at[0], first_head, facts.group, heads_per_chunk)

    def _merged(self, segment: Segment, sums: Sums) -> Sums:
        """The owner's sums with those of its helpers added, always in the same order."""
        num_helpers = segment.num_helpers
        first = self.cta - num_helpers
        if self.awaits_grid:
            row = self.gmem.helper_counters.at[0]
            pl.when(num_helpers > 0)(lambda: grid_sync.await_each(row.at[first], num_helpers))

        def add(turn: jax.Array, sums: Sums) -> Sums:
            found = []
            for i in range(_LOADED_TOGETHER):
                index = turn * _LOADED_TOGETHER + i
                weight = (index < num_helpers).astype(jnp.float32)
                helper = first + jnp.minimum(index, num_helpers - 1)
                found.append((weight, self._left(present(self.gmem.attention_sums).at[helper])))
            for weight, others in found:
                sums = tuple(x + weight * y for x, y in zip(sums, others, strict=True))
            return sums

        num_turns = lax.div(num_helpers + (_LOADED_TOGETHER - 1), jnp.int32(_LOADED_TOGETHER))
        return lax.fori_loop(0, num_turns, add, sums)
