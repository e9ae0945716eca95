"""Which kernels one decode step of a model runs, for any device and without a checkpoint."""

import dataclasses

import jax
import jax.numpy as jnp

from fdpp_jax import heuristics
from fdpp_jax.models.config import DecoderConfig
from fdpp_jax.plans.backend import AttentionPlan, LayerPlan, MatmulPlan
from fdpp_jax.plans.device import Device
from fdpp_jax.plans.shapes import AttentionShape, LayerShape, MatmulShape


def model_plans(
    config: DecoderConfig,
    *,
    batch: int,
    capacity: int,
    device: Device | str,
    dtype: jax.typing.DTypeLike = "bfloat16",
) -> list[tuple[str, AttentionShape | LayerShape | MatmulShape, AttentionPlan | LayerPlan | MatmulPlan]]:
    """The plan of every kind of kernel in one decode step with a unified max, in the order they run in a layer.

    Args:
      config: The model's shapes.
      batch: Rows decoded together, B.
      capacity: Slots of the KV cache, S.
      device: A Device, or the name of a known one.
      dtype: dtype of weights, activations and cache.

    Returns:
      (name, shape, plan) of qkv, attention and layer, which run once a layer, then of the head. If the layer is fused,
      it includes all matmuls of the step but for a head that its plan does not fuse; else o, gate_up (up, where there
      is no gate) and down follow upon it. Where layers differ in attention, each kind is there once, under
      a name that tells its window.

    Raises:
      ValueError: batch or capacity is not positive, or the device is unknown.
    """
    if batch < 1 or capacity < 1:
        raise ValueError(f"expected a batch and a capacity of at least 1, got {batch=} and {capacity=}")
    name = jnp.dtype(dtype).name

    def attention(layer: int) -> AttentionShape:
        options = config.attention_options(layer)
        return AttentionShape(
            batch=batch,
            query_length=1,
            capacity=capacity,
            num_query_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            dtype=name,
            local_window_size=options.get("local_window_size"),
            logits_soft_cap=options.get("logits_soft_cap"),
            has_query_offset="local_window_size" in options,
            has_lengths=False,  # as `ops.unchecked_decode_attention` plans: a cache holds no NaN behind the lengths
            starts_early=layer_plan.overlaps_attention,
        )

    def matmul(what: str, k: int, n: int) -> tuple[str, MatmulShape, MatmulPlan]:
        shape = MatmulShape(batch, k, n, name, w_order="nk")
        return what, shape, heuristics.plan_matmul(shape, device)

    layer_shape = config.layer_shape(batch, dtype)
    layer_plan = heuristics.plan_layer(layer_shape, device)
    mlp_in = "gate_up" if config.mlp_in_size > config.intermediate_size else "up"
    attentions = list(dict.fromkeys(attention(layer) for layer in range(config.num_hidden_layers)))
    before = [matmul("qkv", config.hidden_size, config.qkv_size)]
    behind = [
        matmul("o", config.query_size, config.hidden_size),
        matmul(mlp_in, config.hidden_size, config.mlp_in_size),
        matmul("down", config.intermediate_size, config.hidden_size),
        matmul("head", config.hidden_size, config.vocab_size),
    ]
    if layer_plan.algorithm == "fused":
        before, behind, others = [], behind[-1:], "qkv"
        if layer_plan.fuses_head:
            behind, others = [], "qkv and head"
        layer_plan = dataclasses.replace(layer_plan, reason=f"{layer_plan.reason}; with {others}")
    return [
        *before,
        *((_name(shape, attentions), shape, heuristics.plan_attention(shape, device)) for shape in attentions),
        ("layer", layer_shape, layer_plan),
        *behind,
    ]


def _name(shape: AttentionShape, all_shapes: list[AttentionShape]) -> str:
    if len(all_shapes) == 1 or shape.local_window_size is None:
        return "attention"
    return f"attention (window {shape.local_window_size[0] + 1})"
