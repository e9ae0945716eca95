"""Benches on tiny shapes: that they run, refuse and record; never how fast anything is."""

import functools
import importlib.util
import itertools
import json
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import oracle
import pytest
from matplotlib.figure import Figure

from fdpp_jax import bench_attention, benchmark, device, heuristics, reference, timing
from fdpp_jax.bench_attention import TABLE, attention_case
from fdpp_jax.config import MatmulShape
from fdpp_jax.models import PRESETS, LlamaConfig
from fdpp_jax.timing import BenchReport, Candidate

pytestmark = pytest.mark.slow  # many small programs to compile

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
PEERS_SCRIPT = BENCHMARKS / "attention_peers.py"
E2E_SCRIPT = BENCHMARKS / "e2e_peers.py"
TINY = functools.partial(attention_case, 2, 4, 2, 64, head_dim=16, dtype="float32")
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
    monkeypatch.setattr(timing, "_MAX_STEPS", 2)
    monkeypatch.setattr(timing, "REPEATS", 1)
    monkeypatch.setattr(timing, "_SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(timing, "_WARM_UP_SECONDS", 0.0)


def _check(report: BenchReport, names: list[str], path) -> dict:
    assert all(len(row) == len(report.columns) for row in report.rows)
    assert [name for name in names if not any(row[0].startswith(name) for row in report.rows)] == []
    report.save(path)
    record = json.loads(path.read_text())
    assert record["device"]["kind"] == device.current().kind
    assert {"jax", "jaxlib", "flax", "fdpp_jax"} <= set(record["versions"])
    assert {"date", "commit"} <= set(record)
    return record


def test_attention(tmp_path):
    report = bench_attention.bench_attention(TINY())
    names = ["public op", "online softmax", "jax.nn, xla", "read floor"]
    record = _check(report, names, tmp_path / "record.json")
    assert record["bytes"] == 2 * 2 * 64 * 2 * 16 * 4
    assert record["attention"]["lengths"] == [64, 64]
    assert record["attention"]["plan"]["implementation"] in report.title
    assert all(time > 0 for time in record["time_us"].values())


def test_quick_leaves_out_ablations_and_peers():
    names = [row[0] for row in bench_attention.bench_attention(TINY(), quick=True).rows]
    assert "public op" in names
    assert not {"online softmax", "jax.nn, xla"} & set(names)


def test_attention_table(tmp_path):
    cases = (TINY(query_length=2, lengths=9), TINY(page_size=16, kv_dtype="int8", scales="token"))
    report = bench_attention.bench_attention_table(cases)
    labels = ["2, 4/2, 64, T 2, length 9", "2, 4/2, 64, pages of 16, int8 a token"]
    assert [row[0] for row in report.rows] == labels
    records = _check(report, labels, tmp_path / "record.json")["attention_table"]
    assert [record["bytes"] for record in records] == [2 * 18 * 2 * 64, 2 * 128 * 2 * 20]
    assert ["jax.nn, xla" in record["time_us"] for record in records] == [True, False]
    assert all("failures" not in record for record in records)


def test_a_failure_is_a_cell_of_the_table_and_an_error_alone(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise NotImplementedError("no such kernel\nsecond line")

    monkeypatch.setattr(bench_attention, "_op", fail)
    report = bench_attention.bench_attention_table([TINY()])
    assert report.rows[0][3:6] == ("-", "-", "-")
    (record,) = report.record["attention_table"]
    assert record["failures"]["public op"] == "NotImplementedError: no such kernel"
    assert record["time_us"]["public op"] is None
    assert record["time_us"]["jax.nn, xla"] > 0
    assert "public op does not run: NotImplementedError: no such kernel" in capsys.readouterr().err
    with pytest.raises(NotImplementedError, match="no such kernel"):
        bench_attention.bench_attention(TINY())


def test_what_is_not_finite_is_not_timed():
    sets = timing.copies(jnp.zeros(8), 2)
    candidates = {"bad": Candidate(lambda x, w: x / w), "good": Candidate(lambda x, w: x + w)}
    timings = timing.time_kernels(candidates, jnp.ones(8), sets, 32)
    assert list(timings.seconds) == ["good"]
    assert "not finite" in str(timings.failures["bad"])


def test_copies_are_buffers_of_their_own():
    sets = timing.copies({"key": jnp.arange(8.0)}, 3)
    assert len({buffers["key"].unsafe_buffer_pointer() for buffers in sets}) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "multiple of the key/value heads, got .* num_heads=3 num_kv_heads=2"),
        ({"capacity": 0}, "expected positive sizes"),
        ({"batch": 1, "lengths": "mixed"}, "mixed lengths need two sequences and 64 keys, got batch=1"),
        ({"lengths": 65}, "lengths must lie in query_length=1..capacity=64, got 65"),
        ({"lengths": 2, "query_length": 3}, "lengths must lie in query_length=3..capacity=64, got 2"),
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
    x, kv = bench_attention._inputs(TINY(page_size=16))
    pages = x["page_table"].ravel().tolist()
    assert pages != sorted(pages)
    assert sorted(pages) == list(range(8))
    assert kv["key"].shape == (8, 16, 2, 16)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("scales", ["head", "token"])
def test_a_quantised_cache_is_normal_values_again(dtype, scales):
    x, kv = bench_attention._inputs(TINY(kv_dtype=dtype, scales=scales))
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
    candidates = bench_attention._candidates(case, plan, h200, quick=False, places=bench_attention._PLACES)
    assert {"unified max", "public op", "online softmax", "separate combine"} < set(candidates)
    assert {f"public op, {place}" for place in ("kernel", "launch", "cond") if place != plan.recompute} < set(
        candidates
    )
    x, kv = jax.eval_shape(functools.partial(bench_attention._inputs, case))
    for name in ("unified max", "public op"):
        text = jax.jit(candidates[name].step).trace(x, kv).lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text


@pytest.mark.gpu
@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.label)
def test_what_is_timed_on_a_gpu_is_right(case):
    """Of the whole table: the kernels as planned, the ablations, and each recompute, though no row needs one."""
    running = device.current()
    plan = heuristics.plan_attention(case.shape, running)
    candidates = bench_attention._candidates(case, plan, running, quick=False, places=bench_attention._PLACES)
    x, kv = bench_attention._inputs(case)
    arrays = x | kv
    expected = jax.jit(functools.partial(reference.dot_product_attention, scale=case.shape.head_dim**-0.5))(**arrays)
    assert {"unified max", "public op", "public op, launch", "public op, cond"} < set(candidates)
    for name, candidate in candidates.items():
        if not candidate.is_peer:
            out = jax.jit(candidate.step)(x, kv)
            error = oracle.relative_error(out, expected)
            assert error < oracle.TOLERANCE[case.shape.dtype], name


@pytest.mark.parametrize("w_order", ["kn", "nk"])
def test_matmul(tmp_path, w_order):
    report = benchmark.bench_matmul(MatmulShape(8, 64, 128, w_order=w_order))
    assert f"stored {[64, 128] if w_order == 'kn' else [128, 64]}" in report.title
    record = _check(report, ["jnp.dot", "read floor"], tmp_path / "record.json")
    assert record["bytes"] == 64 * 128 * 2
    assert record["matmul"]["w_order"] == w_order


def test_the_matmuls_of_a_gpu_lower():
    """The flat kernel as planned, and without each thing that the paper adds to it."""
    h100 = device.by_name("H100")  # of which no table is shipped
    shape = MatmulShape(8, 4096, 4096, w_order="nk")
    candidates = benchmark.matmul_candidates(shape, h100)
    ablations = ["flat, rows padded to 64", "flat, two stages", "flat, K unsplit"]
    assert list(candidates) == ["ours, flat (planned)", *ablations, "jnp.dot"]
    x, w = jax.ShapeDtypeStruct((8, 4096), jnp.bfloat16), jax.ShapeDtypeStruct(shape.w_shape, jnp.bfloat16)
    for name in ablations:
        lowered = jax.jit(candidates[name].step).trace(x, w).lower(lowering_platforms=("cuda",))
        assert lowered.as_text().count("custom_call @mosaic_gpu") == 1
        assert lowered.out_info.shape == (8, 4096)


@pytest.mark.parametrize(("tied", "window", "seen"), [(False, None, 14), (True, 8, 8)])
def test_decode(tmp_path, tied, window, seen):
    config = LlamaConfig(**{**vars(CONFIG), "tie_word_embeddings": tied, "sliding_window": window})
    report = benchmark.bench_decode(config, batch=2, context=16, steps=4)
    names = ["ours, unified max", "ours, online softmax", "plain XLA", "read floor"]
    record = _check(report, names, tmp_path / "record.json")
    layer = 32 * (64 + 32 + 96) + 48 * 32 + 2 * 32
    embedding_or_head = 64 * 32  # the one that a step reads whole
    itemsize = 2 if device.current().is_gpu else 4
    assert record["bytes"]["weights"] == (layer + embedding_or_head + 32) * itemsize
    assert record["bytes"]["keys_and_values"] == 2 * 2 * seen * 16 * itemsize  # 14 live tokens on average
    assert record["recomputed_steps"]["ours, online softmax"] == 0


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
    assert benchmark._kv_bytes(config, live_tokens, jnp.dtype("bfloat16")) == 2 * 2 * config.kv_size * seen


@pytest.mark.parametrize("arguments", [{"batch": 0}, {"steps": 0}, {"context": 4}])
def test_bad_input(arguments):
    with pytest.raises(ValueError, match="expected a batch and steps of at least 1 and context above steps"):
        benchmark.bench_decode(CONFIG, **({"batch": 1, "context": 16, "steps": 4} | arguments))
    with pytest.raises(ValueError, match="expected a context of at most the model's 2048, got 2049"):
        benchmark.bench_decode(PRESETS["opt-6.7b"], context=2049)


@pytest.mark.parametrize("set_bytes", [1 << 10, 1 << 20])
def test_small_sets_do_not_make_endless_programs(monkeypatch, set_bytes):
    monkeypatch.setattr(timing, "_MAX_STEPS", 128)
    assert timing.num_sets(set_bytes, device.by_name("H200")) == 128


@pytest.mark.parametrize("set_bytes", [4 << 20, 17 << 20, 1 << 30, 16 << 30])
def test_a_timed_program_reads_past_the_last_cache(monkeypatch, set_bytes):
    monkeypatch.setattr(timing, "_MAX_STEPS", 128)
    h200 = device.by_name("H200")
    sets = timing.num_sets(set_bytes, h200)
    assert sets >= 2
    assert sets * set_bytes >= 4 * h200.l2_bytes


def test_what_records_the_command_buffer_does_not_shorten_the_samples(monkeypatch):
    monkeypatch.setattr(timing, "_SAMPLE_SECONDS", 0.02)
    executions = itertools.count(1)

    def compiled(x, sets):
        time.sleep(0.1 if next(executions) == 2 else 0.001)
        return (jnp.zeros(()),)

    program = timing._Program(compiled, None, (), 1)
    started = time.perf_counter()
    program.sample()
    assert time.perf_counter() - started >= 0.01


def test_a_program_is_long_and_in_whole_rounds(monkeypatch):
    monkeypatch.setattr(timing, "_MAX_STEPS", 128)
    h200 = device.by_name("H200")
    for set_bytes, num_sets, num_steps in (
        (17 << 20, 12, 120),
        (64 << 20, 4, 128),
        (512 << 20, 2, 16),
        (4 << 30, 2, 8),
    ):
        assert timing.num_sets(set_bytes, h200) == num_sets
        assert timing._num_steps(set_bytes, num_sets, h200) == num_steps


@pytest.mark.parametrize("chain", [None, lambda x, out: out])
def test_steps_run_one_after_the_other(chain):
    sets = [jnp.array([1.0]), jnp.array([10.0])]
    lowered = timing._lower(lambda x, w: x + w, jnp.array([0.5]), sets, 4, chain)
    outs = [out.item() for out in lowered.compile()(jnp.array([0.5]), sets)]
    assert outs == ([1.5 + 10.5 + 1.5 + 10.5, 10.5] if chain is None else [22.5])


# The script of the peers in torch, which knows no JAX.


def _script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_peers_time_the_same_table():
    cases = _script(PEERS_SCRIPT).TABLE
    assert [case.label for case in cases] == [case.label for case in TABLE]
    assert [case.live_lengths() for case in cases] == [case.live_lengths() for case in TABLE]
    # Scales per token are ours alone: the peers have one scale, or none.
    ours = [case.live_bytes for case in TABLE if case.shape.scales != "token"]
    assert [case.live_bytes for case in cases if case.scales != "token"] == ours


def test_the_peers_decode_the_same_models(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    models = _script(E2E_SCRIPT).MODELS
    for name in ("llama-2-7b", "llama-2-13b", "llama-3-8b"):
        theirs, ours = models[name], PRESETS[name]
        sizes = theirs.hidden_size, theirs.intermediate_size, theirs.num_layers, theirs.num_heads, theirs.num_kv_heads
        assert sizes == (
            ours.hidden_size,
            ours.intermediate_size,
            ours.num_hidden_layers,
            ours.num_attention_heads,
            ours.num_key_value_heads,
        )
        assert (theirs.vocab_size, theirs.head_dim, theirs.qkv_size) == (ours.vocab_size, ours.head_dim, ours.qkv_size)
        record = json.loads((BENCHMARKS / "results" / f"h200-decode-{name}-batch1-context1024.json").read_text())
        expected = record["bytes"]["weights"] + record["bytes"]["keys_and_values"]
        assert theirs.bytes_read(1024 - 32) == pytest.approx(expected, rel=1e-4)  # but for the norms


@pytest.mark.parametrize("script", [PEERS_SCRIPT, E2E_SCRIPT], ids=lambda script: script.stem)
def test_the_peers_say_what_is_missing(script):
    run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=60, check=False)
    done = run([sys.executable, script, "--help"])
    assert done.returncode == 0
    assert "examples:" in done.stdout
    if importlib.util.find_spec("torch") is None:
        done = run([sys.executable, script])
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"{script.stem}: error: torch is not installed\n"


def test_the_plot_shows_the_recorded_speeds():
    axes = Figure().subplots()
    _script(BENCHMARKS / "plot_attention.py").draw(axes, BENCHMARKS / "results")
    record = json.loads((BENCHMARKS / "results" / "h200-attention.json").read_text())
    first = record["attention_table"][0]
    assert axes.get_yticklabels()[0].get_text() == first["label"]
    ours, *others = axes.containers
    assert len(others) == 3
    assert all(len(bars) == len(ours) > 8 for bars in others)
    assert ours[0].get_width() == pytest.approx(first["bytes"] / first["time_us"]["unified max"] / 1e6)
    floor = axes.lines[0].get_xdata()[0]
    assert floor == pytest.approx(first["bytes"] / first["read_floor_us"] / 1e6)
