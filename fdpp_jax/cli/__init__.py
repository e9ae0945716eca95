"""The command line: a file per command, and what several commands share.

| file | what |
|---|---|
| `main` | the parser, and how a command ends |
| `generate`, `calibrate`, `tune`, `plan`, `bench`, `info` | a command each: `add` adds its parser, `run` runs it |
| `arguments` | types and flags |
| `checkpoints` | what `--model` names |
| `output` | tables |

Heavy imports stand inside the functions that need them, so that `--help` answers at once.
"""

from fdpp_jax.cli.main import main

__all__ = ["main"]
