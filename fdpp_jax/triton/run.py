"""Runs the plans of backend "triton", with a function for each op (see `plans.backend.Backend`)."""

from typing import Any

import jax

from fdpp_jax.plans.backend import AttentionPlan, LayerPlan, MatmulPlan
from fdpp_jax.plans.calls import (
    AttentionArrays,
    AttentionOptions,
    HeadWeights,
    LayerCache,
    LayerWeights,
    NextAttention,
)
from fdpp_jax.plans.shapes import LayerShape, LayerSpec, WeightOrder
from fdpp_jax.triton.decode_attention.kernel import attend
from fdpp_jax.triton.flat_matmul import flat_matmul
from fdpp_jax.triton.fused_layer import kernel as fused_layer
from fdpp_jax.triton.gemv import gemv
from fdpp_jax.triton.prefill_attention import prefill_attention
from fdpp_jax.unified_max import Recompute


def attention(
    arrays: AttentionArrays,
    options: AttentionOptions,
    plan: AttentionPlan,
    *,
    recompute: Recompute | None = None,
    redone: jax.Array | None = None,
    starts_early: bool = False,
) -> Any:
    """Attention by `decode_attention` or `prefill_attention`.

    Args:
      arrays: With lengths.
      options: Static facts.
      plan: Whose config it is.
      recompute: "kernel" redoes rows that left the safe window; else they are NaN.
      redone: [B, K] int32; becomes 1 where a row was redone.
      starts_early: Never: launches do not overlap.

    Returns:
      [B, T, N, H], with options.return_residual the pair of this and the rows' log-sum-exp, with redone the pair of
      this and redone.
    """
    assert not starts_early
    redoes = recompute == "kernel"
    if plan.algorithm == "prefill":
        assert redone is None
        return prefill_attention(arrays, options, plan.config, recompute=redoes)
    return attend(arrays, options, plan.config, recompute=redoes, redone=redone)


def matmul(
    x: jax.Array, w: jax.Array, plan: MatmulPlan, *, out_dtype: jax.typing.DTypeLike, w_order: WeightOrder
) -> jax.Array:
    """x [..., K] @ w -> [..., N], by `gemv` or `flat_matmul`."""
    kernel = gemv if plan.algorithm == "gemv" else flat_matmul
    out = kernel(x.reshape(-1, x.shape[-1]), w, config=plan.config, out_dtype=out_dtype, w_order=w_order)
    return out.reshape(*x.shape[:-1], w.shape[w_order.index("n")])


def layer_state(shape: LayerShape, plan: LayerPlan) -> None:
    """Nothing: each launch has all it needs from the arrays."""
    del shape, plan


def first_layer(
    x: jax.Array,
    weights: LayerWeights,
    cache: LayerCache,
    state: None,
    spec: LayerSpec,
    plan: LayerPlan,
) -> tuple[NextAttention, None]:
    """The first layer up to its attention, of x [B, D] behind its norm; and the state."""
    return fused_layer.fused_qkv(x, weights, cache, spec=spec, config=plan.config), state


def layer(
    attended: jax.Array,
    hidden: jax.Array,
    weights: LayerWeights,
    following: LayerWeights | HeadWeights | None,
    cache: LayerCache | None,
    state: None,
    spec: LayerSpec,
    plan: LayerPlan,
) -> tuple[jax.Array, NextAttention | None, None]:
    """A layer after its attention, up to what follows: the next layer's attention, or nothing."""
    assert not isinstance(following, HeadWeights)  # the plan fuses no head
    hidden, attention = fused_layer.fused_layer(
        attended, hidden, weights, following, cache, spec=spec, config=plan.config
    )
    return hidden, attention, state
