"""The examples run as they stand, in their small versions."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from fdpp_jax import models

REPOSITORY = pathlib.Path(__file__).parent.parent
EXAMPLES = REPOSITORY / "examples"


def _run_notebook(name):
    """The variables of a notebook that ran from top to bottom."""
    cells = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    return names


@pytest.mark.slow
def test_quickstart_runs_from_top_to_bottom(capsys):
    names = _run_notebook("quickstart.ipynb")
    assert "47 of 47 steps recomputed" in capsys.readouterr().out
    assert len(names["results"]) == 4


@pytest.mark.slow
def test_calibration_notebook_runs_from_top_to_bottom(capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = _run_notebook("calibration.ipynb")
    out = capsys.readouterr().out
    assert "a phi each model: unified max" in out
    assert "in float16: refused" in out
    assert "phi off by  20: same text,  0 of 47" in out
    assert "phi off by 120: same text, 47 of 47" in out
    assert names["found"].num_tokens == 12 * 512
    names["plt"].close(names["figure"])


def test_the_readme_s_kernel_calls_run():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    code = text.split("## Use the kernels")[1].split("```python\n")[1].split("```")[0]
    names = {}
    exec(code, names)
    for name in ("sinks", "page_table", "query_offset", "local_window_size", "value_scale"):
        assert name in code
    assert names["out"].shape == names["query"].shape
    assert np.isfinite(names["out"].astype(np.float32)).all()


@pytest.mark.slow
def test_train_tiny_writes_a_checkpoint_that_loads(tmp_path):
    pytest.importorskip("optax")
    command = [sys.executable, str(EXAMPLES / "train_tiny.py"), "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "--- 'def '" in done.stdout
    assert "**Held-out loss:" in (tmp_path / "README.md").read_text()
    config = models.load(tmp_path).config
    assert models.load_tokenizer(tmp_path, vocab_size=config.vocab_size).vocab_size == config.vocab_size
