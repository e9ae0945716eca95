"""OPT: config.json, presets, names of tensors, the end of the position table."""

import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from fdpp_jax import models
from fdpp_jax.bench import decode as benchmark
from fdpp_jax.models import PRESETS, config_from_hf
from fdpp_jax.models.layers import LayerNorm
from fdpp_jax.models.opt import OPTConfig

FIXTURE = pathlib.Path(__file__).parent.parent / "fixtures" / "opt"
# As published with opt-6.7b.
HF_CONFIG: dict[str, Any] = {
    "_name_or_path": "facebook/opt-6.7b",
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 16384,
    "hidden_size": 4096,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "transformers_version": "4.20.1",
    "use_cache": True,
    "vocab_size": 50272,
    "word_embed_proj_dim": 4096,
}


def sizes(hidden_size: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden_size,
        "word_embed_proj_dim": hidden_size,
        "ffn_dim": 4 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def problems(**changes: Any) -> list[str]:
    with pytest.raises(ValueError, match="not one this model can run") as error:
        OPTConfig.from_hf(HF_CONFIG | changes)
    return [line.removeprefix("  - ") for line in str(error.value).splitlines()[1:]]


def test_presets_are_the_published_configs() -> None:
    assert config_from_hf(HF_CONFIG) == PRESETS["opt-6.7b"]
    assert config_from_hf(HF_CONFIG | sizes(768, 12, 12)) == PRESETS["opt-125m"]
    assert config_from_hf(HF_CONFIG | sizes(2048, 24, 32)) == PRESETS["opt-1.3b"]
    assert config_from_hf(HF_CONFIG | sizes(5120, 40, 40)) == PRESETS["opt-13b"]
    silent = {"_remove_final_layer_norm", "activation_function", "do_layer_norm_before", "word_embed_proj_dim"}
    assert config_from_hf({k: v for k, v in HF_CONFIG.items() if k not in silent}) == PRESETS["opt-6.7b"]


@pytest.mark.parametrize(
    ("name", "millions"), [("opt-125m", 125.2), ("opt-1.3b", 1315.8), ("opt-6.7b", 6658.5), ("opt-13b", 12853.5)]
)
def test_presets_have_the_published_size(name: str, millions: float) -> None:
    model = nnx.eval_shape(lambda: models.random_model(PRESETS[name]))
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert round(size / 1e6, 1) == millions


def test_problems_are_listed_at_once() -> None:
    # opt-350m
    assert problems(**sizes(1024, 24, 16) | {"word_embed_proj_dim": 512, "do_layer_norm_before": False}) == [
        "expected word_embed_proj_dim to be hidden_size=1024, got 512",
        "expected do_layer_norm_before True, got False",
    ]
    # Galactica's settings, a checkpoint from before transformers 4.20, and more.
    assert problems(
        activation_function="gelu",
        num_attention_heads=33,
        _remove_final_layer_norm=True,
        layer_norm_elementwise_affine=False,
        enable_bias=False,
        tie_word_embeddings=False,
    ) == [
        "expected activation_function 'relu', got 'gelu'",
        "expected num_attention_heads to divide hidden_size=4096, got 33",
        "expected _remove_final_layer_norm False, got True",
        "expected layer_norm_elementwise_affine True, got False",
        "expected enable_bias True, got False",
        "expected tie_word_embeddings True, got False",
    ]
    assert problems(vocab_size=0, ffn_dim=-1) == [
        "expected vocab_size to be a positive integer, got 0",
        "expected ffn_dim to be a positive integer, got -1",
    ]
    with pytest.raises(ValueError, match=r"hidden_size is missing\n  - ffn_dim is missing"):
        OPTConfig.from_hf({"model_type": "opt", "vocab_size": 1, "intermediate_size": 1})
    (problem,) = problems(architectures=["OPTForSequenceClassification"], vocab_size=0)
    assert problem.startswith("expected model_type 'opt' and architectures ['OPTForCausalLM'], got 'opt'")


def test_both_layouts_of_the_names_are_the_same_model(tmp_path: pathlib.Path) -> None:
    """opt-6.7b, 13b and 30b are published with decoder.*, the others with model.decoder.*."""
    folder = pathlib.Path(shutil.copytree(FIXTURE, tmp_path / "opt"))
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    expected, found = (nnx.state(models.load(path, jnp.float32)) for path in (FIXTURE, folder))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_head_that_repeats_the_embedding_is_ignored(tmp_path: pathlib.Path) -> None:
    folder = pathlib.Path(shutil.copytree(FIXTURE, tmp_path / "opt"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors")
    models.load(folder)


def test_positions_end_with_the_table() -> None:
    model = models.load(FIXTURE, jnp.float32)
    limit = json.loads((FIXTURE / "config.json").read_text())["max_position_embeddings"]
    assert model(jnp.zeros((1, limit), jnp.int32)).shape == (1, limit, 128)
    with pytest.raises(ValueError, match=f"at most max_position_embeddings={limit} tokens a row, got {limit + 1}"):
        model(jnp.zeros((1, limit + 1), jnp.int32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_norm_is_computed_in_float32(dtype: Any) -> None:
    x, weight, bias = (2.0 + jax.random.normal(jax.random.key(0), (3, 7, 64))).astype(dtype)
    norm = LayerNorm(64, eps=1e-5, dtype=dtype)
    norm.weight.set_value(weight[0])
    norm.bias.set_value(bias[0])
    exact = np.asarray(x, np.float64)
    exact -= exact.mean(axis=-1, keepdims=True)
    exact /= np.sqrt(np.mean(exact**2, axis=-1, keepdims=True) + 1e-5)
    exact = exact * np.asarray(weight[0], np.float64) + np.asarray(bias[0], np.float64)
    np.testing.assert_allclose(
        np.asarray(norm(x), np.float64), exact, rtol=0.51 * float(jnp.finfo(dtype).eps), atol=1e-5
    )


def test_plans_have_no_gate() -> None:
    plans = models.model_plans(PRESETS["opt-6.7b"], batch=64, capacity=2048, device="H200")
    shapes = {name: (shape.k, shape.n) for name, shape, _ in plans if name not in ("attention", "layer")}
    assert shapes == {
        "qkv": (4096, 12288),
        "o": (4096, 4096),
        "up": (4096, 16384),
        "down": (16384, 4096),
        "head": (4096, 50272),
    }


def test_a_decode_step_reads_all_but_the_positions() -> None:
    model = models.load(FIXTURE, jnp.float32)
    tensors = load_file(FIXTURE / "model.safetensors")
    positions = tensors.pop("model.decoder.embed_positions.weight")
    assert positions.shape == (130, 64)
    assert benchmark._weight_bytes(model) == sum(tensor.nbytes for tensor in tensors.values())
