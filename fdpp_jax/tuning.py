"""Measures which kernel and which tiles are the fastest for a weight, by number of rows.

For each weight [K, N]: a sweep over all candidates at eight rows; then its best ones, XLA's dot and the rule's config
take turns at each number of rows. The fastest becomes an entry of a table (`tuned_tables`), from which
`heuristics.plan_matmul` answers. The paper's switch points follow from the entries: gemv below M1, flat below M2.

Source: FlashDecoding++ (arXiv 2311.01282), section 5 (heuristic dataflow).
"""

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp

from fdpp_jax import heuristics, limits, matmul, models, timing
from fdpp_jax.config import FlatMatmulConfig, GemvConfig, MatmulImplementation, MatmulShape
from fdpp_jax.device import Device
from fdpp_jax.models import DecoderConfig
from fdpp_jax.tuned_tables import W_ORDER, Entry, Run, Sweep, Table, config_text

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
_SWEEP_ROWS = 8  # of the kernel below 9 rows too, which pads to 8
_SWEEP_ROUNDS = 3
_KEPT = 3  # of the sweep, from its rows on; below them the kernel is the same, and the best one does
_TILES = ((64, 256), (64, 128), (128, 128))  # block_n, block_k: 16 or 32 KiB of weights
_CTAS_PER_SM = (1, 2)
_GEMV_TILES = ((64, 128), (128, 64))
_GEMV_SPLITS = (1, 2, 4, 8)
_DEEPEST = 8
_MAX_CTAS_PER_SM = 4  # beyond, in waves, a split is only more to add up


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight [K, N], stored [n, k], and what it is: "llama-2-7b qkv"."""

    k: int
    n: int
    label: str

    def shape(self, m: int, dtype: str) -> MatmulShape:
        """Of the matmul with m rows."""
        return MatmulShape(m, self.k, self.n, dtype, W_ORDER)

    def __str__(self) -> str:
        return f"{self.label} {self.k}x{self.n}"


@dataclasses.dataclass(frozen=True)
class Job:
    """One kernel to time at m rows."""

    m: int
    implementation: MatmulImplementation
    config: FlatMatmulConfig | GemvConfig | None = None

    @property
    def name(self) -> str:
        """ "M = 8, flat 64 x 256, 5 stages, 132 CTAs"."""
        tiles = "" if self.config is None else f" {config_text(self.config)}"
        return f"M = {self.m}, {self.implementation}{tiles}"


@dataclasses.dataclass(frozen=True)
class Measured:
    """Microseconds of the jobs that ran and of reading the weight's bytes; what the others raised."""

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
    """What one choice for all costs against the best for each.

    Attributes:
      choice: What it is.
      geomean: Of its time by the best's, over all weights.
      worst: The largest of them.
      where: Of which matmul that is.
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


def candidates(shape: MatmulShape, device: Device, implementation: MatmulImplementation) -> list[Job]:
    """The configs worth a try, all legal, each with as many stages as the CTAs of an SM have room for.

    gemv's give every second SM a CTA at least and every SM four at most, where a split does so; the flat kernel's one
    or two an SM. The rule's own is the first.
    """
    found = [heuristics.rule_matmul_config(shape, device, implementation)]
    if implementation == "gemv":
        for (block_n, block_k), split_k in itertools.product(_GEMV_TILES, _GEMV_SPLITS):
            num_ctas = -(-shape.n // block_n) * split_k
            enough = 2 * num_ctas >= device.num_sms or split_k == _GEMV_SPLITS[-1]
            if enough and (split_k == 1 or num_ctas <= _MAX_CTAS_PER_SM * device.num_sms):
                found.append(_fitting(GemvConfig(block_n, block_k, _DEEPEST, split_k), shape, device))
    else:
        for (block_n, block_k), ctas_per_sm in itertools.product(_TILES, _CTAS_PER_SM):
            config = FlatMatmulConfig(ctas_per_sm * device.num_sms, block_n, block_k, _DEEPEST)
            found.append(_fitting(config, shape, device))
    legal = [config for config in found if limits.refuse_matmul_config(shape, device, config) is None]
    return [Job(shape.m, implementation, config) for config in dict.fromkeys(legal)]


def _fitting(
    config: FlatMatmulConfig | GemvConfig, shape: MatmulShape, device: Device
) -> FlatMatmulConfig | GemvConfig:
    """The config with no more stages than one or two CTAs of an SM have room for, as many as the grid gives it."""
    num_ctas = -(-shape.n // config.block_n) * config.split_k if isinstance(config, GemvConfig) else config.num_ctas
    smem_bytes = device.smem_bytes_shared(min(2, -(-num_ctas // device.num_sms)))
    return heuristics.with_stages_that_fit(config, shape, smem_bytes)


def weight_timer(weight: Weight, dtype: str) -> Timer:
    """Random values for the weight, in as many buffers as get past the L2, and what times jobs on them."""
    x, sets, weight_bytes = timing.matmul_buffers(weight.shape(max(ROWS), dtype))

    def measure(jobs: Sequence[Job], rounds: int) -> Measured:
        by_name = {job.name: job for job in jobs}
        steps = {name: timing.Candidate(functools.partial(_step, job)) for name, job in by_name.items()}
        rows = {job.m: x[: job.m] for job in jobs}
        timings = timing.time_kernels(steps, rows, sets, weight_bytes, repeats=rounds, quiet=True)
        for name, error in timings.failures.items():
            if by_name[name].config is None:
                raise error  # XLA's own: nothing to compare with
        times = {by_name[name]: round(seconds * 1e6, 2) for name, seconds in timings.seconds.items()}
        failures = {by_name[name]: timing.first_line(error) for name, error in timings.failures.items()}
        return Measured(round(timings.floor * 1e6, 2), times, failures)

    return measure


def _step(job: Job, rows: Mapping[int, jax.Array], w: jax.Array) -> jax.Array:
    """x [m, k] @ w by the job's kernel; w is [n, k]."""
    x = rows[job.m]
    if job.config is None:
        return jnp.einsum(f"mk,{W_ORDER}->mn", x, w)
    return matmul.run_kernel(x, w, config=job.config, out_dtype=x.dtype, w_order=W_ORDER)


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
      weights: Those to measure.
      dtype: Of weights and rows.
      device: The one that runs.
      table: What was measured before, which the steps' tables add to.
      run: Where the new numbers are from.
      make_timer: make_timer(weight, dtype) -> what times kernels on it: `weight_timer`.
      deadline: No weight is begun that would end after it at the pace of the slowest so far, by `clock`, in seconds.
      clock: Seconds.
      phase: Told what is done.

    Yields:
      A step for each weight; fewer than weights if the deadline came first.
    """
    slowest = 0.0
    for weight in weights:
        started = clock()
        if started + slowest >= deadline:
            return
        phase(weight, "random values")
        time_jobs = make_timer(weight, dtype)
        entries, sweep, failures = _tune_weight(weight, dtype, device, run, time_jobs, functools.partial(phase, weight))
        table = table.replaced(entries, sweep)
        slowest = max(slowest, clock() - started)
        yield Step(weight, table, failures)


def _tune_weight(
    weight: Weight, dtype: str, device: Device, run: Run, time_jobs: Timer, phase: Callable[[str], None]
) -> tuple[list[Entry], Sweep, tuple[str, ...]]:
    shape = weight.shape(_SWEEP_ROWS, dtype)
    jobs = [Job(_SWEEP_ROWS, "xla"), *candidates(shape, device, "flat")]
    jobs += candidates(dataclasses.replace(shape, m=1), device, "gemv")
    phase(f"sweep of {len(jobs)} kernels")
    swept = time_jobs(jobs, _SWEEP_ROUNDS)
    ranked = sorted(swept.time_us, key=lambda job: swept.time_us[job])

    jobs = [job for m in ROWS for job in _finalists(dataclasses.replace(shape, m=m), device, ranked)]
    phase(f"{len(jobs)} kernels at {len(ROWS)} numbers of rows")
    final = time_jobs(jobs, timing.REPEATS)
    entries = [_entry(dataclasses.replace(shape, m=m), final, run) for m in ROWS]
    times = {
        "xla" if job.config is None else config_text(job.config): us
        for job, us in swept.time_us.items()
        if job.implementation != "gemv"
    }
    failures = [f"{job.name}: {why}" for measured in (swept, final) for job, why in measured.failures.items()]
    return entries, Sweep(shape, times, run), tuple(dict.fromkeys(failures))


def _finalists(shape: MatmulShape, device: Device, ranked: Sequence[Job]) -> list[Job]:
    """XLA, and what is timed against it: the sweep's best, with the stages that fit so many rows, and the rule's."""
    jobs = [Job(shape.m, "xla")]
    best_gemv = [job.config for job in ranked if job.implementation == "gemv"][:1]
    best_flat = [job.config for job in ranked if job.implementation == "flat"]
    configs = best_gemv + best_flat[: _KEPT if shape.m >= _SWEEP_ROWS else 1]
    fitting = [_fitting(config, shape, device) for config in configs if config is not None]
    if shape.m > _SWEEP_ROWS:
        fitting.append(heuristics.rule_matmul_config(shape, device, "flat"))
    for config in dict.fromkeys(fitting):
        if limits.refuse_matmul_config(shape, device, config) is None:
            jobs.append(Job(shape.m, "gemv" if isinstance(config, GemvConfig) else "flat", config))
    return jobs


def _entry(shape: MatmulShape, measured: Measured, run: Run) -> Entry:
    times: dict[str, float] = {}
    configs: dict[str, FlatMatmulConfig | GemvConfig] = {}
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

    Configs are compared at the 8 rows of the sweeps, an implementation at all rows where it was measured. Empty where
    nothing was measured.
    """
    sweeps = [sweep for sweep in table.sweeps if sweep.shape.dtype == dtype]
    if not sweeps:
        return []

    def against_best(choice: str, names: Mapping[MatmulShape, str]) -> StaticCost:
        """Names what is chosen for each sweep."""
        ratios = {s.shape: s.time_us[names[s.shape]] / min(s.time_us.values()) for s in sweeps}
        return _static_cost(f"{choice}, M = {_SWEEP_ROWS}", ratios)

    shared = set.intersection(*(set(sweep.time_us) for sweep in sweeps)) - {"xla"}
    singles = [against_best(f"flat, {name}", {s.shape: name for s in sweeps}) for name in sorted(shared)]
    costs = [min(singles, key=lambda cost: cost.geomean)] if singles else []
    rule = {s.shape: config_text(heuristics.rule_matmul_config(s.shape, device, "flat")) for s in sweeps}
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
