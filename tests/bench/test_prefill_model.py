"""The bench of a model's prefill: what it counts, runs and records, on tiny models."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from bench_case import check_report

from fdpp_jax import models
from fdpp_jax.bench import prefill_model
from fdpp_jax.models import PRESETS, LlamaConfig
from fdpp_jax.ops import reference
from fdpp_jax.pallas import run as pallas_run
from fdpp_jax.plans import device

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=20,
)
UNIFIED, ONLINE, WHOLE = "ours, unified max", "ours, online softmax", "whole prompt, cuDNN"


@pytest.mark.slow
def test_a_prefill_without_kernels(tmp_path, monkeypatch):
    """A unified max counts in no kernel here: online softmax is the only line beside the floor's."""
    monkeypatch.setattr(device, "current", lambda: device.by_name("cpu"))
    report = prefill_model.bench_model_prefill(CONFIG, batch=2, prefill_chunk_size=8)
    record = check_report(report, [ONLINE, "floor"], tmp_path / "record.json")
    assert [row[0] for row in report.rows] == [ONLINE, "floor"]
    prefill = record["prefill"]
    assert (prefill["batch"], prefill["query_length"], prefill["phi"]) == (2, 20, None)
    layer = 32 * (64 + 32 + 96) + 48 * 32
    attention = 2 * 4 * 4 * 8 * 210 * 2  # 210: the keys that 20 queries see
    assert prefill["flops"] == 2 * 2 * (20 * 2 * layer + 32 * 64) + attention
    assert record["floor_ms"] == pytest.approx(prefill["flops"] / 1e12 * 1e3)
    online = record["variants"][ONLINE]
    assert (online["chunk_size"], online["attention"]) == (8, "xla reference")
    assert online["temp_bytes"] > 0
    assert online["compile_seconds"] > 0
    row = dict(zip(report.columns, report.rows[0], strict=True))
    assert row["ms"] == f"{online['ms']:.3f}"
    assert row["tokens/s"] == f"{2 * 20 / online['ms'] * 1e3:.0f}"
    assert row["x floor"] == f"{online['ms'] / record['floor_ms']:.2f}"


def test_flops_know_windows_and_families():
    window = prefill_model._flops(dataclasses.replace(CONFIG, sliding_window=5), 1, 20, jnp.float32)
    assert prefill_model._flops(CONFIG, 1, 20, jnp.float32) - window == 2 * 4 * 4 * 8 * (210 - 90)
    config = PRESETS["opt-6.7b"]  # no gate
    per_token = config.num_hidden_layers * 12 * config.hidden_size**2
    expected = 2 * (per_token + config.hidden_size * config.vocab_size) + config.num_hidden_layers * 4 * 4096
    assert prefill_model._flops(config, 1, 1, jnp.bfloat16) == expected


def test_phi_is_the_middle_of_what_the_rows_have():
    config = dataclasses.replace(CONFIG, num_hidden_layers=1)
    model = models.random_model(config, jnp.float32)
    weight = model.model.layers[0].self_attn.qkv_proj.weight
    weight.set_value(weight[...].at[: config.query_size + config.kv_size].multiply(20.0))
    tokens = jnp.arange(18)[None]
    seen = []

    def attend(layer, query, key, value):
        seen.append((query, key))
        return query

    model.hidden_states(tokens, tokens, attend)
    ((query, key),) = seen
    scores = np.einsum("tngh,snh->ngts", query[0].reshape(18, 2, 2, 8), key[0]).astype(np.float64) / 8**0.5
    scores = np.where(np.tri(18, dtype=bool), scores, -np.inf)
    log_den = np.log(np.exp(scores).sum(axis=-1))
    assert np.ptp(log_den) > 1
    expected = (log_den.min() + log_den.max()) / 2
    assert prefill_model._measured_phi(model, tokens) == pytest.approx(expected, abs=1e-4)


@pytest.fixture
def hopper_config(hopper, monkeypatch):
    """A model whose prefill is planned for an H200; plain XLA stands in for the kernel."""

    def run(arrays, options, config, *, recompute, interpret):
        return reference.attention(arrays._replace(phi=None) if recompute else arrays, options)

    monkeypatch.setattr(pallas_run, "prefill_attention", run)
    monkeypatch.setattr(device, "current", lambda: device.by_name("H200"))
    sizes = dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    return dataclasses.replace(CONFIG, max_position_embeddings=64, **sizes)


def test_on_a_gpu_there_is_a_line_a_softmax_and_one_for_the_whole_prompt(hopper_config):
    variants = prefill_model._variants(hopper_config, 1, 64, "bfloat16", 32, quick=False)
    assert {name: (v.is_unified, v.chunk_size, v.attention) for name, v in variants.items()} == {
        UNIFIED: (True, 32, "mosaic_gpu prefill"),
        ONLINE: (False, 32, "mosaic_gpu prefill"),
        WHOLE: (False, 64, "xla cudnn"),
    }
    assert list(prefill_model._variants(hopper_config, 1, 64, "bfloat16", 32, quick=True)) == [UNIFIED]
    whole = prefill_model._variants(hopper_config, 1, 64, "bfloat16", None, quick=False)
    assert {name: (v.chunk_size, v.attention) for name, v in whole.items()} == {
        UNIFIED: (64, "mosaic_gpu prefill"),
        ONLINE: (64, "xla cudnn"),  # which is the whole prompt
    }
    gemma = prefill_model._variants(PRESETS["gemma-2-9b"], 1, 8192, "bfloat16", None, quick=False)
    assert {name: v.chunk_size for name, v in gemma.items()} == {UNIFIED: 4096, ONLINE: 4096}  # capped: no cuDNN


@pytest.mark.slow
def test_both_softmaxes_are_timed(hopper_config, tmp_path, monkeypatch):
    variants = prefill_model._variants

    def without_cudnn(*args, **options):
        return {name: v for name, v in variants(*args, **options).items() if name != WHOLE}

    monkeypatch.setattr(prefill_model, "_variants", without_cudnn)
    report = prefill_model.bench_model_prefill(hopper_config, prefill_chunk_size=32)
    record = check_report(report, [UNIFIED, ONLINE, "floor"], tmp_path / "record.json")
    phi = record["prefill"]["phi"]
    assert 0 < phi < 10
    assert f"phi {phi:.1f}" in report.title
    assert all(variant["ms"] > 0 for variant in record["variants"].values())


@pytest.mark.slow
@pytest.mark.parametrize(("named", "timed"), [(None, "mosaic_gpu"), ("triton", "triton")])
def test_ours_is_by_the_kernels_of_the_backend_that_is_named(two_backends, named, timed):
    report = prefill_model.bench_model_prefill(CONFIG, implementation=named)
    toys = {name: v["attention"] for name, v in report.record["variants"].items()}
    assert toys == {UNIFIED: f"{timed} toy", ONLINE: f"{timed} toy"}
    assert report.record["prefill"]["implementation"] == named
    assert ("kernels of triton" in report.title) == (named == "triton")
    assert timed in two_backends()


def test_a_prefill_whose_attention_the_named_backend_refuses(monkeypatch):
    monkeypatch.setattr(device, "current", lambda: device.by_name("A100"))
    monkeypatch.setattr(models, "random_model", lambda *_: pytest.fail("weights before the check"))
    wide = dataclasses.replace(CONFIG, head_dim=512)
    with pytest.raises(NotImplementedError, match=r"'triton' computes no attention of this prefill: .*got H = 512"):
        prefill_model.bench_model_prefill(wide, implementation="triton")


def test_a_result_that_is_not_finite_is_not_timed(monkeypatch):
    monkeypatch.setattr(prefill_model, "_prefill", lambda *args: (jnp.full((1, 64), jnp.nan), args[3]))
    with pytest.raises(FloatingPointError, match="ours, online softmax"):
        prefill_model.bench_model_prefill(dataclasses.replace(CONFIG, num_hidden_layers=1))


def test_the_default_length_is_what_the_model_was_made_for():
    names = ("llama-2-7b", "gemma-2-9b", "llama-3.1-8b", "opt-6.7b")
    assert [prefill_model._query_length(PRESETS[name], None) for name in names] == [4096, 8192, 8192, 2048]
    assert prefill_model._query_length(PRESETS["llama-2-7b"], 10000) == 10000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "expected a batch and a query_length of at least 1, got batch=0 query_length=20"),
        ({"query_length": 0}, "expected a batch and a query_length of at least 1, got batch=1 query_length=0"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size must be at least 1, got 0"),
    ],
)
def test_bad_input(arguments, message, monkeypatch):
    monkeypatch.setattr(models, "random_model", lambda *_: pytest.fail("weights before the check"))
    with pytest.raises(ValueError, match=message):
        prefill_model.bench_model_prefill(CONFIG, **arguments)
    with pytest.raises(ValueError, match="expected a query_length of at most the model's 2048, got 2049"):
        prefill_model.bench_model_prefill(PRESETS["opt-6.7b"], query_length=2049)


@pytest.mark.gpu
def test_all_lines_on_a_gpu(tmp_path):
    config = dataclasses.replace(PRESETS["llama-2-7b"], num_hidden_layers=2)
    report = prefill_model.bench_model_prefill(config, query_length=1024, prefill_chunk_size=512)
    record = check_report(report, [UNIFIED, ONLINE, WHOLE, "floor"], tmp_path / "record.json")
    assert all(v["ms"] > record["floor_ms"] for v in record["variants"].values())
