"""Starts the tests of interpreted kernels in processes of their own: Triton decides once how kernels are run."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from fdpp_jax.plans import installed

FOLDER = pathlib.Path(__file__).parent / "interpreted"
ATTENTION = ["test_decode_attention.py", "test_prefill_attention.py"]
LAYER = ["test_fused_layer.py"]
OTHERS = ["test_matmul.py", "test_toy.py"]


@pytest.mark.skipif(
    installed.version("triton") < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="Triton 3.6's interpreter needs numpy before 2.4",
)
@pytest.mark.parametrize(
    ("names", "marks"),
    [
        pytest.param(OTHERS, "", id="others"),
        pytest.param(LAYER, "", id="layer"),
        pytest.param(ATTENTION, "not slow", id="attention"),
        pytest.param(ATTENTION, "slow", id="attention, slow", marks=pytest.mark.slow),
    ],
)
def test_interpreted(names, marks):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "-m", marks]
    command += [str(FOLDER / name) for name in names]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = FOLDER.parent.parent.parent
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_every_file_of_the_folder_is_started():
    assert sorted(path.name for path in FOLDER.glob("test_*.py")) == sorted(ATTENTION + LAYER + OTHERS)
