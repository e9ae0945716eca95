"""The products of a fused layer, and which CTA multiplies which of their columns.

The units of a product go round all CTAs, full rounds last. Those of a first round that is not full are split along K,
so that all CTAs have as much to do before the next product can begin: a CTA has the end of one of them and the
beginning of the next. Whoever has a unit's beginning is its host, and finishes it; the others are its guests, and
leave their sums with it. They do so before all else, so that no host waits for long.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from fdpp_jax.config import UNIT_WIDTH, FusedLayerConfig
from fdpp_jax.pallas import ring

# A round that is nearly full is left as it is: splitting it has a cost, too.
_MAX_SPLIT = 0.9


@dataclasses.dataclass(frozen=True)
class Phase:
    """One product, of the array named x [rows, depth] with the weights named w [columns, depth].

    Of its num_units, each is UNIT_WIDTH columns, with as many partner columns if the kind has some: gate and up, the
    halves of a head that rotate together, and of the logits the columns beside them.
    """

    kind: Literal["residual", "gate", "qkv", "head"]
    x: str
    w: str
    depth: int
    num_units: int

    @property
    def num_blocks(self) -> int:
        """Blocks of K in a tile: without partner columns two, or half of it would be empty."""
        return 2 if self.kind == "residual" else 1


@dataclasses.dataclass(frozen=True)
class Step:
    """Of the phase `index` what its guests do, or all else."""

    index: int
    phase: Phase
    is_guests: bool


class Segment(NamedTuple):
    """Tiles [start, stop) of a unit's K, all [] int32; start = stop is nothing to do."""

    unit: jax.Array
    start: jax.Array
    stop: jax.Array


@dataclasses.dataclass(frozen=True)
class Facts:
    """Static facts of a launch.

    Attributes:
      num_kv_heads: 0 if no layer follows.
      vocab_size: 0 if the model's head does not follow.
      is_first: Whether it has the first layer's queries, keys and values only.
    """

    num_rows: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    inner_size: int
    eps: float
    config: FusedLayerConfig
    is_interpreted: bool
    vocab_size: int = 0
    is_first: bool = False

    @functools.cached_property
    def phases(self) -> tuple[Phase, ...]:
        """In their order."""
        phases: list[Phase] = []

        def add(kind: Any, x: str, w: str, depth: int, num_units: int) -> None:
            phases.append(Phase(kind, x, w, depth, num_units))

        if not self.is_first:
            add("residual", "attended", "o", self.num_heads * self.head_dim, self.hidden_size // UNIT_WIDTH)
            add("gate", "scaled_middle", "gate_up", self.hidden_size, self.inner_size // UNIT_WIDTH)
            add("residual", "inner", "down", self.inner_size, self.hidden_size // UNIT_WIDTH)
        if self.num_kv_heads:
            columns = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
            add("qkv", "scaled_last", "next_qkv", self.hidden_size, columns // (2 * UNIT_WIDTH))
        elif self.vocab_size:
            add("head", "scaled_last", "head", self.hidden_size, self.vocab_size // (2 * UNIT_WIDTH))
        return tuple(phases)

    def num_tiles(self, phase: Phase) -> int:
        """Tiles of weights a unit."""
        return pl.cdiv(phase.depth, phase.num_blocks * self.config.block_k)

    def chunks(self, phase: Phase, segment: Segment) -> tuple[jax.Array, jax.Array]:
        """The chunks of x [first, last) that a segment reads."""
        num_x_tiles = jnp.int32(self.config.num_x_tiles)
        first = lax.div(segment.start * phase.num_blocks, num_x_tiles)
        last = lax.div(segment.stop * phase.num_blocks + (num_x_tiles - 1), num_x_tiles)
        return first, jnp.where(segment.stop > segment.start, last, first)

    @functools.cached_property
    def steps(self) -> tuple[Step, ...]:
        """In their order. A step needs all CTAs' results of the steps before."""
        return tuple(
            Step(index, phase, is_guests)
            for index, phase in enumerate(self.phases)
            for is_guests in ((True, False) if self.num_split(phase) else (False,))
        )

    def num_split(self, phase: Phase) -> int:
        """Units that are split: the first ones. None where every CTA but a few has one of them."""
        full, rest = divmod(phase.num_units, self.config.num_ctas)
        is_worth = self.config.num_ctas <= rest * self.num_tiles(phase) and rest < _MAX_SPLIT * self.config.num_ctas
        return rest if full and is_worth else 0

    def num_segments(self, step: Step, cta: jax.Array) -> jax.Array | int:
        """How many segments a CTA has in a step, empty ones included."""
        full, rest = divmod(step.phase.num_units, self.config.num_ctas)
        if step.is_guests:
            return 1
        if self.num_split(step.phase):
            return 1 + full
        return full + (cta < rest).astype(jnp.int32)

    def segment(self, step: Step, cta: jax.Array, turn: jax.Array) -> Segment:
        """A CTA's segment of a step."""
        num_ctas, num_tiles, num_split = self.config.num_ctas, self.num_tiles(step.phase), self.num_split(step.phase)
        if not num_split:
            return Segment(cta + turn * num_ctas, jnp.int32(0), jnp.int32(num_tiles))
        begin, end = ring.share(cta, num_ctas, num_split * num_tiles)
        if step.is_guests:
            unit, start = lax.div(begin, jnp.int32(num_tiles)), lax.rem(begin, jnp.int32(num_tiles))
            stop = jnp.minimum(end - unit * num_tiles, num_tiles)
            return Segment(unit, start, jnp.where(start > 0, stop, start))
        unit = lax.div(begin + (num_tiles - 1), jnp.int32(num_tiles))
        stop = jnp.maximum(end - unit * num_tiles, 0)
        is_split = turn == 0
        unit = jnp.where(is_split, unit, num_split + (turn - 1) * num_ctas + cta)
        return Segment(unit, jnp.int32(0), jnp.where(is_split, stop, num_tiles))

    def for_segments(self, step: Step, cta: jax.Array, work: Callable[..., Any], carry: Any) -> Any:
        """carry = work(turn, segment, carry) for all segments that a CTA has in a step, empty ones included."""

        def body(turn: jax.Array, carry: Any) -> Any:
            return work(turn, self.segment(step, cta, turn), carry)

        return lax.fori_loop(0, self.num_segments(step, cta), body, carry)

    def num_guests(self, phase: Phase, host: jax.Array, unit: jax.Array) -> jax.Array:
        """CTAs after the host that have a part of one of the split units."""
        num_tiles = self.num_tiles(phase)
        last = lax.div((unit + 1) * (num_tiles * self.config.num_ctas) - 1, self.num_split(phase) * num_tiles)
        return last - host

    def columns(self, phase: Phase, unit: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where the two halves of a unit's tile begin: its columns and their partners, or its columns twice."""
        if phase.kind == "residual":
            return unit * UNIT_WIDTH, unit * UNIT_WIDTH
        if phase.kind == "gate":
            return unit * UNIT_WIDTH, unit * UNIT_WIDTH + self.inner_size
        if phase.kind == "head":
            return 2 * unit * UNIT_WIDTH, 2 * unit * UNIT_WIDTH + UNIT_WIDTH
        half = self.head_dim // 2
        units_per_head = jnp.int32(half // UNIT_WIDTH)
        low = lax.div(unit, units_per_head) * self.head_dim + lax.rem(unit, units_per_head) * UNIT_WIDTH
        return low, low + half
