"""x @ w for 1 to 64 rows on Hopper's tensor cores (Mosaic GPU): rows padded to 8, not 64, in one launch.

wgmma's large operand has 64 rows, and its small operand any multiple of 8. There are many weights, so they take the 64,
and x takes the 8:

    out^T [block_n, rows] += w^T [block_n, block_k] @ x^T [block_k, rows]

wgmma transposes 16-bit operands as it reads them, so w may be stored [K, N] or [N, K].

A unit is one column block. Each CTA streams an even share of the tiles of all units, wherever in K the share begins and
ends. The ring of TMA stages runs on from unit to unit: one warpgroup loads, the other multiplies. The CTA that holds a
unit's last tile is the unit's owner. Other CTAs with tiles of the unit are its helpers: they hand over their sums
through memory (`handover`) before anything else. The owner merges these sums last, so it hardly ever waits. TMA fills
rows and columns beyond a ragged K or N with zeros.

Source: FlashDecoding++ (arXiv 2311.01282), section 4 (flat GEMM with double buffering).
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.pallas.parts import accumulators, handover, ring
from fdpp_jax.pallas.parts.accumulators import HEIGHT
from fdpp_jax.plans.hopper_matmul import FlatMatmulConfig
from fdpp_jax.plans.manual_axes import vary_as_operands
from fdpp_jax.plans.shapes import WeightOrder, cdiv, in_order, round_up

_STORED = ("bfloat16", "float16", "float32")


# Jitted so that all layers of a model share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("config", "out_dtype", "w_order", "interpret"))
@vary_as_operands
def flat_matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    config: FlatMatmulConfig,
    out_dtype: jax.typing.DTypeLike,
    w_order: WeightOrder = "kn",
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """x @ w, accumulated in float32.

    Args:
      x: [M, K] bfloat16 or float16, M <= 64; K a multiple of 16.
      w: [K, N] or [N, K], same dtype; N a multiple of 16.
      config: CTAs, tiles and stages.
      out_dtype: dtype of the result.
      w_order: "kn" or "nk", the order of w's axes.
      interpret: Runs the kernel interpreted on the CPU, in two launches: it runs one CTA after the other.

    Returns:
      [M, N].
    """
    num_rows, depth = x.shape
    width = w.shape[w_order.index("n")]
    if dead_rows := ring.loadable_rows(num_rows) - num_rows:
        x = jnp.pad(x, ((0, dead_rows), (0, 0)))
    facts = MatmulFacts(
        num_rows=round_up(num_rows, 8),
        num_tiles=cdiv(depth, config.block_k),
        num_units=cdiv(width, config.block_n),
        config=config,
        w_order=w_order,
        is_interpreted=interpret is not None,
    )
    stored = jnp.dtype(out_dtype) if jnp.dtype(out_dtype).name in _STORED else jnp.dtype(jnp.float32)
    sums = config.num_ctas, config.block_n // HEIGHT, HEIGHT * facts.num_rows
    parts = dict(parts=jax.ShapeDtypeStruct(sums, jnp.float32))
    operands, launch = dict(x=x, w=w), functools.partial(_launch, facts=facts, interpret=interpret)
    if interpret is None:
        out = dict(out=jax.ShapeDtypeStruct((num_rows, width), stored))
        flags = dict(flags=jax.ShapeDtypeStruct((config.num_ctas, handover.WORDS), jnp.int32))
        return launch(operands, out | parts | flags, ("hand_over", "finish"))["out"].astype(out_dtype)
    # The interpreter's stores may not reach beyond an array.
    out = dict(out=jax.ShapeDtypeStruct((num_rows, facts.num_units * config.block_n), stored))
    operands |= launch(operands, parts, ("hand_over",))
    return launch(operands, out, ("finish",))["out"][:, :width].astype(out_dtype)


@dataclasses.dataclass(frozen=True)
class MatmulFacts:
    """Static facts of a call.

    Attributes:
      num_rows: Rows of x, padded to 8.
      num_tiles: Tiles of K per unit.
      num_units: Column blocks.
      config: CTAs, tiles and stages.
      w_order: The order of w's axes.
      is_interpreted: Whether the interpreter runs it.
    """

    num_rows: int
    num_tiles: int
    num_units: int
    config: FlatMatmulConfig
    w_order: WeightOrder
    is_interpreted: bool


class GlobalRefs(NamedTuple):
    """Refs in global memory; None where a launch has no such task."""

    x: jax.Ref  # [M, K]
    w: jax.Ref  # [K, N] or [N, K]
    out: jax.Ref | None = None  # [M, N]
    parts: jax.Ref | None = None  # [CTAs, block_n / HEIGHT, HEIGHT * rows] float32, sums of helpers
    flags: jax.Ref | None = None  # [CTAs, handover.WORDS] int32; None: interpreted, one launch per task


class SharedRefs(NamedTuple):
    """Refs in shared memory: the ring. The kernel's scratch has the same names."""

    x: jax.Ref  # [stages, rows, block_k]
    w: jax.Ref  # [stages, block_k, block_n] or [stages, block_n, block_k]
    ready: ring.Barrier
    free: ring.Barrier


class UnitPart(NamedTuple):
    """Tiles [start, stop) of a unit's K, all [] int32."""

    unit: jax.Array
    start: jax.Array
    stop: jax.Array


type Task = Literal["hand_over", "finish"]


def _launch(
    operands: dict[str, jax.Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    tasks: tuple[Task, ...],
    *,
    facts: MatmulFacts,
    interpret: plgpu.InterpretGPUParams | None,
) -> dict[str, jax.Array]:
    config, x, w = facts.config, operands["x"], operands["w"]
    transforms = ring.tile_transforms(math.gcd(x.shape[1], w.shape[1]))  # wgmma wants one swizzle for both operands
    w_tile = in_order(facts.w_order, config.block_k, config.block_n)

    def body(*refs: jax.Ref, **smem: jax.Ref) -> None:
        gmem = GlobalRefs(**dict(zip((*operands, *outputs), refs, strict=True)))
        cta = _Cta(gmem, SharedRefs(**smem), facts, tasks)
        group = lax.axis_index("warpgroup")
        pl.when(group == 0)(cta.multiply)
        pl.when(group == 1)(cta.stream)

    results = plgpu.kernel(
        body,
        out_type=list(outputs.values()),
        scratch_types=dict(
            x=plgpu.SMEM((config.num_stages, facts.num_rows, config.block_k), x.dtype, transforms=transforms),
            w=plgpu.SMEM((config.num_stages, *w_tile), w.dtype, transforms=transforms),
            ready=plgpu.Barrier(num_arrivals=2, num_barriers=config.num_stages),
            free=plgpu.Barrier(num_barriers=config.num_stages),
        ),
        grid=(config.num_ctas,),
        grid_names=("cta",),
        num_threads=2,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="flat_matmul",
    )(*operands.values())
    return dict(zip(outputs, results, strict=True))


class _Cta:
    """One CTA, whose share of all tiles is [begin, end): the ends of some units, and the beginning of one more."""

    def __init__(self, gmem: GlobalRefs, smem: SharedRefs, facts: MatmulFacts, tasks: tuple[Task, ...]) -> None:
        self.gmem, self.smem, self.facts, self.tasks = gmem, smem, facts, tasks
        self.cta = lax.axis_index("cta")
        self.begin, self.end = ring.share(self.cta, facts.config.num_ctas, self._total)
        self.last_unit = lax.div(self.end, jnp.int32(facts.num_tiles))  # whose end another CTA holds
        num_owned = self.last_unit - lax.div(self.begin, jnp.int32(facts.num_tiles))
        self.turns = (0 if "hand_over" in tasks else 1), (1 + num_owned if "finish" in tasks else 1)

    @property
    def _total(self) -> int:
        return self.facts.num_units * self.facts.num_tiles

    def _part(self, turn: jax.Array) -> UnitPart:
        """Turn 0 is the beginning of a unit, and may be empty. The last turn may be the end of a unit with helpers."""
        num_tiles = self.facts.num_tiles
        unit = self.last_unit - turn
        start = jnp.maximum(self.begin - unit * num_tiles, 0)
        return UnitPart(unit, start, jnp.minimum(self.end - unit * num_tiles, num_tiles))

    # Warpgroup 1

    def stream(self) -> None:
        """Loads the tiles of x and w."""
        config, smem, num_stages = self.facts.config, self.smem, self.facts.config.num_stages

        def stream_part(turn: jax.Array, done: jax.Array) -> jax.Array:
            unit, start, stop = self._part(turn)
            columns = pl.ds(unit * config.block_n, config.block_n)

            def load_tile(k: jax.Array, done: jax.Array) -> jax.Array:
                slot = lax.rem(done, jnp.int32(num_stages))
                pl.when(done >= num_stages)(lambda: plgpu.barrier_wait(smem.free.at[slot]))
                depth = pl.ds(k * config.block_k, config.block_k)
                w = self.gmem.w.at[in_order(self.facts.w_order, depth, columns)]
                plgpu.copy_gmem_to_smem(w, smem.w.at[slot], smem.ready.at[slot])
                # A traced start lets the box reach beyond the rows: TMA fills with zeros.
                x = self.gmem.x.at[pl.ds(self.cta * 0, self.facts.num_rows), depth]
                plgpu.copy_gmem_to_smem(x, smem.x.at[slot], smem.ready.at[slot])
                return done + 1

            return lax.fori_loop(start, stop, load_tile, done)

        ring.drain(smem.free, lax.fori_loop(*self.turns, stream_part, jnp.int32(0)), num_stages)

    # Warpgroup 0

    def multiply(self) -> None:
        """Multiplies the tiles, finishes the units that end here, and hands over the sums of the one that does not."""

        def multiply_part(turn: jax.Array, done: jax.Array) -> jax.Array:
            part = self._part(turn)

            @pl.when(part.stop > part.start)
            def _multiply() -> None:
                accs = [plgpu.ACC((HEIGHT, self.facts.num_rows), jnp.float32)] * (self.facts.config.block_n // HEIGHT)
                ys = pl.run_scoped(functools.partial(self._product, part, done), *accs)
                is_end = part.stop == self.facts.num_tiles
                if "finish" in self.tasks:
                    pl.when(is_end)(functools.partial(self._finish, part, ys))
                if "hand_over" in self.tasks:
                    pl.when(jnp.logical_not(is_end))(functools.partial(self._hand_over, ys))

            return done + part.stop - part.start

        lax.fori_loop(*self.turns, multiply_part, jnp.int32(0))

    def _product(self, part: UnitPart, done: jax.Array, *accs: Any) -> tuple[jax.Array, ...]:
        """The sums of a part, transposed, HEIGHT columns of the unit in each: [HEIGHT, rows]."""
        smem, num_stages, w_order = self.smem, self.facts.config.num_stages, self.facts.w_order

        def slot_of(k: jax.Array) -> jax.Array:
            return lax.rem(done + k - part.start, jnp.int32(num_stages))

        def multiply(k: jax.Array, _: None) -> None:
            slot = slot_of(k)
            plgpu.barrier_wait(smem.ready.at[slot])
            for i, acc in enumerate(accs):
                w = smem.w.at[slot, *in_order(w_order, slice(None), pl.ds(i * HEIGHT, HEIGHT))]
                w_t = w.transpose((1, 0)) if w_order == "kn" else w  # [HEIGHT, block_k]
                plgpu.wgmma(acc, w_t, smem.x.at[slot].transpose((1, 0)))
            plgpu.wgmma_wait(len(accs))  # the products of the tile before are done: its slot is free
            pl.when(k > part.start)(lambda: plgpu.barrier_arrive(smem.free.at[slot_of(k - 1)]))

        lax.fori_loop(part.start, part.stop, multiply, None)
        ys = tuple(acc[...] for acc in accs)
        plgpu.barrier_arrive(smem.free.at[slot_of(part.stop - 1)])
        return ys

    def _hand_over(self, ys: tuple[jax.Array, ...]) -> None:
        """Leaves a helper's sums for the owner."""
        assert self.gmem.parts is not None
        for i, y in enumerate(ys):
            accumulators.leave(y, self.gmem.parts.at[self.cta, i], is_interpreted=self.facts.is_interpreted)
        if self.gmem.flags is not None:
            handover.raise_flag(self.gmem.flags.at[self.cta])

    def _finish(self, part: UnitPart, ys: tuple[jax.Array, ...]) -> None:
        """Merges the helpers' sums with the owner's, always in the same order, and stores the unit."""
        facts, parts, out = self.facts, self.gmem.parts, self.gmem.out
        assert parts is not None
        assert out is not None
        # The CTA whose share holds the unit's first tile; this CTA and all CTAs between are helpers.
        first = lax.div((part.unit * facts.num_tiles + 1) * facts.config.num_ctas - 1, jnp.int32(self._total))
        num_helpers = self.cta - first
        if self.gmem.flags is not None:
            flags = self.gmem.flags
            pl.when(num_helpers > 0)(lambda: handover.await_flags(flags.at[first], num_helpers))

        def merge(i: jax.Array, ys: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            def given(j: int) -> jax.Array:
                source = parts.at[first + i, j]
                return accumulators.left(source, facts.num_rows, is_partner=False, is_interpreted=facts.is_interpreted)

            return tuple(y + given(j) for j, y in enumerate(ys))

        ys = lax.fori_loop(0, num_helpers, merge, ys)
        for i, y in enumerate(ys):
            column = part.unit * facts.config.block_n + i * HEIGHT
            accumulators.store(y, out, column, height=HEIGHT, is_interpreted=facts.is_interpreted)

        def discard(i: jax.Array, _: None) -> None:
            for j in range(len(ys)):
                accumulators.discard(parts.at[first + i, j], is_interpreted=facts.is_interpreted)

        lax.fori_loop(0, num_helpers, discard, None)
