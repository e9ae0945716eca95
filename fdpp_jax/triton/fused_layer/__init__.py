"""What lies between two attentions in Triton; `kernel` has the launches, the other files their kernels."""

from fdpp_jax.triton.fused_layer.kernel import fused_layer, fused_qkv

__all__ = ["fused_layer", "fused_qkv"]
