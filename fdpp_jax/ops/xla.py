"""Runs the plans of backend "xla", with a function for each op (see `plans.backend.Backend`)."""

from typing import Any

import jax
import jax.numpy as jnp

from fdpp_jax.ops import blockwise, reference
from fdpp_jax.plans.backend import AttentionPlan, MatmulPlan
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions
from fdpp_jax.plans.shapes import WeightOrder


def attention(arrays: AttentionArrays, options: AttentionOptions, plan: AttentionPlan) -> Any:
    """cuDNN, plain XLA in blocks, or at once in float32, where rows outside the window of arrays.phi are NaN."""
    if plan.algorithm == "cudnn":
        return _cudnn(arrays, options)
    return blockwise.attention(arrays, options) if plan.algorithm == "blocks" else reference.attention(arrays, options)


def _cudnn(arrays: AttentionArrays, options: AttentionOptions) -> jax.Array:
    """cuDNN, for calls that it does not refuse. Its padding mask wants lengths of both sides."""
    lengths = arrays.lengths
    return jax.nn.dot_product_attention(
        arrays.query,
        arrays.key,
        arrays.value,
        scale=options.scale,
        is_causal=options.is_causal,
        query_seq_lengths=None if lengths is None else jnp.full_like(lengths, arrays.query.shape[1]),
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )


def matmul(
    x: jax.Array, w: jax.Array, plan: MatmulPlan, *, out_dtype: jax.typing.DTypeLike, w_order: WeightOrder
) -> jax.Array:
    """x [..., K] @ w -> [..., N]."""
    del plan  # there is one way
    return reference.matmul(x, w, out_dtype, w_order)
