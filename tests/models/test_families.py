"""What differs between families beside their parity: config.json readers, presets, plans. By family."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdpp_jax import models
from fdpp_jax.models import PRESETS, LlamaConfig, config_from_hf

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures"

# config.json as published with each checkpoint, by the preset it describes; keys that no reader looks at are left out.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-3.2-3b": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 24,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    "mistral-7b-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}
PUBLISHED["mistral-7b-v0.3"] = PUBLISHED["mistral-7b-v0.1"] | {
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32768,
}
PUBLISHED["qwen2.5-7b"] = PUBLISHED["qwen2.5-0.5b"] | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}
PUBLISHED["qwen3-8b"] = PUBLISHED["qwen3-0.6b"] | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "tie_word_embeddings": False,
}


def read(name: str, **changes: Any) -> LlamaConfig:
    config = config_from_hf(PUBLISHED[name] | changes)
    assert isinstance(config, LlamaConfig)
    return config


def problems(name: str, **changes: Any) -> list[str]:
    with pytest.raises(ValueError, match="not one this model can run") as error:
        read(name, **changes)
    return [line.removeprefix("  - ") for line in str(error.value).splitlines()[1:]]


def windows(config: LlamaConfig) -> list[int | None]:
    """How many keys each layer sees at most, the token's own included."""
    sizes = [config.attention_options(layer).get("local_window_size") for layer in range(config.num_hidden_layers)]
    assert all(size is None or size[1] == 0 for size in sizes)
    return [None if size is None else size[0] + 1 for size in sizes]


# All families.


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_configs(name: str) -> None:
    assert read(name) == PRESETS[name]
    rope = {"rope_type": "default", "rope_theta": PUBLISHED[name]["rope_theta"]}
    rope |= PUBLISHED[name].get("rope_scaling") or {}
    new = {key: value for key, value in PUBLISHED[name].items() if not key.startswith("rope_")}
    assert config_from_hf(new | {"rope_parameters": rope}) == PRESETS[name]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3.2-3b", 3.21),
        ("mistral-7b-v0.1", 7.24),
        ("mistral-7b-v0.3", 7.25),
        ("qwen2.5-0.5b", 0.49),
        ("qwen2.5-7b", 7.62),
        ("qwen3-0.6b", 0.60),
        ("qwen3-8b", 8.19),
    ],
)
def test_presets_have_the_published_size(name: str, billions: float) -> None:
    model = nnx.eval_shape(lambda: models.random_model(PRESETS[name]))
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert round(size / 1e9, 2) == billions


@pytest.mark.parametrize("model_type", ["gpt2", "", None, 5])
def test_unknown_model_type(model_type: str | None) -> None:
    with pytest.raises(ValueError, match=rf"^expected a model_type out of llama, .*, got {model_type!r}$"):
        config_from_hf({"model_type": model_type, "hidden_size": -1})


@pytest.mark.parametrize("name", ["mistral-7b-v0.1", "qwen2.5-0.5b", "qwen3-0.6b"])
def test_another_architecture_is_the_only_problem(name: str) -> None:
    model_type = PUBLISHED[name]["model_type"]
    (problem,) = problems(name, architectures=["ForSequenceClassification"], vocab_size=0, hidden_act="gelu")
    assert problem.startswith(f"expected model_type '{model_type}' and architectures")


@pytest.mark.parametrize("name", ["mistral-7b-v0.1", "qwen2.5-0.5b", "qwen3-0.6b"])
def test_problems_are_listed_at_once(name: str) -> None:
    assert problems(name, vocab_size=0, quantization_config={"quant_method": "gptq"}) == [
        "expected vocab_size to be a positive integer, got 0",
        "expected unquantized weights, got a quantization_config (quant_method 'gptq')",
    ]
    layers = PUBLISHED[name]["num_hidden_layers"]
    assert problems(
        name,
        hidden_act="gelu",
        rope_scaling={"type": "yarn", "factor": 4.0},
        use_sliding_window=True,
        sliding_window=0,
        layer_types=["sliding_attention"],
    ) == [
        "expected hidden_act 'silu', got 'gelu'",
        "expected a rope_type out of default, linear, llama3, got 'yarn'",
        "expected sliding_window to be a positive integer or null, got 0",
        f"expected layer_types of {layers} out of sliding_attention, full_attention, got ['sliding_attention']",
    ]


def test_fields_of_the_wrong_kind_are_listed_at_once() -> None:
    assert problems("qwen2.5-7b", layer_types=5, max_window_layers="20", use_sliding_window=1) == [
        "expected layer_types to be a list of texts or null, got 5",
        "expected max_window_layers to be an integer of at least 0, got '20'",
        "expected use_sliding_window to be true or false or null, got 1",
    ]
    assert problems("mistral-7b-v0.1", sliding_window="4096") == [
        "expected sliding_window to be a positive integer or null, got '4096'"
    ]


def test_windows_of_the_fixtures_count() -> None:
    """Parity would otherwise not tell whether windows are there."""
    for name in ("mistral", "qwen2"):
        model = models.load(FIXTURES / name, jnp.float32)
        expected = np.load(FIXTURES / name / "expected.npz")
        assert isinstance(model.config, LlamaConfig)
        model.config = dataclasses.replace(model.config, sliding_window=None)
        wrong = np.abs(model(expected["tokens"]) - expected["logits"]).max(axis=(0, 2))  # [T]
        assert wrong[:6].max() < 1e-4
        assert wrong[6:].min() > 0.1


def test_each_kind_of_attention_has_its_plan() -> None:
    def attentions(config: models.DecoderConfig) -> dict[str, tuple[int, int] | None]:
        plans = models.model_plans(config, batch=4, capacity=8192, device="H200")
        return {name: shape.local_window_size for name, shape, _ in plans if name.startswith("attention")}

    assert attentions(PRESETS["mistral-7b-v0.3"]) == {"attention": None}
    assert attentions(PRESETS["mistral-7b-v0.1"]) == {"attention": (4095, 0)}
    mixed = read("qwen2.5-7b", use_sliding_window=True, sliding_window=4096, max_window_layers=20)
    assert attentions(mixed) == {"attention": None, "attention (window 4096)": (4095, 0)}


# Rotary settings of transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters), and both beside each other.


LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = PUBLISHED["llama-3.2-3b"]["rope_scaling"]
ROTARY = ["mistral-7b-v0.1", "qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-3b"]


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_settings_that_contradict_each_other_are_refused(name: str) -> None:
    theta = PUBLISHED[name]["rope_theta"]
    default = {"rope_type": "default", "rope_theta": theta}
    (problem,) = problems(name, rope_scaling=LINEAR, rope_parameters=default)
    assert problem.startswith("expected rope_scaling and rope_parameters to say the same, got ")
    (problem,) = problems(name, rope_scaling=LINEAR, rope_parameters={"rope_theta": theta})
    assert problem.startswith("expected rope_scaling and rope_parameters to say the same, got ")
    elsewhere = LINEAR | {"rope_theta": 2 * theta}
    for place in ("rope_scaling", "rope_parameters"):
        changes = {"rope_scaling": None, place: elsewhere}
        assert problems(name, **changes) == [f"expected {place}.rope_theta to be rope_theta {theta}, got {2 * theta}"]
        both = {"rope_scaling": None, place: LINEAR | {"type": "default"}}
        assert problems(name, **both) == [f"expected {place}.type to be rope_type 'linear', got 'default'"]
        nested = {"full_attention": default, "sliding_attention": LINEAR}
        assert problems(name, **{"rope_scaling": None, place: nested}) == [
            f"expected {place} of one kind for all layers, got objects full_attention, sliding_attention"
        ]


def test_a_context_that_contradicts_is_refused() -> None:
    assert problems("llama-3.2-3b", original_max_position_embeddings=4096) == [
        "expected rope_scaling.original_max_position_embeddings to be original_max_position_embeddings 4096, got 8192"
    ]


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_settings_that_agree_are_applied(name: str) -> None:
    theta = PUBLISHED[name]["rope_theta"]
    expected = dataclasses.replace(PRESETS[name], rope_scaling=models.RopeScaling("linear", 4.0))
    for changes in (
        {"rope_scaling": LINEAR},
        {"rope_scaling": LINEAR | {"type": "linear", "rope_theta": theta, "partial_rotary_factor": 1}},
        {"rope_scaling": {"type": "linear", "factor": 4}, "rope_parameters": LINEAR | {"rope_theta": theta}},
        {"rope_scaling": {}, "rope_parameters": LINEAR},
        {"rope_scaling": LINEAR, "rope_parameters": {}, "original_max_position_embeddings": 4096},
        {"rope_scaling": LINEAR | {"attention_factor": None}, "partial_rotary_factor": 1.0},
    ):
        assert read(name, **changes) == expected


def test_the_original_context_may_stand_beside() -> None:
    inside = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    assert read("llama-3.2-3b", rope_scaling=inside, original_max_position_embeddings=8192) == PRESETS["llama-3.2-3b"]
    scaling = read("llama-3.2-3b", rope_scaling=inside).rope_scaling
    assert scaling is not None
    assert scaling.original_max_position_embeddings == 131072


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"factor": 4.0}, "rope_type 'default' does not read factor, got 4.0"),
        (LINEAR | {"attention_factor": 1.2}, "rope_type 'linear' does not read attention_factor, got 1.2"),
        (LINEAR | {"low_freq_factor": 1}, "rope_type 'linear' does not read low_freq_factor, got 1"),
        (LLAMA3 | {"beta_fast": 32}, "rope_type 'llama3' does not read beta_fast, got 32"),
        (LINEAR | {"llama_4_scaling_beta": 0.1}, "rope_type 'linear' does not read llama_4_scaling_beta, got 0.1"),
        (LINEAR | {"partial_rotary_factor": 0.5}, "expected partial_rotary_factor 1.0, got 0.5"),
        (LINEAR | {"partial_rotary_factor": "1"}, "expected partial_rotary_factor to be a number, got '1'"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "expected high_freq_factor above low_freq_factor 1.0, got 1.0"),
        *(
            ({"rope_type": kind, "factor": 4.0}, f"expected a rope_type out of default, linear, llama3, got '{kind}'")
            for kind in ("yarn", "dynamic", "longrope", "proportional", "mrope")
        ),
    ],
)
def test_rotary_settings_that_nothing_here_computes_are_refused(scaling: dict[str, Any], message: str) -> None:
    assert problems("llama-3.2-3b", rope_scaling=scaling) == [message]


def test_a_partial_rotation_beside_the_settings_is_refused() -> None:
    assert problems(
        "llama-3.2-3b", partial_rotary_factor=0.5, rope_scaling=LINEAR | {"partial_rotary_factor": 1.0}
    ) == ["expected rope_scaling.partial_rotary_factor to be partial_rotary_factor 0.5, got 1.0"]


# Fields of all families.


@pytest.mark.parametrize("name", ["llama2_mha", "mistral", "qwen2", "qwen3", "gemma2", "chatglm2", "opt"])
def test_what_transformers_reads_of_every_family(name: str) -> None:
    hf = json.loads((FIXTURES / name / "config.json").read_text())
    config_from_hf(hf | {"is_causal": True, "per_layer_config": {}})
    with pytest.raises(ValueError, match="expected is_causal True, got False"):
        config_from_hf(hf | {"is_causal": False})
    with pytest.raises(ValueError, match="expected layers of one shape, got a per_layer_config"):
        config_from_hf(hf | {"per_layer_config": {"0": {"num_attention_heads": 2}}})


# Mistral.


def test_mistral_windows() -> None:
    assert windows(read("mistral-7b-v0.1")) == [4096] * 32
    assert windows(read("mistral-7b-v0.3")) == [None] * 32
    # Ministral's config.json says model_type mistral too.
    types = ["sliding_attention", "full_attention"] * 16
    assert windows(read("mistral-7b-v0.1", layer_types=types)) == [4096, None] * 16


def test_mistral_defaults() -> None:
    config = read("mistral-7b-v0.1", head_dim=160, num_key_value_heads=None)
    assert (config.head_dim, config.num_key_value_heads) == (160, 32)
    silent = {"num_key_value_heads", "sliding_window", "tie_word_embeddings", "hidden_act", "rms_norm_eps"}
    config = config_from_hf({key: value for key, value in PUBLISHED["mistral-7b-v0.1"].items() if key not in silent})
    assert config == dataclasses.replace(PRESETS["mistral-7b-v0.1"], rms_norm_eps=1e-6)


# Qwen 2 and 2.5.


def test_qwen2_windows() -> None:
    changes = {"use_sliding_window": True, "sliding_window": 4096}
    assert windows(read("qwen2.5-7b", **changes)) == [None] * 28
    assert windows(read("qwen2.5-7b", **changes, max_window_layers=20)) == [None] * 20 + [4096] * 8
    types = ["sliding_attention", "full_attention"] * 14
    assert windows(read("qwen2.5-7b", **changes, layer_types=types)) == [4096, None] * 14
    assert read("qwen2.5-7b", layer_types=["full_attention"] * 28) == PRESETS["qwen2.5-7b"]
    assert problems("qwen2.5-7b", layer_types=types) == [
        "layer_types has sliding_attention, but no sliding_window is in use"
    ]


def test_qwen2_biases() -> None:
    config = read("qwen2.5-0.5b")
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (True, False, False, False)
    attention = models.load(FIXTURES / "qwen2", jnp.float32).model.layers[0].self_attn
    assert attention.qkv_proj.bias is not None
    assert attention.o_proj.bias is None


# Qwen 3.


def test_qwen3_norms_and_biases() -> None:
    config = read("qwen3-8b")
    assert (config.qkv_bias, config.o_bias, config.qk_norm) == (False, False, True)
    config = read("qwen3-8b", attention_bias=True)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, False)
    attention = models.load(FIXTURES / "qwen3", jnp.float32).model.layers[0].self_attn
    assert attention.q_norm.weight.shape == attention.k_norm.weight.shape == (32,)


def test_qwen3_head_dim_is_its_own() -> None:
    assert read("qwen3-0.6b").query_size == 2048
    silent = {key: value for key, value in PUBLISHED["qwen3-0.6b"].items() if key != "head_dim"}
    assert config_from_hf(silent) == PRESETS["qwen3-0.6b"]
    assert windows(read("qwen3-8b", use_sliding_window=True, sliding_window=512, max_window_layers=35))[34:] == [
        None,
        512,
    ]
