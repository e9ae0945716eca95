"""A decode step with fused layers against the same step unfused."""

import dataclasses
import functools

import backend_case
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax import UnifiedMax
from fdpp_jax.models import PRESETS, KVCache, LlamaConfig, causal_lm, model_plans
from fdpp_jax.models.chatglm import ChatGLMConfig
from fdpp_jax.models.gemma import Gemma2Config
from fdpp_jax.models.opt import OPTConfig
from fdpp_jax.models.step_cache import StepCache
from fdpp_jax.plans import device
from fdpp_jax.plans.backend import LayerPlan
from fdpp_jax.plans.hopper_layer import FusedLayerConfig

SIZES = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
)
SMALL = LlamaConfig(**SIZES)


pytestmark = pytest.mark.usefixtures("fresh_interpreter")


def prefilled(config, lengths, capacity, *, with_key_norms=False):
    model = causal_lm(config, rngs=nnx.Rngs(0))
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


@pytest.mark.slow
def test_is_the_unfused_step():
    """Without a head in the last layer, for the vocabulary of 80; in the next test there are heads."""
    biased = dataclasses.replace(SMALL, qkv_bias=True, vocab_size=80)
    # The spread of the prompts' largest norms, which are apart, is the yardstick for them.
    model, tokens, cache = prefilled(biased, (5, 9), 16, with_key_norms=True)
    for layer in model.model.layers:
        bias = layer.self_attn.qkv_proj.bias
        bias[...] = 0.1 * jax.random.normal(jax.random.key(1), bias.shape, bias.dtype)
    config = FusedLayerConfig(num_ctas=2, block_k=64, num_stages=3, num_x_tiles=1, num_x_stages=2)
    plan = LayerPlan("mosaic_gpu", "fused", config, "a small one")

    # Jitted: with operations of the host between them, interpreted kernels may wait for each other.
    @functools.partial(jax.jit, static_argnums=0)
    def decode(is_fused, tokens, cache):
        step = StepCache(biased, cache, None, "xla")
        if is_fused:
            return model.fused_logits(tokens, step, plan, interpret=plgpu.InterpretGPUParams()), step.grown()
        return model.decode_logits(tokens, step), step.grown()

    (out, grown), (exact, expected) = decode(True, tokens, cache), decode(False, tokens, cache)
    assert_close(out, exact, 0.02)
    np.testing.assert_array_equal(grown.lengths, expected.lengths)
    for name in ("keys", "values", "key_max_norms"):
        for x, y in zip(getattr(grown, name), getattr(expected, name), strict=True):
            assert_close(x, y, 0.02)


FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": LlamaConfig(**SIZES, qkv_bias=True),
    "qwen3": LlamaConfig(**SIZES, qk_norm=True),
    "gemma2": Gemma2Config(**SIZES, tie_word_embeddings=True),
    "chatglm": ChatGLMConfig(**SIZES | dict(head_dim=128)),
    "opt": OPTConfig(**SIZES | dict(hidden_size=128, num_key_value_heads=2)),
}
LAYERS = {name: config.layer_shape(2, jnp.bfloat16) for name, config in FAMILIES.items()}
FUSED = [
    case
    for case in backend_case.taken("layer", LAYERS)
    if any(case.values[0].layer.configs.values())
    and (backend_case.ON_GPU or case.values[1] != "qwen2")  # whose biases `test_is_the_unfused_step` has
]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "name"), FUSED)
def test_a_backend_fuses_the_layers_that_it_takes(backend, name):
    """The suite of the op layer: as each backend plans it, against the family's own modules."""
    config = FAMILIES[name]
    model, tokens, cache = prefilled(config, (5, 9), 16)
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):  # biases and gains are constants at first
        if path[-1] == "bias" or "norm" in path[-2]:
            parameter.set_value(
                parameter[...] + 0.1 * jax.random.normal(jax.random.key(1), parameter.shape, jnp.bfloat16)
            )
    plan = backend.layer.plan(LAYERS[name], backend_case.device_of(backend), "")

    @functools.partial(jax.jit, static_argnums=0)
    def decode(is_fused, tokens, cache):
        step = StepCache(config, cache, None, "xla")
        if is_fused:
            return model.fused_logits(tokens, step, plan, **backend_case.options_of(backend)), step.grown()
        return model.decode_logits(tokens, step), step.grown()

    (out, grown), (exact, expected) = decode(True, tokens, cache), decode(False, tokens, cache)
    assert_close(out, exact, 0.02)
    for x, y in zip((*grown.keys, *grown.values), (*expected.keys, *expected.values), strict=True):
        assert_close(x, y, 0.02)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_weights_are_those_of_its_spec(name):
    """What a spec has, a layer gives; what the spec has not is None."""
    config = FAMILIES[name]
    model = causal_lm(config, rngs=nnx.Rngs(0))
    spec, weights = config.layer_spec, model.layers[0].weights
    optional = {
        "qkv_bias": spec.has_qkv_bias,
        "o_bias": spec.has_o_bias,
        "mlp_in_bias": spec.has_mlp_bias,
        "mlp_out_bias": spec.has_mlp_bias,
        "query_norm": spec.norms_queries_and_keys,
        "key_norm": spec.norms_queries_and_keys,
        "o_norm": spec.norms_products,
        "mlp_out_norm": spec.norms_products,
        "input_norm_bias": spec.norm.kind == "layer",
        "mlp_norm_bias": spec.norm.kind == "layer",
    }
    assert {field: getattr(weights, field) is not None for field in optional} == optional
    assert weights.mlp_in.shape == (config.mlp_in_size, config.hidden_size)
    assert config.mlp_in_size == config.intermediate_size * (2 if spec.is_gated else 1)
    assert weights.qkv.shape == (config.qkv_size, config.hidden_size)
    assert model.head_weight.shape == (config.vocab_size, config.hidden_size)
    num_rotated = spec.num_rotated(config.head_dim)
    positions = jnp.zeros((2, 1), jnp.int32)
    _, context = model.embed(positions, positions)
    assert num_rotated == (0 if context is None else 2 * context[0].shape[-1])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "vocab_size", "softmax"),
    [
        *(
            (name, vocab_size, softmax)
            for name, vocab_size in (
                ("llama-2-7b", 512),
                ("llama-3.2-1b", 512),
                ("mistral-7b-v0.1", 528),
                ("qwen2.5-0.5b", 512),
            )
            for softmax in (None, UnifiedMax(0.0), UnifiedMax.bound())
        ),
        ("qwen3-8b", 512, UnifiedMax(0.0)),
        ("gemma-2-9b", 512, UnifiedMax(0.0)),
        ("chatglm2-6b", 512, UnifiedMax.bound()),
        ("opt-6.7b", 544, None),  # a multiple of 32 alone
    ],
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
    "name",
    [
        "llama-2-70b",
        "mistral-7b-v0.1",
        "qwen2.5-7b",
        "qwen3-8b",
        "gemma-2-9b",
        "chatglm2-6b",
        "opt-6.7b",
    ],
)
def test_every_familys_layers_are_fused(name):
    plans = {kernel: plan for kernel, _, plan in model_plans(PRESETS[name], batch=1, capacity=1024, device="H200")}
    assert plans["layer"].implementation == "fused"
    assert "one stream of weights" in plans["layer"].reason
    assert not {"qkv", "down", "head"} & set(plans)


def test_a_head_may_be_too_ragged_for_the_last_layer():
    config = dataclasses.replace(PRESETS["llama-2-7b"], vocab_size=32001)
    plans = {kernel: plan for kernel, _, plan in model_plans(config, batch=1, capacity=1024, device="H200")}
    assert list(plans) == ["attention", "layer", "head"]
    assert plans["layer"].reason.endswith("with qkv")
