"""The bench of a decode step on a tiny model."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
import toy_backend
from bench_case import check_report
from flax import nnx
from triton_case import needs_plugin

from fdpp_jax import generation
from fdpp_jax.bench import clock, decode, generate
from fdpp_jax.models import PRESETS, KVCache, LlamaConfig
from fdpp_jax.plans import backends, device

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


@pytest.mark.parametrize(
    ("tied", "window", "seen"), [pytest.param(False, None, 14, marks=pytest.mark.slow), (True, 8, 8)]
)
def test_decode(tmp_path, tied, window, seen):
    config = LlamaConfig(**{**vars(CONFIG), "tie_word_embeddings": tied, "sliding_window": window})
    report = decode.bench_decode(config, batch=2, context=16, steps=4)
    names = ["ours, unified max", "ours, online softmax", "plain XLA", "read floor"]
    record = check_report(report, names, tmp_path / "record.json")
    layer = 32 * (64 + 32 + 96) + 48 * 32 + 2 * 32
    embedding_or_head = 64 * 32  # the one that a step reads whole
    itemsize = 2 if device.current().is_gpu else 4
    assert record["bytes"]["weights"] == (layer + embedding_or_head + 32) * itemsize
    assert record["bytes"]["keys_and_values"] == 2 * 2 * seen * 16 * itemsize  # 14 live tokens on average
    assert record["recomputed_steps"]["ours, online softmax"] == 0


def test_generate_takes_turns_with_the_loops(tmp_path, monkeypatch):
    calls = []

    def counted(model, prompts, **options):
        calls.append((prompts.shape, tuple(options.items())))
        return generation.generate(model, prompts, **options)

    monkeypatch.setattr(generate, "generate", counted)
    kinds = "greedy", "temperature", "top-k", "top-p", "top-k-top-p"
    report = decode.bench_decode(CONFIG, batch=2, context=16, steps=4, generate=kinds)
    names = [f"generate, {kind}" for kind in kinds]
    record = check_report(report, ["ours, online softmax", *names], tmp_path / "record.json")
    assert list(record["ms_per_step"])[3:] == names
    assert {shape for shape, _ in calls} == {(2, 12)}
    assert set(collections.Counter(options for _, options in calls).values()) == {1 + clock.REPEATS}
    assert len({options for _, options in calls}) == len(names)
    assert {dict(options)["max_new_tokens"] for _, options in calls} == {4}


@pytest.mark.parametrize(
    ("kinds", "steps", "message"),
    [
        (["greedy"], 1, "expected steps of at least 2 where generate is timed, got steps=1"),
        (["greedy", "beam"], 4, "generate must be among greedy, temperature, top-k, top-p, top-k-top-p, got beam"),
    ],
)
def test_what_of_generate_cannot_be_timed(kinds, steps, message):
    with pytest.raises(ValueError, match=message):
        decode.bench_decode(CONFIG, context=16, steps=steps, generate=kinds)


@pytest.mark.parametrize(("named", "timed"), [(None, "mosaic_gpu"), ("triton", "triton")])
def test_ours_are_steps_by_the_kernels_of_the_backend_that_is_named(two_backends, named, timed):
    report = decode.bench_decode(CONFIG, batch=2, context=16, steps=4, implementation=named)
    assert [row[0] for row in report.rows][:3] == ["ours, unified max", "ours, online softmax", "plain XLA"]
    assert report.title.endswith(f"; {timed}: qkv, attention, o, gate_up, down, head")
    assert report.record["decode"]["implementation"] == named
    plans = report.record["plans"]
    assert {name: plan["backend"] for name, plan in plans.items()} == dict.fromkeys(plans, timed) | {"layer": "xla"}
    assert two_backends() == {timed}
    assert {plan.algorithm for plan in toy_backend.calls} == {"toy", "flat"}


@needs_plugin
@pytest.mark.slow
def test_a_step_on_hopper_by_triton_alone():
    """Attention, fused layers and the head, where Mosaic GPU's fused layers are the plan."""
    h200 = device.by_name("H200")
    config = LlamaConfig(**{**vars(CONFIG), "hidden_size": 256, "head_dim": 64, "intermediate_size": 512})
    model = nnx.eval_shape(lambda: decode.models.random_model(config, jnp.bfloat16))
    structure, weights = decode.flattened(model)
    cache = jax.eval_shape(lambda: KVCache.create(config, 2, 64, jnp.bfloat16))
    tokens = jax.ShapeDtypeStruct((2,), jnp.int32)
    names, layers = {}, {}
    for gpu in (h200, backends.only("triton", h200)):
        with device.target(gpu):
            loop = jax.jit(functools.partial(decode._decode_loop, structure, 4, None))
            lowered = loop.trace(weights, cache, tokens, None).lower(lowering_platforms=("cuda",)).as_text()
        names[gpu.only_backend] = [lowered.count(f"@{name}") for name in ("mosaic_gpu", "triton_kernel_call")]
        layers[gpu.only_backend] = re.findall(r"func private @(fused_layer\w*)", lowered)
    assert layers["triton"] == ["fused_layer"]  # of the one layer
    assert names[None][0] > 0
    assert names[None][1] == 0
    assert names["triton"][0] == 0
    assert names["triton"][1] >= 6


def test_a_step_whose_attention_the_named_backend_refuses(two_backends, monkeypatch):
    monkeypatch.setattr(decode.models, "random_model", lambda *_: pytest.fail("weights before the check"))
    triton = backends.by_name("triton")
    refusing = dataclasses.replace(triton.attention, refuse=lambda *_: "triton takes nothing")
    others = backends.by_name("mosaic_gpu"), backends.by_name("xla")
    monkeypatch.setattr(backends, "BACKENDS", (dataclasses.replace(triton, attention=refusing), *others))
    with pytest.raises(NotImplementedError, match=r"'triton' computes no attention of this step: .*takes nothing"):
        decode.bench_decode(CONFIG, batch=2, context=16, steps=4, implementation="triton")


def test_phi_fits_scores_that_random_weights_make_large(monkeypatch, tmp_path):
    """Queries some hundred times as long, whose rows phi = 6 leaves outside the window in every step."""
    random_model = decode.models.random_model

    def long_queries(config, dtype):
        model = random_model(config, dtype)
        weight = model.model.layers[0].self_attn.qkv_proj.weight
        weight.set_value(weight[...].at[: config.query_size].multiply(230.0))
        return model

    monkeypatch.setattr(decode.models, "random_model", long_queries)
    report = decode.bench_decode(CONFIG, batch=2, context=64, steps=4)
    record = check_report(report, ["ours, unified max"], tmp_path / "record.json")
    assert record["recomputed_steps"] == dict.fromkeys(record["ms_per_step"], 0)
    assert report.columns[-1] == "redone of 4"
    assert report.rows[0][-1] == "0"
    assert f"phi {record['decode']['phi']:.1f}" in report.title
    measured = decode._measured_phi
    monkeypatch.setattr(decode, "_measured_phi", lambda *args: (6.0, measured(*args)[1]))
    off = decode.bench_decode(CONFIG, batch=2, context=64, steps=4)
    assert off.record["recomputed_steps"]["ours, unified max"] == 4
    assert off.rows[0][-1] == "4"


@pytest.mark.parametrize(
    ("name", "live_tokens", "seen"),
    [
        ("llama-3-8b", 8000, 32 * 8000),
        ("mistral-7b-v0.1", 4000, 32 * 4000),
        ("mistral-7b-v0.1", 8000, 32 * 4096),
        ("gemma-2-9b", 8000, 21 * 4096 + 21 * 8000),
    ],
)
def test_a_layer_reads_no_more_than_its_window(name, live_tokens, seen):
    config = PRESETS[name]
    assert decode._kv_bytes(config, live_tokens, jnp.dtype("bfloat16")) == 2 * 2 * config.kv_size * seen


@pytest.mark.parametrize("arguments", [{"batch": 0}, {"steps": 0}, {"context": 4}])
def test_bad_input(arguments):
    with pytest.raises(ValueError, match="expected a batch and steps of at least 1 and context above steps"):
        decode.bench_decode(CONFIG, **({"batch": 1, "context": 16, "steps": 4} | arguments))
    with pytest.raises(ValueError, match="expected a context of at most the model's 2048, got 2049"):
        decode.bench_decode(PRESETS["opt-6.7b"], context=2049)
