"""Measures which kernel and which tiles are the fastest for a weight, by number of rows.

Each weight [K, N] gets a sweep over all candidates at eight rows. Then the best of them, XLA's dot and the rule's
config take turns at each number of rows. The fastest becomes an entry of a table (`plans.tables`), from which
`heuristics.plan_matmul` answers. The paper's switch points follow from the entries: gemv below M1, flat below M2.

Source: FlashDecoding++ (arXiv 2311.01282), section 5 (heuristic dataflow).
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fdpp_jax import models
from fdpp_jax.bench.clock import REPEATS, Candidate, matmul_buffers, time_kernels
from fdpp_jax.bench.report import first_line
from fdpp_jax.models import DecoderConfig
from fdpp_jax.ops.running import module_of
from fdpp_jax.plans import device as devices
from fdpp_jax.plans.backend import MatmulOp, MatmulPlan
from fdpp_jax.plans.backends import with_kernels
from fdpp_jax.plans.device import Device
from fdpp_jax.plans.shapes import MatmulImplementation, MatmulShape
from fdpp_jax.plans.tables import W_ORDER, Entry, Run, Sweep, Table

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
_SWEEP_ROWS = 8  # the flat kernel pads fewer rows to 8
_SWEEP_ROUNDS = 3
_KEPT = 3  # the sweep's best, timed from _SWEEP_ROWS on; below, the kernel is the same, and the best one suffices


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight [K, N], stored [N, K], and its name: "llama-2-7b qkv"."""

    k: int
    n: int
    label: str

    def shape(self, m: int, dtype: str) -> MatmulShape:
        """The shape of the matmul with m rows."""
        return MatmulShape(m, self.k, self.n, dtype, W_ORDER)

    def __str__(self) -> str:
        return f"{self.label} {self.k}x{self.n}"


@dataclasses.dataclass(frozen=True)
class Job:
    """One kernel to time at m rows; its config is one of `MatmulOp.candidates`, None for XLA's dot."""

    m: int
    implementation: MatmulImplementation
    config: Any = None

    @property
    def name(self) -> str:
        """ "M = 8, flat 64 x 256, 5 stages, 132 CTAs"."""
        tiles = "" if self.config is None else f" {self.config.text}"
        return f"M = {self.m}, {self.implementation}{tiles}"


@dataclasses.dataclass(frozen=True)
class Measured:
    """Microseconds of the jobs that ran and of reading the weight's bytes; the errors of the other jobs."""

    floor_us: float
    time_us: Mapping[Job, float]
    failures: Mapping[Job, str] = dataclasses.field(default_factory=dict)


# Times jobs on one weight: timer(jobs, rounds).
type Timer = Callable[[Sequence[Job], int], Measured]


@dataclasses.dataclass(frozen=True)
class Step:
    """A weight is done: the table with it, and the kernels that failed."""

    weight: Weight
    table: Table
    failures: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class StaticCost:
    """What one choice for all matmuls costs, beside the best choice for each.

    Attributes:
      choice: The choice, in words.
      geomean: Of the ratios of its time to the best time, over all matmuls.
      worst: The largest of these ratios.
      where: The matmul that has it.
    """

    choice: str
    geomean: float
    worst: float
    where: str


def weights_of(name: str, config: DecoderConfig) -> list[Weight]:
    """The weights that a decode step of the model multiplies with."""
    # The shapes are the same on every device, and no table of the CPU is read.
    plans = models.model_plans(config, batch=1, capacity=1, device="cpu")
    return [Weight(shape.k, shape.n, f"{name} {what}") for what, shape, _ in plans if isinstance(shape, MatmulShape)]


def distinct(weights: Sequence[Weight]) -> list[Weight]:
    """The first of each shape, in order."""
    found: dict[tuple[int, int], Weight] = {}
    for weight in weights:
        found.setdefault((weight.k, weight.n), weight)
    return list(found.values())


def pending(weights: Sequence[Weight], dtype: str, table: Table, run: Run) -> list[Weight]:
    """The weights that the table lacks, or has from other versions than the run's."""

    def is_done(weight: Weight) -> bool:
        entries = table.of_weight(weight.k, weight.n, dtype)
        return {entry.shape.m for entry in entries} >= set(ROWS) and all(
            entry.run.versions == run.versions for entry in entries
        )

    return [weight for weight in weights if not is_done(weight)]


def _kernels(device: Device) -> tuple[str, MatmulOp]:
    """The backend that has matmul kernels for the device, and how they compute."""
    backend = with_kernels(device, "matmul")
    assert backend is not None
    assert backend.matmul is not None
    return backend.name, backend.matmul


def weight_timer(weight: Weight, dtype: str) -> Timer:
    """Fills as many buffers as get past the L2 with random values, and returns the function that times jobs on them."""
    x, sets, weight_bytes = matmul_buffers(weight.shape(max(ROWS), dtype))

    def measure(jobs: Sequence[Job], rounds: int) -> Measured:
        by_name = {job.name: job for job in jobs}
        steps = {name: Candidate(functools.partial(_step, job)) for name, job in by_name.items()}
        rows = {job.m: x[: job.m] for job in jobs}
        timings = time_kernels(steps, rows, sets, weight_bytes, repeats=rounds, quiet=True)
        for name, error in timings.failures.items():
            if by_name[name].config is None:
                raise error  # XLA's own: there is nothing to compare with
        times = {by_name[name]: round(seconds * 1e6, 2) for name, seconds in timings.seconds.items()}
        failures = {by_name[name]: first_line(error) for name, error in timings.failures.items()}
        return Measured(round(timings.floor * 1e6, 2), times, failures)

    return measure


def _step(job: Job, rows: Mapping[int, jax.Array], w: jax.Array) -> jax.Array:
    """x [m, k] @ w by the job's kernel; w is [n, k]."""
    x = rows[job.m]
    if job.config is None:
        return jnp.einsum(f"mk,{W_ORDER}->mn", x, w)
    backend, _ = _kernels(devices.planned())
    plan = MatmulPlan(backend, job.implementation, job.config, "a candidate")
    out: jax.Array = module_of(plan).matmul(x, w, plan, out_dtype=x.dtype, w_order=W_ORDER)
    return out


def tune(
    weights: Sequence[Weight],
    dtype: str,
    device: Device,
    table: Table,
    run: Run,
    *,
    make_timer: Callable[[Weight, str], Timer],
    deadline: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    phase: Callable[[Weight, str], None] = lambda weight, text: None,
) -> Iterator[Step]:
    """Measures the weights one after the other.

    Args:
      weights: The weights to measure.
      dtype: Of weights and rows.
      device: The running device, which has kernels; with `backends.only` those of one backend are measured.
      table: The measurements so far, to which the steps' tables add.
      run: Versions, date and commit of the new measurements.
      make_timer: make_timer(weight, dtype) -> a timer of kernels on the weight; see `weight_timer`.
      deadline: In seconds of `clock`. No weight is begun that would end later at the pace of the slowest so far.
      clock: Seconds.
      phase: Called with the weight and what is done with it.

    Yields:
      A step per weight; fewer if the deadline comes first.
    """
    slowest = 0.0
    for weight in weights:
        started = clock()
        if started + slowest >= deadline:
            return
        phase(weight, "random values")
        time_jobs = make_timer(weight, dtype)
        with devices.target(device):
            entries, sweep, failures = _tune_weight(
                weight, dtype, device, run, time_jobs, functools.partial(phase, weight)
            )
        table = table.replaced(entries, sweep)
        slowest = max(slowest, clock() - started)
        yield Step(weight, table, failures)


def _tune_weight(
    weight: Weight, dtype: str, device: Device, run: Run, time_jobs: Timer, phase: Callable[[str], None]
) -> tuple[list[Entry], Sweep, tuple[str, ...]]:
    """Within `devices.target` of the device."""
    shape = weight.shape(_SWEEP_ROWS, dtype)
    _, op = _kernels(device)
    jobs = [Job(_SWEEP_ROWS, "xla")]
    jobs += [Job(_SWEEP_ROWS, "flat", config) for config in op.candidates(shape, device, "flat")]
    jobs += [Job(1, "gemv", config) for config in op.candidates(dataclasses.replace(shape, m=1), device, "gemv")]
    phase(f"sweep of {len(jobs)} kernels")
    swept = time_jobs(jobs, _SWEEP_ROUNDS)
    ranked = sorted(swept.time_us, key=lambda job: swept.time_us[job])

    jobs = [job for m in ROWS for job in _finalists(dataclasses.replace(shape, m=m), device, ranked)]
    phase(f"{len(jobs)} kernels at {len(ROWS)} numbers of rows")
    final = time_jobs(jobs, REPEATS)
    entries = [_entry(dataclasses.replace(shape, m=m), final, run) for m in ROWS]
    times = {
        "xla" if job.config is None else job.config.text: us
        for job, us in swept.time_us.items()
        if job.implementation != "gemv"
    }
    failures = [f"{job.name}: {why}" for measured in (swept, final) for job, why in measured.failures.items()]
    return entries, Sweep(shape, times, run), tuple(dict.fromkeys(failures))


def _finalists(shape: MatmulShape, device: Device, ranked: Sequence[Job]) -> list[Job]:
    """XLA's dot, the sweep's best with the stages that fit so many rows, and the rule's config."""
    jobs = [Job(shape.m, "xla")]
    _, op = _kernels(device)
    best_gemv = [job for job in ranked if job.implementation == "gemv"][:1]
    best_flat = [job for job in ranked if job.implementation == "flat"][: _KEPT if shape.m >= _SWEEP_ROWS else 1]
    for job in best_gemv + best_flat:
        jobs.append(Job(shape.m, job.implementation, op.fit(shape, device, job.config)))
    if shape.m > _SWEEP_ROWS:
        jobs.append(Job(shape.m, "flat", op.config(shape, device, "flat")))
    return [
        job
        for job in dict.fromkeys(jobs)
        if job.config is None or op.refuse_config(shape, device, job.implementation, job.config) is None
    ]


def _entry(shape: MatmulShape, measured: Measured, run: Run) -> Entry:
    times: dict[str, float] = {}
    configs: dict[str, Any] = {}
    ranked = sorted((job for job in measured.time_us if job.m == shape.m), key=lambda job: measured.time_us[job])
    for job in ranked:
        if job.implementation not in times:
            times[job.implementation] = measured.time_us[job]
            if job.config is not None:
                configs[job.implementation] = job.config
    return Entry(shape, ranked[0].implementation, measured.floor_us, times, configs, run)


def switch_points(entries: Sequence[Entry]) -> tuple[int, int]:
    """The paper's M1 and M2 of a weight: gemv runs below M1, XLA from M2 on."""
    gemv = [entry.shape.m for entry in entries if entry.implementation == "gemv"]
    kernels = [entry.shape.m for entry in entries if entry.implementation != "xla"]
    return max(gemv, default=0) + 1, max(kernels, default=0) + 1


def static_costs(table: Table, device: Device, dtype: str) -> list[StaticCost]:
    """What it costs to choose once for all measured weights: a config, the rule, an implementation.

    Configs are compared at the 8 rows of the sweeps, implementations at all rows where they were measured. Empty where
    nothing was measured.
    """
    sweeps = [sweep for sweep in table.sweeps if sweep.shape.dtype == dtype]
    if not sweeps:
        return []

    def against_best(choice: str, names: Mapping[MatmulShape, str]) -> StaticCost:
        """The cost of a choice; names: what it takes in each sweep."""
        ratios = {s.shape: s.time_us[names[s.shape]] / min(s.time_us.values()) for s in sweeps}
        return _static_cost(f"{choice}, M = {_SWEEP_ROWS}", ratios)

    shared = set.intersection(*(set(sweep.time_us) for sweep in sweeps)) - {"xla"}
    singles = [against_best(f"flat, {name}", {s.shape: name for s in sweeps}) for name in sorted(shared)]
    costs = [min(singles, key=lambda cost: cost.geomean)] if singles else []
    _, op = _kernels(device)
    rule = {s.shape: op.config(s.shape, device, "flat").text for s in sweeps}
    if all(rule[s.shape] in s.time_us for s in sweeps):
        costs.append(against_best("flat, the rule's config", rule))
    for name in ("flat", "xla"):
        entries = [entry for entry in table.entries if entry.shape.dtype == dtype and name in entry.time_us]
        if entries:
            ratios = {entry.shape: entry.time_us[name] / min(entry.time_us.values()) for entry in entries}
            rows = sorted(entry.shape.m for entry in entries)
            costs.append(_static_cost(f"{name} with its best config, M = {rows[0]}..{rows[-1]}", ratios))
    return costs


def _static_cost(choice: str, ratios: Mapping[MatmulShape, float]) -> StaticCost:
    worst = max(ratios, key=lambda shape: ratios[shape])
    where = f"[{worst.m}, {worst.k}] @ [{worst.k}, {worst.n}]"
    return StaticCost(choice, statistics.geometric_mean(ratios.values()), ratios[worst], where)
