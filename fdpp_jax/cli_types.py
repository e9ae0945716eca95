"""Types of command-line arguments that several commands share."""

import argparse
import os
import pathlib


def model(text: str) -> str | pathlib.Path:
    """What --model names: a directory that is there goes before "tiny", a preset or a hub id of the same name.

    Defaults do not come here, so that "tiny" stays the bundled one where nobody asks for a directory.
    """
    path = pathlib.Path(text).expanduser()
    return path if path.is_dir() else text


def output_file(text: str) -> str:
    """A file that can be written, which is better known before the work than after it."""
    if reason := unwritable_because(pathlib.Path(text)):
        raise argparse.ArgumentTypeError(reason)
    return text


def unwritable_because(path: pathlib.Path) -> str | None:
    """Why a file cannot be written, if it cannot."""
    if path.is_dir():
        return f"expected a file, got the directory {path}"
    directory = path.absolute().parent
    if not directory.is_dir():
        return f"no directory {path.parent} to write {path.name} to"
    if not os.access(path if path.exists() else directory, os.W_OK):
        return f"no permission to write {path}"
    return None
