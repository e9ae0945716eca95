"""A decode step of a LLaMA with two launches a layer: attention, and all that lies between it and the next one.

What comes before the first attention but for the embedding and its norm is a launch, too, and the head is in the last.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.config import FusedLayerConfig
from fdpp_jax.models.plans import fuses_head
from fdpp_jax.models.step_cache import StepCache
from fdpp_jax.pallas import fused_layer

if TYPE_CHECKING:
    from fdpp_jax.models.llama import LlamaForCausalLM, LlamaLayer


def decode_logits(
    model: "LlamaForCausalLM",
    tokens: jax.Array,
    step: StepCache,
    config: FusedLayerConfig,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """`LlamaForCausalLM.decode_logits` by `pallas.fused_layer`.

    Args:
      model: Without norms of queries and keys, and without biases but those of queries, keys and values.
      tokens: [B] integers.
      step: Its cache, which gets the new keys and values.
      config: Tiles of the kernel.
      interpret: Runs the kernel interpreted on the CPU.

    Returns:
      [B, V] float32.
    """
    layers = model.model.layers
    first = layers[0]
    depth = max(model.config.query_size, model.config.hidden_size, model.config.intermediate_size)
    x, rotation = model.embed(tokens[:, None], step.slots[:, None])
    hidden = x[:, 0]
    rotation = jnp.stack([angle[:, 0, 0] for angle in rotation])  # [2, B, H / 2]
    following, counters = fused_layer.fused_qkv(
        step.settle(first.input_layernorm(hidden)), first.self_attn.qkv_proj.weight[...], _bias(first), rotation,
        *step.arrays(0), step.slots, fused_layer.counters_for(depth, config), config=config, interpret=interpret,
    )  # fmt: skip
    for i, layer in enumerate(layers):
        step.replace(i, following.keys, following.values)
        attended = step.attend(i, following.query[:, None], is_appended=True)[:, 0]  # [B, N, H]
        weights = fused_layer.LayerWeights(
            o=layer.self_attn.o_proj.weight[...],
            post_norm=layer.post_attention_layernorm.weight[...],
            gate_up=layer.mlp.gate_up_proj.weight[...],
            down=layer.mlp.down_proj.weight[...],
        )
        keys, values = None, None
        if i + 1 < len(layers):
            keys, values = step.arrays(i + 1)
            weights = weights._replace(
                next_norm=layers[i + 1].input_layernorm.weight[...],
                next_qkv=layers[i + 1].self_attn.qkv_proj.weight[...],
                next_bias=_bias(layers[i + 1]),
            )
        elif fuses_head(model.config):
            weights = weights._replace(next_norm=model.model.norm.weight[...], head=model.head_weight[...])
        hidden, following, counters = fused_layer.fused_layer(
            attended, hidden, weights, rotation, keys, values, step.slots, counters,
            eps=model.config.rms_norm_eps, config=config, interpret=interpret,
        )  # fmt: skip
    return model.head(model.final_norm(hidden)) if following is None else following


def _bias(layer: "LlamaLayer") -> jax.Array | None:
    """Of a layer's queries, keys and values."""
    bias = layer.self_attn.qkv_proj.bias
    return None if bias is None else bias[...]
