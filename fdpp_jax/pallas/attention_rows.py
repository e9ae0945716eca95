"""The query rows of one sequence and one key/value head, in one CTA of `decode_attention`.

attend() leaves the sums of some tiles in registers, publish() hands them to another CTA, finish() adds those of other
CTAs and writes the result. Sums are num [H, rows], den [rows] and, with online softmax, max [rows], in base 2.

`gmem` and `smem` hold the kernel's refs by name. What a call lacks (offsets, sinks, pages, scales) has no ref.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax import unified_max
from fdpp_jax.config import DecodeAttentionConfig
from fdpp_jax.pallas import handover, kv_tiles, ring

LOG2E = 1.4426950408889634
# Lower than any finite score, yet finite, so that max - max of a share without keys is not a NaN.
_LOWEST = -1e30
_ROW = plgpu.Layout.WGMMA.reduce(0)  # one value a query row

Sums = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is static of a call. Sizes are those of `decode_attention`; a chunk is the sequences that share CTAs."""

    config: DecodeAttentionConfig
    scale: float
    batch: int
    query_length: int
    group: int
    capacity: int
    chunk: int
    is_causal: bool
    window: tuple[int, int] | None
    cap: float | None
    recompute: bool
    is_interpreted: bool


@dataclasses.dataclass(frozen=True)
class Live:
    """What the queries of a sequence see: keys [low, high) of its `length`, in `count` tiles from `first` on."""

    length: jax.Array
    offset: jax.Array | int
    low: jax.Array | int
    high: jax.Array
    first: jax.Array
    count: jax.Array


def bounds(length: Any, offset: Any, token: Any, facts: Facts) -> tuple[Any, Any]:
    """The keys [low, high) that query `token` sees."""
    low: Any = 0
    high = length
    if facts.is_causal:
        high = jnp.minimum(high, offset + token + 1)
    if facts.window is not None:
        left, right = facts.window
        low, high = jnp.maximum(offset + token - left, 0), jnp.minimum(high, offset + token + right + 1)
    return low, high


class Rows:
    """See the module."""

    def __init__(self, gmem: Any, smem: Any, facts: Facts, batch: jax.Array, kv_head: jax.Array, live: Live):
        self.gmem, self.smem, self.facts, self.batch, self.kv_head, self.live = gmem, smem, facts, batch, kv_head, live
        self.num_rows, self.padded_dim = smem.q.shape
        zero = batch * 0  # a traced start lets a TMA box reach beyond the axis: zeros are read, and not written
        self.box = (batch, kv_head, pl.ds(zero, self.num_rows), pl.ds(zero, self.padded_dim))
        self.token_scales = hasattr(smem, "k_factors")
        self.head_scales = hasattr(gmem, "k_scale") and not self.token_scales

    def _phi(self) -> jax.Array:
        """[rows] in base 2."""
        if self.gmem.phi.ndim == 1:
            return _full((self.num_rows,), 1.0, _ROW) * (self.gmem.phi[0] * LOG2E)
        return self._per_row("phi")

    def _per_row(self, name: str) -> jax.Array:
        """[rows] of a float32 [1 or B, K, rows], in base 2."""
        ref = getattr(self.gmem, name)
        row = ref.at[self.batch if ref.shape[0] > 1 else 0, self.kv_head]
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
        self.smem.failed[...] = is_set
        plgpu.commit_smem()
        live_rows = self.facts.group * self.facts.query_length
        return functools.reduce(jnp.logical_or, [self.smem.failed[row] > 0 for row in range(live_rows)])

    def load_query(self) -> None:
        """Starts the load that the first attend() waits for."""
        plgpu.copy_gmem_to_smem(self.gmem.q.at[self.box], self.smem.q, self.smem.q_ready)

    def attend(self, first: jax.Array, last: jax.Array, *, online: bool, again: bool = False) -> Sums:
        """The sums of the tiles [first, last), after load_query(); `again` once more with the same query."""
        smem, facts, live_keys = self.smem, self.facts, self.live
        block_kv, num_stages = facts.config.block_kv, facts.config.num_stages
        fetch = functools.partial(kv_tiles.fetch, self.gmem, smem, self.batch, self.kv_head)
        ring.fill(fetch, first, last, num_stages)
        phi = None if online else self._phi()
        if not again:
            plgpu.barrier_wait(self.smem.q_ready)

        def step(tile: jax.Array, carry: Sums) -> Sums:
            slot = lax.rem(tile - first, jnp.int32(num_stages))
            s = self._scores(slot)
            position = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=plgpu.Layout.WGMMA) + tile * block_kv
            low, high = self._bounds(s.shape, 1, plgpu.Layout.WGMMA)
            live = position < high
            if facts.window is not None:
                live &= position >= low
            num, den, *row_max = carry
            if phi is None:
                shift = jnp.maximum(row_max[0], jnp.where(live, s, _LOWEST).max(axis=0))
                alpha = jnp.exp2(row_max[0] - shift)
                num *= _across(alpha, num.shape)
                den *= _across(alpha, den.shape)
                row_max = [shift]
            else:
                shift = phi
            p = jnp.where(live, jnp.exp2(s - _across(shift, s.shape)), 0.0)
            if self.token_scales:
                den += p
                plgpu.barrier_wait(smem.v_ready.at[slot])
                p *= _across(kv_tiles.factors(smem, "v", slot, self.kv_head), s.shape, 0)
                p = jnp.where(live, p, 0.0)  # a scale beyond the length may be NaN
            p = p.astype(smem.p.dtype)
            if not self.token_scales:
                # The sum of the weights as rounded: a rounding error common to numerator and denominator cancels.
                # Summed over the keys once, after the last tile.
                den += p.astype(jnp.float32)
            smem.p.transpose((1, 0))[...] = p
            if not self.token_scales:
                plgpu.barrier_wait(smem.v_ready.at[slot])
            values = kv_tiles.wide_values(smem, slot) if kv_tiles.is_narrow(smem) else smem.v.at[slot]

            @pl.when((tile * block_kv < live_keys.low) | ((tile + 1) * block_kv > live_keys.high))
            def _clear_dead_values() -> None:
                kv_tiles.clear_rows(values, live_keys.low - tile * block_kv, live_keys.high - tile * block_kv)

            plgpu.commit_smem()

            def product(acc: Any) -> jax.Array:
                plgpu.wgmma(acc, values.transpose((1, 0)), smem.p.transpose((1, 0)))
                return acc[...]

            num += pl.run_scoped(product, plgpu.ACC((self.padded_dim, self.num_rows), jnp.float32))
            pl.when(tile + num_stages < last)(functools.partial(fetch, tile + num_stages, slot))
            return num, den, *row_max

        carry = [
            _full((self.padded_dim, self.num_rows), 0, plgpu.Layout.WGMMA),
            _full((block_kv, self.num_rows), 0, plgpu.Layout.WGMMA),
        ]
        if online:
            carry.append(_full((self.num_rows,), _LOWEST, _ROW))
        num, den, *row_max = lax.fori_loop(first, last, step, tuple(carry))
        if self.head_scales:
            num *= self.gmem.v_scale[self.kv_head]
        return _laid_out((num, den.sum(axis=0), *row_max))

    def _scores(self, slot: jax.Array) -> jax.Array:
        """[block_kv, rows] in base 2, of the tile in `slot`."""
        facts, smem = self.facts, self.smem
        plgpu.barrier_wait(smem.k_ready.at[slot])
        keys = kv_tiles.wide_keys(smem, slot) if kv_tiles.is_narrow(smem) else smem.k.at[slot]

        def product(acc: Any) -> jax.Array:
            if kv_tiles.is_narrow(smem) and facts.is_interpreted:  # whose wgmma takes no registers
                return jnp.dot(keys.astype(jnp.float32), smem.q[...].astype(jnp.float32).T)
            plgpu.wgmma(acc, keys, smem.q.transpose((1, 0)))
            return acc[...]

        s = pl.run_scoped(product, plgpu.ACC((facts.config.block_kv, self.num_rows), jnp.float32))
        if self.token_scales:
            s *= _across(kv_tiles.factors(smem, "k", slot, self.kv_head), s.shape, 0)
        scale = facts.scale * self.gmem.k_scale[self.kv_head] if self.head_scales else facts.scale
        if facts.cap is None:
            return s * (scale * LOG2E)
        # tanh from exp2, since the hardware's tanh is good to 11 bits only.
        s = 1.0 - 2.0 / (jnp.exp2(s * (scale * (2 * LOG2E / facts.cap))) + 1.0)
        return s * (facts.cap * LOG2E)

    def publish(self, sums: Sums, here: tuple[jax.Array, ...]) -> None:
        """Leaves the sums at the place `here` [chunk, kv_head, share]."""
        for name, value in zip(("num", "den", "max"), _laid_out(sums), strict=False):
            if self.facts.is_interpreted:
                getattr(self.gmem, name)[here] = value
            else:
                handover.store(value, getattr(self.gmem, name).at[here])
        if hasattr(self.gmem, "flag") and not self.facts.is_interpreted:
            handover.raise_flag(self.gmem.flag.at[here])

    def finish(self, sums: Sums, chunk: jax.Array, first_share: jax.Array, num_others: jax.Array) -> None:
        """Adds the sums that `num_others` shares from first_share on publish, and writes the result."""
        gmem = self.gmem
        if not self.facts.is_interpreted:  # the interpreter runs one CTA after the other
            flag = gmem.flag.at[chunk, self.kv_head, first_share]
            pl.when(num_others > 0)(lambda: handover.await_flags(flag, num_others))
        # Loads in flight: 128 registers a thread, or 32 where more than two CTAs share an SM's registers.
        num_registers = 32 if kv_tiles.is_narrow(self.smem) else 128
        unroll = max(1, num_registers * 128 // (self.padded_dim * self.num_rows))

        def add(turn: jax.Array, sums: Sums) -> Sums:
            for i in range(unroll):
                index = turn * unroll + i
                there = (chunk, self.kv_head, first_share + jnp.minimum(index, num_others - 1))
                num = plgpu.load(gmem.num.at[there], layout=plgpu.Layout.WGMMA, optimized=False)
                stats = [
                    plgpu.load(getattr(gmem, name).at[there], layout=_ROW, optimized=False)
                    for name in ("den", "max")[: len(sums) - 1]
                ]
                weight = (index < num_others).astype(jnp.float32)  # a share too many is the last once more: weighs 0
                if len(sums) == 2:
                    sums = sums[0] + num * weight, sums[1] + stats[0] * weight
                else:
                    sums = _merged(sums, (num, stats[0], stats[1] * weight + _LOWEST * (1 - weight)))
            return _laid_out(sums)

        self.write(lax.fori_loop(0, lax.div(num_others + (unroll - 1), jnp.int32(unroll)), add, sums))

    def write(self, sums: Sums) -> None:
        """Divides by the denominators and stores [rows, H]; redoes the rows first, if one left the safe window."""
        num, den, *row_max = _laid_out(sums)
        if hasattr(self.gmem, "sinks"):
            sink = self._per_row("sinks")
            if row_max:
                shift = jnp.maximum(row_max[0], sink)
                alpha = jnp.exp2(row_max[0] - shift)
                num, den = num * _across(alpha, num.shape), den * alpha + jnp.exp2(sink - shift)
            else:
                den += jnp.exp2(sink - self._phi())
        if row_max:
            self._store(num, 1.0 / den)
            return
        den_min, den_max = unified_max.window(self.smem.p.dtype, self.facts.capacity)
        if not self.facts.recompute:
            is_safe = (den >= den_min) & (den <= den_max)
            self._store(num + (num - num), jnp.where(is_safe, 1.0 / den, jnp.nan))  # an infinite sum becomes NaN too
            return
        checked = den + (num - num).sum(axis=0)  # NaN where a value as large as 1e18 made a sum infinite
        is_safe = (checked >= den_min) & (checked <= den_max)
        failed = self._any(jnp.where(self._sees_key(), jnp.where(is_safe, 0.0, 1.0), 0.0))
        pl.when(jnp.logical_not(failed))(lambda: self._store(num, 1.0 / den))

        @pl.when(failed)
        def _recompute() -> None:
            first = self.live.first
            self.write(self.attend(first, first + self.live.count, online=True, again=True))

    def _store(self, num: jax.Array, factor: jax.Array) -> None:
        """Writes num * factor, and zeros to rows that see no key. The query is not needed any more: its place is."""
        factor = jnp.where(self._sees_key(), factor, 0.0)
        num, factor = _laid_out((num, factor))
        self.smem.q.transpose((1, 0))[...] = (num * _across(factor, num.shape)).astype(self.smem.q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.smem.q, self.gmem.out.at[self.box])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def prior_is_nan(self) -> jax.Array:
        """Whether a row of the earlier result is NaN."""
        rows = [
            self.gmem.prior[self.batch, self.kv_head, row, 0].astype(jnp.float32)
            for row in range(self.facts.group * self.facts.query_length)
        ]
        return functools.reduce(jnp.logical_or, [row != row for row in rows])

    def copy_prior(self) -> None:
        plgpu.copy_gmem_to_smem(self.gmem.prior.at[self.box], self.smem.q, self.smem.q_ready)
        plgpu.barrier_wait(self.smem.q_ready)
        plgpu.copy_smem_to_gmem(self.smem.q, self.gmem.out.at[self.box])
        plgpu.wait_smem_to_gmem(0)


def _merged(sums: Sums, others: Sums) -> Sums:
    """Online softmax of two shares: both rescaled to the larger max."""
    row_max = jnp.maximum(sums[2], others[2])
    weight, other_weight = jnp.exp2(sums[2] - row_max), jnp.exp2(others[2] - row_max)
    num = sums[0] * _across(weight, sums[0].shape) + others[0] * _across(other_weight, others[0].shape)
    return num, sums[1] * weight + others[1] * other_weight, row_max


def _full(shape: tuple[int, ...], fill: float, layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, fill, jnp.float32), layout)


def _laid_out(sums: Sums) -> Sums:
    """The sums with their layouts: without, the compiler's search for them gives up at branches."""
    return plgpu.layout_cast(sums[0], plgpu.Layout.WGMMA), *(plgpu.layout_cast(x, _ROW) for x in sums[1:])


def _across(x: jax.Array, shape: tuple[int, ...], axis: int = 1) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [axis])
