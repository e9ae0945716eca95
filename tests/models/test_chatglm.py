"""ChatGLM's config reader and presets; test_family_parity.py has its numbers."""

import math
from typing import Any

import jax
import pytest
from flax import nnx

from fdpp_jax import models
from fdpp_jax.models.chatglm import ChatGLMConfig

# chatglm2-6b's config.json, without what only its training needs.
HF_CONFIG = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_softmax_in_fp32": True,
    "ffn_hidden_size": 13696,
    "fp32_residual_connection": False,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "original_rope": True,
    "padded_vocab_size": 65024,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 32768,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


def test_config() -> None:
    assert models.config_from_hf(HF_CONFIG) == models.PRESETS["chatglm2-6b"]
    assert models.config_from_hf(HF_CONFIG | {"seq_length": 8192}) == models.PRESETS["chatglm3-6b"]
    saved = HF_CONFIG | {"architectures": ["ChatGLMForConditionalGeneration"]}
    assert models.config_from_hf(saved) == models.PRESETS["chatglm2-6b"]


def test_what_the_authors_code_has_defaults_for() -> None:
    optional = ("add_qkv_bias", "seq_length", "rmsnorm", "post_layer_norm", "add_bias_linear", "layernorm_epsilon")
    config = ChatGLMConfig.from_hf({key: value for key, value in HF_CONFIG.items() if key not in optional})
    assert (config.add_qkv_bias, config.max_position_embeddings, config.layernorm_epsilon) == (False, 2048, 1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "glm"}, r"expected model_type 'chatglm' and architectures \['ChatGLMModel'\], got 'glm'"),
        ({"architectures": ["ChatGLMForSequenceClassification"]}, r"got 'chatglm' and .*SequenceClassification"),
        ({"rmsnorm": False}, "expected rmsnorm True, got False"),
        ({"post_layer_norm": False}, "expected post_layer_norm True, got False"),
        ({"apply_residual_connection_post_layernorm": True}, "post_layernorm False, got True"),
        ({"fp32_residual_connection": True}, "expected fp32_residual_connection False, got True"),
        ({"add_bias_linear": True}, "expected add_bias_linear False, got True"),
        ({"multi_query_attention": False}, "expected multi_query_attention True, got False"),
        ({"original_rope": False}, "expected original_rope True, got False"),
        ({"rope_ratio": 50}, "expected rope_ratio 1, got 50"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "expected rope_scaling None, got {'type': 'linear'"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "expected rope_parameters None, got {'rope_theta'"),
        ({"rope_theta": 5e5}, "expected rope_theta 10000, got 500000.0"),
        ({"tie_word_embeddings": True}, "expected tie_word_embeddings False, got True"),
        ({"quantization_bit": 4}, "expected quantization_bit 0, got 4"),
        ({"pre_seq_len": 128}, "expected pre_seq_len None, got 128"),
        ({"multi_query_group_num": 5}, "num_key_value_heads=5 must divide num_attention_heads=32"),
        ({"kv_channels": 18}, "head_dim must be divisible by 4, .* got 18"),
        ({"num_layers": 0}, "expected num_layers to be a positive integer, got 0"),
        ({"quantization_bit": 8, "rmsnorm": False}, r"expected rmsnorm .*\n.*expected quantization_bit"),
    ],
)
def test_unsupported_configs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatGLMConfig.from_hf(HF_CONFIG | changes)


def test_missing_config_keys_are_listed_at_once() -> None:
    with pytest.raises(ValueError, match=r"padded_vocab_size is missing\n(.*\n)*.*kv_channels is missing"):
        ChatGLMConfig.from_hf({"model_type": "chatglm", "hidden_size": 1, "num_layers": 1})


@pytest.mark.parametrize("name", ["chatglm2-6b", "chatglm3-6b"])
def test_preset_has_the_published_number_of_weights(name: str) -> None:
    model = nnx.eval_shape(lambda: models.causal_lm(models.PRESETS[name], rngs=nnx.Rngs(0)))
    # The index of either checkpoint: 12487168064 bytes of float16, 64 of them of the rotary frequencies.
    assert 2 * sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param))) + 64 == 12487168064
