"""The fused layer's warpgroup for results: merges partial sums, runs the epilogues, counts what is stored."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.pallas.fused_layer.epilogues import Epilogues
from fdpp_jax.pallas.fused_layer.phases import LayerFacts, Phase, Segment, Step
from fdpp_jax.pallas.fused_layer.refs import NUM_HEAD_ROWS, NUM_RESULT_ROWS, GlobalRefs, SharedRefs
from fdpp_jax.pallas.parts import accumulators, grid_sync, overlap

type Pairs = tuple[tuple[jax.Array, ...], ...]  # per view (y, partner), see `norms.Finish`


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
        # Left by earlier launches: no CTA counts in these rows, that of heads among them, before CTA 0 counts its first
        # unit, since they need all of row 0.
        if self.awaits_grid and not self.facts.is_first:
            for i in range(1, NUM_RESULT_ROWS + NUM_HEAD_ROWS):
                pl.when(self.cta == 0)(functools.partial(grid_sync.clear, self.gmem.counters.at[i]))
        for step in self.steps:
            if step.is_helpers:
                self.facts.for_segments(step, self.cta, functools.partial(self._help, step), None)
                continue
            if self.awaits_grid and self.epilogues.is_normed(step.phase):
                self._await_all(step.phase, step.index - 1)
            factors = self.epilogues.factors(step.phase)
            self.facts.for_segments(step, self.cta, functools.partial(self._finish, step, factors), None)
            # Every CTA finishes a whole unit of the MLP, for which it has awaited all of row 0. So once row 1 is
            # complete, nobody awaits row 0 any more.
            if self.awaits_grid and step.index == 1:
                pl.when(self.cta == 0)(self._clear_first_row)

    def _clear_first_row(self) -> None:
        self._await_all(self.facts.phases[2], 1)
        grid_sync.clear(self.gmem.result_counters.at[0])

    def _await_all(self, phase: Phase, row: int) -> None:
        """Waits for all of a phase's x, which is counted in `row`."""
        width = phase.part_width
        grid_sync.await_row(self.gmem.result_counters.at[row], phase.depth // width, self.facts.config.chunk // width)

    def _seen(self, source: jax.Ref, phase: Phase) -> Pairs:
        """Of a product [its elements] the views that make up the result, each with its halves swapped, too."""
        left = functools.partial(
            accumulators.left,
            source.at[pl.ds(0, phase.product_size)],
            self.facts.num_rows,
            is_interpreted=self.facts.is_interpreted,
        )
        return tuple(
            tuple(left(is_partner=is_partner, **view._asdict()) for is_partner in (False, True))
            for view in self.epilogues.views(phase)
        )

    def _take(self, phase: Phase) -> Pairs:
        """The next product's views."""
        plgpu.barrier_wait(self.smem.y_ready)
        pairs = self._seen(self.smem.y, phase)
        plgpu.barrier_arrive(self.smem.y_free)
        return pairs

    def _help(self, step: Step, _: jax.Array, segment: Segment, __: None) -> None:
        """Hands the partial sum of a split unit to its owner."""

        @pl.when(segment.stop > segment.start)
        def _help() -> None:
            phase, is_interpreted = step.phase, self.facts.is_interpreted
            product = pl.ds(0, phase.product_size)
            plgpu.barrier_wait(self.smem.y_ready)
            y = accumulators.left(
                self.smem.y.at[product], phase.num_rows, is_partner=False, is_interpreted=is_interpreted
            )
            plgpu.barrier_arrive(self.smem.y_free)
            target = self.gmem.parts.at[step.index, self.cta, product]
            accumulators.leave(y, target, is_interpreted=is_interpreted)
            if self.awaits_grid:
                grid_sync.count(self.gmem.helper_counters.at[step.index, segment.unit])

    def _finish(self, step: Step, factors: tuple[jax.Array, ...], turn: jax.Array, segment: Segment, _: None) -> None:
        """Finishes a unit as its owner."""
        facts, phase = self.facts, step.phase

        @pl.when(segment.stop > segment.start)
        def _finish() -> None:
            low, high = facts.columns(phase, segment.unit)
            finish = self.epilogues.of(phase, segment.unit, low, high, factors)
            pairs = self._take(phase)
            if facts.num_split(phase):
                num_helpers = jnp.where(turn == 0, facts.num_helpers(phase, self.cta, segment.unit), 0)
                pairs = self._merged(step, segment.unit, num_helpers, pairs)
            y, partner = pairs[0]
            if self.epilogues.is_normed(phase):
                y, partner = (self.epilogues.norm.normed(views, factors) for views in zip(*pairs, strict=True))
            finish(y, partner)
            if self.awaits_grid and step.index + 1 < len(facts.phases):  # the next phase reads the result
                chunk = lax.div(low, jnp.int32(facts.config.chunk))
                grid_sync.count(self.gmem.result_counters.at[step.index, chunk])
            if facts.num_split(phase):
                self._discard_parts(step, num_helpers)

    def _merged(self, step: Step, unit: jax.Array, num_helpers: jax.Array, pairs: Pairs) -> Pairs:
        """The product with the helpers' partial sums added, always in the same order."""
        if self.awaits_grid:
            row = self.gmem.helper_counters.at[step.index, pl.ds(unit, 1)]

            @pl.when(num_helpers > 0)
            def _await_helpers() -> None:
                grid_sync.await_count(row.at[0], num_helpers)
                grid_sync.clear(row)  # the owner alone awaits it

        def add(i: jax.Array, pairs: Pairs) -> Pairs:
            parts = self._seen(self.gmem.parts.at[step.index, self.cta + 1 + i], step.phase)
            return jax.tree.map(jnp.add, pairs, parts)

        return lax.fori_loop(0, num_helpers, add, pairs)

    def _discard_parts(self, step: Step, num_helpers: jax.Array) -> None:
        """Drops the helpers' partial sums before the L2 writes them back, once other CTAs need not wait for it."""

        def discard(i: jax.Array, _: None) -> None:
            parts = self.gmem.parts.at[step.index, self.cta + 1 + i, pl.ds(0, step.phase.product_size)]
            accumulators.discard(parts, is_interpreted=self.facts.is_interpreted)

        lax.fori_loop(0, num_helpers, discard, None)
