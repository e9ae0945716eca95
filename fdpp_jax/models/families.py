"""Which config and which model belong to a checkpoint's model_type."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdpp_jax.models import chatglm, gemma, mistral, opt, qwen
from fdpp_jax.models import config as llama_config
from fdpp_jax.models.config import DecoderConfig, LlamaConfig
from fdpp_jax.models.decoder import CausalLM
from fdpp_jax.models.llama import LlamaForCausalLM


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
      read_config: From the contents of a config.json to a config.
      presets: Configs as published, by name, for plans and benches that need no checkpoint.
    """

    read_config: Callable[[Mapping[str, Any]], DecoderConfig]
    presets: Mapping[str, DecoderConfig]


# By the model_type of config.json.
FAMILIES = {
    "llama": Family(LlamaConfig.from_hf, llama_config.PRESETS),
    "mistral": Family(mistral.config_from_hf, mistral.PRESETS),
    "qwen2": Family(qwen.qwen2_config_from_hf, qwen.QWEN2_PRESETS),
    "qwen3": Family(qwen.qwen3_config_from_hf, qwen.QWEN3_PRESETS),
    "gemma2": Family(gemma.Gemma2Config.from_hf, gemma.PRESETS),
    "chatglm": Family(chatglm.ChatGLMConfig.from_hf, chatglm.PRESETS),
    "opt": Family(opt.OPTConfig.from_hf, opt.PRESETS),
}
_MODEL_OF: dict[type, Callable[..., CausalLM]] = {
    LlamaConfig: LlamaForCausalLM,
    gemma.Gemma2Config: gemma.Gemma2ForCausalLM,
    chatglm.ChatGLMConfig: chatglm.ChatGLMForConditionalGeneration,
    opt.OPTConfig: opt.OPTForCausalLM,
}

PRESETS: dict[str, DecoderConfig] = {
    name: config for family in FAMILIES.values() for name, config in family.presets.items()
}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads the contents of a Hugging Face config.json, of transformers 4 or 5.

    Raises:
      ValueError: An unknown model_type, or what the family's own reader raises.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"expected a model_type out of {', '.join(FAMILIES)}, got {model_type!r}")
    return FAMILIES[model_type].read_config(hf)


def causal_lm(config: DecoderConfig, *, dtype: jax.typing.DTypeLike = jnp.bfloat16, rngs: nnx.Rngs) -> CausalLM:
    """The model of a config, with random weights.

    Args:
      config: Of any family.
      dtype: dtype of weights, activations and KV cache.
      rngs: Source of the weights.
    """
    return _MODEL_OF[type(config)](config, dtype=dtype, rngs=rngs)
