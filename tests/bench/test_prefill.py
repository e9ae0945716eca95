"""The bench of prefill attention on tiny shapes: what it counts, runs and records."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from bench_case import check_report

from fdpp_jax import heuristics
from fdpp_jax.bench import prefill
from fdpp_jax.bench.attention import inputs
from fdpp_jax.bench.prefill import TABLE, prefill_case
from fdpp_jax.ops import blockwise, reference
from fdpp_jax.plans import device
from fdpp_jax.plans.backend import AttentionPlan
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions
from fdpp_jax.plans.hopper_prefill import PrefillAttentionConfig

TINY = functools.partial(prefill_case, 2, 4, 2, 20, head_dim=16, dtype="float32")


def _arrays(case):
    x, kv = inputs(case.shape, case.live_lengths())
    return x, kv, AttentionArrays(**x, **kv)


@pytest.mark.parametrize(
    "case",
    [
        TINY(),
        TINY(is_causal=False),
        TINY(capacity=40, window=9),
        TINY(capacity=48, lengths=33, is_causal=False, window=9, page_size=16),
    ],
    ids=lambda case: case.label,
)
def test_work_is_that_of_the_keys_that_are_seen(case):
    shape = case.shape
    options = AttentionOptions(1.0, shape.is_causal, shape.local_window_size)
    sees = reference.sees(_arrays(case)[2], options, jnp.arange(shape.query_length), jnp.arange(shape.capacity))
    sees = np.broadcast_to(sees, (shape.batch, *sees.shape[1:]))
    assert case.flops == 4 * 4 * 16 * sees.sum()
    padded = np.pad(sees, ((0, 0), (0, 4), (0, -shape.capacity % 16)))
    blocks = padded.reshape(shape.batch, 3, 8, -1, 16).any(axis=(2, 4))
    assert case.num_blocks(8, 16) == 4 * blocks.sum()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "multiple of the key/value heads, got .* num_heads=3 num_kv_heads=2"),
        ({"capacity": 30}, "capacity must be at least query_length, got capacity=30 query_length=64"),
        ({"lengths": 63}, "lengths must lie in query_length=64..capacity=64, got 63"),
        ({"page_size": 24}, "capacity must be whole pages, got capacity=64 and page_size=24"),
        ({"window": 0}, "window must be a positive number of keys, got 0"),
        *(
            ({"soft_cap": cap}, f"soft_cap must be positive and finite, got {cap}")
            for cap in (0.0, -1.0, math.inf, math.nan)
        ),
        ({"page_size": 8}, "pages must hold 16, 32, 64, 128, 256 keys, got page_size=8"),
        (
            {"query_length": 16},
            "bench prefill is for more than 16 queries .*, got query_length=16; bench attention is for 1 to 16",
        ),
        ({"query_length": 0}, "expected positive sizes"),
    ],
)
def test_bad_case(arguments, message):
    with pytest.raises(ValueError, match=message):
        prefill_case(**dict(batch=2, num_heads=4, num_kv_heads=2, query_length=64) | arguments)


def test_labels_are_distinct():
    labels = [case.label for case in TABLE]
    assert len(set(labels)) == len(labels)
    assert labels[-1] == "1, 32/8, 512 of 32768, lengths, pages of 64"


@pytest.mark.slow
def test_one_shape(tmp_path):
    case = TINY(window=9, soft_cap=5.0)
    report = prefill.bench_prefill(case)
    (record,) = check_report(report, ["unified max", "online softmax"], tmp_path / "record.json")["prefill_attention"]
    assert record["label"] == case.label == "2, 4/2, 20, H 16, float32, window 9, soft cap 5"
    assert (record["flops"], record["num_blocks"]) == (case.flops, None)
    assert all(time > 0 for time in record["time_us"].values())
    assert "xla: float32 reference" in report.title
    assert [row[0] for row in prefill.bench_prefill(case, quick=True).rows] == ["unified max"]


def test_what_no_kernel_takes_is_a_line_with_the_reason(tmp_path, capsys):
    report = prefill.bench_prefill_table([TINY()], record_path=tmp_path / "record.json")
    assert report.rows == ((TINY().label, "0", *["-"] * 8),)
    (record,) = check_report(report, [TINY().label], tmp_path / "record.json")["prefill_attention"]
    assert "no kernel for cpu" in record["plan"]["reason"]
    assert "time_us" not in record
    assert "no kernel: float32 reference: " in capsys.readouterr().err


@pytest.mark.slow
def test_table_of_a_kernel(monkeypatch, capsys):
    """A stand-in: online softmax fails, and is a cell of the table, and an error alone."""

    def op(shape, x, kv, *, softmax, implementation):
        if softmax is None:
            raise NotImplementedError(f"no {implementation}\nsecond line")
        return x["query"]

    plan = AttentionPlan("mosaic_gpu", "prefill", PrefillAttentionConfig(64, 2), "a stand-in")
    monkeypatch.setattr(prefill, "_op", op)
    monkeypatch.setattr(heuristics, "plan_attention", lambda *_: plan)
    report = prefill.bench_prefill_table([TINY()])
    (row,) = report.rows
    (record,) = report.record["prefill_attention"]
    us = record["time_us"]["unified max"]
    assert row[2:6] == (
        f"{us:.1f}",
        f"{TINY().flops / us / 1e6:.3f}",
        f"{us / 1e6 / (TINY().flops / (device.current().bf16_tflops * 1e12)):.2f}",
        f"{us * device.current().num_sms / 8:.2f}",
    )
    assert row[6:] == ("-",) * 4
    assert record["failures"] == {"online softmax": "NotImplementedError: no mosaic_gpu"}
    with pytest.raises(NotImplementedError, match="no mosaic_gpu"):
        prefill.bench_prefill(TINY())


@pytest.mark.slow
@pytest.mark.parametrize(("named", "timed"), [(None, "mosaic_gpu"), ("triton", "triton")])
def test_ours_is_the_kernel_of_the_backend_that_is_named(two_backends, named, timed):
    report = prefill.bench_prefill(TINY(), implementation=named)
    assert [row[0] for row in report.rows] == ["unified max", "online softmax"]
    assert report.record["prefill_attention"][0]["plan"]["implementation"] == timed
    assert two_backends() == {timed}


@pytest.mark.slow
def test_a_shape_that_the_named_backend_refuses(two_backends, capsys):
    case = TINY(capacity=32, page_size=16)
    with pytest.raises(
        NotImplementedError, match="implementation='triton' cannot run this call: triton takes no pages"
    ):
        prefill.bench_prefill(case, implementation="triton")
    report = prefill.bench_prefill_table([case, TINY()], implementation="triton")
    assert report.rows[0][2:] == ("-",) * 8
    assert "triton takes no pages" in report.record["prefill_attention"][0]["plan"]["reason"]
    assert report.rows[1][2] != "-"
    assert "no kernel: " in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{}, {"window": 128, "soft_cap": 5.0, "lengths": 256}], ids=["plain", "more"])
def test_the_candidates_of_a_gpu_lower(monkeypatch, changes):
    """Nothing runs, but every argument fits its kernel."""
    h200 = device.by_name("H200")
    monkeypatch.setattr(device, "current", lambda: h200)
    case = prefill_case(2, 4, 2, 256, head_dim=64, **changes)
    candidates = prefill._candidates(case, heuristics.plan_attention(case.shape, h200), h200, quick=False)
    assert ("jax.nn, cudnn" in candidates) == ("soft_cap" not in changes)
    x, kv = jax.eval_shape(lambda: inputs(case.shape, case.live_lengths()))
    for name in ("unified max", "online softmax"):
        text = jax.jit(candidates[name].step).trace(x, kv).lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text


@pytest.mark.gpu
@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.label)
def test_what_is_timed_on_a_gpu_is_right(case):
    running = device.current()
    plan = heuristics.plan_attention(case.shape, running)
    x, kv, arrays = _arrays(case)
    shape = case.shape
    options = AttentionOptions(shape.head_dim**-0.5, shape.is_causal, shape.local_window_size, shape.logits_soft_cap)
    expected = jax.jit(lambda arrays: blockwise.attention(arrays, options))(arrays)
    for name, candidate in prefill._candidates(case, plan, running, quick=False).items():
        error = oracle.relative_error(jax.jit(candidate.step)(x, kv), expected)
        assert error < oracle.TOLERANCE[shape.dtype], name
