"""Keeps the files of this folder to a process of their own: a kernel is interpreted or compiled, and never both."""

import os
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parent
IS_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_ignore_collect(collection_path):
    """Leaves the files out of an ordinary run, in which `test_interpreted` starts them."""
    return True if not IS_INTERPRETING and collection_path.name.startswith("test_") else None


def pytest_collection_modifyitems(items):
    """Of a file that is named all the same."""
    if not IS_INTERPRETING and any(FOLDER in item.path.parents for item in items):
        raise pytest.UsageError("interpreted kernels need a process of their own with TRITON_INTERPRET=1")
