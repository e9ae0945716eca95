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
    argv = ["--prompt", "a", "--max-new-tokens", "1", "--verbose"]
    code, _, err = run(capsys, "generate", "--model", name, *argv)
    assert code == 0, err
    assert "[1, 160] @ [160, 64]" in err
    # Where none is named, the default stays what --help says.
    assert "[1, 4096] @ [4096, 32000]" in run(capsys, "plan", "--device", "A100")[1]
    assert "[1, 160] @ [160, 64]" not in run(capsys, "generate", *argv)[2]


@pytest.mark.slow
def test_the_second_run_finds_what_the_first_has_compiled(tmp_path):
    options = {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
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


def _run_with(tmp_path, **environment):
    """A command in a process of its own, with compiled programs kept."""
    command = [sys.executable, "-m", "fdpp_jax", "generate", "--prompt", "def ", "--max-new-tokens", "2"]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "true"} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_a_place_for_compiled_programs_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.touch()
    expected = f"expected a directory for compiled programs that can be written, got {file}/"
    ours = _run_with(tmp_path, XDG_CACHE_HOME=str(file))
    assert ours.returncode == 0, ours.stderr
    assert len(ours.stdout) > 1
    assert f"fdpp-jax: warning: {expected}fdpp_jax/xla: Not a directory; nothing is kept\n" in ours.stderr
    assert "UserWarning" not in ours.stderr
    theirs = _run_with(tmp_path, JAX_COMPILATION_CACHE_DIR=str(file / "x"))
    assert (theirs.returncode, theirs.stdout) == (2, "")
    assert theirs.stderr == f"fdpp-jax: error: {expected}x: Not a directory; JAX_COMPILATION_CACHE_DIR names it\n"
