"""Mistral: LLaMA's modules, with sliding windows in all layers, in those of layer_types, or in none."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fdpp_jax.models.config import (
    LlamaConfig,
    activation_problems,
    common_problems,
    refuse,
    window_problems,
)
from fdpp_jax.models.rotary import rope_problems

# What transformers assumes where config.json is silent.
_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
}


def config_from_hf(hf: Mapping[str, Any]) -> LlamaConfig:
    """Reads a Mistral's config.json, of transformers 4 or 5.

    Raises:
      ValueError: Not a Mistral, a required key is missing, or the checkpoint asks for something this model
        does not compute. All problems are listed at once.
    """
    hf = {**_DEFAULTS, **hf}
    problems = common_problems(hf, "mistral", "MistralForCausalLM")
    refuse(problems or activation_problems(hf, "hidden_act", "silu") + rope_problems(hf) + window_problems(hf))
    return LlamaConfig.of(hf, sliding_window=hf["sliding_window"], layer_types=tuple(hf.get("layer_types") or ()))


_MISTRAL_7B_V01 = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=32768,
    sliding_window=4096,
)

# Shapes as published, for plans and benches that need no checkpoint.
PRESETS: dict[str, LlamaConfig] = {
    "mistral-7b-v0.1": _MISTRAL_7B_V01,
    "mistral-7b-v0.3": dataclasses.replace(
        _MISTRAL_7B_V01, vocab_size=32768, rope_theta=1000000.0, sliding_window=None
    ),
}
