"""A decode step with fused layers against the same step unfused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax import UnifiedMax, device
from fdpp_jax.config import FusedLayerConfig
from fdpp_jax.models import PRESETS, KVCache, LlamaConfig, LlamaForCausalLM, fused, model_plans
from fdpp_jax.models.step_cache import StepCache

SMALL = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
)


pytestmark = pytest.mark.usefixtures("fresh_interpreter")


def prefilled(config, lengths, capacity, *, with_key_norms=False):
    model = LlamaForCausalLM(config, rngs=nnx.Rngs(0))
    batch = len(lengths)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, max(lengths)))
    cache = KVCache.create(config, batch, capacity, jnp.bfloat16, with_key_norms=with_key_norms)
    prefill = nnx.jit(lambda model, *arguments: model.prefill(*arguments))
    logits, cache = prefill(model, jnp.asarray(tokens), jnp.asarray(lengths), cache)
    return model, jnp.argmax(logits, axis=-1), cache


def assert_close(out, exact, tolerance):
    """Root mean square error relative to the spread."""
    out, exact = np.asarray(out, np.float64), np.asarray(exact, np.float64)
    assert np.sqrt(((out - exact) ** 2).mean()) < tolerance * exact.std()


@pytest.mark.parametrize(
    ("changes", "lengths"),  # of prompts whose largest norms are apart: their spread is the yardstick for them
    [({}, (5, 9)), (dict(vocab_size=96), (5, 9)), (dict(tie_word_embeddings=True), (2, 13))],
)
def test_is_the_unfused_step(changes, lengths):
    """With its head in the last layer, but for the vocabulary of 96."""
    biased = dataclasses.replace(SMALL, qkv_bias=True, **changes)
    model, tokens, cache = prefilled(biased, lengths, 16, with_key_norms=True)
    for layer in model.model.layers:
        bias = layer.self_attn.qkv_proj.bias
        bias[...] = 0.1 * jax.random.normal(jax.random.key(1), bias.shape, bias.dtype)
    config = FusedLayerConfig(num_ctas=2, block_k=64, num_stages=3, num_x_tiles=1, num_x_stages=2)

    # Jitted: with operations of the host between them, interpreted kernels may wait for each other.
    @functools.partial(jax.jit, static_argnums=0)
    def decode(is_fused, tokens, cache):
        step = StepCache(biased, cache, None, "xla")
        if is_fused:
            return fused.decode_logits(model, tokens, step, config, plgpu.InterpretGPUParams()), step.grown()
        return model.decode_logits(tokens, step), step.grown()

    (out, grown), (exact, expected) = decode(True, tokens, cache), decode(False, tokens, cache)
    assert_close(out, exact, 0.02)
    np.testing.assert_array_equal(grown.lengths, expected.lengths)
    for name in ("keys", "values", "key_max_norms"):
        for x, y in zip(getattr(grown, name), getattr(expected, name), strict=True):
            assert_close(x, y, 0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("softmax", [None, UnifiedMax(0.0), UnifiedMax.bound()])
@pytest.mark.parametrize(
    ("name", "vocab_size"),
    [("llama-2-7b", 512), ("llama-3.2-1b", 512), ("mistral-7b-v0.1", 528), ("qwen2.5-0.5b", 512)],
)
def test_decodes_like_xla(name, vocab_size, softmax):
    config = dataclasses.replace(PRESETS[name], num_hidden_layers=3, vocab_size=vocab_size)
    plans = model_plans(config, batch=3, capacity=128, device=device.current())
    assert [plan.implementation for kernel, _, plan in plans if kernel == "layer"] == ["fused"]
    model, tokens, cache = prefilled(config, (5, 70, 33), 128, with_key_norms=True)

    @functools.partial(nnx.jit, static_argnums=3)
    def steps(model, state, token, implementation):
        found, redone = [], []
        for _ in range(4):
            logits, state, overflow, is_redone = model.decode(
                token, state, softmax=None if implementation else softmax, implementation=implementation
            )
            found.append(logits)
            assert overflow is False
            redone.append(jnp.asarray(is_redone))
            token = (token + 17) % config.vocab_size
        return jnp.stack(found), state, jnp.stack(redone)

    logits, grown, redone = steps(model, cache, tokens, None)
    exact, expected, _ = steps(model, cache, tokens, "xla")
    assert not redone.any()
    assert_close(logits, exact, 0.02)
    for x, y in zip((*grown.keys, *grown.values), (*expected.keys, *expected.values), strict=True):
        assert_close(x, y, 0.02)


@pytest.mark.parametrize(
    ("name", "implementation", "why"),
    [
        ("llama-2-70b", "fused", "one stream of weights"),
        ("mistral-7b-v0.1", "fused", "one stream of weights"),
        ("qwen2.5-7b", "fused", "one stream of weights"),
        ("qwen3-8b", "unfused", "normalise"),
        ("gemma-2-9b", "unfused", "no GELU"),
        ("opt-6.7b", "unfused", "that of LLaMA"),
    ],
)
def test_plans_say_why(name, implementation, why):
    plans = {kernel: plan for kernel, _, plan in model_plans(PRESETS[name], batch=1, capacity=1024, device="H200")}
    assert plans["layer"].implementation == implementation
    assert why in plans["layer"].reason
    for matmul in ("qkv", "down", "head"):
        assert (matmul in plans) == (implementation == "unfused")


def test_a_head_may_be_too_ragged_for_the_last_layer():
    config = dataclasses.replace(PRESETS["llama-2-7b"], vocab_size=32001)
    plans = {kernel: plan for kernel, _, plan in model_plans(config, batch=1, capacity=1024, device="H200")}
    assert list(plans) == ["attention", "layer", "head"]
    assert plans["layer"].reason.endswith("with qkv")
