"""The fused layer's warpgroups that stream weights and inputs, and the one that multiplies them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.pallas.fused_layer.phases import LayerFacts, Phase, Segment, Step
from fdpp_jax.pallas.fused_layer.refs import GlobalRefs, SharedRefs
from fdpp_jax.pallas.parts import accumulators, grid_sync, overlap, ring
from fdpp_jax.pallas.parts.accumulators import HEIGHT, WIDTH


class Products:
    """The products of one CTA."""

    def __init__(self, gmem: GlobalRefs, smem: SharedRefs, facts: LayerFacts, steps: tuple[Step, ...]):
        self.gmem, self.smem, self.facts, self.steps = gmem, smem, facts, steps
        self.cta = lax.axis_index("cta")
        self.awaits_grid = len(steps) > 1  # an interpreted launch has one step

    # Warpgroup 1

    def stream_weights(self) -> None:
        done = jnp.int32(0)
        for step in self.steps:
            stream = functools.partial(self._stream_weights, step.phase)
            done = self.facts.for_segments(step, self.cta, stream, done)
        ring.drain(self.smem.w_free, done, self.facts.config.num_stages)

    def _stream_weights(self, phase: Phase, _: jax.Array, segment: Segment, done: jax.Array) -> jax.Array:
        load = functools.partial(self._load_weights, phase, segment.unit)
        return lax.fori_loop(segment.start, segment.stop, load, done)

    def _load_weights(self, phase: Phase, unit: jax.Array, k: jax.Array, done: jax.Array) -> jax.Array:
        """Loads tile k of a unit; `done` tiles were loaded before it."""
        smem, num_stages, block_k = self.smem, self.facts.config.num_stages, self.facts.config.block_k
        _, weights = self.gmem.operands(phase)
        slot = lax.rem(done, jnp.int32(num_stages))
        pl.when(done >= num_stages)(lambda: plgpu.barrier_wait(smem.w_free.at[slot]))
        for half, row in enumerate(self.facts.columns(phase, unit)):
            block = k * phase.num_blocks + half % phase.num_blocks
            source = weights.at[pl.ds(row, WIDTH), pl.ds(block * block_k, block_k)]
            target = smem.w.at[slot, pl.ds(half * WIDTH, WIDTH)]
            plgpu.copy_gmem_to_smem(source, target, smem.w_ready.at[slot])
        return done + 1

    # Warpgroup 2

    def stream_inputs(self) -> None:
        overlap.await_predecessor(is_interpreted=self.facts.is_interpreted)
        chunks_done = jnp.int32(0)
        for step in self.steps:
            stream = functools.partial(self._stream_inputs, step)
            # A step has one segment, or all its segments begin with chunk 0. So chunks known to be complete stay so.
            chunks_done, _ = self.facts.for_segments(step, self.cta, stream, (chunks_done, jnp.int32(0)))
        ring.drain(self.smem.x_free, chunks_done, self.facts.config.num_x_stages)

    def _stream_inputs(
        self, step: Step, _: jax.Array, segment: Segment, done: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return lax.fori_loop(*self.facts.chunks(step.phase, segment), functools.partial(self._load_chunk, step), done)

    def _load_chunk(
        self, step: Step, chunk: jax.Array, done: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """Loads a chunk of x once it is complete. done: chunks loaded before, end of those known to be complete."""
        config, gmem, smem = self.facts.config, self.gmem, self.smem
        x, _ = gmem.operands(step.phase)
        chunks_done, complete = done
        slot = lax.rem(chunks_done, jnp.int32(config.num_x_stages))
        pl.when(chunks_done >= config.num_x_stages)(lambda: plgpu.barrier_wait(smem.x_free.at[slot]))
        if self.awaits_grid and step.index > 0:
            row, width = gmem.result_counters.at[step.index - 1], step.phase.part_width

            def await_chunk() -> jax.Array:
                return grid_sync.await_ahead(row, chunk, step.phase.depth // width, config.chunk // width, smem.seen)

            # The second block of the last tile may lie beyond K.
            is_awaited = (chunk >= complete) & (chunk * config.chunk < step.phase.depth)
            complete = lax.cond(is_awaited, await_chunk, lambda: complete)
        for i in range(config.num_x_tiles):
            # TMA fills rows and columns beyond the array with zeros. Pallas allows such a box if its start is traced.
            columns = pl.ds(chunk * config.chunk + i * config.block_k, config.block_k)
            source = x.at[pl.ds(self.cta * 0, step.phase.num_rows), columns]
            plgpu.copy_gmem_to_smem(source, self._x_tile(step.phase, slot, i), smem.x_ready.at[slot])
        return chunks_done + 1, complete

    def _x_tile(self, phase: Phase, slot: jax.Array, i: jax.Array | int) -> Any:
        """[rows of the phase, block_k]: tile i of a stage of x, which has room for the phase with most rows."""
        return self.smem.x.at[slot, i, pl.ds(0, phase.num_rows)]

    # Warpgroup 0

    def multiply(self) -> None:
        done = jnp.int32(0), jnp.int32(0), jnp.int32(0)
        for step in self.steps:
            done = self.facts.for_segments(step, self.cta, functools.partial(self._multiply, step.phase), done)
        pl.when(done[-1] > 0)(lambda: plgpu.barrier_wait(self.smem.y_free))

    def _multiply(
        self, phase: Phase, _: jax.Array, segment: Segment, done: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        smem, facts = self.smem, self.facts
        tiles_done, chunks_done, products_done = done
        num_tiles = segment.stop - segment.start
        first_chunk, last_chunk = facts.chunks(phase, segment)

        @pl.when(num_tiles > 0)
        def _multiply() -> None:
            product = functools.partial(self._product, phase, segment, tiles_done, chunks_done)
            y = pl.run_scoped(product, *[plgpu.ACC((HEIGHT, phase.num_rows), jnp.float32)] * phase.num_blocks)
            pl.when(products_done > 0)(lambda: plgpu.barrier_wait(smem.y_free))
            accumulators.leave(y, smem.y.at[pl.ds(0, phase.product_size)], is_interpreted=facts.is_interpreted)
            plgpu.barrier_arrive(smem.y_ready)

        is_product = (num_tiles > 0).astype(jnp.int32)
        return tiles_done + num_tiles, chunks_done + last_chunk - first_chunk, products_done + is_product

    def _product(
        self, phase: Phase, segment: Segment, tiles_done: jax.Array, chunks_done: jax.Array, *accs: Any
    ) -> jax.Array:
        """[HEIGHT, rows]. With two blocks of K per tile, each half of HEIGHT sums up one of the two blocks."""
        config, smem, num_blocks = self.facts.config, self.smem, phase.num_blocks
        num_x_tiles = jnp.int32(config.num_x_tiles)
        first_chunk, _ = self.facts.chunks(phase, segment)
        first_block, last_block = segment.start * num_blocks, segment.stop * num_blocks

        def w_slot(k: jax.Array) -> jax.Array:
            return lax.rem(tiles_done + k - segment.start, jnp.int32(config.num_stages))

        def x_slot(block: jax.Array) -> jax.Array:
            chunk = chunks_done + lax.div(block, num_x_tiles) - first_chunk
            return lax.rem(chunk, jnp.int32(config.num_x_stages))

        def release(block: jax.Array, ends_tile: bool, ends_chunk: jax.Array) -> None:
            """Frees the stages that the product with a block was the last one to read."""
            if ends_tile:
                plgpu.barrier_arrive(smem.w_free.at[w_slot(lax.div(block, jnp.int32(num_blocks)))])
            pl.when(ends_chunk)(lambda: plgpu.barrier_arrive(smem.x_free.at[x_slot(block)]))

        def multiply(k: jax.Array, _: None) -> None:
            slot = w_slot(k)
            for j, acc in enumerate(accs):
                block = k * num_blocks + j
                i, is_first = lax.rem(block, num_x_tiles), block == first_block
                pl.when((i == 0) | is_first)(functools.partial(plgpu.barrier_wait, smem.x_ready.at[x_slot(block)]))
                if j == 0:
                    plgpu.barrier_wait(smem.w_ready.at[slot])
                plgpu.wgmma(acc, smem.w.at[slot], self._x_tile(phase, x_slot(block), i).transpose((1, 0)))
                plgpu.wgmma_wait(1)  # the product with the block before is done
                before = functools.partial(release, block - 1, j == 0, i == 0)
                pl.when(jnp.logical_not(is_first))(before)

        lax.fori_loop(segment.start, segment.stop, multiply, None)
        y, *others = (acc[...] for acc in accs)
        for other in others:
            is_upper = plgpu.broadcasted_iota(jnp.int32, y.shape, 0, layout=accumulators.LAYOUT) < WIDTH
            y = jnp.where(is_upper, y, other)
        release(last_block - 1, True, segment.stop > 0)
        return y
