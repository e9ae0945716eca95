"""What pyproject.toml promises: an sdist that can test itself, tests that end, and of which CI leaves none out."""

import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

REPOSITORY = pathlib.Path(__file__).parent.parent
ALWAYS_PACKED = {".gitignore", "LICENSE", "README.md", "pyproject.toml"}  # by hatchling, whatever `include` says

_WAITS = """
import threading

def test_waits_for_a_barrier():
    threading.Barrier(2).wait()

def test_after():
    pass
"""


def _not_packed(tracked: list[str], include: list[str]) -> list[str]:
    """Tracked files that an sdist with these includes does not have."""
    packed = {path.removeprefix("/") for path in include} | ALWAYS_PACKED
    return [path for path in tracked if path.split("/")[0] not in packed]


def test_the_sdist_has_every_file_that_git_tracks():
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("needs a git checkout: only there a file may be left out of the sdist")
    command = ["git", "-C", str(REPOSITORY), "ls-files"]
    tracked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert _not_packed(tracked, project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]) == []


def test_the_checker_finds_a_file_that_is_not_packed():
    assert _not_packed(["README.md", "docs/a.md", "benchmarks/b.py"], ["/docs"]) == ["benchmarks/b.py"]


def test_ci_runs_the_readmes_tests_and_then_the_slow_ones():
    readme, ci = ((REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", ".ci/run"))
    (command,) = re.findall(r"^.*&& \.venv/bin/(pytest .*)$", readme, re.MULTILINE)
    runs = re.findall(r"^\.venv-ci/bin/(pytest .*)$", ci, re.MULTILINE)
    assert command == "pytest -n auto -m 'not slow'"
    assert runs[:2] == [command, "pytest -n auto -m slow"]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_test_that_waits_for_ever_ends_and_says_where(tmp_path, pytestconfig, workers):
    assert float(pytestconfig.getini("faulthandler_timeout")) > 0
    path = tmp_path / "test_waits.py"
    path.write_text(_WAITS, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-c", str(REPOSITORY / "pyproject.toml"), "-n", str(workers), str(path)]
    command += ["-p", "no:cacheprovider", "-o", "faulthandler_timeout=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    assert 'test_waits.py", line 5 in test_waits_for_a_barrier' in done.stderr
    if workers:  # another worker takes the crashed one's place
        assert "crashed while running" in done.stdout
        assert "1 failed, 1 passed" in done.stdout
