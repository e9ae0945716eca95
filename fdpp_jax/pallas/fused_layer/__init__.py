"""All matmuls between two attentions in one launch; `kernel` has the algorithm, the other files its roles."""

from fdpp_jax.pallas.fused_layer.kernel import Handover, fused_layer, fused_qkv, handover

__all__ = ["Handover", "fused_layer", "fused_qkv", "handover"]
