"""Starts the tests of interpreted kernels, a process for each file: Triton decides once how kernels are run."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from fdpp_jax.plans import installed

FOLDER = pathlib.Path(__file__).parent / "interpreted"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))


@pytest.mark.skipif(
    installed.version("triton") < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="Triton 3.6's interpreter needs numpy before 2.4",
)
@pytest.mark.parametrize("name", FILES)
def test_interpreted(name):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", str(FOLDER / name)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = FOLDER.parent.parent.parent
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
