"""What pyproject.toml promises: an sdist that can test itself."""

import pathlib
import shutil
import subprocess
import tomllib

import pytest

REPOSITORY = pathlib.Path(__file__).parent.parent
ALWAYS_PACKED = {".gitignore", "LICENSE", "README.md", "pyproject.toml"}  # by hatchling, whatever `include` says


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
