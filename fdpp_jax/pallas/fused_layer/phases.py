"""The products of a fused layer, and which CTA computes which of their columns.

A unit is UNIT_WIDTH columns of a product, with their partner columns if the product has some. Units go round the CTAs.
A round that is not full comes first, and its units are split along K, so that all CTAs have equal work before the next
product can begin: each CTA then has the end of one split unit and the beginning of the next. The CTA that has a unit's
beginning is the owner: it merges the partial sums and finishes the unit. The other CTAs of the unit are its helpers,
which hand their partial sums to the owner. A CTA works as a helper before all else, so that owners hardly ever wait.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fdpp_jax.pallas.parts import ring
from fdpp_jax.plans.hopper_layer import UNIT_WIDTH, FusedLayerConfig, inner_width, padded_rows
from fdpp_jax.plans.shapes import LayerSpec, cdiv, round_up

# A nearly full round stays whole, since splitting has a cost, too:
# docs/experiments/fused_layer.md#what-each-change-gave
_MAX_SPLIT = 0.9


@dataclasses.dataclass(frozen=True)
class Phase:
    """One product x [rows, depth] @ w [columns, depth]^T.

    Attributes:
      name: Of its weights.
      depth: Columns of x.
      num_units: Units of its columns. Partner columns are up's for gate's, the other half of the head for queries, keys
        and values that rotate together, and else the neighbours; products that join the residual stream have none.
      num_rows: Rows of x, padded to a multiple of 8.
      part_width: Columns of x that a unit of the product before makes.
    """

    name: Literal["o", "mlp_in", "mlp_out", "qkv", "head"]
    depth: int
    num_units: int
    num_rows: int
    part_width: int = UNIT_WIDTH

    @property
    def is_residual(self) -> bool:
        """Whether the result joins the residual stream."""
        return self.name in ("o", "mlp_out")

    @property
    def product_size(self) -> int:
        """Elements of a unit's product, with its partner columns."""
        return 2 * UNIT_WIDTH * self.num_rows

    @property
    def num_blocks(self) -> int:
        """Blocks of K per tile: two without partner columns, which would leave half of the tile empty."""
        return 2 if self.is_residual else 1


@dataclasses.dataclass(frozen=True)
class Step:
    """What CTAs do as helpers in the phase `index`, or all their other work in the phase."""

    index: int
    phase: Phase
    is_helpers: bool


class Segment(NamedTuple):
    """Tiles [start, stop) of a unit's K, all [] int32; empty if start = stop."""

    unit: jax.Array
    start: jax.Array
    stop: jax.Array


@dataclasses.dataclass(frozen=True)
class LayerFacts:
    """Static facts of a launch.

    Attributes:
      batch: Rows of the residual stream, B.
      num_heads: N.
      num_kv_heads: K; 0 if no layer follows.
      head_dim: H.
      hidden_size: D.
      inner_size: F.
      spec: What the layer computes.
      config: Tiles and stages.
      is_interpreted: Whether the interpreter runs the kernel.
      vocab_size: V; 0 if the model's head does not follow.
      is_first: Whether the launch computes the first layer's queries, keys and values only.
    """

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    inner_size: int
    spec: LayerSpec
    config: FusedLayerConfig
    is_interpreted: bool
    vocab_size: int = 0
    is_first: bool = False

    @property
    def num_rows(self) -> int:
        """Rows of results: B, padded to a multiple of 8."""
        return round_up(self.batch, 8)

    @property
    def num_normed_rows(self) -> int:
        """Rows of x in a product behind a norm, which are the most. The first layer's x is normed in full."""
        return self.num_rows if self.is_first else padded_rows(self.spec, self.batch)

    @functools.cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The products in their order."""
        hidden, inner, pair = self.hidden_size, self.inner_size, 2 * UNIT_WIDTH
        rows, normed_rows = self.num_rows, self.num_normed_rows
        phases = []
        if not self.is_first:
            width = inner_width(self.spec)
            phases += [
                Phase("o", self.num_heads * self.head_dim, hidden // UNIT_WIDTH, rows),
                Phase("mlp_in", hidden, inner // width, normed_rows),
                Phase("mlp_out", inner, hidden // UNIT_WIDTH, rows, part_width=width),
            ]
        if self.num_kv_heads:
            heads = self.num_heads + 2 * self.num_kv_heads
            phases.append(Phase("qkv", hidden, heads * self.units_per_head, normed_rows))
        elif self.vocab_size:
            phases.append(Phase("head", hidden, cdiv(self.vocab_size, pair), normed_rows))
        return tuple(phases)

    @property
    def num_rotated(self) -> int:
        """Columns of a head that rotate: its first ones."""
        return self.spec.num_rotated(self.head_dim)

    @property
    def units_per_head(self) -> int:
        """Units of a head's columns: first those of the columns that rotate."""
        return self._rotated_units + cdiv(self.head_dim - self.num_rotated, 2 * UNIT_WIDTH)

    @property
    def _rotated_units(self) -> int:
        return cdiv(self.num_rotated, 2 * UNIT_WIDTH)

    @property
    def _units_overlap(self) -> bool:
        """Whether the last units of a head begin early, so that some columns are of two units, which store the same."""
        return any(columns % (2 * UNIT_WIDTH) for columns in (self.num_rotated, self.head_dim))

    def num_tiles(self, phase: Phase) -> int:
        """Tiles of weights per unit."""
        return cdiv(phase.depth, phase.num_blocks * self.config.block_k)

    def chunks(self, phase: Phase, segment: Segment) -> tuple[jax.Array, jax.Array]:
        """The chunks of x [first, last) that a segment reads."""
        num_x_tiles = jnp.int32(self.config.num_x_tiles)
        first = lax.div(segment.start * phase.num_blocks, num_x_tiles)
        last = lax.div(segment.stop * phase.num_blocks + (num_x_tiles - 1), num_x_tiles)
        return first, jnp.where(segment.stop > segment.start, last, first)

    @functools.cached_property
    def steps(self) -> tuple[Step, ...]:
        """The steps in their order. A step needs the results of the steps before it, of all CTAs."""
        return tuple(
            Step(index, phase, is_helpers)
            for index, phase in enumerate(self.phases)
            for is_helpers in ((True, False) if self.num_split(phase) else (False,))
        )

    def num_split(self, phase: Phase) -> int:
        """Units that are split: the first ones. 0 where splitting would not pay, as in a nearly full round.

        Nor may a CTA have two units of a head whose units wait for each other (`heads`): it would wait for itself. And
        units with the same columns must add up K in the same order, to store the same bits.
        """
        full, rest = divmod(phase.num_units, self.config.num_ctas)
        if phase.name == "qkv" and self._units_overlap:
            return 0
        if phase.name == "qkv" and self.spec.norms_queries_and_keys and rest % self.units_per_head:
            return 0
        is_worth = self.config.num_ctas <= rest * self.num_tiles(phase) and rest < _MAX_SPLIT * self.config.num_ctas
        return rest if full and is_worth else 0

    def num_segments(self, step: Step, cta: jax.Array) -> jax.Array | int:
        """Segments that a CTA has in a step, empty ones included."""
        full, rest = divmod(step.phase.num_units, self.config.num_ctas)
        if step.is_helpers:
            return 1
        if self.num_split(step.phase):
            return 1 + full
        return full + (cta < rest).astype(jnp.int32)

    def segment(self, step: Step, cta: jax.Array, turn: jax.Array) -> Segment:
        """Segment `turn` of a CTA in a step. An owner's part of a split unit comes first."""
        num_ctas, num_tiles, num_split = self.config.num_ctas, self.num_tiles(step.phase), self.num_split(step.phase)
        if not num_split:
            return Segment(cta + turn * num_ctas, jnp.int32(0), jnp.int32(num_tiles))
        begin, end = ring.share(cta, num_ctas, num_split * num_tiles)
        if step.is_helpers:
            unit, start = lax.div(begin, jnp.int32(num_tiles)), lax.rem(begin, jnp.int32(num_tiles))
            stop = jnp.minimum(end - unit * num_tiles, num_tiles)
            return Segment(unit, start, jnp.where(start > 0, stop, start))
        unit = lax.div(begin + (num_tiles - 1), jnp.int32(num_tiles))
        stop = jnp.maximum(end - unit * num_tiles, 0)
        is_split = turn == 0
        unit = jnp.where(is_split, unit, num_split + (turn - 1) * num_ctas + cta)
        return Segment(unit, jnp.int32(0), jnp.where(is_split, stop, num_tiles))

    def for_segments[C](self, step: Step, cta: jax.Array, work: Callable[[jax.Array, Segment, C], C], carry: C) -> C:
        """carry = work(turn, segment, carry) for each segment that a CTA has in a step, empty ones included."""

        def body(turn: jax.Array, carry: C) -> C:
            return work(turn, self.segment(step, cta, turn), carry)

        return lax.fori_loop(0, self.num_segments(step, cta), body, carry)

    def num_helpers(self, phase: Phase, owner: jax.Array, unit: jax.Array) -> jax.Array:
        """Helpers of a split unit: the CTAs owner + 1, owner + 2, ..."""
        num_tiles = self.num_tiles(phase)
        last = lax.div((unit + 1) * (num_tiles * self.config.num_ctas) - 1, self.num_split(phase) * num_tiles)
        return last - owner

    def columns(self, phase: Phase, unit: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First of a unit's columns and first of their partners; without partners, the first column twice."""
        if phase.is_residual:
            return unit * UNIT_WIDTH, unit * UNIT_WIDTH
        if phase.name == "mlp_in" and self.spec.is_gated:
            return unit * UNIT_WIDTH, unit * UNIT_WIDTH + self.inner_size
        if phase.name != "qkv":
            return 2 * unit * UNIT_WIDTH, 2 * unit * UNIT_WIDTH + UNIT_WIDTH
        head, place = (f(unit, jnp.int32(self.units_per_head)) for f in (lax.div, lax.rem))
        half, end = self.num_rotated // 2, self.head_dim - 2 * UNIT_WIDTH  # where the last unit begins
        rotated = jnp.minimum(place * UNIT_WIDTH, half - UNIT_WIDTH)
        others = jnp.minimum(self.num_rotated + 2 * (place - self._rotated_units) * UNIT_WIDTH, end)
        is_rotated = place < self._rotated_units
        low = head * self.head_dim + jnp.where(is_rotated, rotated, others)
        return low, low + jnp.where(is_rotated, half, UNIT_WIDTH)
