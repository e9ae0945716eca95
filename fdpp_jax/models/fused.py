"""A decode step of a LLaMA with two launches a layer: attention, and all that lies between it and the next one."""

from typing import TYPE_CHECKING

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.config import FusedLayerConfig
from fdpp_jax.models.step_cache import StepCache
from fdpp_jax.pallas import fused_layer

if TYPE_CHECKING:
    from fdpp_jax.models.llama import LlamaForCausalLM, LlamaLayer


def decode_states(
    model: "LlamaForCausalLM",
    tokens: jax.Array,
    step: StepCache,
    config: FusedLayerConfig,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """`LlamaForCausalLM.decode_states` by `pallas.fused_layer`; the first layer's queries, keys and values are unfused.

    Args:
      model: Without norms of queries and keys, and without biases but those of queries, keys and values.
      tokens: [B] integers.
      step: Its cache, which gets the new keys and values.
      config: Tiles of the kernel.
      interpret: Runs the kernel interpreted on the CPU.

    Returns:
      [B, D], after the final norm.
    """
    layers = model.model.layers
    x, rotation = model.embed(tokens[:, None], step.slots[:, None])
    cos, sin = (angle[:, 0, 0] for angle in rotation)  # [B, H / 2]
    query, key, value = layers[0].self_attn.project(layers[0].input_layernorm(x), rotation, None)
    step.append(0, key, value)
    hidden = x[:, 0]
    depth = max(model.config.query_size, model.config.hidden_size, model.config.intermediate_size)
    counters = fused_layer.counters_for(depth, config)
    for i, layer in enumerate(layers):
        attended = step.attend(i, query, is_appended=i > 0)[:, 0]  # [B, N, H], right after the fused layer
        next_layer = layers[i + 1] if i + 1 < len(layers) else None
        weights = fused_layer.LayerWeights(
            o=layer.self_attn.o_proj.weight[...],
            post_norm=layer.post_attention_layernorm.weight[...],
            gate_up=layer.mlp.gate_up_proj.weight[...],
            down=layer.mlp.down_proj.weight[...],
            next_norm=None if next_layer is None else next_layer.input_layernorm.weight[...],
            next_qkv=None if next_layer is None else next_layer.self_attn.qkv_proj.weight[...],
            next_bias=_bias(next_layer),
        )
        keys, values = (None, None) if next_layer is None else step.arrays(i + 1)
        hidden, following, counters = fused_layer.fused_layer(
            attended, hidden, weights, cos, sin, keys, values, step.slots, counters,
            eps=model.config.rms_norm_eps, config=config, interpret=interpret,
        )  # fmt: skip
        if following is not None:
            query = following.query[:, None]
            step.replace(i + 1, following.keys, following.values)
    return model.final_norm(hidden)


def _bias(layer: "LlamaLayer | None") -> jax.Array | None:
    """Of a layer's queries, keys and values."""
    bias = None if layer is None else layer.self_attn.qkv_proj.bias
    return None if bias is None else bias[...]
