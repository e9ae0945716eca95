"""The examples and the code in the pages run as they stand, in their small versions."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from fdpp_jax import models
from fdpp_jax.models.cache import KVCache
from fdpp_jax.models.qwen import qwen3_config_from_hf

REPOSITORY = pathlib.Path(__file__).parent.parent
EXAMPLES = REPOSITORY / "examples"


# Numbers that hang on the machine (rounding), or on the release of Python (the text that is calibrated on).
VARYING_NUMBERS = {
    "quickstart.ipynb": re.compile(r"\d\.\d+e-\d+"),
    "calibration.ipynb": re.compile(r" *-?\d+(?:\.\d+|,\d{3})"),
    "in_your_code.ipynb": re.compile(r"\d\.\d+e-\d+"),
}
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
PLACEHOLDERS = ("path-or-hub-id", "DIR")  # in the pages' code, where a reader writes a path


def _stale(name, stored, fresh):
    """What a fresh run of a notebook's cell prints, if it is not what is stored, or None."""
    pattern = VARYING_NUMBERS[name]
    numbers = [[float(number.replace(",", "")) for number in pattern.findall(text)] for text in (stored, fresh)]
    same_words = pattern.split(stored) == pattern.split(fresh)
    return None if same_words and numbers[1] == pytest.approx(numbers[0], rel=0.1, abs=1) else fresh


def _run_notebook(name, capsys):
    """The variables and the text of a notebook that ran from top to bottom and printed what it shows."""
    cells = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))["cells"]
    names, text = {}, ""
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            stored = "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")
            fresh = capsys.readouterr().out
            assert _stale(name, stored, fresh) is None, f"{name} shows another output than this:\n{fresh}"
            text += fresh
    return names, text


@pytest.mark.slow
def test_quickstart_runs_from_top_to_bottom(capsys):
    names, out = _run_notebook("quickstart.ipynb", capsys)
    assert "47 of 47 steps recomputed" in out
    assert len(names["results"]) == 4


@pytest.mark.slow
def test_calibration_notebook_runs_from_top_to_bottom(capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "agg")
    names, out = _run_notebook("calibration.ipynb", capsys)
    assert "a phi each model: unified max" in out
    assert "in float16: refused" in out
    assert "phi off by  20: same text,  0 of 47" in out
    assert "phi off by 120: same text, 47 of 47" in out
    assert names["found"].num_tokens == 12 * 512
    names["plt"].close(names["figure"])


def test_in_your_code_runs_from_top_to_bottom(capsys):
    names, out = _run_notebook("in_your_code.ipynb", capsys)
    assert "mosaic_gpu, decode" in out
    assert "xla, reference" in out
    assert "takes no mask" in out
    assert names["ours"].attention_fn is names["attention_fn"]


@pytest.mark.parametrize(
    ("name", "stored", "fresh", "is_stale"),
    [
        ("quickstart.ipynb", "difference: 3.8e-07", "difference: 1.25e-06", False),
        ("quickstart.ipynb", "M = 8 (flat 28.3 us)", "M = 8 (flat 26.1 us)", True),
        ("calibration.ipynb", "spans 27.9 nats, 1,479 rows", "spans 28.0 nats, 1,483 rows", False),
        ("calibration.ipynb", "scores -10.2 .. 18.1", "scores  -9.8 .. 18.1", False),
        ("calibration.ipynb", "spans 27.9 nats", "spans 37.9 nats", True),
        ("calibration.ipynb", "spans 27.9 nats", "covers 27.9 nats", True),
        ("calibration.ipynb", "2 of 47", "3 of 47", True),
    ],
)
def test_the_checker_finds_a_stale_output(name, stored, fresh, is_stale):
    assert _stale(name, stored, fresh) == (fresh if is_stale else None)


def _python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def _not_quoted(blocks):
    """Blocks that are no quotes of this project's source, word for word."""
    folders = (REPOSITORY / name for name in ("fdpp_jax", "tests"))
    sources = [path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py")]
    return [block for block in blocks if not any(block in source for source in sources)]


PAGES_WITH_CODE = [page for page in PAGES if _not_quoted(_python_blocks(page))]


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, one_layer_checkpoint, tmp_path):
    checkpoint = shutil.copytree(one_layer_checkpoint, tmp_path / "checkpoint")
    names = {}
    for block in _not_quoted(_python_blocks(page)):
        for placeholder in PLACEHOLDERS:
            block = block.replace(f'"{placeholder}"', repr(str(checkpoint)))
        exec(block, names)
    if page.name == "README.md":
        for name in ("sinks", "page_table", "query_offset", "local_window_size", "value_scale"):
            assert name in "".join(_python_blocks(page))
        assert names["out"].shape == names["query"].shape
        assert np.isfinite(names["out"].astype(np.float32)).all()
        assert names["result"].tokens.shape == (2, 64)
    elif page.name == "adding_a_model.md":
        config = json.loads((REPOSITORY / "tests" / "fixtures" / "qwen3" / "config.json").read_text(encoding="utf-8"))
        assert names["qwen3_config_from_hf"](config) == qwen3_config_from_hf(config)
    elif page.name == "heuristics.md":
        cache = KVCache.create(names["model"].config, batch=8, capacity=64, dtype=jnp.bfloat16)
        tokens, cache = names["loop"](jnp.zeros(8, jnp.int32), cache)
        assert (tokens.shape, cache.lengths.tolist()) == ((8,), [64] * 8)


def test_a_page_quotes_code_as_it_stands():
    quote = "def run(capsys, *argv):\n"
    assert _not_quoted([quote, quote.replace("argv", "words")]) == [quote.replace("argv", "words")]


@pytest.mark.slow
def test_train_tiny_writes_a_checkpoint_that_loads(tmp_path):
    pytest.importorskip("optax")
    command = [sys.executable, str(EXAMPLES / "train_tiny.py"), "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "--- 'def '" in done.stdout
    assert "**Held-out loss:" in (tmp_path / "README.md").read_text()
    config = models.load(tmp_path).config
    assert models.load_tokenizer(tmp_path, vocab_size=config.vocab_size).vocab_size == config.vocab_size
