"""The scripts of benchmarks/: peers in torch, which know no JAX and may fail, and the plot."""

import contextlib
import functools
import importlib
import importlib.util
import json
import pathlib
import subprocess
import sys

import peer_case
import pytest
from matplotlib.figure import Figure

import fdpp_jax
from fdpp_jax.bench import prefill
from fdpp_jax.bench.attention import TABLE
from fdpp_jax.models import PRESETS

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
PEERS_SCRIPT = BENCHMARKS / "attention_peers.py"
PREFILL_SCRIPT = BENCHMARKS / "prefill_peers.py"
E2E_SCRIPT = BENCHMARKS / "e2e_peers.py"


TIMEOUT_S = 60.0  # of a peer that starts on a machine that is busy
HANGS_FOR_S = 2.0


@pytest.fixture(autouse=True)
def _scripts_find_each_other(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def _script(path):
    return importlib.import_module(path.stem)


def _processes(made, timeout_s=TIMEOUT_S):
    """The processes of some of `peer_case`'s peers, which end with the stack."""
    stack = contextlib.ExitStack()
    peer_process = importlib.import_module("peer_process")
    return stack, {peer.__name__: stack.enter_context(peer_process.PeerProcess(peer, timeout_s)) for peer in made}


def test_a_peer_that_fails_is_a_cell_of_the_attention_table():
    attention_peers = _script(PEERS_SCRIPT)
    good = (peer_case.Floor, peer_case.Good, peer_case.CrashesAtFirst)
    failing = (peer_case.Crashes, peer_case.CrashesLate, peer_case.AnswersWrongly, peer_case.AnswersNaN)
    failing += (peer_case.Refuses, peer_case.Raises, peer_case.IsNotInstalled)
    stack, peers = _processes((*good, *failing))
    with stack:
        floor = peers.pop("Floor")
        one, eight = (attention_peers.Case(batch, 32, 32, 1024) for batch in (1, 8))
        records = [attention_peers.measure(case, floor, peers) for case in (one, eight)]
    failures = {
        "Crashes": "crashed (signal 6)",
        "CrashesLate": "crashed (exit 3)",
        "AnswersWrongly": "wrong: error 0.31",
        "AnswersNaN": "wrong: error nan",
        "Refuses": "one sequence only",
        "Raises": "ValueError: no plan",
        "IsNotInstalled": "not installed: no_such_peer",
    }
    assert records[0]["failures"] == {"CrashesAtFirst": "crashed (signal 6)", **failures}
    assert records[1]["failures"] == failures
    assert [record["time_us"]["Good"] for record in records] == [3.0, 3.0]
    assert [record["time_us"]["CrashesAtFirst"] for record in records] == [None, 3.0]
    assert [record["time_us"]["Crashes"] for record in records] == [None, None]
    assert [record["read_floor_us"] for record in records] == [peer_case.FLOOR_US] * 2


def test_a_peer_that_hangs_is_a_cell():
    attention_peers = _script(PEERS_SCRIPT)
    stack, peers = _processes((peer_case.Floor, peer_case.Good))
    hanging, hangs = _processes((peer_case.Hangs,), HANGS_FOR_S)
    with stack, hanging:
        floor = peers.pop("Floor")
        record = attention_peers.measure(attention_peers.TABLE[0], floor, {**hangs, **peers})
    assert record["failures"] == {"Hangs": "timed out after 2 s"}
    assert record["time_us"] == {"Hangs": None, "Good": 3.0}


def test_a_peer_that_fails_is_a_cell_of_the_decode_record(capsys):
    e2e_peers = _script(E2E_SCRIPT)
    case = e2e_peers.Case(e2e_peers.MODELS["tiny"], batch=1, context=16, steps=8, device="cpu")
    made = (peer_case.Crashes, peer_case.AnswersWrongly, peer_case.IsNotInstalled, peer_case.Good)
    stack, peers = _processes(made)
    with stack:
        record = e2e_peers.measure(case, 1e-3, peers)
    assert record["failures"] == {
        "Crashes": "crashed (signal 6)",
        "AnswersWrongly": "wrong: error 0.31",
        "IsNotInstalled": "not installed: no_such_peer",
    }
    assert record["ms_per_step"] == {"Crashes": None, "AnswersWrongly": None, "IsNotInstalled": None, "Good": 3.0}
    assert record["read_floor_ms"] == 1.0


def test_a_peer_that_fails_is_a_cell_of_the_prefill_table():
    prefill_peers = _script(PREFILL_SCRIPT)
    made = (peer_case.Crashes, peer_case.CrashesLate, peer_case.IsNotInstalled, peer_case.AnswersNaN, peer_case.Good)
    stack, peers = _processes(made)
    with stack:
        record = prefill_peers.measure(prefill_peers.TABLE[0], peers)
    assert record["failures"] == {
        "Crashes": "crashed (signal 6)",
        "CrashesLate": "crashed (exit 3)",
        "IsNotInstalled": "not installed: no_such_peer",
        "AnswersNaN": "wrong: error nan",
    }
    assert record["time_us"] == dict.fromkeys(record["failures"]) | {"Good": 3.0}
    assert prefill_peers._line(record) == "1, 32/32, 1024 | Good 3 us, 2866 Tflop/s"


def test_a_peer_keeps_its_process_until_it_fails():
    stack, peers = _processes((peer_case.Counts,))
    failed = importlib.import_module("peer_process").FailedError
    with stack:
        peer = peers["Counts"]
        assert [peer.call("count"), peer.call("count")] == [1, 2]
        with pytest.raises(failed, match="AttributeError: 'Counts' object has no attribute 'absent'"):
            peer.call("absent")
        assert peer.call("count") == 1


def test_the_peers_time_the_same_table():
    cases = _script(PEERS_SCRIPT).TABLE
    assert [case.label for case in cases] == [case.label for case in TABLE]
    assert [case.live_lengths() for case in cases] == [case.live_lengths() for case in TABLE]
    # Scales per token are ours alone: the peers have one scale, or none.
    ours = [case.live_bytes for case in TABLE if case.shape.scales != "token"]
    assert [case.live_bytes for case in cases if case.scales != "token"] == ours


def test_the_peers_prefill_shapes_of_the_table():
    cases = {case.label: case for case in prefill.TABLE}
    for theirs in _script(PREFILL_SCRIPT).TABLE:
        ours = cases[theirs.label]
        assert (theirs.flops, theirs.num_bytes) == (ours.flops, ours.num_bytes)


def test_a_prefill_kernel_of_jax_is_checked_and_timed(monkeypatch):
    """A stand-in on the CPU: the first kernel does not fit, and the last is asked with a query that has its scale."""
    kernels, peer_process = (_script(BENCHMARKS / f"{name}.py") for name in ("prefill_kernels", "peer_process"))
    case = kernels.Case(1, 2, 1, 24, capacity=32, head_dim=16, window=9, soft_cap=5.0)
    monkeypatch.setattr(kernels, "_REFERENCE_ROWS", 8)
    monkeypatch.setattr(kernels, "_MAX_CALLS", 2)

    def too_wide(*_):
        raise ValueError("exceeds available shared memory")

    def attend(query, key, value, factor):
        return fdpp_jax.dot_product_attention(
            query,
            key,
            value,
            scale=factor,
            is_causal=True,
            query_offset=[8],
            local_window_size=(8, 0),
            logits_soft_cap=5.0,
        )

    makes = lambda _, factor: ([too_wide, functools.partial(attend, factor=factor)], 0.25, "bfloat16")  # noqa: E731
    for factor, is_right in ((1.0, True), (0.5, False)):
        monkeypatch.setitem(kernels._JAX_KERNELS, "stand-in", functools.partial(makes, factor=factor))
        kernel = kernels.JaxKernel("stand-in")
        with contextlib.nullcontext() if is_right else pytest.raises(peer_process.WrongError, match="wrong: error"):
            kernel.prepare(case)
            assert kernel.sample() > 0


def test_a_prefill_kernel_refuses_what_it_lacks():
    kernels, peer_process = (_script(BENCHMARKS / f"{name}.py") for name in ("prefill_kernels", "peer_process"))
    for case, reason in (
        (kernels.Case(1, 2, 2, 128, soft_cap=5.0), "no soft cap"),
        (kernels.Case(1, 2, 2, 128, window=5), "no window"),
        (kernels.Case(1, 2, 2, 128, capacity=256), "the causal mask begins at the first key"),
    ):
        with pytest.raises(peer_process.RefusedError, match=reason):
            kernels._jax_mosaic(case)


def test_the_peers_decode_the_same_models():
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


@pytest.mark.parametrize("script", [PEERS_SCRIPT, E2E_SCRIPT, PREFILL_SCRIPT], ids=lambda script: script.stem)
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
