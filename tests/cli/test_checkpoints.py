"""What `--model` names, and what a run of a checkpoint leaves for the next one."""

import os
import subprocess
import sys

import pytest
from cli_case import make_checkpoint, run


@pytest.mark.parametrize("name", ["tiny", "llama-2-7b"])
def test_a_directory_that_is_named_goes_before_a_preset(capsys, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / name)
    code, out, _ = run(capsys, "plan", "--model", name, "--device", "H200")
    assert code == 0
    assert "[1, 160] @ [160, 64]" in out
    code, out, err = run(capsys, "generate", "--model", name, "--prompt", "a", "--max-new-tokens", "1")
    assert code == 0, err
    assert "[1, 160] @ [160, 64]" in out
    # Where none is named, the default stays what --help says.
    assert "[1, 4096] @ [4096, 32000]" in run(capsys, "plan", "--device", "A100")[1]
    assert "[1, 160] @ [160, 64]" not in run(capsys, "generate", "--prompt", "a", "--max-new-tokens", "1")[1]


def test_the_second_run_finds_what_the_first_has_compiled(tmp_path):
    options = {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    environment = os.environ | options | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "fdpp_jax", "generate", "--prompt", "def ", "--max-new-tokens", "4"]

    def compiled():
        """The programs that are kept after a run, and when they were written."""
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr
        found = [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith("-atime")]
        return {path.relative_to(tmp_path): path.stat().st_mtime_ns for path in found}

    first = compiled()
    assert first
    assert {path.parts[:2] for path in first} == {("fdpp_jax", "xla")}
    assert compiled() == first
