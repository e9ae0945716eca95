"""The clock of every bench: kernels take turns with their peers and with the read floor.

A kernel is timed as a model runs it: many times in one jitted program, one call after the other, each on its own
buffers. So launches come from command buffers, and the L2 holds nothing that a call reads. All kernels of a report and
the read floor take turns, round by round: a GPU that warms up or slows down does so for all of them. A time is the
median over the rounds.

Why its figures are as they are: docs/experiments/README.md#the-clock
"""

import concurrent.futures
import dataclasses
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fdpp_jax import progress
from fdpp_jax.plans import device
from fdpp_jax.plans.shapes import MatmulShape, cdiv

# Bytes that one timed program reads: so many that what it takes beside its steps hardly shows.
_GPU_PROGRAM_BYTES = 8 << 30
_CPU_PROGRAM_BYTES = 32 << 20
_MIN_STEPS = 8  # per program: XLA makes no command buffer of fewer than five launches
_MAX_STEPS = 128  # each is compiled
_PAST_L2 = 4  # buffers of so many times the L2's size, used in turn, are not found in it
# A read of this size runs at the full speed of the memory; a longer one takes as much longer.
_LONGEST_READ_BYTES = 1 << 30
_READ_COLUMNS = 4096
REPEATS = 7
_SAMPLE_SECONDS = 0.06  # between two looks at the clock: so long that the dispatch of the first program hardly shows
_MAX_PROGRAMS = 256
_WARM_UP_SECONDS = 0.3  # the first loops of a process, or after a pause, run at a lower clock
_COMPILE_THREADS = 8


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A kernel to time.

    Attributes:
      step: step(x, set) -> array, x small and the same every time, set one of the large arguments.
      is_peer: Not ours: it may fail, and the report then says so.
      is_short: Each program uses every set once: for a kernel that is slow to compile and slow to run.
    """

    step: Callable[[Any, Any], jax.Array]
    is_peer: bool = False
    is_short: bool = False


@dataclasses.dataclass(frozen=True)
class Timings:
    """Medians, in seconds.

    Attributes:
      floor: Of reading as many bytes.
      floor_spread: The slowest floor of the rounds divided by the fastest: how quiet the machine was.
      seconds: Of one step of each candidate that ran, by name.
      failures: The errors of the other candidates.
      in_l2: Whether the buffers are so small that they are found in the L2.
    """

    floor: float
    floor_spread: float
    seconds: dict[str, float]
    failures: dict[str, Exception]
    in_l2: bool = False

    def best(self, names: Sequence[str]) -> float:
        """The shortest time of the named candidates that ran; nan if none did."""
        return min((self.seconds[name] for name in names if name in self.seconds), default=math.nan)


class _Program:
    """Steps back to back in one compiled program, and how long one step takes."""

    def __init__(self, compiled: jax.stages.Compiled, x: Any, sets: Sequence[Any], num_steps: int) -> None:
        self._compiled, self._x, self._sets, self._num_steps = compiled, x, sets, num_steps
        if not jnp.isfinite(compiled(x, sets)[-1]).all():
            raise FloatingPointError("the result is not finite: this would time the wrong work")
        self._run(1)  # the first executions are the slowest, on a GPU until the command buffer is recorded
        self._num_programs = 1
        while self._run(self._num_programs) < _SAMPLE_SECONDS and self._num_programs < _MAX_PROGRAMS:
            self._num_programs *= 2

    def sample(self) -> float:
        """Seconds per step, over several programs in a row."""
        return self._run(self._num_programs) / (self._num_programs * self._num_steps)

    def _run(self, num_programs: int) -> float:
        out = None
        started = time.perf_counter()
        for _ in range(num_programs):
            del out  # the next program takes the same buffer, so its command buffer stays as it is
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
    """A program of steps in a row, each on the next set."""
    step = jax.jit(step)  # traced and lowered once, not once per step

    def program(x: Any, sets: Sequence[Any]) -> tuple[jax.Array, ...]:
        total = jnp.float32(0)
        for index in range(num_steps):
            # The barrier makes a step wait for the one before, and keeps XLA from merging them.
            x, out = jax.lax.optimization_barrier((x, step(x, sets[index % len(sets)])))
            if chain is None:
                # One number stands for each result: every further output takes the host time.
                total += out[(0,) * out.ndim].astype(jnp.float32)
            else:
                x = chain(x, out)
        return (total, out) if chain is None else (out,)

    return jax.jit(program).lower(x, sets)


def matmul_buffers(shape: MatmulShape) -> tuple[jax.Array, list[Any], int]:
    """Random x [m, k], as many random weights as get past the L2, and the bytes of one weight."""
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
      num_bytes: Bytes that one step has to read.
      chain: chain(x, result) -> the next step's x. None: all steps have the same x.
      repeats: Rounds, of which the times are medians.
      quiet: Says nothing on stderr.
    """
    running = device.current()
    compiling: dict[str, tuple[concurrent.futures.Future[jax.stages.Compiled], int]] = {}
    failures: dict[str, Exception] = {}
    if not quiet:
        progress.say("bench", f"compile {', '.join(candidates)}")
    with concurrent.futures.ThreadPoolExecutor(min(_COMPILE_THREADS, os.cpu_count() or 1)) as pool:
        for name, candidate in candidates.items():
            num_steps = len(sets) if candidate.is_short else _num_steps(num_bytes, len(sets), running)
            try:
                # Lowering holds the GIL, compiling does not: one candidate is compiled while the next is lowered.
                lowered = _lower(candidate.step, x, sets, num_steps, chain)
                compiling[name] = pool.submit(lowered.compile), num_steps
            except Exception as error:
                failures[name] = error
        floor = _floor_program(num_bytes)
    programs: dict[str, _Program] = {}
    if not quiet:
        progress.say("bench", "time")
    for name, (compiled, num_steps) in compiling.items():
        try:
            programs[name] = _Program(compiled.result(), x, sets, num_steps)
        except Exception as error:
            failures[name] = error
    _warm_up(floor)
    floors, samples = [floor.sample()], {name: list[float]() for name in programs}
    for turn in range(repeats):
        # Another kernel first each time: the one behind the floor is slower.
        for name in in_turn(programs, turn):
            samples[name].append(programs[name].sample())
        floors.append(floor.sample())
    longer = num_bytes / _read_bytes(num_bytes)
    seconds = {name: statistics.median(times) for name, times in samples.items()}
    in_l2 = running.is_gpu and len(sets) * num_bytes < _PAST_L2 * running.l2_bytes
    return Timings(statistics.median(floors) * longer, max(floors) / min(floors), seconds, failures, in_l2)


def in_turn(names: Iterable[str], turn: int) -> list[str]:
    """The names in a circle; each turn begins one name later."""
    order = list(names)
    first = turn % max(1, len(order))
    return order[first:] + order[:first]


def num_sets(set_bytes: int, running: device.Device) -> int:
    """How many sets, of so many bytes each, a program rotates through to get past the L2: no more than its steps.

    Very small sets stay in the L2 all the same.
    """
    past_l2 = cdiv(_PAST_L2 * running.l2_bytes, set_bytes) if running.is_gpu else 1
    return max(2, min(_MAX_STEPS, past_l2))


def _num_steps(set_bytes: int, num_sets: int, running: device.Device) -> int:
    """How many steps make a program long enough, in whole rounds of the sets."""
    program_bytes = _GPU_PROGRAM_BYTES if running.is_gpu else _CPU_PROGRAM_BYTES
    num_steps = min(_MAX_STEPS, program_bytes // set_bytes)
    if running.is_gpu:
        num_steps = max(_MIN_STEPS, num_steps)
    return num_sets * max(1, num_steps // num_sets)


def copies(buffers: Any, num: int) -> list[Any]:
    """The pytree and num - 1 copies of it: other addresses, far cheaper than new random values."""
    return [buffers, *(jax.tree.map(jnp.copy, buffers) for _ in range(num - 1))]


def read_floor(num_bytes: int) -> float:
    """Seconds to read so many bytes: row sums in float32 of bfloat16, as XLA compiles them.

    Beyond 1 GiB the time is scaled up from that of 1 GiB.
    """
    program = _floor_program(num_bytes)
    _warm_up(program)
    return statistics.median(program.sample() for _ in range(REPEATS)) * num_bytes / _read_bytes(num_bytes)


def _read_bytes(num_bytes: int) -> int:
    """Bytes that one step of the floor's program reads: whole rows, at most 1 GiB."""
    row_bytes = 2 * _READ_COLUMNS
    return max(1, min(num_bytes, _LONGEST_READ_BYTES) // row_bytes) * row_bytes


@functools.lru_cache(maxsize=2)  # a row of a table often reads as much as the row before
def _floor_program(num_bytes: int) -> _Program:
    rows = _read_bytes(num_bytes) // (2 * _READ_COLUMNS)
    buffers = random_normal(jax.random.key(0), (rows, _READ_COLUMNS), jnp.bfloat16)
    running = device.current()
    sets = copies(buffers, num_sets(buffers.nbytes, running))
    num_steps = _num_steps(buffers.nbytes, len(sets), running)
    x = jnp.ones((rows,), jnp.float32)

    def read(x: jax.Array, w: jax.Array) -> jax.Array:
        # A factor that depends on the step before; without it, XLA reads a buffer once for all its steps.
        return (w.astype(jnp.float32) * x[:, None]).sum(1)

    lowered = _lower(read, x, sets, num_steps, lambda x, out: 1.0 + 0.0 * out)
    return _Program(lowered.compile(), x, sets, num_steps)


def _warm_up(program: _Program) -> None:
    started = time.perf_counter()
    while time.perf_counter() - started < _WARM_UP_SECONDS:
        program.sample()


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def random_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> jax.Array:
    """Normal values: with zeros a GPU takes less power, and so less time."""
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
