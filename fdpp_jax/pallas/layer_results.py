"""Of a fused layer the warpgroup for results: what becomes of a product, until it is stored and counted.

`gmem` and `smem` hold the kernel's refs by name.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.pallas import accumulators, grid_sync, overlap
from fdpp_jax.pallas.accumulators import LAYOUT, WIDTH
from fdpp_jax.pallas.layer_phases import Facts, Phase, Segment, Step


class Results:
    """One CTA's; see the module."""

    def __init__(self, gmem: Any, smem: Any, facts: Facts, steps: tuple[Step, ...]):
        self.gmem, self.smem, self.facts, self.steps = gmem, smem, facts, steps
        self.cta = lax.axis_index("cta")
        self.is_whole = len(steps) > 1

    def finish(self) -> None:
        overlap.await_predecessor(is_interpreted=self.facts.is_interpreted)
        overlap.let_successor_start(is_interpreted=self.facts.is_interpreted)
        results = self.gmem.results
        if self.is_whole:  # what earlier launches left: none counts there before CTA 0 has counted its first unit
            for i in range(1, results.shape[0]):
                pl.when(self.cta == 0)(functools.partial(grid_sync.clear, results.at[i]))
        for step in self.steps:
            if step.is_guests:
                self.facts.for_segments(step, self.cta, functools.partial(self._leave, step), None)
                continue
            factor = None
            if step.phase.kind != "residual" and not self.facts.is_first:
                factor = self._factor(step)
            self.facts.for_segments(step, self.cta, functools.partial(self._finish, step, factor), None)
            if self.is_whole and step.index == 1:  # all CTAs have a whole unit of it, for which they saw all of row 0
                pl.when(self.cta == 0)(self._clear_first_row)

    def _clear_first_row(self) -> None:
        self._await_all(self.facts.phases[2], 1)
        grid_sync.clear(self.gmem.results.at[0])

    def _await_all(self, phase: Phase, row: int) -> None:
        """Waits for all that a phase reads."""
        grid_sync.await_row(self.gmem.results.at[row], phase.depth // WIDTH, self.facts.config.chunk // WIDTH)

    def _factor(self, step: Step) -> jax.Array:
        """1 / rms of every row [rows]."""
        if self.is_whole:
            self._await_all(step.phase, step.index - 1)
        facts = self.facts
        sums = self.gmem.middle_squares if step.phase.kind == "gate" else self.gmem.last_squares
        squares = plgpu.load(sums, layout=LAYOUT, optimized=False)
        is_sum = plgpu.broadcasted_iota(jnp.int32, squares.shape, 0, layout=LAYOUT) < 2 * facts.hidden_size // WIDTH
        mean = jnp.where(is_sum, squares, 0.0).sum(axis=0) / facts.hidden_size
        return lax.rsqrt(mean + facts.eps)

    def _take(self, is_alone: bool) -> tuple[jax.Array, ...]:
        """A product [64, rows], and unless it is alone with its halves changed for each other, too."""
        take = functools.partial(accumulators.left, self.smem.y, self.facts.num_rows)
        plgpu.barrier_wait(self.smem.y_ready)
        ys = tuple(
            take(is_partner=is_partner, is_interpreted=self.facts.is_interpreted)
            for is_partner in ((False,) if is_alone else (False, True))
        )
        plgpu.barrier_arrive(self.smem.y_free)
        return ys

    def _leave(self, step: Step, _: jax.Array, segment: Segment, __: None) -> None:
        """As a guest, with the host."""

        @pl.when(segment.stop > segment.start)
        def _leave() -> None:
            (y,) = self._take(is_alone=True)
            target = self.gmem.parts.at[step.index, self.cta]
            accumulators.leave(y, target, is_interpreted=self.facts.is_interpreted)
            if self.is_whole:
                grid_sync.count(self.gmem.guests.at[step.index, segment.unit])

    def _finish(self, step: Step, factor: jax.Array | None, turn: jax.Array, segment: Segment, _: None) -> None:
        facts, phase = self.facts, step.phase

        @pl.when(segment.stop > segment.start)
        def _finish() -> None:
            finish = getattr(self, f"_{phase.kind}")(step.index, segment.unit, *facts.columns(phase, segment.unit))
            ys = self._take(is_alone=False)
            if facts.num_split(phase):
                num_guests = jnp.where(turn == 0, facts.num_guests(phase, self.cta, segment.unit), 0)
                ys = self._with_guests(step, segment.unit, num_guests, ys)
            if phase.kind == "residual":  # each half is of half of K
                ys = (ys[0] + ys[1],)
            if factor is not None:
                ys = tuple(y * lax.broadcast_in_dim(factor, y.shape, [1]) for y in ys)
            if phase.kind in ("gate", "qkv"):  # rounded as a matmul of its own would leave it
                ys = tuple(y.astype(jnp.bfloat16).astype(jnp.float32) for y in ys)
            finish(*ys)
            if facts.num_split(phase):
                self._discard_guests(step, num_guests)

    def _discard_guests(self, step: Step, num_guests: jax.Array) -> None:
        """After what is waited for: what the guests left is never written to memory."""

        def discard(i: jax.Array, _: None) -> None:
            parts = self.gmem.parts.at[step.index, self.cta + 1 + i]
            accumulators.discard(parts, is_interpreted=self.facts.is_interpreted)

        lax.fori_loop(0, num_guests, discard, None)

    def _with_guests(
        self, step: Step, unit: jax.Array, num_guests: jax.Array, ys: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        """With what the guests have left, always in the same order."""
        if self.is_whole:
            row = self.gmem.guests.at[step.index, pl.ds(unit, 1)]

            @pl.when(num_guests > 0)
            def _await_guests() -> None:
                grid_sync.await_count(row.at[0], num_guests)
                grid_sync.clear(row)  # nobody else waits for it

        def add(i: jax.Array, ys: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            take = functools.partial(
                accumulators.left, self.gmem.parts.at[step.index, self.cta + 1 + i], self.facts.num_rows
            )
            parts = (take(is_partner=p, is_interpreted=self.facts.is_interpreted) for p in (False, True))
            return tuple(y + part for y, part in zip(ys, parts, strict=False))

        return lax.fori_loop(0, num_guests, add, ys)

    # For a unit's product y [64, rows], and its partner's: what can be loaded before is.

    def _count(self, index: int, column: jax.Array) -> None:
        """For those who wait for the chunk of this product's result that the column is in."""
        if self.is_whole and index + 1 < len(self.facts.phases):
            grid_sync.count(self.gmem.results.at[index, lax.div(column, jnp.int32(self.facts.config.chunk))])

    def _residual(self, index: int, unit: jax.Array, low: jax.Array, high: jax.Array) -> Any:
        del high
        gmem, facts = self.gmem, self.facts
        name, before, norm = ("middle", "hidden", "post_norm") if index == 0 else ("last", "middle", "next_norm")
        load = functools.partial(
            accumulators.load, column=low, num_rows=facts.num_rows, is_interpreted=facts.is_interpreted
        )
        # For the factor of gate and up this warpgroup has seen the counts of all of `middle`.
        hidden = load(getattr(gmem, before))
        gain = load(getattr(gmem, norm)) if hasattr(gmem, norm) else None

        def finish(y: jax.Array) -> None:
            total = (hidden + y).astype(jnp.bfloat16).astype(jnp.float32)
            self._store(total, name, low)
            if gain is not None:
                self._store(total * gain, f"scaled_{name}", low)
                sums = getattr(gmem, f"{name}_squares").at[pl.ds(2 * unit, 2)]
                accumulators.store_squares(total, sums, is_interpreted=facts.is_interpreted)
            self._count(index, low)

        return finish

    def _gate(self, index: int, unit: jax.Array, low: jax.Array, high: jax.Array) -> Any:
        del unit, high

        def finish(gate: jax.Array, up: jax.Array) -> None:
            self._store(gate / (1.0 + jnp.exp(-gate)) * up, "inner", low)
            self._count(index, low)

        return finish

    def _qkv(self, index: int, unit: jax.Array, low: jax.Array, high: jax.Array) -> Any:
        del index, unit
        gmem, facts = self.gmem, self.facts
        load = functools.partial(accumulators.load, num_rows=facts.num_rows, is_interpreted=facts.is_interpreted)
        angle = lax.rem(low, jnp.int32(facts.head_dim))
        cos, sin = (load(gmem.rotation.at[i], angle) for i in range(2))
        biases = [load(gmem.next_bias, column) for column in (low, high)] if hasattr(gmem, "next_bias") else []
        key, value = facts.num_heads * facts.head_dim, (facts.num_heads + facts.num_kv_heads) * facts.head_dim

        def finish(y: jax.Array, partner: jax.Array) -> None:
            if biases:
                y, partner = (
                    (x + bias).astype(jnp.bfloat16).astype(jnp.float32)
                    for x, bias in zip((y, partner), biases, strict=True)
                )
            is_turned = (low < value).astype(jnp.float32)
            c, s = cos * is_turned + (1.0 - is_turned), sin * is_turned
            turned = y * c - partner * s, partner * c + y * s
            for name, start, end in (("query", 0, key), ("keys", key, value), ("values", value, None)):
                is_here = low >= start if end is None else (low >= start) & (low < end)
                slots = None if name == "query" else gmem.slots
                for part, column in zip(turned, (low, high), strict=True):
                    pl.when(is_here)(functools.partial(self._store, part, name, column - start, slots))

        return finish

    def _head(self, index: int, unit: jax.Array, low: jax.Array, high: jax.Array) -> Any:
        del index, unit

        def finish(y: jax.Array, partner: jax.Array) -> None:
            self._store(y, "logits", low)
            self._store(partner, "logits", high)

        return finish

    def _store(self, y: jax.Array, name: str, column: jax.Array, rows_gmem: Any = None) -> None:
        target, is_interpreted = getattr(self.gmem, name), self.facts.is_interpreted
        accumulators.store(y, target, column, is_interpreted=is_interpreted, rows_gmem=rows_gmem)
