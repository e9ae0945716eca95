"""A LLaMA's config.json: what is read, and what is refused."""

from typing import Any

import pytest

from fdpp_jax import models
from fdpp_jax.models import LlamaConfig, RopeScaling

HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}


def test_config_of_transformers_4_and_5() -> None:
    config = LlamaConfig.from_hf(HF_CONFIG)
    assert config == models.PRESETS["llama-3.1-8b"]
    new = {k: v for k, v in HF_CONFIG.items() if not k.startswith("rope")}
    new["rope_parameters"] = HF_CONFIG["rope_scaling"] | {"rope_theta": 500000.0}
    assert LlamaConfig.from_hf(new) == config
    old = HF_CONFIG | {"rope_scaling": {"type": "linear", "factor": 2}, "num_key_value_heads": None}
    assert LlamaConfig.from_hf(old).rope_scaling == RopeScaling("linear", factor=2.0)
    assert LlamaConfig.from_hf(old).num_key_value_heads == 32
    assert LlamaConfig.from_hf(old).head_dim == 128
    nulls = dict.fromkeys(("head_dim", "rope_parameters", "quantization_config", "attention_bias", "mlp_bias"))
    assert LlamaConfig.from_hf(HF_CONFIG | nulls) == config


def test_a_model_without_its_head_has_another_architecture() -> None:
    """As LlamaModel saves it; whether the head is needed shows at the tensors."""
    assert LlamaConfig.from_hf(HF_CONFIG | {"architectures": ["LlamaModel"]}) == models.PRESETS["llama-3.1-8b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
            r"expected model_type 'llama' .*'LlamaForCausalLM'.*, got 'mistral' and \['MistralForCausalLM'\]",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "got 'llama' and .*SequenceClassification"),
        ({"hidden_act": "gelu"}, "expected hidden_act 'silu', got 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "out of default, linear, llama3, got 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4}}, "got 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4}}, "'llama3' needs low_freq_factor, which is missing"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config .*'awq'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 1.0, got 0.5"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5 must divide num_attention_heads=32"),
        ({"hidden_size": 0}, "expected hidden_size to be a positive integer, got 0"),
        ({"vocab_size": "32000"}, "expected vocab_size to be a positive integer, got '32000'"),
        ({"num_attention_heads": 0}, "expected num_attention_heads to be a positive integer, got 0"),
        ({"num_key_value_heads": -8}, "expected num_key_value_heads to be a positive integer or null, got -8"),
        ({"head_dim": 33}, "head_dim must be even"),
        ({"head_dim": "64"}, "expected head_dim to be a positive integer or null, got '64'"),
        ({"architectures": 5}, r"architectures \['LlamaForCausalLM'\], got 'llama' and 5"),
        ({"rms_norm_eps": "x"}, "expected rms_norm_eps to be a positive number, got 'x'"),
        ({"rms_norm_eps": None}, "expected rms_norm_eps to be a positive number, got None"),
        ({"max_position_embeddings": 1.5}, "expected max_position_embeddings to be a positive integer, got 1.5"),
        ({"tie_word_embeddings": "no"}, "expected tie_word_embeddings to be true or false or null, got 'no'"),
        ({"quantization_config": "awq"}, "expected quantization_config to be an object or null, got 'awq'"),
        ({"rope_parameters": [1]}, r"expected rope_parameters to be an object or null, got \[1\]"),
        ({"rope_theta": "x"}, "expected rope_theta to be a positive number, got 'x'"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "expected factor to be a positive number, got '4'"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "'linear' needs factor, which is missing"),
        ({"rope_scaling": {"type": ["linear"]}}, r"expected rope_type to be text, got \['linear'\]"),
    ],
)
def test_unsupported_configs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_hf(HF_CONFIG | changes)


def test_missing_config_keys_are_listed_at_once() -> None:
    with pytest.raises(ValueError, match=r"vocab_size is missing\n.*hidden_size is missing"):
        LlamaConfig.from_hf({"model_type": "llama", "intermediate_size": 1, "num_hidden_layers": 1})
