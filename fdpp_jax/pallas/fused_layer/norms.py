"""Kinds of norms, and how products join the residual stream before one and are normed behind it.

No norm has a pass of its own. The gain is applied per column, to x before the next product. The mean and 1 / rms are
applied per row, to that product's result, since they are known only when all columns of the residual stream are. So the
CTA that finishes columns of the residual stream also stores them as rows of x, and sums over them.

A kind says which rows of x it stores (`rows_behind_norm` in `plans.hopper_layer` counts them), which sums, and how the
rows of the product make up the product with the normed residual stream (`normed`).
"""

import abc
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.pallas.fused_layer.columns import Columns, by_row, joined, rounded
from fdpp_jax.pallas.fused_layer.phases import LayerFacts, Phase
from fdpp_jax.pallas.fused_layer.refs import GlobalRefs, present
from fdpp_jax.pallas.parts.accumulators import LAYOUT, WIDTH
from fdpp_jax.pallas.parts.registers import load
from fdpp_jax.plans.shapes import LayerSpec

# finish(y, partner): y [64, rows] float32, a unit's columns in its first WIDTH rows; in partner the partner columns.
type Finish = Callable[[jax.Array, jax.Array], None]


class View(NamedTuple):
    """Rows of a product, as `accumulators.left` takes them: from first_row on, or that one for all."""

    first_row: int = 0
    is_repeated: bool = False


class Norm(abc.ABC):
    """A kind of norm in one launch.

    Attributes:
      num_sums: Sums over the columns that a join leaves.
    """

    num_sums: ClassVar[int]

    def __init__(self, gmem: GlobalRefs, facts: LayerFacts):
        self.gmem, self.facts = gmem, facts
        self.columns = Columns(facts.num_rows, facts.is_interpreted)

    @abc.abstractmethod
    def views(self) -> tuple[View, ...]:
        """The rows of a product behind the norm that `normed` wants."""

    @abc.abstractmethod
    def factors(self, phase: Phase) -> tuple[jax.Array, ...]:
        """What `join` or `normed` needs of all columns, each [rows]; the product before is done."""

    @abc.abstractmethod
    def join(self, phase: Phase, unit: jax.Array, low: jax.Array, factors: tuple[jax.Array, ...]) -> Finish:
        """The epilogue of a unit that joins the residual stream; its columns begin at low."""

    @abc.abstractmethod
    def normed(self, ys: Sequence[jax.Array], factors: tuple[jax.Array, ...]) -> jax.Array:
        """[64, rows]: the product with the normed residual stream, of the views of the product with x."""

    def gain(self, source: jax.Ref, low: jax.Array) -> jax.Array:
        """A norm's gain, of WIDTH columns."""
        return self.columns.load(source, low) + self.facts.spec.norm.gain_offset

    def mean(self, sums: jax.Ref | None, kind: int) -> jax.Array:
        """A sum over all columns, divided by their number, [rows]."""
        hidden_size = self.facts.hidden_size
        parts = load(present(sums).at[kind], LAYOUT, optimized=False)
        is_sum = plgpu.broadcasted_iota(jnp.int32, parts.shape, 0, layout=LAYOUT) < 2 * hidden_size // WIDTH
        return jnp.where(is_sum, parts, 0.0).sum(axis=0) / hidden_size

    def rsqrt(self, mean_square: jax.Array) -> jax.Array:
        """1 / sqrt(mean_square + eps)."""
        return lax.rsqrt(mean_square + self.facts.spec.norm.eps)

    def store_sums(self, sums: jax.Ref | None, unit: jax.Array, *values: jax.Array) -> None:
        """Of each kind the sums over a unit's columns."""
        for kind, value in enumerate(values):
            self.columns.store_sums(value, present(sums).at[kind, pl.ds(2 * unit, 2)])


class _PlainJoin(Norm):
    """The product, with its bias, is added to the residual stream as it is."""

    def join(self, phase: Phase, unit: jax.Array, low: jax.Array, factors: tuple[jax.Array, ...]) -> Finish:
        del factors
        refs, columns = self.gmem.join(phase), self.columns
        hidden, bias = columns.load(present(refs.before), low), columns.load_if(refs.bias, low)
        gain = None if refs.gain is None else self.gain(refs.gain, low)
        gain_bias = columns.load_if(refs.gain_bias, low)

        def finish(y: jax.Array, partner: jax.Array) -> None:
            total = rounded(hidden + joined(y, partner, bias))
            columns.store(total, present(refs.after), low)
            if gain is not None:
                self.leave(phase, unit, low, total, gain, gain_bias)

        return finish

    @abc.abstractmethod
    def leave(
        self, phase: Phase, unit: jax.Array, low: jax.Array, total: jax.Array, gain: jax.Array, bias: jax.Array | None
    ) -> None:
        """Stores rows of x and sums; total, gain and bias are [64, rows]."""


class RMSNorm(_PlainJoin):
    """x / rms(x) * gain. Rows of x: x * gain. The factor of a row is 1 / rms."""

    num_sums = 1

    def views(self) -> tuple[View, ...]:
        return (View(),)

    def factors(self, phase: Phase) -> tuple[jax.Array, ...]:
        return () if phase.is_residual else (self.rsqrt(self.mean(self.gmem.join(phase).sums, 0)),)

    def leave(
        self, phase: Phase, unit: jax.Array, low: jax.Array, total: jax.Array, gain: jax.Array, bias: jax.Array | None
    ) -> None:
        refs = self.gmem.join(phase)
        self.columns.store(total * gain, present(refs.scaled), low)
        self.store_sums(refs.sums, unit, total * total)

    def normed(self, ys: Sequence[jax.Array], factors: tuple[jax.Array, ...]) -> jax.Array:
        return by_row(factors[0], ys[0])


class LayerNorm(_PlainJoin):
    """(x - mean(x)) / std(x) * gain + bias. Rows of x: x * gain; then one row of gains, and one of biases.

    With them the product has what W @ gain and W @ bias are, column by column, for no more than rows of padding.
    """

    num_sums = 2

    def views(self) -> tuple[View, ...]:
        batch = self.facts.batch
        return View(), View(batch, is_repeated=True), View(batch + 1, is_repeated=True)

    def factors(self, phase: Phase) -> tuple[jax.Array, ...]:
        if phase.is_residual:
            return ()
        square, mean = (self.mean(self.gmem.join(phase).sums, kind) for kind in range(2))
        return mean, self.rsqrt(jnp.maximum(square - mean * mean, 0.0))

    def leave(
        self, phase: Phase, unit: jax.Array, low: jax.Array, total: jax.Array, gain: jax.Array, bias: jax.Array | None
    ) -> None:
        assert bias is not None
        refs, batch = self.gmem.join(phase), self.facts.batch
        scaled = present(refs.scaled)
        for first_row, num_rows, rows in ((0, batch, total * gain), (batch, 1, gain), (batch + 1, 1, bias)):
            self.columns.store(rows, scaled.at[pl.ds(first_row, num_rows)], low)
        self.store_sums(refs.sums, unit, total * total, total)

    def normed(self, ys: Sequence[jax.Array], factors: tuple[jax.Array, ...]) -> jax.Array:
        (y, of_gain, of_bias), (mean, factor) = ys, factors
        return by_row(factor, y - by_row(mean, of_gain)) + of_bias


class RMSNormOfSum(Norm):
    """RMSNorm of x + z / rms(y), where z = y * gain is a product with a norm of its own, whose factor comes later.

    Rows of x: x * gain, then z * gain, as many. The residual stream is a pair, too: x, and z as `added`. The next join
    adds them up, when it knows the factor.
    """

    num_sums = 4  # of y^2, x^2, x z and z^2

    def views(self) -> tuple[View, ...]:
        return View(), View(self.facts.batch)

    def factors(self, phase: Phase) -> tuple[jax.Array, ...]:
        refs = self.gmem.join(phase)
        if phase.is_residual:
            return (self.rsqrt(self.mean(refs.sums_before, 0)),)
        y_square, x_square, product, z_square = (self.mean(refs.sums, kind) for kind in range(4))
        factor = self.rsqrt(y_square)
        square = x_square + 2.0 * factor * product + factor * factor * z_square
        return factor, self.rsqrt(jnp.maximum(square, 0.0))  # rounding may leave less where the sum is nearly 0

    def join(self, phase: Phase, unit: jax.Array, low: jax.Array, factors: tuple[jax.Array, ...]) -> Finish:
        refs, columns, batch = self.gmem.join(phase), self.columns, self.facts.batch
        before, added = (columns.load(present(ref), low) for ref in (refs.before, refs.added_before))
        x = rounded(before + by_row(factors[0], added))
        bias = columns.load_if(refs.bias, low)
        product_gain = self.gain(present(refs.product_gain), low)
        gain = None if refs.gain is None else self.gain(refs.gain, low)

        def finish(y: jax.Array, partner: jax.Array) -> None:
            y = rounded(joined(y, partner, bias))  # as a matmul of its own would store it
            z = y * product_gain
            columns.store(x, present(refs.after), low)
            columns.store(z, present(refs.added), low)
            self.store_sums(refs.sums, unit, y * y, x * x, x * z, z * z)
            if gain is not None:
                scaled = present(refs.scaled)
                columns.store(x * gain, scaled.at[pl.ds(0, batch)], low)
                columns.store(z * gain, scaled.at[pl.ds(batch, batch)], low)

        return finish

    def normed(self, ys: Sequence[jax.Array], factors: tuple[jax.Array, ...]) -> jax.Array:
        (y, added), (added_factor, factor) = ys, factors
        return by_row(factor, y + by_row(added_factor, added))


def kind_of(spec: LayerSpec) -> type[RMSNorm | LayerNorm | RMSNormOfSum]:
    """The kind of a layer's norms."""
    if spec.norms_products:
        return RMSNormOfSum
    return LayerNorm if spec.norm.kind == "layer" else RMSNorm


def added_up(x: jax.Array, added: jax.Array, sums: jax.Array, eps: float) -> jax.Array:
    """The residual stream [B, D], of the pair that the last join of a launch leaves with an `RMSNormOfSum`."""
    square = sums[0, : 2 * x.shape[1] // WIDTH, : x.shape[0]].sum(axis=0) / x.shape[1]
    factor = lax.rsqrt(square + eps)[:, None]
    return (x.astype(jnp.float32) + factor * added.astype(jnp.float32)).astype(x.dtype)
