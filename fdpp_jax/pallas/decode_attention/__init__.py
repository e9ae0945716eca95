"""Decode attention for Hopper; `kernel` has the algorithm, the other files its roles."""

from fdpp_jax.pallas.decode_attention.kernel import decode_attention

__all__ = ["decode_attention"]
