"""The public ops. Each one checks a call, asks `heuristics` for a plan, and runs the plan on its backend."""

from fdpp_jax.ops.attention import dot_product_attention, unchecked_decode_attention
from fdpp_jax.ops.matmul import flat_matmul
from fdpp_jax.ops.merge import merge_attention_states

__all__ = ["dot_product_attention", "flat_matmul", "merge_attention_states", "unchecked_decode_attention"]
