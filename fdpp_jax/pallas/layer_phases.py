"""The products of a fused layer, and which CTA finishes which of their columns."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from fdpp_jax.config import UNIT_WIDTH, FusedLayerConfig


@dataclasses.dataclass(frozen=True)
class Phase:
    """One product, of the array named x [rows, depth] with the weights named w [columns, depth].

    Of its num_units, each is UNIT_WIDTH columns, with as many partner columns if the kind has some: gate and up, and
    the halves of a head that rotate together.
    """

    kind: Literal["residual", "gate", "qkv"]
    x: str
    w: str
    depth: int
    num_units: int
    first_unit: int  # units of all phases before


@dataclasses.dataclass(frozen=True)
class Facts:
    """Static facts of a fused layer; num_kv_heads is 0 after the last layer."""

    num_rows: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    inner_size: int
    eps: float
    config: FusedLayerConfig
    is_interpreted: bool

    @functools.cached_property
    def phases(self) -> tuple[Phase, ...]:
        """In their order."""
        phases: list[Phase] = []

        def add(kind: Any, x: str, w: str, depth: int, num_units: int) -> None:
            done = phases[-1].first_unit + phases[-1].num_units if phases else 0
            phases.append(Phase(kind, x, w, depth, num_units, done))

        add("residual", "attended", "o", self.num_heads * self.head_dim, self.hidden_size // UNIT_WIDTH)
        add("gate", "scaled_middle", "gate_up", self.hidden_size, self.inner_size // UNIT_WIDTH)
        add("residual", "inner", "down", self.inner_size, self.hidden_size // UNIT_WIDTH)
        if self.num_kv_heads:
            columns = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
            add("qkv", "scaled_last", "next_qkv", self.hidden_size, columns // (2 * UNIT_WIDTH))
        return tuple(phases)

    def sizes(self, phase: Phase) -> tuple[int, int]:
        """Tiles of weights a unit, and chunks of x."""
        num_tiles = pl.cdiv(phase.depth, self.config.block_k)
        return num_tiles, pl.cdiv(num_tiles, self.config.num_x_tiles)

    def share(self, phase: Phase, cta: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A CTA's first unit, and how many it has: they go round all CTAs, on and on from phase to phase."""
        num_ctas = self.config.num_ctas
        first = lax.rem(cta + (num_ctas - phase.first_unit % num_ctas), jnp.int32(num_ctas))
        return first, jnp.maximum(lax.div(phase.num_units - first + (num_ctas - 1), jnp.int32(num_ctas)), 0)

    def columns(self, phase: Phase, unit: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where the two halves of a unit's tile begin: its columns and their partners, or its columns in two parts."""
        if phase.kind == "residual":
            return unit * UNIT_WIDTH, unit * UNIT_WIDTH + UNIT_WIDTH // 2
        if phase.kind == "gate":
            return unit * UNIT_WIDTH, unit * UNIT_WIDTH + self.inner_size
        half = self.head_dim // 2
        units_per_head = jnp.int32(half // UNIT_WIDTH)
        low = lax.div(unit, units_per_head) * self.head_dim + lax.rem(unit, units_per_head) * UNIT_WIDTH
        return low, low + half
