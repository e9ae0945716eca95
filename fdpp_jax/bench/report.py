"""What a bench shows and saves: a table, and a record of its numbers with device, versions, date and commit."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from fdpp_jax import device_memory, progress
from fdpp_jax.bench.clock import Candidate, Timings
from fdpp_jax.bench.provenance import provenance
from fdpp_jax.plans.device import Device


@dataclasses.dataclass(frozen=True)
class BenchReport:
    """A table to print, and a record of the run to save.

    Attributes:
      title: What was measured, and where.
      columns: Headings.
      rows: Cells, as text.
      record: The same numbers with device, versions, date and commit, ready for JSON.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    record: dict[str, Any]

    def save(self, path: str | pathlib.Path) -> None:
        """Writes the record as JSON."""
        pathlib.Path(path).write_text(json.dumps(self.record, indent=2) + "\n", encoding="utf-8")


def begin(running: Device, what: str, num_bytes: int) -> None:
    """Once the arguments are checked: says that numbers without a GPU are of no kernel.

    Raises:
      MemoryError: There is no memory for the arrays, of so many bytes; `what` names them.
    """
    device_memory.check_fits(what, num_bytes)
    if not running.is_gpu:
        progress.say("bench", f"warning: no GPU: these are numbers of {running.kind}, of no kernel")


def kernel_report(
    title: str,
    candidates: Mapping[str, Candidate],
    timings: Timings,
    num_bytes: int,
    what: dict[str, Any],
    baseline: str | None = None,
) -> BenchReport:
    """A line per candidate, and one for the read floor. A peer may have failed, a kernel of ours may not.

    Args:
      title: Of the table.
      candidates: The kernels that were timed, by name.
      timings: Their times.
      num_bytes: Bytes that one step reads.
      what: Further entries of the record.
      baseline: The candidate whose saving over each other one is a further column.

    Raises:
      Exception: The error of a kernel of ours.
    """
    for name, error in timings.failures.items():
        if not candidates[name].is_peer:
            raise error
        progress.say("bench", f"{name} does not run: {first_line(error)}")
    best_peer = timings.best([name for name, candidate in candidates.items() if candidate.is_peer])

    def cells(name: str, seconds: float | None) -> tuple[str, ...]:
        if seconds is None:
            line: tuple[str, ...] = (name, "does not run", "", "", "")
        else:
            speed = num_bytes / seconds / 1e12
            line = name, us(seconds), f"{speed:.2f}", ratio(seconds, timings.floor), ratio(seconds, best_peer)
        if baseline is None:
            return line
        has_saving = name in timings.seconds and name != baseline
        return *line, saving(timings.seconds.get(baseline), seconds) if has_saving else ""

    title += "; so small that L2 holds it" if timings.in_l2 else ""
    rows = [cells(name, timings.seconds.get(name)) for name in candidates]
    rows.append(cells("read floor", timings.floor))
    columns = ("kernel", "us", "TB/s", "x floor", "x best peer") + (() if baseline is None else (f"{baseline} saves",))
    record = provenance() | what | timings_record(candidates, timings, num_bytes)
    return BenchReport(title, columns, tuple(rows), record)


def timings_record(names: Sequence[str] | Mapping[str, Any], timings: Timings, num_bytes: int) -> dict[str, Any]:
    """The numbers of one shape, ready for JSON; None for a kernel that does not run."""
    times_us = {name: timings.seconds[name] * 1e6 if name in timings.seconds else None for name in names}
    record = {"bytes": num_bytes, "read_floor_us": timings.floor * 1e6, "floor_spread": timings.floor_spread}
    failures = {name: first_line(error) for name, error in timings.failures.items()}
    return record | {"time_us": times_us} | ({"failures": failures} if failures else {})


def us(seconds: float) -> str:
    """ "12.3"."""
    return f"{seconds * 1e6:.1f}"


def ratio(seconds: float, other: float) -> str:
    """ "1.05", or "-" where either time is nan."""
    return "-" if math.isnan(seconds / other) else f"{seconds / other:.2f}"


def saving(ours: float | None, other: float | None) -> str:
    """The share of the other's time that ours saves: "12 %"; negative where ours is slower."""
    return "-" if ours is None or other is None else f"{100 * (1 - ours / other):.0f} %"


def first_line(error: Exception) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
