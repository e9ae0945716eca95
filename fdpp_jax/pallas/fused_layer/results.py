"""The fused layer's warpgroup for results: merges partial sums, runs the epilogues, counts what is stored."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.pallas.fused_layer.epilogues import Epilogues
from fdpp_jax.pallas.fused_layer.phases import LayerFacts, Phase, Segment, Step
from fdpp_jax.pallas.fused_layer.refs import GlobalRefs, SharedRefs
from fdpp_jax.pallas.parts import accumulators, grid_sync, overlap
from fdpp_jax.pallas.parts.accumulators import WIDTH


class Results:
    """The results of one CTA."""

    def __init__(self, gmem: GlobalRefs, smem: SharedRefs, facts: LayerFacts, steps: tuple[Step, ...]):
        self.gmem, self.smem, self.facts, self.steps = gmem, smem, facts, steps
        self.epilogues = Epilogues(gmem, facts)
        self.cta = lax.axis_index("cta")
        self.awaits_grid = len(steps) > 1  # an interpreted launch has one step

    def finish(self) -> None:
        overlap.await_predecessor(is_interpreted=self.facts.is_interpreted)
        overlap.let_successor_start(is_interpreted=self.facts.is_interpreted)
        if self.awaits_grid:  # left by earlier launches: no CTA counts in these rows before CTA 0 counts its first unit
            for i in range(1, self.gmem.result_counters.shape[0]):
                pl.when(self.cta == 0)(functools.partial(grid_sync.clear, self.gmem.result_counters.at[i]))
        for step in self.steps:
            if step.is_helpers:
                self.facts.for_segments(step, self.cta, functools.partial(self._help, step), None)
                continue
            factor = None
            if self.epilogues.has_factor(step.phase):
                if self.awaits_grid:
                    self._await_all(step.phase, step.index - 1)
                factor = self.epilogues.factor(step.phase)
            self.facts.for_segments(step, self.cta, functools.partial(self._finish, step, factor), None)
            # Every CTA finishes a whole unit of gate and up, for which it has awaited all of row 0. So once row 1 is
            # complete, nobody awaits row 0 any more.
            if self.awaits_grid and step.index == 1:
                pl.when(self.cta == 0)(self._clear_first_row)

    def _clear_first_row(self) -> None:
        self._await_all(self.facts.phases[2], 1)
        grid_sync.clear(self.gmem.result_counters.at[0])

    def _await_all(self, phase: Phase, row: int) -> None:
        """Waits for all of a phase's x, which is counted in `row`."""
        grid_sync.await_row(self.gmem.result_counters.at[row], phase.depth // WIDTH, self.facts.config.chunk // WIDTH)

    def _take(self, *, with_partner: bool) -> tuple[jax.Array, ...]:
        """The next product [64, rows], and if wanted the same with its halves swapped: the partner columns first."""
        take = functools.partial(accumulators.left, self.smem.y, self.facts.num_rows)
        plgpu.barrier_wait(self.smem.y_ready)
        ys = tuple(
            take(is_partner=is_partner, is_interpreted=self.facts.is_interpreted)
            for is_partner in ((False, True) if with_partner else (False,))
        )
        plgpu.barrier_arrive(self.smem.y_free)
        return ys

    def _help(self, step: Step, _: jax.Array, segment: Segment, __: None) -> None:
        """Hands the partial sum of a split unit to its owner."""

        @pl.when(segment.stop > segment.start)
        def _help() -> None:
            (y,) = self._take(with_partner=False)
            target = self.gmem.parts.at[step.index, self.cta]
            accumulators.leave(y, target, is_interpreted=self.facts.is_interpreted)
            if self.awaits_grid:
                grid_sync.count(self.gmem.helper_counters.at[step.index, segment.unit])

    def _finish(self, step: Step, factor: jax.Array | None, turn: jax.Array, segment: Segment, _: None) -> None:
        """Finishes a unit as its owner."""
        facts, phase = self.facts, step.phase

        @pl.when(segment.stop > segment.start)
        def _finish() -> None:
            low, high = facts.columns(phase, segment.unit)
            finish = self.epilogues.of(phase, segment.unit, low, high)
            ys = self._take(with_partner=True)
            if facts.num_split(phase):
                num_helpers = jnp.where(turn == 0, facts.num_helpers(phase, self.cta, segment.unit), 0)
                ys = self._merged(step, segment.unit, num_helpers, ys)
            if factor is not None:
                ys = tuple(y * lax.broadcast_in_dim(factor, y.shape, [1]) for y in ys)
            finish(*ys)
            if self.awaits_grid and step.index + 1 < len(facts.phases):  # the next phase reads the result
                chunk = lax.div(low, jnp.int32(facts.config.chunk))
                grid_sync.count(self.gmem.result_counters.at[step.index, chunk])
            if facts.num_split(phase):
                self._discard_parts(step, num_helpers)

    def _merged(
        self, step: Step, unit: jax.Array, num_helpers: jax.Array, ys: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        """The product with the helpers' partial sums added, always in the same order."""
        if self.awaits_grid:
            row = self.gmem.helper_counters.at[step.index, pl.ds(unit, 1)]

            @pl.when(num_helpers > 0)
            def _await_helpers() -> None:
                grid_sync.await_count(row.at[0], num_helpers)
                grid_sync.clear(row)  # the owner alone awaits it

        def add(i: jax.Array, ys: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            take = functools.partial(
                accumulators.left, self.gmem.parts.at[step.index, self.cta + 1 + i], self.facts.num_rows
            )
            parts = (take(is_partner=p, is_interpreted=self.facts.is_interpreted) for p in (False, True))
            return tuple(y + part for y, part in zip(ys, parts, strict=True))

        return lax.fori_loop(0, num_helpers, add, ys)

    def _discard_parts(self, step: Step, num_helpers: jax.Array) -> None:
        """Drops the helpers' partial sums before the L2 writes them back, once other CTAs need not wait for it."""

        def discard(i: jax.Array, _: None) -> None:
            parts = self.gmem.parts.at[step.index, self.cta + 1 + i]
            accumulators.discard(parts, is_interpreted=self.facts.is_interpreted)

        lax.fori_loop(0, num_helpers, discard, None)
