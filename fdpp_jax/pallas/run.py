"""Runs the plans of backend "mosaic_gpu", with a function for each op (see `plans.backend.Backend`)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.pallas.decode_attention.kernel import attend
from fdpp_jax.pallas.flat_matmul import flat_matmul
from fdpp_jax.pallas.fused_layer import kernel as fused_layer
from fdpp_jax.pallas.gemv import gemv
from fdpp_jax.pallas.prefill_attention import prefill_attention
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
from fdpp_jax.unified_max import Recompute


def attention(
    arrays: AttentionArrays,
    options: AttentionOptions,
    plan: AttentionPlan,
    *,
    recompute: Recompute | None = None,
    redone: jax.Array | None = None,
    starts_early: bool = False,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Any:
    """Attention by `decode_attention` or `prefill_attention`.

    Args:
      arrays: With lengths.
      options: Static facts.
      plan: Whose config it is.
      recompute: "kernel" or "launch" redoes rows that left the safe window; else they are NaN. The prefill kernel
        redoes them itself, whichever it is.
      redone: [B, K] int32; becomes 1 where a row was redone.
      starts_early: As in `decode_attention`.
      interpret: Runs the kernel interpreted on the CPU.

    Returns:
      [B, T, N, H], with options.return_residual the pair of this and the rows' log-sum-exp, with redone the pair of
      this and redone.
    """
    if plan.algorithm == "prefill":
        assert redone is None
        return prefill_attention(
            arrays, options, plan.config, recompute=recompute in ("kernel", "launch"), interpret=interpret
        )
    if recompute == "kernel":
        return attend(
            arrays, options, plan.config, recompute=True, redone=redone, starts_early=starts_early, interpret=interpret
        )
    out = attend(arrays, options, plan.config, starts_early=starts_early, interpret=interpret)
    if recompute != "launch":
        return out
    online = arrays._replace(phi=None)
    if not options.return_residual:
        return attend(online, options, plan.config, prior=out, redone=redone, interpret=interpret)
    out, log_sum = out
    given = attend(online, options, plan.config, prior=out, redone=redone, interpret=interpret)
    (out, again), *marks = (given,) if redone is None else given
    result = out, jnp.where(jnp.isnan(log_sum), again, log_sum)  # `again` is undefined where nothing failed
    return (result, *marks) if marks else result


def matmul(
    x: jax.Array,
    w: jax.Array,
    plan: MatmulPlan,
    *,
    out_dtype: jax.typing.DTypeLike,
    w_order: WeightOrder,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """x [..., K] @ w -> [..., N], by `gemv` or `flat_matmul`."""
    kernel = gemv if plan.algorithm == "gemv" else flat_matmul
    rows = x.reshape(-1, x.shape[-1])
    out = kernel(rows, w, config=plan.config, out_dtype=out_dtype, w_order=w_order, interpret=interpret)
    return out.reshape(*x.shape[:-1], w.shape[w_order.index("n")])


def layer_state(shape: LayerShape, plan: LayerPlan) -> fused_layer.Handover:
    """What the launches of one decode step hand on from one to the next, at its start."""
    return fused_layer.handover(shape, plan.config)


def first_layer(
    x: jax.Array,
    weights: LayerWeights,
    cache: LayerCache,
    state: fused_layer.Handover,
    spec: LayerSpec,
    plan: LayerPlan,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[NextAttention, fused_layer.Handover]:
    """The first layer up to its attention, of x [B, D] behind its norm; and the state."""
    return fused_layer.fused_qkv(x, weights, cache, state, spec=spec, config=plan.config, interpret=interpret)


def layer(
    attended: jax.Array,
    hidden: jax.Array,
    weights: LayerWeights,
    following: LayerWeights | HeadWeights | None,
    cache: LayerCache | None,
    state: fused_layer.Handover,
    spec: LayerSpec,
    plan: LayerPlan,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[jax.Array, NextAttention | jax.Array | None, fused_layer.Handover]:
    """A layer after its attention, up to what follows: the next layer's attention, the logits, or nothing."""
    return fused_layer.fused_layer(
        attended, hidden, weights, following, cache, state, spec=spec, config=plan.config, interpret=interpret
    )
