"""The parser of `fdpp-jax`, and how a command ends."""

import argparse
import os
import sys
from collections.abc import Sequence

from fdpp_jax._version import __version__
from fdpp_jax.cli import bench, calibrate, generate, info, plan, tune
from fdpp_jax.cli.output import report

_EXIT_ERROR = 2
_EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

_EXAMPLES = """\
examples:
  fdpp-jax generate --prompt "def "                     the bundled tiny model, on whatever device there is
  fdpp-jax generate --model ./Llama-2-7b-hf --prompt "The sea"
  fdpp-jax calibrate --model ./Llama-2-7b-hf --data ./texts
  fdpp-jax plan --model llama-2-7b --batch 8 --device A100
  fdpp-jax bench decode --model llama-2-7b --context 1024
  fdpp-jax info
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: Arguments without the program's name; None takes the process's.

    Returns:
      The exit code: 0, 2 for an error that the user can mend, 130 after Ctrl-C.
    """
    _open_standard_streams()
    try:
        args = _parser().parse_args(argv)
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        print(": ".join(["\nfdpp-jax: interrupted", *map(str, stop.args)]), file=sys.stderr)
        return _EXIT_INTERRUPTED
    except BrokenPipeError:  # e.g. `| head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UnicodeEncodeError as error:
        return _fail(
            f"expected an output that takes {error.object[error.start]!r}, got one in {error.encoding}: "
            "PYTHONIOENCODING=utf-8 makes it take all"
        )
    except (ValueError, NotImplementedError, OSError, MemoryError, FloatingPointError) as error:
        return _fail(error)
    except RuntimeError as error:
        from fdpp_jax import device_memory  # JAX is there by now

        if not device_memory.is_exhausted(error):
            raise
        return _fail(f"{device_memory.request(error)}. Lower the sizes that the command names")
    return 0


def _open_standard_streams() -> None:
    """Puts the null device where the caller has closed stdin, stdout or stderr, which Python has as None then."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _fail(error: object) -> int:
    report(f"error: {error}")
    return _EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fdpp-jax",
        description="Decode LLMs of the Hugging Face hub in JAX with FlashDecoding++'s kernels.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fdpp-jax {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (generate, calibrate, tune, plan, bench, info):
        command.add(commands)
    return parser
