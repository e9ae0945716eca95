"""The bench of attention on tiny shapes: that it runs, refuses and records."""

import functools

import jax
import jax.numpy as jnp
import oracle
import pytest
from bench_case import check_report
from triton_case import needs_plugin

from fdpp_jax import heuristics
from fdpp_jax.bench import attention
from fdpp_jax.bench.attention import TABLE, attention_case
from fdpp_jax.ops import reference
from fdpp_jax.plans import backends, device
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions

TINY = functools.partial(attention_case, 2, 4, 2, 64, head_dim=16, dtype="float32")


def _inputs(case):
    return attention.inputs(case.shape, case.live_lengths())


def test_attention(tmp_path):
    report = attention.bench_attention(TINY())
    names = ["public op", "online softmax", "jax.nn, xla", "read floor"]
    record = check_report(report, names, tmp_path / "record.json")
    assert record["bytes"] == 2 * 2 * 64 * 2 * 16 * 4
    assert record["attention"]["lengths"] == [64, 64]
    assert record["attention"]["plan"]["backend"] in report.title
    assert record["attention"]["plan"]["implementation"] == record["attention"]["plan"]["backend"]
    assert all(time > 0 for time in record["time_us"].values())


def test_quick_leaves_out_ablations_and_peers():
    names = [row[0] for row in attention.bench_attention(TINY(), quick=True).rows]
    assert "public op" in names
    assert not {"online softmax", "jax.nn, xla"} & set(names)


def test_attention_table(tmp_path):
    cases = (TINY(query_length=2, lengths=9), TINY(page_size=16, kv_dtype="int8", scales="token"))
    report = attention.bench_attention_table(cases)
    labels = ["2, 4/2, 64, T 2, length 9", "2, 4/2, 64, pages of 16, int8 a token"]
    assert [row[0] for row in report.rows] == labels
    records = check_report(report, labels, tmp_path / "record.json")["attention_table"]
    assert [record["bytes"] for record in records] == [2 * 18 * 2 * 64, 2 * 128 * 2 * 20]
    assert ["jax.nn, xla" in record["time_us"] for record in records] == [True, False]
    assert all("failures" not in record for record in records)


def test_a_failure_is_a_cell_of_the_table_and_an_error_alone(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise NotImplementedError("no such kernel\nsecond line")

    monkeypatch.setattr(attention, "_op", fail)
    report = attention.bench_attention_table([TINY()])
    assert report.rows[0][3:6] == ("-", "-", "-")
    (record,) = report.record["attention_table"]
    assert record["failures"]["public op"] == "NotImplementedError: no such kernel"
    assert record["time_us"]["public op"] is None
    assert record["time_us"]["jax.nn, xla"] > 0
    assert "public op does not run: NotImplementedError: no such kernel" in capsys.readouterr().err
    with pytest.raises(NotImplementedError, match="no such kernel"):
        attention.bench_attention(TINY())


@pytest.mark.parametrize(("named", "timed"), [(None, "mosaic_gpu"), ("triton", "triton")])
def test_ours_are_the_kernels_of_the_backend_that_is_named(two_backends, named, timed):
    report = attention.bench_attention(TINY(), implementation=named)
    names = ["unified max", "public op", "online softmax", "jax.nn, xla", "read floor"]
    assert [row[0] for row in report.rows] == names
    assert report.record["attention"]["plan"]["implementation"] == timed
    assert f"{timed}: by {timed}" in report.title
    assert two_backends() == {timed}


def test_a_shape_that_the_named_backend_refuses(two_backends, capsys):
    with pytest.raises(
        NotImplementedError, match="implementation='triton' cannot run this call: triton takes no pages"
    ):
        attention.bench_attention(TINY(page_size=16), implementation="triton")
    report = attention.bench_attention_table([TINY(page_size=16), TINY()], implementation="triton")
    refused, taken = report.rows
    assert refused[2] != "-"
    assert set(refused[3:]) == {"-"}
    assert "-" not in taken[3:7]
    record = report.record["attention_table"][0]
    assert record["plan"]["implementation"] == "xla"
    assert "triton takes no pages" in record["plan"]["reason"]
    assert record["time_us"] == {}
    assert "no kernel of triton: " in capsys.readouterr().err
    assert two_backends() == {"triton"}
    quick = attention.bench_attention_table([TINY(page_size=16)], quick=True, implementation="triton")
    assert quick.rows[0][3:] == ("-", "-", "-")


@needs_plugin
def test_the_candidates_of_triton_lower_on_hopper():
    """A second launch that merges, which is not planned, is a candidate of its own."""
    h200 = backends.only("triton", device.by_name("H200"))
    case = attention_case(8, 8, 4, 4096)
    plan = heuristics.plan_attention(case.shape, h200)
    candidates = attention._candidates(case, plan, h200, quick=False, places=attention._PLACES)
    ours = ["unified max", "public op", "public op, cond", "online softmax", "separate combine"]
    assert list(candidates) == [*ours, "jax.nn, cudnn", "jax.nn, xla"]
    x, kv = jax.eval_shape(functools.partial(_inputs, case))
    with device.target(h200):
        found = {name: str(jax.jit(candidates[name].step).trace(x, kv).jaxpr) for name in ("unified max", ours[-1])}
    assert [text.count("name=merge_shares") for text in found.values()] == [0, 1]
    assert all("triton_kernel_call" in text for text in found.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "multiple of the key/value heads, got .* num_heads=3 num_kv_heads=2"),
        ({"capacity": 0}, "expected positive sizes"),
        ({"batch": 1, "lengths": "mixed"}, "mixed lengths need two sequences and 64 keys, got batch=1"),
        (
            {"query_length": 17},
            "bench attention is for 1 to 16 queries .*, got query_length=17; bench prefill is for more",
        ),
        ({"query_length": 0}, "expected positive sizes"),
        ({"query_length": 9, "capacity": 8}, "capacity must be at least query_length, got capacity=8 query_length=9"),
        ({"lengths": 65}, "lengths must lie in query_length=1..capacity=64, got 65"),
        ({"lengths": 2, "query_length": 3}, "lengths must lie in query_length=3..capacity=64, got 2"),
        ({"page_size": 8}, "pages must hold 16, 32, 64, 128, 256 keys, got page_size=8"),
        ({"page_size": 24}, "capacity must be whole pages, got capacity=64 and page_size=24"),
    ],
)
def test_bad_case(arguments, message):
    with pytest.raises(ValueError, match=message):
        attention_case(**dict(batch=2, num_heads=4, num_kv_heads=2, capacity=64) | arguments)


def test_mixed_lengths_span_the_capacity_and_stay_the_same():
    (case,) = (case for case in TABLE if case.lengths == "mixed")
    lengths = case.live_lengths()
    assert len(lengths) == case.shape.batch
    assert (min(lengths), max(lengths)) == (64, case.shape.capacity)
    assert lengths == case.live_lengths()


def test_a_page_table_is_a_permutation_of_the_pool():
    x, kv = _inputs(TINY(page_size=16))
    pages = x["page_table"].ravel().tolist()
    assert pages != sorted(pages)
    assert sorted(pages) == list(range(8))
    assert kv["key"].shape == (8, 16, 2, 16)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("scales", ["head", "token"])
def test_a_quantised_cache_is_normal_values_again(dtype, scales):
    x, kv = _inputs(TINY(kv_dtype=dtype, scales=scales))
    arrays = x | kv
    scale = arrays["key_scale"]
    assert ("key_scale" in kv) == (scales == "token")
    values = kv["key"].astype(jnp.float32) * (scale[..., None] if scales == "token" else scale[:, None])
    assert abs(values.mean()) < 0.1
    assert 0.8 < values.std() < 1.2


def test_the_candidates_of_a_gpu_lower(monkeypatch):
    """Nothing runs, but every argument fits its kernel."""
    h200 = device.by_name("H200")
    monkeypatch.setattr(device, "current", lambda: h200)
    case = attention_case(2, 8, 4, 256, page_size=16, kv_dtype="int8")
    plan = heuristics.plan_attention(case.shape, h200)
    candidates = attention._candidates(case, plan, h200, quick=False, places=attention._PLACES)
    assert {"unified max", "public op", "online softmax", "separate combine"} < set(candidates)
    assert {f"public op, {place}" for place in ("kernel", "launch", "cond") if place != plan.recompute} < set(
        candidates
    )
    x, kv = jax.eval_shape(functools.partial(_inputs, case))
    for name in ("unified max", "public op"):
        text = jax.jit(candidates[name].step).trace(x, kv).lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.label)
def test_what_is_timed_on_a_gpu_is_right(case, implementation):
    """Of the whole table: the kernels as planned, the ablations, and each recompute, though no row needs one."""
    running = backends.only(implementation, device.current())
    plan = heuristics.plan_attention(case.shape, running)
    candidates = attention._candidates(case, plan, running, quick=False, places=attention._PLACES)
    x, kv = _inputs(case)
    arrays = x | kv
    options = AttentionOptions(case.shape.head_dim**-0.5)
    expected = jax.jit(lambda arrays: reference.attention(arrays, options))(AttentionArrays(**arrays))
    assert plan.backend == implementation
    others = {f"public op, {place}" for place in backends.by_name(implementation).attention.recomputes}
    assert {"unified max", "public op", *others} - {f"public op, {plan.recompute}"} < set(candidates)
    for name, candidate in candidates.items():
        if not candidate.is_peer:
            with device.target(running):
                out = jax.jit(candidate.step)(x, kv)
            error = oracle.relative_error(out, expected)
            assert error < oracle.TOLERANCE[case.shape.dtype], name
