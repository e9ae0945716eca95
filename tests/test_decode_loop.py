"""The jitted loop: the recompute's place in it, and logits that are not finite."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from generation_case import CONFIG, PROMPTS, SOFTMAXES, loud_model, plain_loop

from fdpp_jax import decode_loop, ops
from fdpp_jax.generation import generate, stream
from fdpp_jax.models import KVCache, LlamaForCausalLM
from fdpp_jax.plans.backend import LayerPlan
from fdpp_jax.sampling import Sampling
from fdpp_jax.unified_max import UnifiedMax


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return loud_model()


@pytest.mark.parametrize(
    ("overlaps", "options"),
    [(True, {"xla_gpu_enable_command_buffer": ""}), (False, {"xla_gpu_enable_dynamic_slice_fusion": False})],
)
def test_a_step_is_one_cuda_graph_unless_its_launches_overlap(overlaps, options, monkeypatch, model):
    plan = LayerPlan("mosaic_gpu", "fused", None, "in a test", overlaps_attention=overlaps)
    monkeypatch.setattr(type(model), "layer_plan", lambda *_: plan)
    assert decode_loop.decode_compiler_options(model, 1) == options
    compiled = jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile(compiler_options=options)  # XLA knows them
    assert compiled(jnp.ones(3)).tolist() == [2, 2, 2]


def _decode_chunk_arguments(model, batch: int, capacity: int, softmax):
    structure, weights = decode_loop.flattened(model)
    eos_ids = jnp.array([3], jnp.int32)
    prompts, lengths = jnp.zeros((batch, 16), jnp.int32), jnp.full((batch,), 5, jnp.int32)
    prefill = (
        structure,
        capacity,
        softmax is not None and softmax.is_bound,
        16,
        weights,
        prompts,
        lengths,
        Sampling(),
        eos_ids,
        jax.random.key(0),
        None,
    )
    loop, _ = decode_loop.prefill(*prefill)
    return structure, 8, 4, weights, loop, jnp.int32(8), Sampling(), eos_ids, softmax


@pytest.mark.parametrize(
    ("softmax", "num_conds"), [(None, 0), (UnifiedMax(jnp.float32(6)), 1), (UnifiedMax.bound(), 1)]
)
def test_one_cond_a_step_and_none_without_unified_max(model, softmax, num_conds):
    arguments = _decode_chunk_arguments(model, 2, 64, softmax)
    assert str(decode_loop.decode_chunk.trace(*arguments).jaxpr).count("= cond[") == num_conds


@pytest.mark.parametrize(("has_kernel", "num_conds"), [((True, True), 0), ((False, True), 1)])
def test_what_a_kernel_redoes_is_counted_without_a_cond(model, monkeypatch, has_kernel, num_conds):
    unchecked, layers = ops.unchecked_decode_attention, itertools.cycle(has_kernel)

    def attend(*arrays, softmax, redone, **options):
        if not next(layers) or softmax is None:
            return unchecked(*arrays, softmax=softmax, redone=redone, **options)
        fails = softmax.phi[..., 0] > 100  # [1]: of head 0, in a stand-in for the kernel
        return unchecked(*arrays, **options)[0], redone.at[:, 0].max(fails.astype(jnp.int32))

    monkeypatch.setattr(ops, "unchecked_decode_attention", attend)
    graphdef, weights = nnx.split(model)
    cache = KVCache.create(CONFIG, 2, 16, jnp.float32)

    @jax.jit
    def step(softmax):
        return decode_loop.decode_step(nnx.merge(graphdef, weights), jnp.array([3, 5]), cache, softmax)

    exact, exact_cache, redone = step(None)
    assert not redone
    for layer in (None, 0, 1):
        softmax = UnifiedMax(jnp.zeros((2, 1, 4)) if layer is None else jnp.zeros((2, 1, 4)).at[layer].set(200.0))
        assert str(step.trace(softmax).jaxpr).count("= cond[") == num_conds
        logits, grown, redone = step(softmax)
        assert bool(redone) == (layer is not None)
        np.testing.assert_allclose(logits, exact, atol=1e-5)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), grown, exact_cache)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_recompute_copies_no_cache(model, batch):
    capacity = 4096
    array_bytes = batch * capacity * CONFIG.kv_size * 4
    temp_bytes = {}
    for name, softmax in (("online", None), ("unified", UnifiedMax(jnp.float32(6)))):
        compiled = decode_loop.decode_chunk.lower(*_decode_chunk_arguments(model, batch, capacity, softmax)).compile()
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= 2 * CONFIG.num_hidden_layers * array_bytes  # all of it in place
        temp_bytes[name] = memory.temp_size_in_bytes
    assert temp_bytes["unified"] - temp_bytes["online"] < array_bytes / 4


# Logits that are not finite.


def _poisoned(model, token, value):
    """The model with an embedding that makes the logits of whoever sees that token no finite numbers."""
    graphdef, weights = nnx.split(model)

    def poison(path, x):
        is_embedding = "embed_tokens" in map(str, (getattr(key, "key", key) for key in path))
        return x.at[token].set(value) if is_embedding else x

    return nnx.merge(graphdef, jax.tree.map_with_path(poison, weights))


@pytest.mark.parametrize(
    ("softmax", "value", "sampling"),
    [
        ("online", np.nan, {}),
        ("unified", np.nan, {}),
        ("unified", np.inf, {"temperature": 0.7}),
        ("bound", np.nan, {"temperature": 0.7, "top_k": 3, "top_p": 0.9}),
    ],
)
def test_logits_that_are_not_finite_are_an_error_that_names_row_and_step(model, softmax, value, sampling):
    softmax = SOFTMAXES[softmax]
    expected = generate(model, PROMPTS, max_new_tokens=20, **sampling).tokens
    row = 1
    token, step = next(
        (int(token), step)
        for step, token in enumerate(expected[row])
        if step > 2 and token not in expected[:, :step] and token not in PROMPTS and token != expected[0, step]
    )
    wrong = _poisoned(model, token, value)
    message = (
        rf"expected finite logits, got NaN or infinity in row {row} of decode step {step + 1}: weights are damaged"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none blames phi
        with pytest.raises(FloatingPointError, match=message):
            generate(wrong, PROMPTS, max_new_tokens=20, softmax=softmax, **sampling)
        chunks = stream(wrong, PROMPTS, max_new_tokens=20, softmax=softmax, chunk_size=1, **sampling)
        for _ in range(step + 1):  # what came before is right
            next(chunks)
        with pytest.raises(FloatingPointError, match=message):
            next(chunks)


def test_a_prompt_whose_logits_are_not_finite(model):
    wrong = _poisoned(model, PROMPTS[1, 2], np.nan)
    with pytest.raises(
        FloatingPointError, match=r"in row 1 of the prompt: weights are damaged, or .* exceed float32\.$"
    ):
        generate(wrong, PROMPTS, max_new_tokens=4)


def test_a_row_that_has_ended_may_hold_anything(model):
    expected = [plain_loop(prompt, 20) for prompt in PROMPTS]
    end = next(token for token in expected[1] if token not in expected[0] and token not in PROMPTS)
    wrong = _poisoned(model, end, np.nan)  # which row 1 feeds itself for ever
    result = generate(wrong, PROMPTS, max_new_tokens=20, eos_ids=[end])
    assert result.tokens[0].tolist() == expected[0]
