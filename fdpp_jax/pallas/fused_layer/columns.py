"""Columns of arrays in global memory, to and from registers [64, rows], of which the first WIDTH rows are columns."""

import dataclasses

import jax
import jax.numpy as jnp

from fdpp_jax.pallas.parts import accumulators

type Halves = tuple[jax.Array, jax.Array]  # of a unit's columns and of its partners'


@dataclasses.dataclass(frozen=True)
class Columns:
    """How the arrays of a launch are read and written.

    Attributes:
      num_rows: Rows of results, a multiple of 8.
      is_interpreted: Whether the interpreter runs the kernel.
    """

    num_rows: int
    is_interpreted: bool

    def load(self, source: jax.Ref, column: jax.Array) -> jax.Array:
        """WIDTH columns of source [rows, columns], or of source [columns], which every row gets."""
        return accumulators.load(source, column, self.num_rows, is_interpreted=self.is_interpreted)

    def load_if(self, source: jax.Ref | None, column: jax.Array) -> jax.Array | None:
        """`load`, if there is such an array."""
        return None if source is None else self.load(source, column)

    def load_both(self, source: jax.Ref | None, low: jax.Array, high: jax.Array) -> Halves | None:
        """`load` of a unit's columns and of its partners', if there is such an array."""
        return None if source is None else (self.load(source, low), self.load(source, high))

    def store(self, y: jax.Array, target: jax.Ref, column: jax.Array, rows_gmem: jax.Ref | None = None) -> None:
        """target[row, column + i] = y[i, row] for the first WIDTH i; see `accumulators.store`."""
        accumulators.store(y, target, column, is_interpreted=self.is_interpreted, rows_gmem=rows_gmem)

    def store_sums(self, y: jax.Array, sums: jax.Ref) -> None:
        """sums[0, row] + sums[1, row] = the sum of y[i, row] over the first WIDTH i."""
        accumulators.store_sums(y, sums, is_interpreted=self.is_interpreted)


def rounded(y: jax.Array) -> jax.Array:
    """y as an array in bfloat16 would hold it."""
    return y.astype(jnp.bfloat16).astype(jnp.float32)


def joined(y: jax.Array, partner: jax.Array, bias: jax.Array | None) -> jax.Array:
    """A product of whose K y and partner have a half each, with its bias."""
    return y + partner if bias is None else y + partner + bias


def biased(y: jax.Array, partner: jax.Array, biases: Halves | None) -> Halves:
    """Both as a matmul of its own would store them, and a sum with its bias."""
    y, partner = rounded(y), rounded(partner)
    return (y, partner) if biases is None else (rounded(y + biases[0]), rounded(partner + biases[1]))


def by_row(factors: jax.Array, y: jax.Array) -> jax.Array:
    """y [64, rows] times a factor per row [rows]."""
    return y * jax.lax.broadcast_in_dim(factors, y.shape, [1])
