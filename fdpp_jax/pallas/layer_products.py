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
from fdpp_jax.pallas.layer_phases import Facts, Segment, Step


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
            source = getattr(self.gmem, step.phase.w)
            height = WIDTH // 2 if step.phase.kind == "residual" else WIDTH

            def stream(_: Any, segment: Segment, done: jax.Array, step=step, source=source, height=height) -> jax.Array:
                def tile(k: jax.Array, done: jax.Array) -> jax.Array:
                    slot = lax.rem(done, jnp.int32(num_stages))
                    pl.when(done >= num_stages)(lambda: plgpu.barrier_wait(smem.w_free.at[slot]))
                    for half, row in enumerate(self.facts.columns(step.phase, segment.unit)):
                        part = source.at[pl.ds(row, height), pl.ds(k * block_k, block_k)]
                        target = smem.w.at[slot, pl.ds(half * height, height)]
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

            def stream(turn: jax.Array, segment: Segment, done: jax.Array, step=step) -> jax.Array:
                load = functools.partial(self._load_chunk, step, turn)
                return lax.fori_loop(*self._chunks(segment), load, done)

            chunks_done = self.facts.for_segments(step, self.cta, stream, chunks_done)
        ring.drain(self.smem.x_free, chunks_done, self.facts.config.num_x_stages)

    def _chunks(self, segment: Segment) -> tuple[jax.Array, jax.Array]:
        """The chunks of x [first, last) that a segment reads."""
        first = lax.div(segment.start, jnp.int32(self.facts.config.num_x_tiles))
        last = self.facts.num_chunks(segment.stop)
        return first, jnp.where(segment.stop > segment.start, last, first)

    def _load_chunk(self, step: Step, turn: jax.Array, chunk: jax.Array, chunks_done: jax.Array) -> jax.Array:
        """Loads a chunk of x once it is complete."""
        facts, config, gmem, smem = self.facts, self.facts.config, self.gmem, self.smem
        slot = lax.rem(chunks_done, jnp.int32(config.num_x_stages))
        pl.when(chunks_done >= config.num_x_stages)(lambda: plgpu.barrier_wait(smem.x_free.at[slot]))
        if self.is_whole and step.index > 0:
            counter = gmem.results.at[step.index - 1, chunk]
            num_parts = lax.div(jnp.minimum(step.phase.depth - chunk * config.chunk, config.chunk), jnp.int32(WIDTH))
            is_new = turn <= (1 if facts.num_split(step.phase) else 0)  # a whole unit has seen all chunks
            pl.when(is_new)(lambda: grid_sync.await_count(counter, num_parts))
        for i in range(config.num_x_tiles):
            # Rows and columns beyond the array's come as zeros, which takes a traced start.
            columns = pl.ds(chunk * config.chunk + i * config.block_k, config.block_k)
            source = getattr(gmem, step.phase.x).at[pl.ds(self.cta * 0, facts.num_rows), columns]
            plgpu.copy_gmem_to_smem(source, smem.x.at[slot, i], smem.x_ready.at[slot])
        return chunks_done + 1

    # Warpgroup 0

    def multiply(self) -> None:
        done = jnp.int32(0), jnp.int32(0), jnp.int32(0)
        for step in self.steps:
            done = self.facts.for_segments(step, self.cta, self._multiply, done)
        pl.when(done[-1] > 0)(lambda: plgpu.barrier_wait(self.smem.y_free))

    def _multiply(self, _: jax.Array, segment: Segment, done: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        smem, facts = self.smem, self.facts
        tiles_done, chunks_done, products_done = done
        num_tiles = segment.stop - segment.start
        first_chunk, last_chunk = self._chunks(segment)

        @pl.when(num_tiles > 0)
        def _multiply() -> None:
            product = functools.partial(self._product, segment, tiles_done, chunks_done)
            y = pl.run_scoped(product, plgpu.ACC((HEIGHT, facts.num_rows), jnp.float32))
            pl.when(products_done > 0)(lambda: plgpu.barrier_wait(smem.y_free))
            accumulators.leave(y, smem.y, is_interpreted=facts.is_interpreted)
            plgpu.barrier_arrive(smem.y_ready)

        is_product = (num_tiles > 0).astype(jnp.int32)
        return tiles_done + num_tiles, chunks_done + last_chunk - first_chunk, products_done + is_product

    def _product(self, segment: Segment, tiles_done: jax.Array, chunks_done: jax.Array, acc: Any) -> jax.Array:
        config, smem = self.facts.config, self.smem
        num_x_tiles = jnp.int32(config.num_x_tiles)
        first_chunk, _ = self._chunks(segment)

        def chunk_of(k: jax.Array) -> jax.Array:
            return chunks_done + lax.div(k, num_x_tiles) - first_chunk

        def release(k: jax.Array, is_end: jax.Array) -> None:
            """What the product with tile k has read; its chunk, too, if that was its last one."""
            tile = tiles_done + k - segment.start
            plgpu.barrier_arrive(smem.w_free.at[lax.rem(tile, jnp.int32(config.num_stages))])
            x_free = smem.x_free.at[lax.rem(chunk_of(k), jnp.int32(config.num_x_stages))]
            pl.when(is_end)(lambda: plgpu.barrier_arrive(x_free))

        def multiply(k: jax.Array, _: None) -> None:
            i, tile = lax.rem(k, num_x_tiles), tiles_done + k - segment.start
            slot = lax.rem(tile, jnp.int32(config.num_stages))
            x_slot = lax.rem(chunk_of(k), jnp.int32(config.num_x_stages))
            is_first = k == segment.start
            pl.when((i == 0) | is_first)(lambda: plgpu.barrier_wait(smem.x_ready.at[x_slot]))
            plgpu.barrier_wait(smem.w_ready.at[slot])
            plgpu.wgmma(acc, smem.w.at[slot], smem.x.at[x_slot, i].transpose((1, 0)))
            plgpu.wgmma_wait(1)
            pl.when(jnp.logical_not(is_first))(lambda: release(k - 1, i == 0))

        lax.fori_loop(segment.start, segment.stop, multiply, None)
        y = acc[...]
        release(segment.stop - 1, segment.stop > 0)
        return y
