"""All matmuls between two attentions in one launch; `kernel` has the algorithm, the other files its roles."""

from fdpp_jax.pallas.fused_layer.kernel import BetweenWeights, counters_for, fused_layer, fused_qkv

__all__ = ["BetweenWeights", "counters_for", "fused_layer", "fused_qkv"]
