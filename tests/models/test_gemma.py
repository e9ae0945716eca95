"""Gemma 2: config.json, presets, and what of the family the parity test would not miss."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdpp_jax import UnifiedMax, models, unified_max
from fdpp_jax.models import PRESETS, config_from_hf
from fdpp_jax.models.gemma import Gemma2Config
from fdpp_jax.models.layers import RMSNorm

FIXTURE = pathlib.Path(__file__).parent.parent / "fixtures" / "gemma2"
# As published with gemma-2-2b.
HF_CONFIG: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "transformers_version": "4.42.4",
    "use_cache": True,
    "vocab_size": 256000,
}
LARGER: dict[str, dict[str, Any]] = {
    "gemma-2-9b": {
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_attention_heads": 16,
        "num_hidden_layers": 42,
        "num_key_value_heads": 8,
    },
    "gemma-2-27b": {
        "head_dim": 128,
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_attention_heads": 32,
        "num_hidden_layers": 46,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 144,
    },
}


def problems(**changes: Any) -> list[str]:
    with pytest.raises(ValueError, match="not one this model can run") as error:
        Gemma2Config.from_hf(HF_CONFIG | changes)
    return [line.removeprefix("  - ") for line in str(error.value).splitlines()[1:]]


def test_presets_are_the_published_configs() -> None:
    assert config_from_hf(HF_CONFIG) == PRESETS["gemma-2-2b"]
    for name, changes in LARGER.items():
        assert config_from_hf(HF_CONFIG | changes) == PRESETS[name]


@pytest.mark.parametrize(("name", "billions"), [("gemma-2-2b", 2.614), ("gemma-2-9b", 9.242), ("gemma-2-27b", 27.227)])
def test_presets_have_the_published_size(name: str, billions: float) -> None:
    model = nnx.eval_shape(lambda: models.random_model(PRESETS[name]))
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert round(size / 1e9, 3) == billions


def test_config_of_transformers_5() -> None:
    new = {key: value for key, value in HF_CONFIG.items() if key not in ("rope_theta", "hidden_act")}
    new["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "default"}
    new["layer_types"] = ["sliding_attention", "full_attention"] * 13
    new["use_bidirectional_attention"] = None
    assert config_from_hf(new) == PRESETS["gemma-2-2b"]
    needed = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    silent = {key: HF_CONFIG[key] for key in (*needed, "num_attention_heads")}
    assert config_from_hf(silent) == PRESETS["gemma-2-2b"]


def test_attention_options() -> None:
    config = Gemma2Config.from_hf(HF_CONFIG | LARGER["gemma-2-27b"])
    full = {"scale": 1 / 12, "logits_soft_cap": 50.0}
    assert config.attention_options(0) == full | {"local_window_size": (4095, 0)}
    assert config.attention_options(1) == full
    config = Gemma2Config.from_hf(
        HF_CONFIG | {"layer_types": ["full_attention"] * 26, "sliding_window": None, "attn_logit_softcapping": None}
    )
    assert [config.attention_options(layer) for layer in range(26)] == [{"scale": 1 / 16}] * 26


def test_problems_are_listed_at_once() -> None:
    assert problems(vocab_size=0, hidden_size="2304", quantization_config={"quant_method": "awq"}) == [
        "expected vocab_size to be a positive integer, got 0",
        "expected hidden_size to be a positive integer, got '2304'",
        "expected unquantized weights, got a quantization_config (quant_method 'awq')",
    ]
    assert problems(query_pre_attn_scalar=None, attn_logit_softcapping="50") == [
        "expected query_pre_attn_scalar to be a number, got None",
        "expected attn_logit_softcapping to be a number or null, got '50'",
    ]
    assert problems(
        hidden_activation="gelu",
        rope_scaling={"type": "yarn", "factor": 4.0},
        sliding_window=None,
        query_pre_attn_scalar=-1,
        attn_logit_softcapping=0.0,
        final_logit_softcapping=-30.0,
        use_bidirectional_attention=True,
        tie_word_embeddings=False,
    ) == [
        "expected hidden_activation 'gelu_pytorch_tanh', got 'gelu'",
        "expected a rope_type out of default, linear, llama3, got 'yarn'",
        "layer_types has sliding_attention, but no sliding_window is in use",
        "expected query_pre_attn_scalar to be positive, got -1",
        "expected attn_logit_softcapping to be positive or null, got 0.0",
        "expected final_logit_softcapping to be positive or null, got -30.0",
        "expected use_bidirectional_attention False, got True",
        "expected tie_word_embeddings True, got False",
    ]
    (problem,) = problems(rope_scaling={"type": "linear", "factor": 4.0}, rope_parameters={"rope_theta": 10000.0})
    assert problem.startswith("expected rope_scaling and rope_parameters to say the same, got ")
    (problem,) = problems(layer_types=["full_attention", "chunked_attention"])
    assert problem.startswith("expected layer_types of 26 out of sliding_attention, full_attention, got")
    (problem,) = problems(architectures=["Gemma2ForTokenClassification"], vocab_size=0)
    assert problem.startswith("expected model_type 'gemma2' and architectures ['Gemma2ForCausalLM'], got 'gemma2'")


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": None},
        {"attn_logit_softcapping": None},
        {"final_logit_softcapping": None},
        {"query_pre_attn_scalar": 32.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_the_fixture_would_not_miss(change: dict[str, Any]) -> None:
    """Parity would otherwise not tell whether caps, windows and the scale are there."""
    model = models.load(FIXTURE, jnp.float32)
    expected = np.load(FIXTURE / "expected.npz")
    assert isinstance(model.config, Gemma2Config)
    # The layers' own configs hold shapes only; attention and head ask the model's.
    model.config = dataclasses.replace(model.config, **change)
    assert np.abs(model(expected["tokens"]) - expected["logits"])[1].max() > 0.1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_norm_is_computed_in_float32(dtype: Any) -> None:
    x, weight = jax.random.normal(jax.random.key(0), (2, 7, 64)).astype(dtype)
    norm = RMSNorm(64, eps=1e-6, offset=1.0, dtype=dtype)
    norm.weight.set_value(weight[0])
    exact = np.asarray(x, np.float64)
    exact /= np.sqrt(np.mean(exact**2, axis=-1, keepdims=True) + 1e-6)
    exact *= 1 + np.asarray(weight[0], np.float64)
    # 1 + weight rounded to the dtype would be off by more than the one rounding at the end.
    np.testing.assert_allclose(
        np.asarray(norm(x), np.float64), exact, rtol=0.51 * float(jnp.finfo(dtype).eps), atol=1e-6
    )


def test_embeddings_are_scaled_in_the_models_dtype() -> None:
    config = Gemma2Config.from_hf(json.loads((FIXTURE / "config.json").read_text()))
    model = models.random_model(dataclasses.replace(config, hidden_size=18), jnp.bfloat16)
    model.model.layers = nnx.List()
    model.model.norm = lambda x: x
    tokens = jnp.arange(12)[None]
    x = model.hidden_states(tokens, tokens, lambda *_: None)
    # 4.25 is sqrt(18) = 4.243 in bfloat16.
    np.testing.assert_array_equal(x[0], (4.25 * model.embedding.weight[:12].astype(jnp.float32)).astype(jnp.bfloat16))


def test_a_cap_rules_out_overflow_but_not_underflow() -> None:
    """What Gemma2Config says of phi."""
    cap, keys, phi = 50.0, 8192, 15.0
    config = PRESETS["gemma-2-9b"]
    assert config.uncalibrated_softmax("bfloat16")[0] == config.uncalibrated_softmax("float32")[0] == UnifiedMax(phi)
    assert config.uncalibrated_softmax("float16") == (None, "float16's window being narrow")
    uncapped = dataclasses.replace(config, attn_logit_softcapping=None)
    assert uncapped.uncalibrated_softmax("bfloat16") == (UnifiedMax(), "the default")
    den_min, den_max = unified_max.window(jnp.bfloat16, keys)
    assert keys * math.exp(cap - phi) < den_max
    assert keys * math.exp(-cap - phi) < den_min < math.exp(-44.3)
    den_min, den_max = unified_max.window(jnp.float16, keys)
    assert math.log(den_max / den_min) < 20.2 - math.log(keys) < cap


def test_plans_know_both_kinds_of_attention() -> None:
    plans = models.model_plans(PRESETS["gemma-2-9b"], batch=64, capacity=8192, device="H200")
    shapes = {name: shape for name, shape, _ in plans}
    assert list(shapes) == ["qkv", "attention (window 4096)", "attention", "layer", "o", "gate_up", "down", "head"]
    assert shapes["attention"].logits_soft_cap == shapes["attention (window 4096)"].logits_soft_cap == 50.0
    assert (shapes["qkv"].n, shapes["gate_up"].n, shapes["down"].k) == (8192, 28672, 14336)
