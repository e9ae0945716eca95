"""The query rows of one sequence and one key/value head, in one CTA of `decode_attention`.

attend() leaves the sums of some tiles in registers, publish() hands them to another CTA, finish() adds those of other
CTAs and writes the result. Sums are num [H, rows], den [rows] and, with online softmax, max [rows], in base 2.

`gmem` and `smem` hold the kernel's refs by name. What a call lacks (offsets, sinks, pages, scales) has no ref.
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
from fdpp_jax.pallas import handover, kv_tiles, registers, ring
from fdpp_jax.pallas.kv_shares import Place, Share, bounds

LOG2E = 1.4426950408889634
# No score is lower, yet it is finite, so that max - max of a share without keys is not a NaN.
_LOWEST = float(jnp.finfo(jnp.float32).min)
_ROW = plgpu.Layout.WGMMA.reduce(0)  # one value a query row

Sums = tuple[jax.Array, ...]


class Rows:
    """See the module."""

    def __init__(
        self,
        gmem: Any,
        smem: Any,
        share: Share,
        stream: kv_tiles.Stream,
        place: Place,
        slot: jax.Array,
        *,
        is_again: bool = False,  # with the rows' maxima in place of phi
    ):
        self.gmem, self.smem, self.facts, self.share, self.stream = gmem, smem, share.facts, share, stream
        self.place, self.slot, self.is_again = place, slot, is_again
        self.batch, self.live = share.sequence(place[0]), share.live(place[0])
        self.start, self.stop = place[1], place[1] + self.live.count
        self.query = smem.q.at[slot]
        _, self.num_rows, self.padded_dim = smem.q.shape
        self.in_cluster = hasattr(smem, "given_num")
        self.token_scales = hasattr(smem, "k_factors")
        self.head_scales = hasattr(gmem, "k_scale") and not self.token_scales

    def _shift(self) -> jax.Array:
        """[rows] in base 2: phi, or the second time the rows' maxima."""
        ones = _full((self.num_rows,), 1.0, _ROW)
        if self.is_again:
            return plgpu.load(self.smem.by_row, layout=_ROW, optimized=False)
        return ones * (self.gmem.phi[0] * LOG2E) if self.gmem.phi.ndim == 1 else self._per_row("phi")

    def _per_row(self, name: str) -> jax.Array:
        """[rows] of a float32 [1 or B, K, rows], in base 2."""
        ref = getattr(self.gmem, name)
        row = ref.at[self.batch if ref.shape[0] > 1 else 0, self.share.kv_head]
        return plgpu.load(row, layout=_ROW, optimized=False) * LOG2E

    def _bounds(self, shape: tuple[int, ...], axis: int, layout: Any) -> tuple[Any, Any]:
        """[low, high) of the keys that each row sees; scalars where all rows see the same."""
        facts, live = self.facts, self.live
        if facts.query_length == 1 or not (facts.is_causal or facts.window):
            return live.low, live.high
        row = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)
        return bounds(live.length, live.offset, lax.div(row, jnp.int32(facts.group)), facts)

    def _sees_key(self) -> jax.Array:
        """[rows] bool."""
        low, high = self._bounds((self.num_rows,), 0, _ROW)
        keys = (high - low).astype(jnp.float32)
        return (_full((self.num_rows,), 1.0, _ROW) * keys if keys.ndim == 0 else keys) > 0

    def _any(self, is_set: jax.Array) -> jax.Array:
        """Whether any live row is set, for [rows] float32 of 0 and 1: a scalar, by way of shared memory."""
        self.smem.by_row[...] = is_set
        plgpu.commit_smem()
        return functools.reduce(jnp.logical_or, [self.smem.by_row[row] > 0 for row in range(self.facts.live_rows)])

    def attend(self) -> Sums:
        """The sums of this CTA's tiles, whose loads and whose query's have been started."""
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
        self._store(num, 1.0 / self._with_sink(den))

    def _receive_query(self) -> None:
        plgpu.barrier_wait(self.smem.q_ready.at[self.slot])
        if kv_tiles.is_narrow(self.smem) and not self.facts.is_interpreted:
            kv_tiles.permute_query(self.query)

    def _attend(self, first: jax.Array, last: jax.Array, base: jax.Array) -> Sums:
        """The sums of the tiles [first, last), where tile `base` is in slot 0 of the ring."""
        smem, facts, live_keys = self.smem, self.facts, self.live
        block_kv = facts.config.block_kv
        is_narrow = kv_tiles.is_narrow(smem)
        scale = self._scale()
        phi = self._shift() if hasattr(self.gmem, "phi") else None

        def step(tile: jax.Array, carry: Sums) -> Sums:
            num, den, *row_max = carry
            slot = self._slot(tile, base)

            def receive_values() -> None:
                plgpu.barrier_wait(smem.v_ready.at[slot])
                self._sync()  # v_wide and p were read by the last tile's product
                kv_tiles.widen_values(smem, slot)

            s, live = self._scores(tile, slot, scale, receive_values if is_narrow else None)
            if phi is None:
                shift = jnp.maximum(row_max[0], jnp.where(live, s, _LOWEST).max(axis=0))
                alpha = jnp.exp2(row_max[0] - shift)
                num *= _across(alpha, num.shape)
                den *= _across(alpha, den.shape)
                row_max = [shift]
            else:
                shift = phi
            p = jnp.where(live, jnp.exp2(s - _across(shift, s.shape)), 0.0)
            if not is_narrow:
                plgpu.barrier_wait(smem.v_ready.at[slot])
            if self.token_scales:
                den += p
                p *= _across(self._factors("v", slot), s.shape, 0)
                p = jnp.where(live, p, 0.0)  # a scale beyond the length may be NaN
            p = p.astype(smem.p.dtype)
            if not self.token_scales:
                # The sum of the weights as rounded: a rounding error common to numerator and denominator cancels.
                # Summed over the keys once, after the last tile.
                den += p.astype(jnp.float32)
            smem.p.at[0].transpose((1, 0))[...] = p
            zero = 0 if self.facts.is_interpreted else kv_tiles.opaque_zero()
            values = smem.v_wide.at[zero] if is_narrow else smem.v.at[slot]
            if smem.v.dtype != jnp.int8:  # which has no NaN

                @pl.when((tile * block_kv < live_keys.low) | ((tile + 1) * block_kv > live_keys.high))
                def _clear_dead_values() -> None:
                    if is_narrow:
                        self._sync()  # other threads widened them
                    kv_tiles.clear_rows(values, live_keys.low - tile * block_kv, live_keys.high - tile * block_kv)

            plgpu.commit_smem()

            def product(acc: Any) -> jax.Array:
                plgpu.wgmma(acc, values.transpose((1, 0)), smem.p.at[zero].transpose((1, 0)))
                if is_narrow:  # all threads have read the tile; the product reads v_wide
                    self._refill(tile, slot, last)
                return acc[...]

            num += pl.run_scoped(product, plgpu.ACC((self.padded_dim, self.num_rows), jnp.float32))
            if not is_narrow:
                self._sync()  # p and the tile were read by all warps
                self._refill(tile, slot, last)
            return num, den, *row_max

        zeros = _zeros(self.padded_dim, self.num_rows), _zeros(block_kv, self.num_rows)
        start = zeros if phi is not None else (*zeros, _full((self.num_rows,), _LOWEST, _ROW))
        num, den, *row_max = lax.fori_loop(first, last, step, start)
        if self.head_scales:
            num *= self.gmem.v_scale[self.share.kv_head]
        return _laid_out((num, den.sum(axis=0), *row_max))

    def _find_max(self, first: jax.Array, last: jax.Array) -> None:
        """Leaves the rows' maxima over the tiles [first, last) in by_row, and starts their loads for _attend()."""
        num_stages, block_kv = self.facts.config.num_stages, self.facts.config.block_kv
        fetch = functools.partial(kv_tiles.fetch, self.gmem, self.smem, self.batch, self.share.kv_head)
        fetch_keys = functools.partial(fetch, names=("k",))
        scale = self._scale()

        def step(tile: jax.Array, largest: jax.Array) -> jax.Array:
            slot = self._slot(tile, first)
            s, live = self._scores(tile, slot, scale)
            plgpu.commit_smem()  # all threads have read the tile
            pl.when(tile + num_stages < last)(lambda: fetch_keys(tile + num_stages, slot))
            return jnp.maximum(largest, jnp.where(live, s, _LOWEST))

        ring.fill(fetch_keys, first, last, num_stages)
        largest = _full((block_kv, self.num_rows), _LOWEST, plgpu.Layout.WGMMA)
        row_max = lax.fori_loop(first, last, step, largest).max(axis=0)
        if hasattr(self.gmem, "sinks"):
            row_max = jnp.maximum(row_max, self._per_row("sinks"))
        self.smem.by_row[...] = row_max
        plgpu.commit_smem()
        ring.fill(fetch, first, last, num_stages)

    def _slot(self, tile: jax.Array, base: jax.Array) -> jax.Array:
        return lax.rem(tile - base, jnp.int32(self.facts.config.num_stages))

    def _refill(self, tile: jax.Array, slot: jax.Array, last: jax.Array) -> None:
        """Starts the load that follows in the slot of a tile of [.., last), which all threads have read."""
        self.stream.refill(slot, tile, last, self.place, self.live, self.batch, is_alone=self.is_again)

    def _sync(self) -> None:
        """All threads of the CTA get here before any goes on."""
        if not self.facts.is_interpreted:
            handover.sync()

    def _scale(self) -> Any:
        return self.facts.scale * self.gmem.k_scale[self.share.kv_head] if self.head_scales else self.facts.scale

    def _scores(
        self, tile: jax.Array, slot: jax.Array, scale: Any, meanwhile: Callable[[], None] | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """[block_kv, rows] in base 2 of the tile in `slot`, and which are live. The product runs `meanwhile`."""
        facts, smem = self.facts, self.smem
        plgpu.barrier_wait(smem.k_ready.at[slot])

        def product(acc: Any) -> jax.Array:
            if not kv_tiles.is_narrow(smem):
                plgpu.wgmma(acc, smem.k.at[slot], self.query.transpose((1, 0)))
            elif facts.is_interpreted:  # whose wgmma takes no registers
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
        if self.token_scales:
            s *= _across(self._factors("k", slot), s.shape, 0)
        if facts.cap is None:
            # Rounded as the row's maximum is, which comes from it: their difference is 0 however large they are.
            s = registers.rounded_product(s, scale * LOG2E, is_interpreted=facts.is_interpreted)
        else:  # tanh from exp2, since the hardware's tanh is good to 11 bits only
            s = 1.0 - 2.0 / (jnp.exp2(s * (scale * (2 * LOG2E / facts.cap))) + 1.0)
            s *= facts.cap * LOG2E
        position = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=plgpu.Layout.WGMMA)
        position += tile * facts.config.block_kv
        low, high = self._bounds(s.shape, 1, plgpu.Layout.WGMMA)
        live = position < high
        if facts.window is not None:
            live &= position >= low
        return s, live

    def _factors(self, name: str, slot: jax.Array) -> jax.Array:
        """[block_kv] scales of the tile of keys or values in `slot`."""
        kv_head, is_interpreted = self.share.kv_head, self.facts.is_interpreted
        return kv_tiles.factors(self.smem, name, slot, kv_head, is_interpreted=is_interpreted)

    def publish(self, sums: Sums) -> None:
        """Leaves the sums at this CTA's place, of num the live rows only, and says so."""
        share = self.share
        if self.in_cluster:
            for name, value in zip(("num", "den", "max"), _laid_out(sums), strict=False):
                handover.store(value, getattr(self.smem, f"given_{name}").at[share.index], share.num_shares - 1)
            handover.arrive()
            return
        here = share.chunk, share.kv_head, share.index
        for name, value in zip(("num", "den", "max"), _laid_out(sums), strict=False):
            if not self.facts.is_interpreted:
                handover.store(value, getattr(self.gmem, name).at[here])
            else:
                getattr(self.gmem, name)[here] = (
                    handover.packed(value, self.facts.live_rows) if name == "num" else value
                )
        if hasattr(self.gmem, "flag") and not self.facts.is_interpreted:
            handover.raise_flag(self.gmem.flag.at[here])

    def finish(self, sums: Sums) -> jax.Array:
        """Adds the sums that other CTAs publish, whose indices are just below this one's, and writes the result.

        Returns:
          Whether it did not, since a row left the safe window: then redo() does.
        """
        share, facts = self.share, self.facts
        num_others = share.num_sharers(self.stop) - 1
        first = share.index - num_others
        # Loads in flight: up to 180 registers a thread. Of many sequences most have few CTAs each.
        num_registers = self.num_rows // 4 * (self.padded_dim // 32 + len(sums) - 1)
        max_others = facts.config.num_splits - 1
        num_rounds = -(-max_others // max(1, min(180 // num_registers, 8 if facts.chunk > 1 else max_others)))

        def add(turn: jax.Array, sums: Sums) -> Sums:
            others = [self._published(first, turn * unroll + i, num_others) for i in range(unroll)]
            for other in others:
                sums = _merged(sums, other)
            return _laid_out(sums)

        if max_others:
            unroll = -(-max_others // num_rounds)
            if self.in_cluster:
                pl.when(num_others > 0)(handover.await_cluster)
            elif not facts.is_interpreted:  # the interpreter runs one CTA after the other
                flag = self.gmem.flag.at[share.chunk, share.kv_head, first]
                pl.when(num_others > 0)(lambda: handover.await_flags(flag, num_others))
            sums = lax.fori_loop(0, lax.div(num_others + (unroll - 1), jnp.int32(unroll)), add, sums)
        return self._write(sums)

    def _published(self, first: jax.Array, index: jax.Array, num_others: jax.Array) -> Sums:
        """The sums of CTA first + index, or those of no keys if index is not below num_others."""
        is_there = index < num_others
        there: tuple[Any, ...] = self.share.chunk, self.share.kv_head, first + jnp.minimum(index, num_others - 1)
        refs = [getattr(self.gmem, name, None) for name in ("num", "den", "max")]
        if self.in_cluster:
            there = there[2:]
            refs = [getattr(self.smem, f"given_{name}", None) for name in ("num", "den", "max")]
        num_ref, *row_refs = (ref for ref in refs if ref is not None)
        if self.facts.is_interpreted:
            num = jnp.where(is_there, handover.unpacked(num_ref[there]).T, 0.0)
            num = jnp.pad(num, ((0, 0), (0, self.num_rows - num.shape[1])))
        else:
            num = handover.load(num_ref.at[there], self.num_rows, is_there, in_smem=self.in_cluster)
        den, *row_max = (plgpu.load(ref.at[there], layout=_ROW, optimized=False) for ref in row_refs)
        weight = is_there.astype(jnp.float32)
        return num, den * weight, *(x * weight + _LOWEST * (1 - weight) for x in row_max)

    def _write(self, sums: Sums) -> jax.Array:
        """Divides by the denominators and stores [rows, H], or returns that a row left the safe window."""
        num, den, *row_max = _laid_out(sums)
        if row_max:
            if hasattr(self.gmem, "sinks"):
                sink = self._per_row("sinks")
                shift = jnp.maximum(row_max[0], sink)
                alpha = jnp.exp2(row_max[0] - shift)
                num, den = num * _across(alpha, num.shape), den * alpha + jnp.exp2(sink - shift)
            if hasattr(self.gmem, "prior"):
                self._mark_redone()
            self._store(num, 1.0 / den)
            return jnp.bool_(False)
        den = self._with_sink(den)
        den_min, den_max = unified_max.window(self.smem.p.dtype, self.facts.capacity)
        checked = den + (num - num).sum(axis=0)  # NaN where a value as large as 1e18 made a sum infinite
        is_safe = (checked >= den_min) & (checked <= den_max)
        if not self.facts.recompute:  # the whole row becomes NaN, for whoever looks at a part of it
            self._store(num, jnp.where(is_safe, 1.0 / den, jnp.nan))
            return jnp.bool_(False)
        failed = self._any(jnp.where(self._sees_key(), jnp.where(is_safe, 0.0, 1.0), 0.0))
        pl.when(jnp.logical_not(failed))(lambda: self._store(num, 1.0 / den))
        return failed

    def _with_sink(self, den: jax.Array) -> jax.Array:
        """The denominators with a unified max, or the rows' own."""
        return den + jnp.exp2(self._per_row("sinks") - self._shift()) if hasattr(self.gmem, "sinks") else den

    def _mark_redone(self) -> None:
        if hasattr(self.gmem, "redone"):
            self.gmem.redone[self.batch, self.share.kv_head] = jnp.int32(1)

    def _store(self, num: jax.Array, factor: jax.Array) -> None:
        """Writes num * factor, and zeros to rows that see no key. The query is not needed any more: its place is."""
        factor = jnp.where(self._sees_key(), factor, 0.0)
        num, factor = _laid_out((num, factor))
        self.query.transpose((1, 0))[...] = (num * _across(factor, num.shape)).astype(self.smem.q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.query, self.gmem.out.at[box(self.smem, self.batch, self.share.kv_head)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def load_query(gmem: Any, smem: Any, share: Share, i: jax.Array, slot: jax.Array) -> None:
    """Starts the load of the query of sequence i of the chunk."""
    source = gmem.q.at[box(smem, share.sequence(i), share.kv_head)]
    plgpu.copy_gmem_to_smem(source, smem.q.at[slot], smem.q_ready.at[slot])


def copy_prior(gmem: Any, smem: Any, share: Share, i: jax.Array) -> None:
    """Makes the earlier result of sequence i of the chunk the result. Takes the place of the first query."""
    place = box(smem, share.sequence(i), share.kv_head)
    plgpu.copy_gmem_to_smem(gmem.prior.at[place], smem.q.at[0], smem.q_ready.at[0])
    plgpu.barrier_wait(smem.q_ready.at[0])
    plgpu.copy_smem_to_gmem(smem.q.at[0], gmem.out.at[place])
    plgpu.wait_smem_to_gmem(0)


def box(smem: Any, batch: jax.Array, kv_head: jax.Array) -> tuple[Any, ...]:
    """Where the rows of a query or a result lie in [B, K, rows, H]."""
    _, num_rows, padded_dim = smem.q.shape
    zero = batch * 0  # a traced start lets a TMA box reach beyond the axis: zeros are read, and not written
    return batch, kv_head, pl.ds(zero, num_rows), pl.ds(zero, padded_dim)


def _merged(sums: Sums, others: Sums) -> Sums:
    """The sums of two shares; with online softmax both are rescaled to the larger max first."""
    if len(sums) == 2:
        return sums[0] + others[0], sums[1] + others[1]
    row_max = jnp.maximum(sums[2], others[2])
    weight, other_weight = jnp.exp2(sums[2] - row_max), jnp.exp2(others[2] - row_max)
    num = sums[0] * _across(weight, sums[0].shape) + others[0] * _across(other_weight, others[0].shape)
    return num, sums[1] * weight + others[1] * other_weight, row_max


def _full(shape: tuple[int, ...], fill: float, layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, fill, jnp.float32), layout)


def _zeros(*shape: int) -> jax.Array:
    return _full(shape, 0, plgpu.Layout.WGMMA)


def _laid_out(sums: Sums) -> Sums:
    """The sums with their layouts: without, the compiler's search for them gives up at branches."""
    return plgpu.layout_cast(sums[0], plgpu.Layout.WGMMA), *(plgpu.layout_cast(x, _ROW) for x in sums[1:])


def _across(x: jax.Array, shape: tuple[int, ...], axis: int = 1) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [axis])
