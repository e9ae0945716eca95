"""The query rows of one sequence and one key/value head, in one CTA of `decode_attention`.

attend() leaves the sums of this CTA's tiles in registers. A helper hands them over; the owner merges those of its
helpers with its own and writes the result: see `sums`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax import unified_max
from fdpp_jax.pallas.decode_attention import sums as partial_sums
from fdpp_jax.pallas.decode_attention import tiles as kv_tiles
from fdpp_jax.pallas.decode_attention.refs import GlobalRefs, SharedRefs
from fdpp_jax.pallas.decode_attention.shares import Place, Share, bounds
from fdpp_jax.pallas.decode_attention.sums import ROW, Sums, across, full, laid_out
from fdpp_jax.pallas.parts import cache_tiles, handover, registers, ring
from fdpp_jax.pallas.parts.registers import load
from fdpp_jax.pallas.parts.scores import LN2, LOG2E, LOWEST, capped


class Rows:
    """The query rows of one sequence and one key/value head.

    Args:
      gmem: Global memory.
      smem: Shared memory.
      share: The CTA's.
      stream: The CTA's.
      place: The sequence's.
      slot: Where the query is in `smem.q`.
      is_again: Whether the rows' maxima, in `smem.by_row`, take the place of phi.
    """

    def __init__(
        self,
        gmem: GlobalRefs,
        smem: SharedRefs,
        share: Share,
        stream: kv_tiles.Stream,
        place: Place,
        slot: jax.Array,
        *,
        is_again: bool = False,
    ) -> None:
        self.gmem, self.smem, self.facts, self.share, self.stream = gmem, smem, share.facts, share, stream
        self.place, self.slot, self.is_again = place, slot, is_again
        self.batch, self.live = share.sequence(place.i), share.live(place.i)
        self.start, self.stop = place.start, place.start + self.live.count
        self.query = smem.q.at[slot]
        self.num_rows = self.facts.num_rows

    def _shift(self, phi_gmem: jax.Ref) -> jax.Array:
        """[rows] in base 2: phi, or with `is_again` the rows' maxima."""
        ones = full((self.num_rows,), 1.0, ROW)
        if self.is_again:
            return load(self.smem.by_row, ROW, optimized=False)
        return ones * (phi_gmem[0] * LOG2E) if phi_gmem.ndim == 1 else self._per_row(phi_gmem)

    def _per_row(self, ref: jax.Ref) -> jax.Array:
        """[rows] of a float32 [1 or B, K, rows], in base 2."""
        row = ref.at[self.batch if ref.shape[0] > 1 else 0, self.share.kv_head]
        return load(row, ROW, optimized=False) * LOG2E

    def _bounds(self, shape: tuple[int, ...], axis: int, layout: Any) -> tuple[jax.Array | int, jax.Array]:
        """[low, high) of the keys that each row sees; scalars where all rows see the same."""
        facts, live = self.facts, self.live
        if facts.query_length == 1 or not (facts.options.is_causal or facts.options.local_window_size):
            return live.low, live.high
        row = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)
        return bounds(live.start, live.length, live.offset, lax.div(row, jnp.int32(facts.group)), facts)

    def _sees_key(self) -> jax.Array:
        """[rows] bool."""
        low, high = self._bounds((self.num_rows,), 0, ROW)
        keys = (high - low).astype(jnp.float32)
        return (full((self.num_rows,), 1.0, ROW) * keys if keys.ndim == 0 else keys) > 0

    def _any(self, is_set: jax.Array) -> jax.Array:
        """Whether any live row is set, for [rows] float32 of 0 and 1: a scalar, by way of shared memory."""
        self.smem.by_row[...] = is_set
        plgpu.commit_smem()
        return functools.reduce(jnp.logical_or, [self.smem.by_row[row] > 0 for row in range(self.facts.live_rows)])

    def attend(self) -> Sums:
        """The sums of this CTA's tiles. The loads of the query and of the first tiles have been started."""
        share, live = self.share, self.live
        first, last = (
            live.first + jnp.clip(position, self.start, self.stop) - self.start for position in (share.begin, share.end)
        )
        self._receive_query()
        return self._attend(first, last, share.begin + live.first - self.start)

    def redo(self) -> None:
        """Writes the result of all of the sequence's tiles, with the rows' maxima in place of phi.

        The query's load has been started; the ring is empty.
        """
        first = self.live.first
        last = first + self.live.count
        self._mark_redone()
        self._receive_query()
        self._find_max(first, last)
        num, den = self._attend(first, last, first)
        den = self._with_sink(den)
        self._store(num, 1.0 / den)
        self._store_log_sum(den)

    def _receive_query(self) -> None:
        plgpu.barrier_wait(self.smem.q_ready.at[self.slot])
        if self.smem.is_narrow and not self.facts.is_interpreted:
            kv_tiles.permute_query(self.query)

    def _attend(self, first: jax.Array, last: jax.Array, base: jax.Array) -> Sums:
        """The sums of the tiles [first, last), where tile `base` is in slot 0 of the ring."""
        smem, facts, live_keys = self.smem, self.facts, self.live
        block_kv = facts.config.block_kv
        scale = self._scale()
        phi = None if self.gmem.phi is None else self._shift(self.gmem.phi)

        def step(tile: jax.Array, carry: Sums) -> Sums:
            num, den, *row_max = carry
            slot = self._slot(tile, base)

            def receive_values() -> None:
                plgpu.barrier_wait(smem.v_ready.at[slot])
                if smem.v_wide is not None:
                    self._sync()  # the last tile's product has read v_wide and p
                    kv_tiles.widen_values(smem.v.at[slot], smem.v_wide.at[0])

            s, is_live = self._scores(tile, slot, scale, receive_values if smem.is_narrow else None)
            if phi is None:
                shift = jnp.maximum(row_max[0], jnp.where(is_live, s, LOWEST).max(axis=0))
                alpha = jnp.exp2(row_max[0] - shift)
                num *= across(alpha, num.shape)
                den *= across(alpha, den.shape)
                row_max = [shift]
            else:
                shift = phi
            p = jnp.where(is_live, jnp.exp2(s - across(shift, s.shape)), 0.0)
            if not smem.is_narrow:
                receive_values()
            if smem.v_factors is not None:
                den += p
                p *= across(self._factors(smem.v_factors, slot), s.shape, 0)
                p = jnp.where(is_live, p, 0.0)  # a scale beyond the length may be NaN
            p = p.astype(smem.p.dtype)
            if smem.v_factors is None:
                # The weights as rounded: a rounding error common to numerator and denominator cancels. The sum over
                # the keys follows once, after the last tile.
                den += p.astype(jnp.float32)
            smem.p.at[0].transpose((1, 0))[...] = p
            zero = 0 if self.facts.is_interpreted else kv_tiles.opaque_zero()
            values = smem.v.at[slot] if smem.v_wide is None else smem.v_wide.at[zero]
            if smem.v.dtype != jnp.int8:  # int8 has no NaN

                @pl.when((tile * block_kv < live_keys.low) | ((tile + 1) * block_kv > live_keys.high))
                def _clear_dead_values() -> None:
                    if smem.is_narrow:
                        self._sync()  # other threads widened these values
                    kv_tiles.clear_rows(values, live_keys.low - tile * block_kv, live_keys.high - tile * block_kv)

            plgpu.commit_smem()

            def product(acc: Any) -> jax.Array:
                plgpu.wgmma(acc, values.transpose((1, 0)), smem.p.at[zero].transpose((1, 0)))
                if smem.is_narrow:  # all threads have read the tile; the product reads v_wide
                    self._refill(tile, slot, last)
                return acc[...]

            num += pl.run_scoped(product, plgpu.ACC((facts.padded_dim, self.num_rows), jnp.float32))
            if not smem.is_narrow:
                self._sync()  # all warps have read p and the tile
                self._refill(tile, slot, last)
            return num, den, *row_max

        zeros = tuple(full((height, self.num_rows), 0, plgpu.Layout.WGMMA) for height in (facts.padded_dim, block_kv))
        start = zeros if phi is not None else (*zeros, full((self.num_rows,), LOWEST, ROW))
        num, den, *row_max = lax.fori_loop(first, last, step, start)
        if (factor := self._head_factor(self.gmem.v_scale)) is not None:
            num *= factor
        return laid_out((num, den.sum(axis=0), *row_max))

    def _find_max(self, first: jax.Array, last: jax.Array) -> None:
        """Leaves the rows' maxima over the tiles [first, last) in by_row, and starts the tiles' loads for _attend()."""
        num_stages, block_kv = self.facts.config.num_stages, self.facts.config.block_kv
        fetch = functools.partial(kv_tiles.fetch, self.gmem, self.smem, self.batch, self.share.kv_head)
        fetch_keys = functools.partial(fetch, keys_only=True)
        scale = self._scale()

        def step(tile: jax.Array, largest: jax.Array) -> jax.Array:
            slot = self._slot(tile, first)
            s, is_live = self._scores(tile, slot, scale)
            plgpu.commit_smem()  # all threads have read the tile
            pl.when(tile + num_stages < last)(lambda: fetch_keys(tile + num_stages, slot))
            return jnp.maximum(largest, jnp.where(is_live, s, LOWEST))

        ring.fill(fetch_keys, first, last, num_stages)
        largest = full((block_kv, self.num_rows), LOWEST, plgpu.Layout.WGMMA)
        row_max = lax.fori_loop(first, last, step, largest).max(axis=0)
        if self.gmem.sinks is not None:
            row_max = jnp.maximum(row_max, self._per_row(self.gmem.sinks))
        self.smem.by_row[...] = row_max
        plgpu.commit_smem()
        ring.fill(fetch, first, last, num_stages)

    def _slot(self, tile: jax.Array, base: jax.Array) -> jax.Array:
        return lax.rem(tile - base, jnp.int32(self.facts.config.num_stages))

    def _refill(self, tile: jax.Array, slot: jax.Array, last: jax.Array) -> None:
        """Starts the load that follows a tile in its slot, once all threads have read the tile; see `Stream.refill`."""
        self.stream.refill(slot, tile, last, self.place, self.live, self.batch, is_alone=self.is_again)

    def _sync(self) -> None:
        """All threads of the CTA arrive here before any goes on."""
        if not self.facts.is_interpreted:
            handover.sync()

    def _scale(self) -> jax.Array | float:
        factor = self._head_factor(self.gmem.k_scale)
        return self.facts.options.scale if factor is None else self.facts.options.scale * factor

    def _head_factor(self, scales_gmem: jax.Ref | None) -> jax.Array | None:
        """This head's factor on its keys or values; None where there are no scales, or scales per token."""
        return None if scales_gmem is None or scales_gmem.ndim > 1 else scales_gmem[self.share.kv_head]

    def _scores(
        self, tile: jax.Array, slot: jax.Array, scale: jax.Array | float, meanwhile: Callable[[], None] | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Scores [block_kv, rows] of the tile in `slot`, in base 2, and which are live.

        `meanwhile` is called once the product has been started.
        """
        facts, smem, cap = self.facts, self.smem, self.facts.options.logits_soft_cap
        plgpu.barrier_wait(smem.k_ready.at[slot])

        def product(acc: Any) -> jax.Array:
            if not smem.is_narrow:
                plgpu.wgmma(acc, smem.k.at[slot], self.query.transpose((1, 0)))
            elif facts.is_interpreted:  # the interpreter's wgmma takes no registers
                if meanwhile is not None:
                    meanwhile()
                return jnp.dot(smem.k[slot].astype(jnp.float32), self.query[...].astype(jnp.float32).T)
            else:
                query = smem.q.at[self.slot + kv_tiles.opaque_zero()]
                plgpu.wgmma(acc, kv_tiles.wide_keys(smem, slot), query.transpose((1, 0)))
            if meanwhile is not None:
                meanwhile()
            return acc[...]

        s = pl.run_scoped(product, plgpu.ACC((facts.config.block_kv, self.num_rows), jnp.float32))
        if smem.k_factors is not None:
            s *= across(self._factors(smem.k_factors, slot), s.shape, 0)
        if cap is None:
            # Rounded here, as the row's maximum is: the largest score minus the maximum is 0 however large it is.
            s = registers.rounded_product(s, scale * LOG2E, is_interpreted=facts.is_interpreted)
        else:
            s = capped(s, scale, cap)
        position = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=plgpu.Layout.WGMMA)
        position += tile * facts.config.block_kv
        low, high = self._bounds(s.shape, 1, plgpu.Layout.WGMMA)
        is_live = position < high
        if facts.options.local_window_size is not None or self.gmem.starts is not None:
            is_live &= position >= low
        return s, is_live

    def _factors(self, factors_smem: jax.Ref, slot: jax.Array) -> jax.Array:
        """[block_kv] scales of the tile of keys or values in `slot`."""
        kv_head, is_interpreted = self.share.kv_head, self.facts.is_interpreted
        return cache_tiles.factors(factors_smem, slot, kv_head, is_interpreted=is_interpreted)

    def hand_over(self, sums: Sums) -> None:
        """Leaves the sums for the owner, or for XLA."""
        partial_sums.hand_over(sums, self.gmem, self.smem, self.share)

    def finish(self, sums: Sums) -> jax.Array:
        """Merges the helpers' sums with the owner's, and writes the result unless a row must be recomputed.

        Returns:
          Whether a row left the safe window and must be recomputed, by redo(): then nothing is written.
        """
        return self._write(partial_sums.merge_helpers(sums, self.stop, self.gmem, self.smem, self.share))

    def _write(self, sums: Sums) -> jax.Array:
        """Divides by the denominators and stores [rows, H], or returns that a row left the safe window."""
        num, den, *row_max = laid_out(sums)
        if row_max:
            shift = row_max[0]
            if self.gmem.sinks is not None:
                sink = self._per_row(self.gmem.sinks)
                shift = jnp.maximum(row_max[0], sink)
                alpha = jnp.exp2(row_max[0] - shift)
                num, den = num * across(alpha, num.shape), den * alpha + jnp.exp2(sink - shift)
            if self.gmem.prior is not None:
                self._mark_redone()
            self._store(num, 1.0 / den)
            self._store_log_sum(den, shift)
            return jnp.bool_(False)
        den = self._with_sink(den)
        den_min, den_max = unified_max.window(self.smem.p.dtype, self.facts.capacity)
        checked = den + (num - num).sum(axis=0)  # NaN where a value as large as 1e18 made a sum infinite
        is_safe = (checked >= den_min) & (checked <= den_max)
        if not self.facts.recompute:  # the whole row becomes NaN: `Share.is_nan` looks at one element
            self._store(num, jnp.where(is_safe, 1.0 / den, jnp.nan))
            self._store_log_sum(den, is_safe=is_safe)
            return jnp.bool_(False)
        failed = self._any(jnp.where(self._sees_key(), jnp.where(is_safe, 0.0, 1.0), 0.0))

        @pl.when(jnp.logical_not(failed))
        def _store() -> None:
            self._store(num, 1.0 / den)
            self._store_log_sum(den)

        return failed

    def _with_sink(self, den: jax.Array) -> jax.Array:
        """The denominators and the sinks' terms, relative to phi or, with `is_again`, to the rows' maxima."""
        if self.gmem.sinks is None or self.gmem.phi is None:
            return den
        return den + jnp.exp2(self._per_row(self.gmem.sinks) - self._shift(self.gmem.phi))

    def _mark_redone(self) -> None:
        if self.gmem.redone is not None:
            self.gmem.redone[self.batch, self.share.kv_head] = jnp.int32(1)

    def _store(self, num: jax.Array, factor: jax.Array) -> None:
        """Writes num * factor, and zeros to rows that see no key. The result takes the query's place on its way."""
        factor = jnp.where(self._sees_key(), factor, 0.0)
        num, factor = laid_out((num, factor))
        self.query.transpose((1, 0))[...] = (num * across(factor, num.shape)).astype(self.smem.q.dtype)
        plgpu.commit_smem()
        assert self.gmem.out is not None
        plgpu.copy_smem_to_gmem(self.query, self.gmem.out.at[_box(self.share, self.batch)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _store_log_sum(self, den: jax.Array, shift: jax.Array | None = None, is_safe: jax.Array | None = None) -> None:
        """Writes ln den + shift if asked for: NaN where a row is not safe, its sink or -inf where it sees no key.

        Args:
          den: [rows].
          shift: [rows] in base 2; None: _shift().
          is_safe: [rows] bool; None: all are.
        """
        if self.gmem.log_sum is None:
            return
        if shift is None:
            assert self.gmem.phi is not None
            shift = self._shift(self.gmem.phi)
        log_sum = jnp.log(den) + shift * LN2
        if is_safe is not None:
            log_sum = jnp.where(is_safe, log_sum, jnp.nan)
        nothing = -jnp.inf if self.gmem.sinks is None else self._per_row(self.gmem.sinks) * LN2
        log_sum = jnp.where(self._sees_key(), log_sum, nothing)
        place = self.gmem.log_sum.at[self.batch, self.share.kv_head]
        if self.facts.is_interpreted:
            place[...] = log_sum
        else:
            handover.store(plgpu.layout_cast(log_sum, ROW), place)


def load_query(gmem: GlobalRefs, smem: SharedRefs, share: Share, i: jax.Array, slot: jax.Array) -> None:
    """Starts the load of the query of sequence i of the chunk."""
    source = gmem.q.at[_box(share, share.sequence(i))]
    plgpu.copy_gmem_to_smem(source, smem.q.at[slot], smem.q_ready.at[slot])


def copy_prior(gmem: GlobalRefs, smem: SharedRefs, share: Share, i: jax.Array) -> None:
    """Copies the earlier result of sequence i of the chunk, by way of the first query's place."""
    assert gmem.prior is not None
    assert gmem.out is not None
    box = _box(share, share.sequence(i))
    plgpu.copy_gmem_to_smem(gmem.prior.at[box], smem.q.at[0], smem.q_ready.at[0])
    plgpu.barrier_wait(smem.q_ready.at[0])
    plgpu.copy_smem_to_gmem(smem.q.at[0], gmem.out.at[box])
    plgpu.wait_smem_to_gmem(0)


def _box(share: Share, batch: jax.Array) -> tuple[jax.Array, jax.Array, pl.Slice, pl.Slice]:
    """Where the rows of a query or a result lie in [B, K, rows, H]."""
    zero = batch * 0  # a traced start lets a TMA box reach beyond the axis: zeros are read, and not written
    return batch, share.kv_head, pl.ds(zero, share.facts.num_rows), pl.ds(zero, share.facts.padded_dim)
