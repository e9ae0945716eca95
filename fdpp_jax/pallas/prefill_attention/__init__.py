"""Prefill attention for Hopper; `kernel` has the algorithm, the other files its roles."""

from fdpp_jax.pallas.prefill_attention.kernel import prefill_attention

__all__ = ["prefill_attention"]
