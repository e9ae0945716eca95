"""Types of arguments and flags that several commands share."""

import argparse
import os
import pathlib
from collections.abc import Callable

# Where a command adds its parser.
type Commands = argparse._SubParsersAction[argparse.ArgumentParser]

BUNDLED = "tiny"
IMPLEMENTATIONS = ("mosaic_gpu", "triton")  # the backends with kernels
DTYPES = ("bfloat16", "float16", "float32")
_MAX_SIZE = 2**31 - 1  # of an axis, whose positions JAX counts in 32 bits


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], None], summary: str, examples: str
) -> argparse.ArgumentParser:
    """Adds a command whose parser has no flags yet, and returns the parser."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """--model and --dtype of a command that needs weights."""
    parser.add_argument(
        "--model",
        type=model,
        metavar="DIR-OR-HUB-ID",
        help='checkpoint in Hugging Face format; a directory goes before a hub id, and before "tiny", the bundled one '
        "(default: the bundled one)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")


def add_model_shapes(parser: argparse._ActionsContainer, default: str | None) -> None:
    """--model of a command that needs no weights; default None: without it the command is about no model."""
    default_text = "none" if default is None else f"the preset {default}"
    parser.add_argument(
        "--model",
        type=model,
        metavar="PRESET-OR-DIR",
        help='preset such as llama-2-7b, "tiny", or a directory with a config.json, which goes before a preset of its '
        f"name (default: {default_text})",
    )


def add_batch(parser: argparse.ArgumentParser) -> None:
    """--batch of a decode step."""
    parser.add_argument("--batch", type=size, default=1, help="sequences decoded together (default: 1)")


def add_dtype(parser: argparse.ArgumentParser, choices: tuple[str, ...] = DTYPES) -> None:
    """--dtype, whose default depends on no device."""
    parser.add_argument("--dtype", choices=choices, default="bfloat16", help="default: bfloat16")


def add_implementation(parser: argparse.ArgumentParser, what: str) -> None:
    """--implementation of a command that measures kernels; `what` tells which."""
    parser.add_argument(
        "--implementation",
        choices=IMPLEMENTATIONS,
        help=f"{what} of this backend, also where it is not the first choice, as Triton is not on Hopper (default: as "
        "planned)",
    )


def size(text: str) -> int:
    """A number of things; one that no axis of an array can have is refused here, before JAX fails on it."""
    number = int(text)
    if abs(number) > _MAX_SIZE:
        raise argparse.ArgumentTypeError(f"expected at most {_MAX_SIZE}, got {number}")
    return number


def model(text: str) -> str | pathlib.Path:
    """The argument of --model: a directory that exists goes before "tiny", a preset or a hub id of the same name.

    Defaults do not pass through here, so that "tiny" stays the bundled one where nobody asks for a directory.
    """
    path = pathlib.Path(given(text)).expanduser()
    return path if path.is_dir() else text


def given(text: str) -> str:
    """A name; an empty one, as of a shell's variable that is not set, would be the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("expected a name, got an empty one")
    return text


def utf8(content: bytes, name: str) -> str:
    """The text of a prompt or a message.

    Raises:
      ValueError: It is not UTF-8.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected UTF-8 in {name}, got byte 0x{content[error.start]:02x} at position {error.start}"
        ) from None


def output_file(text: str) -> str:
    """A file that can be written; the user learns that before the work, not after it."""
    if reason := unwritable_because(pathlib.Path(text)):
        raise argparse.ArgumentTypeError(reason)
    return text


def unwritable_because(path: pathlib.Path) -> str | None:
    """Why a file cannot be written, or None if it can."""
    if path.is_dir():
        return f"expected a file, got the directory {path}"
    directory = path.absolute().parent
    if not directory.is_dir():
        return f"no directory {path.parent} to write {path.name} to"
    if not os.access(path if path.exists() else directory, os.W_OK):
        return f"no permission to write {path}"
    return None
