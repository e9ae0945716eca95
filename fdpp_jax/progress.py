"""How far a command is: one bar for all that take a while, and lines between. All on stderr."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Protocol


class Update(Protocol):
    """Moves a bar."""

    def __call__(self, *, done: int | None = None, title: str | None = None) -> None:
        """Sets how many steps are done, or what is being done; None: as before."""


@contextlib.contextmanager
def bar(title: str, total: int, done: int = 0, *, is_shown: bool | None = None) -> Iterator[Update]:
    """A bar while the context lasts.

    Args:
      title: What is being done.
      total: Steps.
      done: Steps done before.
      is_shown: Whether there is a bar at all. None: where stderr is a terminal.

    Yields:
      What moves the bar.
    """
    if not (sys.stderr.isatty() if is_shown is None else is_shown):
        yield lambda **_: None
        return
    import rich.console
    import rich.progress

    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.MofNCompleteColumn())
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total, completed=done)
        yield lambda *, done=None, title=None: progress.update(task, completed=done, description=title)


def say(who: str, text: str) -> None:
    """One line: "bench: compile ours"."""
    sys.stderr.write(f"{who}: {text}\n")
    sys.stderr.flush()
