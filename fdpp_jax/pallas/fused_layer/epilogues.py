"""The fused layer's epilogues: from a unit's merged product to what is stored.

Each epilogue loads its operands first, then returns a function of the product, so that loads overlap with products.
What a `LayerSpec` decides is here, in `norms` and in `heads`.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from fdpp_jax.pallas.fused_layer.columns import Columns, biased
from fdpp_jax.pallas.fused_layer.heads import Heads
from fdpp_jax.pallas.fused_layer.norms import Finish, View, kind_of
from fdpp_jax.pallas.fused_layer.phases import LayerFacts, Phase
from fdpp_jax.pallas.fused_layer.refs import GlobalRefs, present


def _silu(x: jax.Array) -> jax.Array:
    return x / (1.0 + jnp.exp(-x))


def _gelu_tanh(x: jax.Array) -> jax.Array:
    # x (1 + tanh(u)) / 2 is x sigmoid(2 u).
    return x / (1.0 + jnp.exp(-1.5957691216057308 * (x + 0.044715 * (x * x * x))))


def _relu(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0.0)


_ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": _silu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
}


class Epilogues:
    """The epilogues of one CTA."""

    def __init__(self, gmem: GlobalRefs, facts: LayerFacts):
        self.gmem, self.facts = gmem, facts
        self.norm, self.heads = kind_of(facts.spec)(gmem, facts), Heads(gmem, facts)
        self.columns = Columns(facts.num_rows, facts.is_interpreted)

    def is_normed(self, phase: Phase) -> bool:
        """Whether the product stands behind a norm that has yet to be applied. The first layer's input is normed."""
        return not phase.is_residual and not self.facts.is_first

    def views(self, phase: Phase) -> tuple[View, ...]:
        """The rows of the product that make up the result."""
        return self.norm.views() if self.is_normed(phase) else (View(),)

    def factors(self, phase: Phase) -> tuple[jax.Array, ...]:
        """What the norm needs of all columns of the product before."""
        return () if self.facts.is_first else self.norm.factors(phase)

    def of(
        self, phase: Phase, unit: jax.Array, low: jax.Array, high: jax.Array, factors: tuple[jax.Array, ...]
    ) -> Finish:
        """The epilogue of a unit whose columns begin at low, and whose partner columns at high."""
        match phase.name:
            case "o" | "mlp_out":
                return self.norm.join(phase, unit, low, factors)
            case "mlp_in":
                return self._inner(low, high)
            case "qkv":
                return self.heads.finish(unit, low, high)
            case "head":
                return self._logits(low, high)

    def _inner(self, low: jax.Array, high: jax.Array) -> Finish:
        inner, spec = present(self.gmem.inner), self.facts.spec
        activation = _ACTIVATIONS[spec.activation]
        biases = self.columns.load_both(self.gmem.mlp_in_bias, low, high)

        def finish(y: jax.Array, partner: jax.Array) -> None:
            halves = biased(y, partner, biases)
            if spec.is_gated:
                gate, up = halves
                self.columns.store(activation(gate) * up, inner, low)
            else:
                for half, column in zip(halves, (low, high), strict=True):
                    self.columns.store(activation(half), inner, column)

        return finish

    def _logits(self, low: jax.Array, high: jax.Array) -> Finish:
        logits, cap = present(self.gmem.logits), self.facts.spec.logits_soft_cap

        def finish(y: jax.Array, partner: jax.Array) -> None:
            for half, column in ((y, low), (partner, high)):
                if cap is not None:
                    half = cap * (1.0 - 2.0 / (1.0 + jnp.exp(half * (2.0 / cap))))  # cap * tanh(half / cap)
                self.columns.store(half, logits, column)

        return finish
