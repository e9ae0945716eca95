"""Qwen 2, 2.5 and 3: LLaMA's modules, with biases of q, k, v (2, 2.5) or norms of q and k (3), and sliding windows."""

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
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def qwen2_config_from_hf(hf: Mapping[str, Any]) -> LlamaConfig:
    """Reads a Qwen 2's or 2.5's config.json, of transformers 4 or 5.

    Raises:
      ValueError: Not a Qwen 2, a required key is missing, or the checkpoint asks for something this model
        does not compute. All problems are listed at once.
    """
    hf = _checked({**_DEFAULTS, **hf}, "qwen2", "Qwen2ForCausalLM")
    return LlamaConfig.of(hf, qkv_bias=True, **_windows(hf))


def qwen3_config_from_hf(hf: Mapping[str, Any]) -> LlamaConfig:
    """Reads a Qwen 3's config.json, of transformers 4 or 5.

    Raises:
      ValueError: Not a Qwen 3, a required key is missing, or the checkpoint asks for something this model
        does not compute. All problems are listed at once.
    """
    hf = _checked({**_DEFAULTS, "head_dim": 128, **hf}, "qwen3", "Qwen3ForCausalLM")
    bias = bool(hf.get("attention_bias"))
    return LlamaConfig.of(hf, qkv_bias=bias, o_bias=bias, qk_norm=True, **_windows(hf))


def _checked(hf: dict[str, Any], model_type: str, architecture: str) -> dict[str, Any]:
    """`hf` without the sliding_window that config.json names but does not use.

    Raises:
      ValueError: What is wrong with it.
    """
    if not hf["use_sliding_window"]:
        hf["sliding_window"] = None
    problems = common_problems(hf, model_type, architecture)
    refuse(problems or activation_problems(hf, "hidden_act", "silu") + rope_problems(hf) + window_problems(hf))
    return hf


def _windows(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the windows; without a list of layer_types the first max_window_layers see everything."""
    if hf["sliding_window"] is None:
        return {}
    layers = range(hf["num_hidden_layers"])
    types = hf.get("layer_types") or [
        "sliding_attention" if layer >= hf["max_window_layers"] else "full_attention" for layer in layers
    ]
    return {"sliding_window": hf["sliding_window"], "layer_types": tuple(types)}


# Shapes as published, for plans and benches that need no checkpoint.
QWEN2_PRESETS: dict[str, LlamaConfig] = {
    "qwen2.5-0.5b": LlamaConfig(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        qkv_bias=True,
        tie_word_embeddings=True,
    ),
    "qwen2.5-7b": LlamaConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        qkv_bias=True,
    ),
}
QWEN3_PRESETS: dict[str, LlamaConfig] = {
    "qwen3-0.6b": LlamaConfig(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        qk_norm=True,
        tie_word_embeddings=True,
    ),
    "qwen3-8b": LlamaConfig(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        qk_norm=True,
    ),
}
