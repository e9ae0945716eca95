"""x @ w for 1 to 64 rows on Hopper's tensor cores (Mosaic GPU): rows padded to 8, not 64, in one launch.

wgmma's large operand has 64 rows and its small one any multiple of 8. The weights, of which there are many,
take the 64, and x takes the 8:

    out^T [block_n, rows] += w^T [block_n, block_k] @ x^T [block_k, rows]

wgmma transposes 16-bit operands as it reads them, so w may be stored [K, N] or [N, K] alike.

Each CTA streams an even share of all tiles, wherever in K it begins and ends, through one ring of TMA stages that knows
no end of a column block: a warpgroup loads, another multiplies. A block that several CTAs have parts of is finished by
the one that has its end; the others hand their sums over through memory (handover). They do so before all else, so that
it waits for them last and hardly ever for long. TMA fills what lies beyond a ragged K or N with zeros.

Source: FlashDecoding++ (arXiv 2311.01282), section 4 (flat GEMM with double buffering).
"""

import dataclasses
import functools
import math
import types
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.config import FlatMatmulConfig, WeightOrder, in_order, round_up
from fdpp_jax.pallas import accumulators, handover, ring
from fdpp_jax.pallas.accumulators import HEIGHT

_STORED = ("bfloat16", "float16", "float32")


# Jitted so that a model's layers share one trace and one lowering: a kernel takes some 0.3 s to lower.
@functools.partial(jax.jit, static_argnames=("config", "out_dtype", "w_order", "interpret"))
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
    facts = Facts(
        num_rows=round_up(num_rows, 8),
        num_tiles=pl.cdiv(depth, config.block_k),
        num_units=pl.cdiv(width, config.block_n),
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
        return launch(operands, out | parts | flags, ("give", "finish"))["out"].astype(out_dtype)
    # Its stores may not reach beyond an array.
    out = dict(out=jax.ShapeDtypeStruct((num_rows, facts.num_units * config.block_n), stored))
    operands |= launch(operands, parts, ("give",))
    return launch(operands, out, ("finish",))["out"][:, :width].astype(out_dtype)


@dataclasses.dataclass(frozen=True)
class Facts:
    """Static facts of a call: padded rows, tiles of K a unit, and units, each a block of columns."""

    num_rows: int
    num_tiles: int
    num_units: int
    config: FlatMatmulConfig
    w_order: WeightOrder
    is_interpreted: bool


class Segment(NamedTuple):
    """Tiles [start, stop) of a unit's K, all [] int32."""

    unit: jax.Array
    start: jax.Array
    stop: jax.Array


type Task = Literal["give", "finish"]


def _launch(
    operands: dict[str, jax.Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    tasks: tuple[Task, ...],
    *,
    facts: Facts,
    interpret: plgpu.InterpretGPUParams | None,
) -> dict[str, jax.Array]:
    config, x, w = facts.config, operands["x"], operands["w"]
    transforms = ring.tile_transforms(math.gcd(x.shape[1], w.shape[1]))  # wgmma wants one swizzle for both operands
    w_tile = in_order(facts.w_order, config.block_k, config.block_n)

    def body(*refs: Any, **smem: Any) -> None:
        gmem = types.SimpleNamespace(**dict(zip((*operands, *outputs), refs, strict=True)))
        cta = _Cta(gmem, types.SimpleNamespace(**smem), facts, tasks)
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
    """One CTA, whose share of all tiles is [begin, end): the units that end there, and the beginning of one more."""

    def __init__(self, gmem: Any, smem: Any, facts: Facts, tasks: tuple[Task, ...]):
        self.gmem, self.smem, self.facts, self.tasks = gmem, smem, facts, tasks
        self.cta = lax.axis_index("cta")
        self.begin, self.end = ring.share(self.cta, facts.config.num_ctas, self._total)
        self.last_unit = lax.div(self.end, jnp.int32(facts.num_tiles))  # whose beginning it has, if not all of it
        num_ended = self.last_unit - lax.div(self.begin, jnp.int32(facts.num_tiles))
        self.turns = (0 if "give" in tasks else 1), (1 + num_ended if "finish" in tasks else 1)

    @property
    def _total(self) -> int:
        return self.facts.num_units * self.facts.num_tiles

    def _segment(self, turn: jax.Array) -> Segment:
        """First the beginning of a unit, which may be empty; last the end of the one that others have begun."""
        num_tiles = self.facts.num_tiles
        unit = self.last_unit - turn
        start = jnp.maximum(self.begin - unit * num_tiles, 0)
        return Segment(unit, start, jnp.minimum(self.end - unit * num_tiles, num_tiles))

    # Warpgroup 1

    def stream(self) -> None:
        """Loads the tiles of x and w."""
        config, smem, num_stages = self.facts.config, self.smem, self.facts.config.num_stages

        def segment(turn: jax.Array, done: jax.Array) -> jax.Array:
            unit, start, stop = self._segment(turn)
            columns = pl.ds(unit * config.block_n, config.block_n)

            def tile(k: jax.Array, done: jax.Array) -> jax.Array:
                slot = lax.rem(done, jnp.int32(num_stages))
                pl.when(done >= num_stages)(lambda: plgpu.barrier_wait(smem.free.at[slot]))
                depth = pl.ds(k * config.block_k, config.block_k)
                w = self.gmem.w.at[in_order(self.facts.w_order, depth, columns)]
                plgpu.copy_gmem_to_smem(w, smem.w.at[slot], smem.ready.at[slot])
                # A traced start lets the box reach beyond the rows, too: TMA fills with zeros.
                x = self.gmem.x.at[pl.ds(self.cta * 0, self.facts.num_rows), depth]
                plgpu.copy_gmem_to_smem(x, smem.x.at[slot], smem.ready.at[slot])
                return done + 1

            return lax.fori_loop(start, stop, tile, done)

        ring.drain(smem.free, lax.fori_loop(*self.turns, segment, jnp.int32(0)), num_stages)

    # Warpgroup 0

    def multiply(self) -> None:
        """Multiplies the tiles, and hands over what another CTA finishes."""

        def segment(turn: jax.Array, done: jax.Array) -> jax.Array:
            part = self._segment(turn)

            @pl.when(part.stop > part.start)
            def _segment() -> None:
                accs = [plgpu.ACC((HEIGHT, self.facts.num_rows), jnp.float32)] * (self.facts.config.block_n // HEIGHT)
                ys = pl.run_scoped(functools.partial(self._product, part, done), *accs)
                is_end = part.stop == self.facts.num_tiles
                if "finish" in self.tasks:
                    pl.when(is_end)(functools.partial(self._finish, part, ys))
                if "give" in self.tasks:
                    pl.when(jnp.logical_not(is_end))(functools.partial(self._give, ys))

            return done + part.stop - part.start

        lax.fori_loop(*self.turns, segment, jnp.int32(0))

    def _product(self, part: Segment, done: jax.Array, *accs: Any) -> tuple[jax.Array, ...]:
        """The columns of a unit, HEIGHT by HEIGHT: each [HEIGHT, rows]."""
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
            plgpu.wgmma_wait(len(accs))  # the products of the last tile are done: its slot is free
            pl.when(k > part.start)(lambda: plgpu.barrier_arrive(smem.free.at[slot_of(k - 1)]))

        lax.fori_loop(part.start, part.stop, multiply, None)
        ys = tuple(acc[...] for acc in accs)
        plgpu.barrier_arrive(smem.free.at[slot_of(part.stop - 1)])
        return ys

    def _give(self, ys: tuple[jax.Array, ...]) -> None:
        for i, y in enumerate(ys):
            accumulators.leave(y, self.gmem.parts.at[self.cta, i], is_interpreted=self.facts.is_interpreted)
        if not self.facts.is_interpreted:
            handover.raise_flag(self.gmem.flags.at[self.cta])

    def _finish(self, part: Segment, ys: tuple[jax.Array, ...]) -> None:
        """Adds what others have of the unit, always in the same order, and stores it."""
        facts = self.facts
        # The CTA whose share holds the unit's first tile; it and all between are givers.
        host = lax.div((part.unit * facts.num_tiles + 1) * facts.config.num_ctas - 1, jnp.int32(self._total))
        num_givers = self.cta - host
        if not facts.is_interpreted:
            pl.when(num_givers > 0)(lambda: handover.await_flags(self.gmem.flags.at[host], num_givers))

        def add(i: jax.Array, ys: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            def left(j: int) -> jax.Array:
                source = self.gmem.parts.at[host + i, j]
                return accumulators.left(source, facts.num_rows, is_partner=False, is_interpreted=facts.is_interpreted)

            return tuple(y + left(j) for j, y in enumerate(ys))

        ys = lax.fori_loop(0, num_givers, add, ys)
        for i, y in enumerate(ys):
            column = part.unit * facts.config.block_n + i * HEIGHT
            accumulators.store(y, self.gmem.out, column, height=HEIGHT, is_interpreted=facts.is_interpreted)

        def discard(i: jax.Array, _: None) -> None:
            for j in range(len(ys)):
                accumulators.discard(self.gmem.parts.at[host + i, j], is_interpreted=facts.is_interpreted)

        lax.fori_loop(0, num_givers, discard, None)
