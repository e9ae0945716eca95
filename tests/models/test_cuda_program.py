"""The decode step as it is lowered for GPUs by name, on whatever machine runs the tests."""

import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from triton_case import needs_plugin

import fdpp_jax
from fdpp_jax import UnifiedMax
from fdpp_jax.decode_loop import decode_step
from fdpp_jax.models import KVCache, LlamaConfig, LlamaForCausalLM
from fdpp_jax.plans import device


def traced_step(
    num_layers: int, batch: int, softmax: UnifiedMax | None, *, with_key_norms: bool = False, **options: Any
) -> Any:
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{"head_dim": 64, "intermediate_size": 512} | options,
    )
    model = nnx.eval_shape(lambda: LlamaForCausalLM(config, rngs=nnx.Rngs(0)))
    graphdef, weights = nnx.split(model)
    cache = jax.eval_shape(lambda: KVCache.create(config, batch, 256, jnp.bfloat16, with_key_norms=with_key_norms))

    def step(weights, cache, tokens, softmax):
        return decode_step(nnx.merge(graphdef, weights), tokens, cache, softmax)

    return jax.jit(step, donate_argnums=1).trace(weights, cache, jax.ShapeDtypeStruct((batch,), jnp.int32), softmax)


def lowered_step(
    num_layers: int, batch: int, softmax: UnifiedMax | None, platform: str = "cuda", **options: Any
) -> str:
    return traced_step(num_layers, batch, softmax, **options).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("name", "batch", "matmul", "options"),
    [
        ("H200", 1, "flat_matmul", {"tie_word_embeddings": True}),
        pytest.param("H100", 1, "gemv", {}, marks=pytest.mark.slow),
        pytest.param("H100", 4, "flat_matmul", {}, marks=pytest.mark.slow),
    ],
)
def test_layers_share_their_kernels(monkeypatch, name, batch, matmul, options):
    """qkv, o, gate and up, down, head and attention: lowered once, whatever the depth."""
    monkeypatch.setattr(device, "current", lambda: device.by_name(name))
    text = lowered_step(3, batch, UnifiedMax(), intermediate_size=528, **options)  # which no layer's launch takes
    assert text.count("custom_call @mosaic_gpu") == 6
    assert len(set(re.findall(rf"func private @({matmul}\w*)", text))) == 5
    assert "dot_general" not in text
    assert not re.search(r"stablehlo\.transpose .*tensor<\d{3,}x\d{3,}x", text)  # of a weight
    assert "stablehlo.case" not in text  # attention redoes what fails


def test_fused_layers_share_their_kernels(monkeypatch):
    """The first layer's qkv; attention; the rest of the last layer, with the head, and of all others."""
    monkeypatch.setattr(device, "current", lambda: device.by_name("H200"))
    text = lowered_step(3, 1, UnifiedMax())
    assert text.count("custom_call @mosaic_gpu") == 4
    assert len(set(re.findall(r"func private @(fused_layer\w*)", text))) == 2
    assert "dot_general" not in text
    assert "stablehlo.case" not in text


@needs_plugin
@pytest.mark.parametrize(
    ("name", "platform"),
    [
        ("A100", "cuda"),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in (("RTX 4090", "cuda"), ("MI250", "rocm"))),
    ],
)
def test_a_step_for_triton_has_its_kernels_and_no_product_of_xlas(name, platform):
    """qkv, o, gate and up, down, head and attention, of more rows than a fused layer takes."""
    with fdpp_jax.target(name):
        text = lowered_step(2, 17, UnifiedMax(), platform)
    assert len(set(re.findall(r"func private @(flat_matmul\w*)", text))) == 5
    assert text.count("custom_call @triton_kernel_call_ffi") >= 6
    assert "mosaic_gpu" not in text
    assert "dot_general" not in text
    assert not re.search(r"stablehlo\.transpose .*tensor<\d{3,}x\d{3,}x", text)  # of a weight
    assert "stablehlo.case" not in text  # attention redoes what fails


@needs_plugin
@pytest.mark.parametrize(
    ("name", "platform", "batch", "num_launches", "options"),
    [
        ("A100", "cuda", 1, 4, {}),
        ("A100", "cuda", 4, 4, {}),
        ("MI250", "rocm", 4, 4, {}),
        ("A100", "cuda", 4, 5, {"qk_norm": True}),
    ],
)
def test_a_layer_for_triton_is_its_launches_alone(name, platform, batch, num_launches, options):
    """One more layer adds them and attention, and nothing that XLA makes a kernel of."""
    with fdpp_jax.target(name):
        texts = [lowered_step(n, batch, UnifiedMax(), platform, **options) for n in (3, 4)]
    fewer, more = (Counter(_operations(text, "main")) for text in texts)
    added = more - fewer
    attention = added.pop("custom_call")
    assert attention <= 2
    assert added.pop("call") == 1
    assert set(added) <= {"reshape", "broadcast_in_dim", "convert"}  # of no elements, or of phi alone
    layer = Counter(_operations(texts[1], "fused_layer"))
    assert layer == {"reshape": 2, "custom_call": num_launches, "return": 1}
    assert "dot_general" not in texts[1]
    (heads,) = re.findall(r"custom_call @triton_kernel_call_ffi.*output_operand_alias.*", _body(texts[1], "fused_qkv"))
    assert heads.count("output_operand_alias<") == 2  # keys and values, in place


def _body(text: str, function: str) -> str:
    return re.search(rf"func\.func \w+ @{function}\(.*?\n  }}", text, re.DOTALL)[0]


def _operations(text: str, function: str) -> list[str]:
    """The names of a function's operations."""
    body = re.sub(r'opaque = "[^"]*"', "", _body(text, function))
    return re.findall(r"(?:^ *|^ *%[\w:]+ = )\"?(?:stablehlo\.)?([a-z]\w+)\"?[ (]", body, re.MULTILINE)


@pytest.mark.parametrize(
    ("softmax", "num_kernels", "num_cases"),
    [
        pytest.param(None, 4, 0, marks=pytest.mark.slow),
        (UnifiedMax(recompute="launch"), 5, 0),
        (UnifiedMax(recompute="cond"), 5, 1),  # the step is redone, not each layer
    ],
)
def test_where_a_step_is_redone(monkeypatch, softmax, num_kernels, num_cases):
    monkeypatch.setattr(device, "current", lambda: device.by_name("H200"))
    text = lowered_step(2, 1, softmax)
    assert text.count("custom_call @mosaic_gpu") == num_kernels
    assert text.count("stablehlo.case") == num_cases


def test_only_a_bound_without_its_norms_reads_all_keys_again(monkeypatch):
    monkeypatch.setattr(device, "current", lambda: device.by_name("H200"))
    norms, all_keys = "f32[3,2]", "f32[3,256,2,64]"  # [B, K], and the cache in float32
    for softmax, with_key_norms, expected in (
        (UnifiedMax(), False, (False, False)),
        (UnifiedMax.bound(), False, (True, True)),
        (UnifiedMax.bound(), True, (True, False)),
    ):
        text = str(traced_step(2, 3, softmax, with_key_norms=with_key_norms).jaxpr)
        assert (norms in text, all_keys in text) == expected
