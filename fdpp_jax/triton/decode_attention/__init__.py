"""Decode attention in Triton; `kernel` has the algorithm, the other files its roles."""

from fdpp_jax.triton.decode_attention.kernel import attend

__all__ = ["attend"]
