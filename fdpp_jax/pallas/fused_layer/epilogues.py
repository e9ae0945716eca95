"""The fused layer's epilogues: from a unit's merged product to what is stored.

Each epilogue loads its operands first, then returns a function of the product, so that loads overlap with products.
What a `LayerSpec` decides is here alone: norm, activation, biases and rotation. `hopper_layer.refuse_spec` refuses the
layers for which there is no epilogue.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.pallas.fused_layer.phases import LayerFacts, Phase
from fdpp_jax.pallas.fused_layer.refs import GlobalRefs, present
from fdpp_jax.pallas.parts import accumulators
from fdpp_jax.pallas.parts.accumulators import LAYOUT, WIDTH
from fdpp_jax.pallas.parts.registers import load

# finish(y, partner): y [64, rows] float32, a unit's columns in its first WIDTH rows; in partner the partner columns.
type Finish = Callable[[jax.Array, jax.Array], None]


def _silu(x: jax.Array) -> jax.Array:
    return x / (1.0 + jnp.exp(-x))


_ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {"silu": _silu}


def _rotated(
    y: jax.Array, partner: jax.Array, cos: jax.Array, sin: jax.Array, is_rotated: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The two halves of a head turned together, or as they are."""
    is_rotated = is_rotated.astype(jnp.float32)
    c, s = cos * is_rotated + (1.0 - is_rotated), sin * is_rotated
    return y * c - partner * s, partner * c + y * s


def _rounded(y: jax.Array) -> jax.Array:
    """y as an array in bfloat16 would hold it."""
    return y.astype(jnp.bfloat16).astype(jnp.float32)


class Epilogues:
    """The epilogues of one CTA."""

    def __init__(self, gmem: GlobalRefs, facts: LayerFacts):
        self.gmem, self.facts = gmem, facts

    def of(self, phase: Phase, unit: jax.Array, low: jax.Array, high: jax.Array) -> Finish:
        """The epilogue of a unit whose columns begin at low, and whose partner columns at high."""
        match phase.name:
            case "o" | "down":
                return self._residual(phase, unit, low)
            case "gate_up":
                return self._gated(low)
            case "qkv":
                return self._query_key_value(low, high)
            case "head":
                return self._logits(low, high)

    def has_factor(self, phase: Phase) -> bool:
        """Whether the product's rows lack the norm's factor. The first layer's input comes normed in full."""
        return not phase.is_residual and not self.facts.is_first

    def factor(self, phase: Phase) -> jax.Array:
        """The norm's factor per row [rows], 1 / rms, for a product of rows that were stored times the gain only."""
        facts = self.facts
        sums = self.gmem.middle_squares if phase.name == "gate_up" else self.gmem.last_squares
        squares = load(present(sums), LAYOUT, optimized=False)
        is_sum = plgpu.broadcasted_iota(jnp.int32, squares.shape, 0, layout=LAYOUT) < 2 * facts.hidden_size // WIDTH
        mean = jnp.where(is_sum, squares, 0.0).sum(axis=0) / facts.hidden_size
        return lax.rsqrt(mean + facts.spec.norm.eps)

    def _residual(self, phase: Phase, unit: jax.Array, low: jax.Array) -> Finish:
        """Adds to the residual stream; stores what the next norm needs: columns times its gain, and sums of squares."""
        gmem = self.gmem
        if phase.name == "o":
            before, after = gmem.hidden, present(gmem.middle)
            gains, scaled, squares = gmem.post_norm, gmem.scaled_middle, gmem.middle_squares
        else:  # this warpgroup has awaited all of `middle` for the factor of gate and up
            before, after = gmem.middle, present(gmem.last)
            gains, scaled, squares = gmem.next_norm, gmem.scaled_last, gmem.last_squares
        hidden = self._load(present(before), low)
        gain = None if gains is None else self._load(gains, low)

        def finish(y: jax.Array, partner: jax.Array) -> None:
            y = y + partner  # each is of half of K
            total = _rounded(hidden + y)
            self._store(total, after, low)
            if gain is not None:
                self._store(total * gain, present(scaled), low)
                sums = present(squares).at[pl.ds(2 * unit, 2)]
                accumulators.store_squares(total, sums, is_interpreted=self.facts.is_interpreted)

        return finish

    def _gated(self, low: jax.Array) -> Finish:
        inner, activation = present(self.gmem.inner), _ACTIVATIONS[self.facts.spec.activation]

        def finish(gate: jax.Array, up: jax.Array) -> None:
            gate, up = _rounded(gate), _rounded(up)  # as a matmul of its own would store them
            self._store(activation(gate) * up, inner, low)

        return finish

    def _query_key_value(self, low: jax.Array, high: jax.Array) -> Finish:
        """Biases, rotation of queries and keys; keys and values go to the cache."""
        gmem, facts = self.gmem, self.facts
        rotation, cache_rows = present(gmem.rotation), present(gmem.cache_rows)
        angle = lax.rem(low, jnp.int32(facts.head_dim))
        cos, sin = (self._load(rotation.at[i], angle) for i in range(2))
        bias = None if gmem.next_bias is None else [self._load(gmem.next_bias, column) for column in (low, high)]
        # First columns of keys and of values.
        key, value = facts.num_heads * facts.head_dim, (facts.num_heads + facts.num_kv_heads) * facts.head_dim
        targets = (
            (present(gmem.query), 0, key, None),
            (present(gmem.keys), key, value, cache_rows),
            (present(gmem.values), value, None, cache_rows),
        )

        def finish(y: jax.Array, partner: jax.Array) -> None:
            y, partner = _rounded(y), _rounded(partner)  # as a matmul of its own would store them
            if bias is not None:
                y, partner = _rounded(y + bias[0]), _rounded(partner + bias[1])
            halves = _rotated(y, partner, cos, sin, is_rotated=low < value)
            for target, start, end, rows in targets:
                is_here = low >= start if end is None else (low >= start) & (low < end)
                for half, column in zip(halves, (low, high), strict=True):
                    pl.when(is_here)(functools.partial(self._store, half, target, column - start, rows))

        return finish

    def _logits(self, low: jax.Array, high: jax.Array) -> Finish:
        logits = present(self.gmem.logits)

        def finish(y: jax.Array, partner: jax.Array) -> None:
            self._store(y, logits, low)
            self._store(partner, logits, high)

        return finish

    def _load(self, source: jax.Ref, column: jax.Array) -> jax.Array:
        return accumulators.load(source, column, self.facts.num_rows, is_interpreted=self.facts.is_interpreted)

    def _store(self, y: jax.Array, target: jax.Ref, column: jax.Array, rows_gmem: jax.Ref | None = None) -> None:
        accumulators.store(y, target, column, is_interpreted=self.facts.is_interpreted, rows_gmem=rows_gmem)
