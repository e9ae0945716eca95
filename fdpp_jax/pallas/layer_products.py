"""Of a fused layer the warpgroups that stream weights and inputs and multiply them; `fused_layer` has the whole.

`gmem` and `smem` hold the kernel's refs by name.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.pallas import accumulators, grid_sync, overlap, ring
from fdpp_jax.pallas.accumulators import HEIGHT, WIDTH
from fdpp_jax.pallas.layer_phases import Facts, Phase, Segment, Step


class Products:
    """One CTA's; see the module."""

    def __init__(self, gmem: Any, smem: Any, facts: Facts, steps: tuple[Step, ...]):
        self.gmem, self.smem, self.facts, self.steps = gmem, smem, facts, steps
        self.cta = lax.axis_index("cta")
        self.is_whole = len(steps) > 1

    # Warpgroup 1

    def stream_weights(self) -> None:
        num_stages, block_k, smem = self.facts.config.num_stages, self.facts.config.block_k, self.smem
        done = jnp.int32(0)
        for step in self.steps:
            source, num_blocks = getattr(self.gmem, step.phase.w), step.phase.num_blocks

            def stream(
                _: Any, segment: Segment, done: jax.Array, step=step, source=source, num_blocks=num_blocks
            ) -> jax.Array:
                def tile(k: jax.Array, done: jax.Array) -> jax.Array:
                    slot = lax.rem(done, jnp.int32(num_stages))
                    pl.when(done >= num_stages)(lambda: plgpu.barrier_wait(smem.w_free.at[slot]))
                    for half, row in enumerate(self.facts.columns(step.phase, segment.unit)):
                        block = k * num_blocks + half % num_blocks
                        part = source.at[pl.ds(row, WIDTH), pl.ds(block * block_k, block_k)]
                        target = smem.w.at[slot, pl.ds(half * WIDTH, WIDTH)]
                        plgpu.copy_gmem_to_smem(part, target, smem.w_ready.at[slot])
                    return done + 1

                return lax.fori_loop(segment.start, segment.stop, tile, done)

            done = self.facts.for_segments(step, self.cta, stream, done)
        ring.drain(smem.w_free, done, num_stages)

    # Warpgroup 2

    def stream_inputs(self) -> None:
        overlap.await_predecessor(is_interpreted=self.facts.is_interpreted)
        chunks_done = jnp.int32(0)
        for step in self.steps:

            def stream(_: jax.Array, segment: Segment, done: tuple[jax.Array, ...], step=step) -> tuple[jax.Array, ...]:
                load = functools.partial(self._load_chunk, step)
                return lax.fori_loop(*self.facts.chunks(step.phase, segment), load, done)

            # All segments of a step begin with the same chunk, or there is but one.
            chunks_done, _ = self.facts.for_segments(step, self.cta, stream, (chunks_done, jnp.int32(0)))
        ring.drain(self.smem.x_free, chunks_done, self.facts.config.num_x_stages)

    def _load_chunk(self, step: Step, chunk: jax.Array, done: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Loads a chunk of x once it is complete."""
        facts, config, gmem, smem = self.facts, self.facts.config, self.gmem, self.smem
        chunks_done, complete = done
        slot = lax.rem(chunks_done, jnp.int32(config.num_x_stages))
        pl.when(chunks_done >= config.num_x_stages)(lambda: plgpu.barrier_wait(smem.x_free.at[slot]))
        if self.is_whole and step.index > 0:
            row, num_parts = gmem.results.at[step.index - 1], step.phase.depth // WIDTH

            def await_chunk() -> jax.Array:
                return grid_sync.await_ahead(row, chunk, num_parts, config.chunk // WIDTH, smem.seen)

            # The second block of the last tile may lie beyond K.
            is_awaited = (chunk >= complete) & (chunk * config.chunk < step.phase.depth)
            complete = lax.cond(is_awaited, await_chunk, lambda: complete)
        for i in range(config.num_x_tiles):
            # Rows and columns beyond the array's come as zeros, which takes a traced start.
            columns = pl.ds(chunk * config.chunk + i * config.block_k, config.block_k)
            source = getattr(gmem, step.phase.x).at[pl.ds(self.cta * 0, facts.num_rows), columns]
            plgpu.copy_gmem_to_smem(source, smem.x.at[slot, i], smem.x_ready.at[slot])
        return chunks_done + 1, complete

    # Warpgroup 0

    def multiply(self) -> None:
        done = jnp.int32(0), jnp.int32(0), jnp.int32(0)
        for step in self.steps:
            done = self.facts.for_segments(step, self.cta, functools.partial(self._multiply, step.phase), done)
        pl.when(done[-1] > 0)(lambda: plgpu.barrier_wait(self.smem.y_free))

    def _multiply(
        self, phase: Phase, _: jax.Array, segment: Segment, done: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        smem, facts = self.smem, self.facts
        tiles_done, chunks_done, products_done = done
        num_tiles = segment.stop - segment.start
        first_chunk, last_chunk = facts.chunks(phase, segment)

        @pl.when(num_tiles > 0)
        def _multiply() -> None:
            product = functools.partial(self._product, phase, segment, tiles_done, chunks_done)
            y = pl.run_scoped(product, *[plgpu.ACC((HEIGHT, facts.num_rows), jnp.float32)] * phase.num_blocks)
            pl.when(products_done > 0)(lambda: plgpu.barrier_wait(smem.y_free))
            accumulators.leave(y, smem.y, is_interpreted=facts.is_interpreted)
            plgpu.barrier_arrive(smem.y_ready)

        is_product = (num_tiles > 0).astype(jnp.int32)
        return tiles_done + num_tiles, chunks_done + last_chunk - first_chunk, products_done + is_product

    def _product(
        self, phase: Phase, segment: Segment, tiles_done: jax.Array, chunks_done: jax.Array, *accs: Any
    ) -> jax.Array:
        """[HEIGHT, rows]. Of tiles with two blocks of K the upper half is of one and the lower half of the other."""
        config, smem, num_blocks = self.facts.config, self.smem, phase.num_blocks
        num_x_tiles = jnp.int32(config.num_x_tiles)
        first_chunk, _ = self.facts.chunks(phase, segment)
        first_block, last_block = segment.start * num_blocks, segment.stop * num_blocks

        def w_slot(k: jax.Array) -> jax.Array:
            return lax.rem(tiles_done + k - segment.start, jnp.int32(config.num_stages))

        def x_slot(block: jax.Array) -> jax.Array:
            chunk = chunks_done + lax.div(block, num_x_tiles) - first_chunk
            return lax.rem(chunk, jnp.int32(config.num_x_stages))

        def release(block: jax.Array, is_tile: bool, is_chunk: jax.Array) -> None:
            """What the product with a block has read, if it was the last one of its tile and of its chunk."""
            if is_tile:
                plgpu.barrier_arrive(smem.w_free.at[w_slot(lax.div(block, jnp.int32(num_blocks)))])
            pl.when(is_chunk)(lambda: plgpu.barrier_arrive(smem.x_free.at[x_slot(block)]))

        def multiply(k: jax.Array, _: None) -> None:
            slot = w_slot(k)
            for j, acc in enumerate(accs):
                block = k * num_blocks + j
                i, is_first = lax.rem(block, num_x_tiles), block == first_block
                pl.when((i == 0) | is_first)(functools.partial(plgpu.barrier_wait, smem.x_ready.at[x_slot(block)]))
                if j == 0:
                    plgpu.barrier_wait(smem.w_ready.at[slot])
                plgpu.wgmma(acc, smem.w.at[slot], smem.x.at[x_slot(block), i].transpose((1, 0)))
                plgpu.wgmma_wait(1)
                before = functools.partial(release, block - 1, j == 0, i == 0)
                pl.when(jnp.logical_not(is_first))(before)

        lax.fori_loop(segment.start, segment.stop, multiply, None)
        y, *others = (acc[...] for acc in accs)
        for other in others:
            is_upper = plgpu.broadcasted_iota(jnp.int32, y.shape, 0, layout=accumulators.LAYOUT) < WIDTH
            y = jnp.where(is_upper, y, other)
        release(last_block - 1, True, segment.stop > 0)
        return y
