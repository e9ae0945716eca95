"""The fused layer in Triton against float64, and against the modules of each family, interpreted on the CPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import layer_case
import numpy as np
import oracle
import pytest
import triton_case
from flax import nnx
from layer_case import CAPACITY, SPECS, Case

from fdpp_jax.models import KVCache, LlamaConfig
from fdpp_jax.models.chatglm import ChatGLMConfig
from fdpp_jax.models.families import causal_lm
from fdpp_jax.models.gemma import Gemma2Config
from fdpp_jax.models.opt import OPTConfig
from fdpp_jax.models.step_cache import StepCache
from fdpp_jax.plans import device, triton_layer
from fdpp_jax.plans.calls import NextAttention
from fdpp_jax.plans.shapes import LayerShape
from fdpp_jax.plans.triton_layer import FusedLayerConfig
from fdpp_jax.plans.triton_matmul import FlatMatmulConfig, GemvConfig
from fdpp_jax.triton import bridge
from fdpp_jax.triton.fused_layer import fused_layer, fused_qkv


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setattr(bridge, "call", triton_case.call)


def flat(block_n=16, block_k=64, k_groups=1, arch="sm_80"):
    return FlatMatmulConfig(arch, block_n, block_k, k_groups, 1, 4, 2)


def gemv(block_n=4, block_k=64):
    return GemvConfig("sm_80", block_n, block_k, 1, 4, 1)


SMALL = 96, 40, 4, 2, 16  # hidden, inner, heads, key/value heads, head dim
RAGGED = 72, 88, 3, 1, 24  # no size is a multiple of a tile
FLAT = FusedLayerConfig(flat(), flat(32, 32, 2), flat(), flat(32))
GEMV = FusedLayerConfig(gemv(), gemv(8), gemv(), gemv(8, 32))
MIXED = FusedLayerConfig(gemv(), flat(), gemv(8), flat())
AMD = FusedLayerConfig(*[flat(arch="gfx90a")] * 4)


def case(batch, sizes, spec=SPECS["llama"], seed=0):
    return Case(LayerShape(batch, *sizes, dtype="float16", spec=spec), seed)


def run(case, config, inputs):
    return jax.jit(functools.partial(fused_layer, spec=case.shape.spec, config=config))(*inputs)


def check(case, inputs, hidden, following):
    for out, exact in zip((hidden, *following), case.expected(*inputs), strict=True):
        # Four products with inputs rounded to float16 stand one on the other.
        assert oracle.relative_error(out, exact) < 2 * oracle.TOLERANCE["float16"]
    layer_case.check_slots(inputs[-1], following)


CASES = [
    *((3, SMALL, spec, FLAT) for spec in SPECS),
    *((1, SMALL, spec, GEMV) for spec in ("qwen3", "chatglm", "opt")),
    *((5, RAGGED, spec, FLAT) for spec in ("llama", "qwen3")),
    (1, RAGGED, "llama", GEMV),
    (1, RAGGED, "qwen2", MIXED),
    (9, SMALL, "llama", AMD),
    (16, SMALL, "llama", FLAT),
]


@pytest.mark.parametrize(("batch", "sizes", "spec", "config"), CASES)
def test_agrees_with_float64(batch, sizes, spec, config):
    one = case(batch, sizes, SPECS[spec])
    inputs = one.inputs()
    check(one, inputs, *run(one, config, inputs))


@pytest.mark.parametrize("spec", ["qwen3", "gemma", "opt"])
def test_nan_stays_in_its_row_and_slots_beyond_the_capacity_are_nowhere(spec):
    """NaN marks a row whose attention left the safe window."""
    one = case(5, SMALL, SPECS[spec])
    attended, hidden, weights, following, cache = one.inputs()
    cache = cache._replace(slots=cache.slots.at[1].set(CAPACITY).at[4].set(CAPACITY + 5))
    inputs = attended, hidden, weights, following, cache
    out, attention = run(one, FLAT, (attended.at[3, 0, 5].set(jnp.nan), *inputs[1:]))
    assert np.isnan(out[3]).all()
    assert np.isnan(attention.query[3]).all()
    slot, exact = int(cache.slots[3]), one.expected(*inputs)
    out, query = (x.at[3].set(y[3].astype(x.dtype)) for x, y in zip((out, attention.query), exact[:2], strict=True))
    keys, values = (
        x.at[3, slot].set(y[3, slot].astype(x.dtype)) for x, y in zip(attention[1:], exact[2:], strict=True)
    )
    check(one, inputs, out, NextAttention(query, keys, values))


@pytest.mark.parametrize("spec", ["llama", "gemma", "opt"])
def test_behind_the_last_layer_are_its_hidden_states(spec):
    one = case(3, SMALL, SPECS[spec])
    attended, hidden, weights, _, _ = one.inputs()
    out, following = run(one, FLAT, (attended, hidden, weights, None, None))
    assert following is None
    exact = one.expected_hidden(attended, hidden, weights)
    assert oracle.relative_error(out, exact) < 2 * oracle.TOLERANCE["float16"]


@pytest.mark.parametrize(("spec", "batch", "config"), [("qwen2", 1, GEMV), ("qwen3", 3, FLAT), ("opt", 3, FLAT)])
def test_before_the_first_attention_are_queries_keys_and_values(spec, batch, config):
    one = case(batch, SMALL, SPECS[spec])
    _, x, weights, _, cache = one.inputs()
    call = functools.partial(fused_qkv, spec=one.shape.spec, config=config)
    following = jax.jit(call)(x, weights, cache)
    for out, exact in zip(following, one.expected_attention(np.asarray(x, np.float64), weights, cache), strict=True):
        assert oracle.relative_error(out, exact) < oracle.TOLERANCE["float16"]
    layer_case.check_slots(cache, following)


SIZES = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": LlamaConfig(**SIZES, qkv_bias=True),
    "qwen3": LlamaConfig(**SIZES, qk_norm=True),
    "gemma2": Gemma2Config(**SIZES, tie_word_embeddings=True),
    "chatglm": ChatGLMConfig(**SIZES),
    "opt": OPTConfig(**SIZES | dict(num_key_value_heads=4)),
}


@pytest.mark.parametrize(("name", "batch"), [*((name, 3) for name in FAMILIES), ("llama", 1)])
def test_a_step_is_that_of_the_family_s_modules(name, batch):
    config = FAMILIES[name]
    model = causal_lm(config, dtype=jnp.float16, rngs=nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):  # biases and gains are constants at first
        if path[-1] == "bias" or "norm" in path[-2]:
            noise = 0.1 * jax.random.normal(next(keys), parameter.shape, jnp.float16)
            parameter.set_value(parameter[...] + noise)
    cache = KVCache.create(config, batch, 16, jnp.float16)
    prompts = jax.random.randint(next(keys), (batch, 5), 0, config.vocab_size)
    logits, cache = nnx.jit(lambda model, *arguments: model.prefill(*arguments))(
        model, prompts, jnp.array([5, 2, 4][:batch]), cache
    )
    tokens = logits.argmax(axis=-1)
    shape = config.layer_shape(batch, jnp.float16)
    plan = triton_layer.OP.plan(shape, dataclasses.replace(device.by_name("A100"), num_sms=3), "")

    @functools.partial(jax.jit, static_argnums=0)
    def decode(is_fused, tokens, cache):
        step = StepCache(config, cache, None, "xla")
        if is_fused:
            return model.fused_logits(tokens, step, plan), step.grown()
        return model.decode_logits(tokens, step), step.grown()

    (out, grown), (exact, expected) = decode(True, tokens, cache), decode(False, tokens, cache)
    for x, y in zip((out, *grown.keys, *grown.values), (exact, *expected.keys, *expected.values), strict=True):
        assert oracle.relative_error(x, y) < 4e-3
