"""Types of command-line arguments that several commands share."""

import argparse
import pathlib


def model(text: str) -> str | pathlib.Path:
    """What --model names: a directory that is there goes before "tiny", a preset or a hub id of the same name.

    Defaults do not come here, so that "tiny" stays the bundled one where nobody asks for a directory.
    """
    path = pathlib.Path(text).expanduser()
    return path if path.is_dir() else text


def output_file(text: str) -> str:
    """A file that can be written, which is better known before the work than after it."""
    path = pathlib.Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, got the directory {path}")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"no directory {path.parent} to write {path.name} to")
    return text
