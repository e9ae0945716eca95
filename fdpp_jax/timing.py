"""The clock of every bench: kernels take turns with their peers and the read floor, and a report of it.

Kernels are timed as a model runs them: many in one jitted program, one after the other, each on its own
buffers, so that launches come from command buffers and nothing is found in L2. All kernels of a report and the
read floor take turns, round by round, so that a GPU that warms up or slows down does so for all of them; timings
are medians over the rounds.
"""

import concurrent.futures
import dataclasses
import datetime
import functools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fdpp_jax import device
from fdpp_jax.config import MatmulShape

# Bytes that one timed program reads: on a GPU two milliseconds of reads. A program takes some 14 to 30 us beside its
# steps (H200, 2026-11-28: the difference that its length makes), which each of them has a share of.
_GPU_PROGRAM_BYTES = 8 << 30
_CPU_PROGRAM_BYTES = 32 << 20
_MIN_STEPS = 8  # of one program: XLA makes no command buffer of fewer than five launches
_MAX_STEPS = 128  # each is compiled
_PAST_L2 = 4  # buffers of so many times the L2's size, one after the other and again, are not found in it
# A read of this size runs at the full speed of the memory; a longer one takes as much longer.
_LONGEST_READ_BYTES = 1 << 30
_READ_COLUMNS = 4096
REPEATS = 7
# Between two looks at the clock: so long that the dispatch of the first program, up to 2 ms (H200), hardly shows.
_SAMPLE_SECONDS = 0.06
_MAX_PROGRAMS = 256
_WARM_UP_SECONDS = 0.3  # the first loops of a process, or after a pause, run at a lower clock
_COMPILE_THREADS = 8


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


# Timing.


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A kernel to time.

    Attributes:
      step: step(x, set) -> array, x small and the same every time, set one of the large arguments.
      is_peer: Not ours: it may fail, and then says so in the report.
      is_short: One round of the sets a program: for what is slow to compile and slow to run.
    """

    step: Callable[[Any, Any], jax.Array]
    is_peer: bool = False
    is_short: bool = False


@dataclasses.dataclass(frozen=True)
class Timings:
    """Medians, in seconds.

    Attributes:
      floor: Of reading as many bytes.
      floor_spread: Slowest by fastest floor of the rounds: how quiet the machine was.
      seconds: Of one step of each candidate that ran, by name.
      failures: What the others raised.
      in_l2: Whether the buffers are so small that they are found in the L2.
    """

    floor: float
    floor_spread: float
    seconds: dict[str, float]
    failures: dict[str, Exception]
    in_l2: bool = False

    def best(self, names: Sequence[str]) -> float:
        """The shortest time of those that ran, nan without any."""
        return min((self.seconds[name] for name in names if name in self.seconds), default=math.nan)


class _Program:
    """Steps back to back in one compiled program, and how long one of them takes."""

    def __init__(self, compiled: jax.stages.Compiled, x: Any, sets: Sequence[Any], num_steps: int) -> None:
        self._compiled, self._x, self._sets, self._num_steps = compiled, x, sets, num_steps
        if not jnp.isfinite(compiled(x, sets)[-1]).all():
            raise FloatingPointError("the result is not finite: this would time the wrong work")
        self._run(1)  # the first executions are the slowest, on a GPU until the command buffer is recorded
        self._num_programs = 1
        while self._run(self._num_programs) < _SAMPLE_SECONDS and self._num_programs < _MAX_PROGRAMS:
            self._num_programs *= 2

    def sample(self) -> float:
        """Seconds a step, of several programs in a row."""
        return self._run(self._num_programs) / (self._num_programs * self._num_steps)

    def _run(self, num_programs: int) -> float:
        out = None
        started = time.perf_counter()
        for _ in range(num_programs):
            del out  # so that the next program can have the same buffer, and its command buffer stays as it is
            out = self._compiled(self._x, self._sets)
        jax.block_until_ready(out)
        return time.perf_counter() - started


def _lower(
    step: Callable[[Any, Any], jax.Array],
    x: Any,
    sets: Sequence[Any],
    num_steps: int,
    chain: Callable[[Any, jax.Array], Any] | None,
) -> jax.stages.Lowered:
    """A program of one step after the other, on one set after the other."""
    step = jax.jit(step)  # traced and lowered once, not once a step

    def program(x: Any, sets: Sequence[Any]) -> tuple[jax.Array, ...]:
        total = jnp.float32(0)
        for index in range(num_steps):
            # The barrier makes a step wait for the one before, and keeps XLA from merging them.
            x, out = jax.lax.optimization_barrier((x, step(x, sets[index % len(sets)])))
            if chain is None:
                # A number of each result stands for it: an output more takes the host some 8 us.
                total += out[(0,) * out.ndim].astype(jnp.float32)
            else:
                x = chain(x, out)
        return (total, out) if chain is None else (out,)

    return jax.jit(program).lower(x, sets)


def matmul_buffers(shape: MatmulShape) -> tuple[jax.Array, list[Any], int]:
    """Random x [m, k], as many random weights as get past the L2, and the bytes of one."""
    dtype = jnp.dtype(shape.dtype)
    weight_bytes = dtype.itemsize * shape.k * shape.n
    x_key, w_key = jax.random.split(jax.random.key(0))
    weights = random_normal(w_key, shape.w_shape, dtype, 0.02)
    sets = copies(weights, num_sets(weight_bytes, device.current()))
    return random_normal(x_key, (shape.m, shape.k), dtype), sets, weight_bytes


def time_kernels(
    candidates: Mapping[str, Candidate],
    x: Any,
    sets: Sequence[Any],
    num_bytes: int,
    chain: Callable[[Any, jax.Array], Any] | None = None,
    *,
    repeats: int = REPEATS,
    quiet: bool = False,
) -> Timings:
    """Times all candidates on the same buffers, and the read floor between them.

    Args:
      candidates: The kernels, by name.
      x: Their small argument, a pytree.
      sets: Their large arguments, pytrees of equal shapes, in distinct buffers; `num_sets` of them.
      num_bytes: What one step has to read.
      chain: chain(x, result) -> the next step's x, which is the same in all steps without it.
      repeats: Rounds, of which the times are medians.
      quiet: Says nothing on stderr.
    """
    running = device.current()
    compiling: dict[str, tuple[concurrent.futures.Future[jax.stages.Compiled], int]] = {}
    failures: dict[str, Exception] = {}
    say = (lambda _: None) if quiet else progress
    say(f"compile {', '.join(candidates)}")
    with concurrent.futures.ThreadPoolExecutor(min(_COMPILE_THREADS, os.cpu_count() or 1)) as pool:
        for name, candidate in candidates.items():
            num_steps = len(sets) if candidate.is_short else _num_steps(num_bytes, len(sets), running)
            try:
                # Lowering holds the GIL, compiling does not: one goes on while the other does.
                lowered = _lower(candidate.step, x, sets, num_steps, chain)
                compiling[name] = pool.submit(lowered.compile), num_steps
            except Exception as error:
                failures[name] = error
        floor = _floor_program(num_bytes)
    programs: dict[str, _Program] = {}
    say("time")
    for name, (compiled, num_steps) in compiling.items():
        try:
            programs[name] = _Program(compiled.result(), x, sets, num_steps)
        except Exception as error:
            failures[name] = error
    _warm_up(floor)
    floors, samples = [floor.sample()], {name: list[float]() for name in programs}
    for turn in range(repeats):
        # Another one first each time: whoever follows the floor is some 4 % slower (H200, 2026-11-23).
        for name in in_turn(programs, turn):
            samples[name].append(programs[name].sample())
        floors.append(floor.sample())
    longer = num_bytes / _read_bytes(num_bytes)
    seconds = {name: statistics.median(times) for name, times in samples.items()}
    in_l2 = running.is_gpu and len(sets) * num_bytes < _PAST_L2 * running.l2_bytes
    return Timings(statistics.median(floors) * longer, max(floors) / min(floors), seconds, failures, in_l2)


def in_turn(names: Iterable[str], turn: int) -> list[str]:
    """The names, each turn from the next one on, and round."""
    order = list(names)
    first = turn % max(1, len(order))
    return order[first:] + order[:first]


def num_sets(set_bytes: int, running: device.Device) -> int:
    """How many sets, of so many bytes read, a program rotates through to get past the L2: no more than its steps.

    Sets below some 3 MB stay in an H200's L2.
    """
    past_l2 = -(-_PAST_L2 * running.l2_bytes // set_bytes) if running.is_gpu else 1
    return max(2, min(_MAX_STEPS, past_l2))


def _num_steps(set_bytes: int, num_sets: int, running: device.Device) -> int:
    """How many steps make a program that is long enough, in whole rounds of the sets."""
    program_bytes = _GPU_PROGRAM_BYTES if running.is_gpu else _CPU_PROGRAM_BYTES
    num_steps = min(_MAX_STEPS, program_bytes // set_bytes)
    if running.is_gpu:
        num_steps = max(_MIN_STEPS, num_steps)
    return num_sets * max(1, num_steps // num_sets)


def copies(buffers: Any, num: int) -> list[Any]:
    """The pytree and num - 1 copies of it: other addresses, and far cheaper than random values for each."""
    return [buffers, *(jax.tree.map(jnp.copy, buffers) for _ in range(num - 1))]


def read_floor(num_bytes: int) -> float:
    """Seconds that reading so many bytes takes: row sums in float32 of bfloat16, as XLA compiles them.

    Beyond 1 GiB the time is scaled up from that of 1 GiB.
    """
    program = _floor_program(num_bytes)
    _warm_up(program)
    return statistics.median(program.sample() for _ in range(REPEATS)) * num_bytes / _read_bytes(num_bytes)


def _read_bytes(num_bytes: int) -> int:
    """What the floor's program reads at a time for num_bytes: whole rows, at most 1 GiB."""
    row_bytes = 2 * _READ_COLUMNS
    return max(1, min(num_bytes, _LONGEST_READ_BYTES) // row_bytes) * row_bytes


@functools.lru_cache(maxsize=2)  # rows of a table often read as much as the row before
def _floor_program(num_bytes: int) -> _Program:
    rows = _read_bytes(num_bytes) // (2 * _READ_COLUMNS)
    buffers = random_normal(jax.random.key(0), (rows, _READ_COLUMNS), jnp.bfloat16)
    running = device.current()
    sets = copies(buffers, num_sets(buffers.nbytes, running))
    num_steps = _num_steps(buffers.nbytes, len(sets), running)
    x = jnp.ones((rows,), jnp.float32)

    def read(x: jax.Array, w: jax.Array) -> jax.Array:
        # A factor that follows from the step before: without, XLA reads a buffer once for all its steps.
        return (w.astype(jnp.float32) * x[:, None]).sum(1)

    lowered = _lower(read, x, sets, num_steps, lambda x, out: 1.0 + 0.0 * out)
    return _Program(lowered.compile(), x, sets, num_steps)


def _warm_up(program: _Program) -> None:
    started = time.perf_counter()
    while time.perf_counter() - started < _WARM_UP_SECONDS:
        program.sample()


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def random_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> jax.Array:
    """Normal values: zeros would cost a GPU less power, and so less time."""
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


# The report.


def kernel_report(
    title: str,
    candidates: Mapping[str, Candidate],
    timings: Timings,
    num_bytes: int,
    what: dict[str, Any],
    baseline: str | None = None,
) -> BenchReport:
    """A line for each candidate, and one for the read floor. A peer may have failed; ours may not.

    Args:
      title: Of the table.
      candidates: What was timed.
      timings: The result.
      num_bytes: What one step reads.
      what: Joins the record.
      baseline: The candidate whose saving against the others makes one more column.
    """
    for name, error in timings.failures.items():
        if not candidates[name].is_peer:
            raise error
        progress(f"{name} does not run: {first_line(error)}")
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
    """The numbers of one shape, ready for JSON; None for what does not run."""
    times_us = {name: timings.seconds[name] * 1e6 if name in timings.seconds else None for name in names}
    record = {"bytes": num_bytes, "read_floor_us": timings.floor * 1e6, "floor_spread": timings.floor_spread}
    failures = {name: first_line(error) for name, error in timings.failures.items()}
    return record | {"time_us": times_us} | ({"failures": failures} if failures else {})


def us(seconds: float) -> str:
    """ "12.3"."""
    return f"{seconds * 1e6:.1f}"


def ratio(seconds: float, other: float) -> str:
    """ "1.05", or "-" where one of the two is nan."""
    return "-" if math.isnan(seconds / other) else f"{seconds / other:.2f}"


def saving(ours: float | None, other: float | None) -> str:
    """What ours saves of the other's time: "12 %"; negative where it is the slower."""
    return "-" if ours is None or other is None else f"{100 * (1 - ours / other):.0f} %"


def first_line(error: Exception) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def provenance() -> dict[str, Any]:
    """Device, versions, date and commit of a run."""
    import importlib.metadata

    import fdpp_jax

    running = device.current()
    return {
        "device": dataclasses.asdict(running) | {"jax_kind": jax.devices()[0].device_kind},
        "versions": {"fdpp_jax": fdpp_jax.__version__}
        | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The checkout's commit, "-dirty" if changed since; None where the package is installed or git is missing."""
    checkout = pathlib.Path(__file__).parent.parent
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def progress(what: str) -> None:
    """One line on stderr: compiling and timing take a while."""
    sys.stderr.write(f"bench: {what}\n")
    sys.stderr.flush()
