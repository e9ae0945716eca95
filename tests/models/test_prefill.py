"""Prefill in pieces and behind a cache: the numbers of the whole prompt, in place, in memory that a piece takes."""

import dataclasses
import functools
import pathlib
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdpp_jax import UnifiedMax, dot_product_attention, models, target
from fdpp_jax.models import PRESETS, KVCache, LlamaConfig
from fdpp_jax.models.plans import PREFILL_CHUNK_SIZE, PrefillPlan, plan_prefill, prefill_plans
from fdpp_jax.ops import blockwise, reference
from fdpp_jax.pallas import run as pallas_run
from fdpp_jax.plans import xla
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions
from fdpp_jax.plans.device import Device, by_name

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures"
NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/expected.npz"))
WINDOWED = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=4,
    layer_types=("sliding_attention", "full_attention"),
)


@functools.cache
def load(name: str) -> tuple[models.CausalLM, dict[str, np.ndarray]]:
    return models.load(FIXTURES / name, jnp.float32), dict(np.load(FIXTURES / name / "expected.npz"))


@functools.partial(nnx.jit, static_argnames="prefill_chunk_size")
def prefill(model: Any, tokens: Any, lengths: Any, cache: KVCache, **options: Any) -> tuple[jax.Array, KVCache]:
    return model.prefill(tokens, lengths, cache, **options)


@functools.partial(nnx.jit, static_argnames="prefill_chunk_size")
def extend(model: Any, tokens: Any, lengths: Any, cache: KVCache, **options: Any) -> tuple[jax.Array, KVCache]:
    return model.extend(tokens, lengths, cache, **options)


def empty(model: models.CausalLM, batch: int, capacity: int, fill: float = 0.0) -> KVCache:
    """An empty cache; fill is what its slots hold."""
    cache = KVCache.create(model.config, batch, capacity, model.dtype, with_key_norms=True)
    keys, values = ([jnp.full_like(x, fill) for x in arrays] for arrays in (cache.keys, cache.values))
    return KVCache(tuple(keys), tuple(values), cache.lengths, cache.key_max_norms)


def assert_same(cache: KVCache, expected: KVCache) -> None:
    """Live keys and values within rounding, and their norms."""
    np.testing.assert_array_equal(cache.lengths, expected.lengths)
    live = (np.arange(cache.capacity) < np.asarray(cache.lengths)[:, None])[:, :, None, None]
    for x, y in zip(cache.keys + cache.values, expected.keys + expected.values, strict=True):
        np.testing.assert_allclose(np.where(live, x, 0), np.where(live, y, 0), rtol=0, atol=2e-5)
    for x, y in zip(cache.key_max_norms, expected.key_max_norms, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


@nnx.jit
def in_three_ways(model: Any, tokens: Any, lengths: Any, first: Any, rest: Any, cache: KVCache) -> Any:
    """Logits and cache: of the whole prompts, of pieces of five tokens, and of `first` tokens and then the rest."""
    _, begun = model.prefill(tokens, first, cache)
    return (
        model.prefill(tokens, lengths, cache),
        model.prefill(tokens, lengths, cache, prefill_chunk_size=5),
        model.extend(rest, lengths - first, begun),
    )


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in ("llama3_gqa", "gemma2", "opt") else pytest.mark.slow) for x in NAMES]
)
def test_pieces_and_what_goes_behind_them_give_what_the_whole_prompt_gives(name: str) -> None:
    """In a batch of unequal lengths, whose rows end in different pieces, and go on from different slots."""
    model, expected = load(name)
    tokens, lengths = expected["tokens"], expected["prompt_lengths"]
    first = np.maximum(1, lengths * np.arange(1, len(lengths) + 1) // (len(lengths) + 1))
    assert len({(length - 1) // 5 for length in lengths.tolist()}) > 1
    assert len(set(first)) > 1
    rest = np.stack([np.roll(row, -n) for row, n in zip(tokens, first, strict=True)])
    ways = in_three_ways(model, tokens, lengths, first, rest, empty(model, len(tokens), tokens.shape[1] + 3))
    (exact, whole), pieces, behind = ways
    np.testing.assert_allclose(exact, expected["logits"][np.arange(len(tokens)), lengths - 1], rtol=0, atol=1e-4)
    for (logits, cache), counts in ((pieces, lengths > 0), (behind, lengths > first)):
        np.testing.assert_allclose(logits[counts], exact[counts], rtol=0, atol=2e-5)
        assert_same(cache, whole)


@pytest.fixture(scope="module")
def windowed() -> models.CausalLM:
    return models.random_model(WINDOWED, jnp.float32)


@pytest.mark.parametrize("prefill_chunk_size", [None, 1, 4, 6])
def test_a_boundary_at_every_offset(windowed: models.CausalLM, prefill_chunk_size: int | None) -> None:
    """Of a window of 4, and of pieces; the other row has nothing new, and stays as it is."""
    tokens, whole_length = np.arange(26).reshape(2, 13) % 40, np.array([13, 5])
    exact, whole = prefill(windowed, tokens, whole_length, empty(windowed, 2, 13))
    for n in range(1, 13):
        _, before = prefill(windowed, tokens, np.array([n, 5]), empty(windowed, 2, 13))
        rest = np.roll(tokens, -n, axis=1)
        options = {} if prefill_chunk_size is None else {"prefill_chunk_size": prefill_chunk_size}
        logits, cache = extend(windowed, rest, np.array([13 - n, 0]), before, **options)
        np.testing.assert_allclose(logits[0], exact[0], rtol=0, atol=1e-6)
        assert_same(cache, whole)
        for x, y in zip(cache.keys + cache.values, before.keys + before.values, strict=True):
            np.testing.assert_array_equal(x[1], y[1])
            np.testing.assert_array_equal(x[0, :n], y[0, :n])


def test_what_the_slots_held_before_does_not_count(windowed: models.CausalLM) -> None:
    """Of a cache that is used again: its lengths and norms are not those of the prompt."""
    tokens, lengths = np.arange(26).reshape(2, 13) % 40, np.array([13, 5])
    exact, whole = prefill(windowed, tokens, lengths, empty(windowed, 2, 16))
    used = empty(windowed, 2, 16, fill=9.0)
    used = KVCache(used.keys, used.values, used.lengths + 7, tuple(x + 99 for x in used.key_max_norms))
    for size in (4, 16):
        logits, cache = prefill(windowed, tokens, lengths, used, prefill_chunk_size=size)
        np.testing.assert_allclose(logits, exact, rtol=0, atol=1e-6)
        assert_same(cache, whole)


def _compiled_prefill(model: models.CausalLM, length: int, capacity: int, prefill_chunk_size: int) -> Any:
    graphdef, weights = nnx.split(model)

    def run(weights: Any, tokens: jax.Array, lengths: jax.Array, cache: KVCache) -> Any:
        model = nnx.merge(graphdef, weights)
        return model.prefill(tokens, lengths, cache, prefill_chunk_size=prefill_chunk_size)

    args = jnp.zeros((2, length), jnp.int32), jnp.ones(2, jnp.int32), empty(model, 2, capacity)
    return jax.jit(run, donate_argnums=3).lower(weights, *args).compile()


def test_memory_does_not_depend_on_the_prompt(windowed: models.CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on the capacity of the cache, which is written in place."""
    monkeypatch.setattr(xla, "MAX_SCORE_BYTES", 0)  # attention in blocks, of 32 queries and keys
    monkeypatch.setattr(blockwise, "_LARGEST", 32)

    def temp_bytes(length: int, size: int) -> int:
        return int(_compiled_prefill(windowed, length, length, size).memory_analysis().temp_size_in_bytes)

    short, long = (temp_bytes(length, 32) - 2 * 4 * length for length in (128, 1024))  # without the tokens
    assert long - short < 1024
    assert temp_bytes(1024, 1024) > 5 * short  # the test can fail


def test_the_cache_is_written_in_place(windowed: models.CausalLM) -> None:
    compiled = _compiled_prefill(windowed, 64, 997, 16)  # no other array has an axis of 997 but scores
    array_bytes = 2 * 997 * WINDOWED.kv_size * 4
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * WINDOWED.num_hidden_layers * array_bytes
    text = compiled.as_text()
    assert "f32[2,997,2,8]" in text
    copies = [
        line for line in text.splitlines() if "[2,997,2,8]" in line and (" copy(" in line or "copy-start" in line)
    ]
    assert not copies


@pytest.mark.parametrize("method", ["prefill", "extend"])
def test_bad_input(windowed: models.CausalLM, method: str) -> None:
    call, tokens = getattr(windowed, method), jnp.zeros((2, 9), jnp.int32)
    with pytest.raises(ValueError, match="prefill_chunk_size must be at least 1, got 0"):
        call(tokens, jnp.ones(2, jnp.int32), empty(windowed, 2, 16), prefill_chunk_size=0)
    with pytest.raises(ValueError, match="cache of 2 rows"):
        call(tokens[:1], jnp.ones(1, jnp.int32), empty(windowed, 2, 16))
    with pytest.raises(ValueError, match=r"expected integer tokens \[B, T\]"):
        call(tokens[0], jnp.ones(2, jnp.int32), empty(windowed, 2, 16))


# By plan.

NO_KERNELS = dataclasses.replace(by_name("A100"), why_no_triton="no triton here")


@pytest.mark.parametrize(
    ("device", "length", "options", "expected"),
    [
        ("H200", 4096, {}, PrefillPlan(4096, False, False)),  # whole: cuDNN
        ("H200", 4096, {"has_unified_max": True}, PrefillPlan(4096, False, True)),
        ("H200", 4097, {}, PrefillPlan(4096, True, False)),
        ("H200", 8192, {"has_unified_max": True}, PrefillPlan(4096, True, True)),
        ("H200", 8192, {"chunk_size": 512}, PrefillPlan(512, True, False)),
        ("H200", 32, {"has_unified_max": True, "is_behind_cache": True}, PrefillPlan(32, True, True)),
        ("H200", 32, {"dtype": "float32", "has_unified_max": True}, PrefillPlan(32, False, False)),
        ("A100", 8192, {}, PrefillPlan(4096, True, False)),
        ("A100", 8192, {"chunk_size": 512, "has_unified_max": True}, PrefillPlan(512, True, True)),
        (NO_KERNELS, 8192, {}, PrefillPlan(8192, False, False)),  # cuDNN, which continues nothing
        (NO_KERNELS, 8192, {"chunk_size": 512, "has_unified_max": True}, PrefillPlan(512, True, False)),
        (NO_KERNELS, 8192, {"is_behind_cache": True}, PrefillPlan(4096, True, False)),
        (NO_KERNELS, 8192, {"dtype": "float32"}, PrefillPlan(4096, True, False)),
    ],
)
def test_how_a_prefill_runs(device: Device | str, length: int, options: dict[str, Any], expected: PrefillPlan) -> None:
    arguments: dict[str, Any] = dict(batch=2, capacity=8256, has_unified_max=False, is_behind_cache=False)
    arguments |= dict(chunk_size=None, device=device) | options
    assert plan_prefill(PRESETS["llama-3-8b"], length=length, **arguments) == expected
    assert PREFILL_CHUNK_SIZE == 4096


@pytest.mark.parametrize(
    ("name", "device", "length", "expected"),
    [
        ("llama-3-8b", "H200", 4096, [("prefill attention", 4096, 4096, "prefill")]),
        ("llama-3-8b", "H200", 8192, [("prefill attention", 4096, 8256, "prefill")]),
        ("llama-3-8b", "A100", 8192, [("prefill attention", 4096, 8256, "prefill")]),
        ("llama-3-8b", NO_KERNELS, 8192, [("prefill attention", 8192, 8192, "cudnn")]),
        (
            "gemma-2-9b",
            "H200",
            8192,
            [
                ("prefill attention (window 4096)", 4096, 8256, "prefill"),
                ("prefill attention", 4096, 8256, "prefill"),
            ],
        ),
    ],
)
def test_plans_of_a_prefill_are_those_of_a_piece(name: str, device: Device | str, length: int, expected: Any) -> None:
    plans = prefill_plans(PRESETS[name], batch=1, length=length, capacity=8256, device=device)
    assert [(name, shape.query_length, shape.capacity, plan.algorithm) for name, shape, plan in plans] == expected
    assert all(shape.is_online == (plan.algorithm == "cudnn") for _, shape, plan in plans)


@pytest.fixture
def kernel_calls(hopper: Any, monkeypatch: pytest.MonkeyPatch) -> list[AttentionArrays]:
    """Arrays of the prefill kernel's calls, in the order in which they are traced; plain XLA stands in for a launch."""
    calls = []

    def run(arrays: AttentionArrays, options: AttentionOptions, config: Any, *, recompute: bool, interpret: Any) -> Any:
        calls.append(arrays)
        return reference.attention(arrays._replace(phi=None) if recompute else arrays, options)

    monkeypatch.setattr(pallas_run, "prefill_attention", run)
    return calls


def _hopper_model(**changes: Any) -> models.CausalLM:
    sizes: dict[str, Any] = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=64, max_position_embeddings=256)
    return models.random_model(LlamaConfig(**sizes | changes), jnp.bfloat16)


@pytest.mark.parametrize("softmax", [None, UnifiedMax(jnp.array([[[1.0]], [[2.0]]])), UnifiedMax.bound()])
def test_on_hopper_pieces_are_the_prefill_kernel_s(kernel_calls: Any, softmax: UnifiedMax | None) -> None:
    """With windows, and a phi of each layer."""
    model = _hopper_model(sliding_window=20)
    tokens, lengths = np.arange(80).reshape(2, 40) % 64, np.array([40, 7])
    logits, cache = prefill(model, tokens, lengths, empty(model, 2, 64), softmax=softmax, prefill_chunk_size=20)
    assert kernel_calls  # layers that are alike share a trace
    for arrays in kernel_calls:
        assert (arrays.query.shape, arrays.key.shape) == ((2, 20, 2, 64), (2, 64, 1, 64))
        assert (arrays.phi is None) == (softmax is None)
    with target("cpu"):
        exact, whole = prefill(model, tokens, lengths, empty(model, 2, 64))
    np.testing.assert_allclose(logits, exact, atol=0.05 * np.abs(exact).max())
    np.testing.assert_array_equal(cache.lengths, whole.lengths)


@pytest.mark.parametrize(
    ("softmax", "length", "names"),
    [
        (None, 32, set()),  # cuDNN's
        (UnifiedMax(), 32, {"prefill"}),
        (UnifiedMax(), 16, {"decode"}),
    ],
)
def test_a_policy_counts_where_a_kernel_computes_the_prompt(softmax: Any, length: int, names: set[str]) -> None:
    model = _hopper_model()
    graphdef, weights = nnx.split(model)

    def run(weights: Any, cache: KVCache, softmax: UnifiedMax | None) -> Any:
        tokens, lengths = jnp.zeros((2, length), jnp.int32), jnp.full(2, length)
        return nnx.merge(graphdef, weights).prefill(tokens, lengths, cache, softmax=softmax)

    with target("H200"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="JAX lowers cuDNN's attention only where there is a GPU")
        traced = jax.jit(run).trace(weights, empty(model, 2, 64), softmax)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"(prefill|decode)_attention_unified", text)) == names


@pytest.mark.gpu
@pytest.mark.parametrize("softmax", [None, UnifiedMax(0.0), UnifiedMax.bound()])
@pytest.mark.parametrize(
    ("name", "changes"),
    [("llama-3-8b", {}), ("mistral-7b-v0.1", {"sliding_window": 100}), ("gemma-2-2b", {"sliding_window": 100})],
)
def test_pieces_on_the_gpu_are_the_whole_prompt(name: str, changes: dict[str, Any], softmax: Any) -> None:
    """Pieces of 128 tokens, and 20 and 10 tokens behind a cache, against plain XLA on the whole prompts."""
    config = dataclasses.replace(PRESETS[name], num_hidden_layers=2, layer_types=(), vocab_size=512, **changes)
    model = models.random_model(config, jnp.bfloat16)
    tokens, lengths = np.random.default_rng(0).integers(0, 512, (2, 300)), np.array([300, 137])

    def attend(layer: int, *arrays: jax.Array) -> jax.Array:
        options = config.attention_options(layer)
        out: jax.Array = dot_product_attention(*arrays, is_causal=True, implementation="xla", **options)
        return out

    hidden = nnx.jit(lambda model: model.hidden_states(tokens, np.arange(300)[None], attend, "xla"))(model)
    exact = np.asarray(model.head(hidden[np.arange(2), lengths - 1]))
    pieces, _ = prefill(model, tokens, lengths, empty(model, 2, 320), softmax=softmax, prefill_chunk_size=128)
    begun = lengths - np.array([20, 10])
    rest = np.stack([np.roll(row, -n)[:32] for row, n in zip(tokens, begun, strict=True)])
    _, cache = prefill(model, tokens, begun, empty(model, 2, 320), softmax=softmax)
    behind, _ = extend(model, rest, lengths - begun, cache, softmax=softmax)
    for logits in (pieces, behind):
        assert np.sqrt(np.square(logits - exact).mean()) < 0.02 * np.std(exact)
