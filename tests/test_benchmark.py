"""Benches on tiny shapes: that they run, refuse and record; never how fast anything is."""

import json

import pytest

from fdpp_jax import benchmark, device
from fdpp_jax.config import AttentionShape, MatmulShape
from fdpp_jax.models import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(benchmark, "_MAX_SETS", 2)
    monkeypatch.setattr(benchmark, "_REPEATS", 1)


def _check(report: benchmark.BenchReport, names: list[str], path) -> dict:
    assert all(len(row) == len(report.columns) for row in report.rows)
    assert [name for name in names if not any(row[0].startswith(name) for row in report.rows)] == []
    report.save(path)
    record = json.loads(path.read_text())
    assert record["device"]["kind"] == device.current().kind
    assert {"jax", "jaxlib", "flax", "fdpp_jax"} <= set(record["versions"])
    assert {"date", "commit"} <= set(record)
    return record


def test_attention(tmp_path):
    report = benchmark.bench_attention(AttentionShape(2, 1, 64, 4, 2, 64, dtype="float32"))
    names = ["ours, unified max", "ours, online softmax", "jax.nn, xla", "read floor"]
    record = _check(report, names, tmp_path / "record.json")
    assert record["bytes"] == 2 * 2 * 64 * 2 * 64 * 4
    assert all(time > 0 for time in record["time_us"].values())


def test_matmul(tmp_path):
    record = _check(
        benchmark.bench_matmul(MatmulShape(8, 64, 128)), ["jnp.dot", "read floor"], tmp_path / "record.json"
    )
    assert record["bytes"] == 64 * 128 * 2


@pytest.mark.parametrize("tied", [False, True])
def test_decode(tmp_path, tied):
    config = LlamaConfig(**{**vars(CONFIG), "tie_word_embeddings": tied})
    report = benchmark.bench_decode(config, batch=2, context=16, steps=4)
    names = ["ours, unified max", "ours, online softmax", "plain XLA", "read floor"]
    record = _check(report, names, tmp_path / "record.json")
    layer = 32 * (64 + 32 + 96) + 48 * 32 + 2 * 32
    embedding_or_head = 64 * 32  # the one that a step reads whole
    itemsize = 2 if device.current().is_gpu else 4
    assert record["bytes"]["weights"] == (layer + embedding_or_head + 32) * itemsize
    assert record["bytes"]["keys_and_values"] == 2 * 2 * 14 * 16 * itemsize  # 14 live tokens on average
    assert record["recomputed_steps"]["ours, online softmax"] == 0


@pytest.mark.parametrize("arguments", [{"batch": 0}, {"steps": 0}, {"context": 4}])
def test_bad_input(arguments):
    with pytest.raises(ValueError, match="expected a batch and steps of at least 1 and context above steps"):
        benchmark.bench_decode(CONFIG, **({"batch": 1, "context": 16, "steps": 4} | arguments))
    with pytest.raises(ValueError, match="query_length 1, got 2"):
        benchmark.bench_attention(AttentionShape(1, 2, 64, 4, 2, 64))


@pytest.mark.parametrize("set_bytes", [1 << 10, 1 << 20])
def test_small_sets_do_not_make_endless_programs(monkeypatch, set_bytes):
    monkeypatch.setattr(benchmark, "_MAX_SETS", 64)
    assert benchmark.num_sets(set_bytes, device.by_name("H200")) == 64


@pytest.mark.parametrize("set_bytes", [4 << 20, 17 << 20, 1 << 30, 16 << 30])
def test_a_timed_program_reads_past_the_last_cache(monkeypatch, set_bytes):
    monkeypatch.setattr(benchmark, "_MAX_SETS", 64)
    h200 = device.by_name("H200")
    sets = benchmark.num_sets(set_bytes, h200)
    assert sets >= 2
    assert sets * set_bytes >= 4 * h200.l2_bytes
