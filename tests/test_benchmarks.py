"""The scripts of benchmarks/: peers in torch, which know no JAX, and the plot."""

import functools
import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from fdpp_jax.bench.attention import TABLE
from fdpp_jax.models import PRESETS

pytestmark = pytest.mark.slow

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
PEERS_SCRIPT = BENCHMARKS / "attention_peers.py"
E2E_SCRIPT = BENCHMARKS / "e2e_peers.py"


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
