"""How fast prefill attention is: the public op with a unified max and with online softmax, beside jax.nn's cuDNN.

A kernel of many queries is bound by its products, so the floor here is the time that they take at the device's peak. A
unified max includes what redoes failed rows, of which there are none.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fdpp_jax import heuristics, ops, progress
from fdpp_jax.bench import report
from fdpp_jax.bench.attention import PHI, cache_labels, check_sizes, input_bytes, inputs
from fdpp_jax.bench.clock import Candidate, Timings, copies, num_sets, time_kernels
from fdpp_jax.bench.provenance import provenance
from fdpp_jax.bench.report import BenchReport
from fdpp_jax.plans import backends, device
from fdpp_jax.plans.backend import AttentionPlan
from fdpp_jax.plans.device import Device
from fdpp_jax.plans.hopper_attention import MAX_QUERY_LENGTH
from fdpp_jax.plans.hopper_prefill import PrefillAttentionConfig
from fdpp_jax.plans.shapes import AttentionImplementation, AttentionShape, ScaleKind
from fdpp_jax.plans.xla import refuse_cudnn
from fdpp_jax.unified_max import UnifiedMax

_UNIFIED, _ONLINE, _CUDNN = "unified max", "online softmax", "jax.nn, cudnn"


@dataclasses.dataclass(frozen=True)
class PrefillCase:
    """One shape to time. The queries are the last tokens of their sequence.

    Attributes:
      shape: Of the call; see `prefill_case`.
      num_keys: Live keys of each sequence.
    """

    shape: AttentionShape
    num_keys: int

    def live_lengths(self) -> tuple[int, ...]:
        """Live keys of each sequence, B of them."""
        return (self.num_keys,) * self.shape.batch

    def _visible(self, first_row: np.ndarray, last_row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and last key that any of the queries of a span sees."""
        shape, offset = self.shape, self.num_keys - self.shape.query_length
        last = np.full_like(last_row, self.num_keys - 1)
        first = np.zeros_like(first_row)
        if shape.is_causal:
            last = np.minimum(last, last_row + offset)
        if shape.local_window_size is not None:
            left, right = shape.local_window_size
            first = np.maximum(first, first_row + offset - left)
            last = np.minimum(last, last_row + offset + right)
        return first, last

    @property
    def flops(self) -> float:
        """Of both products, over the keys that each query sees."""
        shape = self.shape
        rows = np.arange(shape.query_length)
        first, last = self._visible(rows, rows)
        return float(4 * shape.batch * shape.num_query_heads * shape.head_dim * (last - first + 1).sum())

    def num_blocks(self, block_q: int, block_kv: int) -> int:
        """Blocks of queries and keys, of all heads, in which a query sees a key."""
        shape = self.shape
        first_row = np.arange(0, shape.query_length, block_q)
        last_row = np.minimum(first_row + block_q, shape.query_length) - 1
        first, last = self._visible(first_row, last_row)
        return int(shape.batch * shape.num_query_heads * (last // block_kv - first // block_kv + 1).sum())

    @property
    def num_bytes(self) -> int:
        """Bytes of queries, live keys and values, and results."""
        shape = self.shape
        query_bytes = (4 if shape.dtype == "float32" else 2) * shape.query_length * shape.num_query_heads
        kv_bytes = shape.kv_itemsize * self.num_keys * shape.num_kv_heads
        return 2 * shape.batch * shape.head_dim * (query_bytes + kv_bytes)

    @property
    def label(self) -> str:
        """B, heads, queries and what is special: "1, 32/8, 512 of 32768, pages of 64"."""
        shape = self.shape
        keys = "" if self.num_keys == shape.query_length else f" of {self.num_keys}"
        parts = [str(shape.batch), f"{shape.num_query_heads}/{shape.num_kv_heads}", f"{shape.query_length}{keys}"]
        if shape.head_dim != 128:
            parts.append(f"H {shape.head_dim}")
        if shape.dtype != "bfloat16":
            parts.append(shape.dtype)
        if not shape.is_causal:
            parts.append("not causal")
        if shape.local_window_size is not None:
            parts.append(f"window {shape.local_window_size[0] + 1}")
        if shape.logits_soft_cap is not None:
            parts.append(f"soft cap {shape.logits_soft_cap:g}")
        if shape.has_lengths:
            parts.append("lengths")
        return ", ".join([*parts, *cache_labels(shape)])


def prefill_case(
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    query_length: int,
    *,
    capacity: int | None = None,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    is_causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    lengths: int | None = None,
    page_size: int | None = None,
    kv_dtype: str | None = None,
    scales: ScaleKind = "head",
) -> PrefillCase:
    """A case from sizes.

    Args:
      batch: Sequences.
      num_heads: Query heads.
      num_kv_heads: Key/value heads.
      query_length: Queries per sequence, the last of its live keys; more than 16, which are prefill's.
      capacity: Keys per sequence; None: as many as queries.
      head_dim: Elements per head.
      dtype: Of queries, keys and values.
      is_causal: Whether a query sees the keys up to its own only.
      window: Keys that a query sees, its own included.
      soft_cap: Of the scores.
      lengths: Live keys of each sequence, given as an array. None: no lengths are given, and all keys are live.
      page_size: Keys per page.
      kv_dtype: Of a quantised cache.
      scales: Of a quantised cache.

    Raises:
      ValueError: The sizes do not fit together.
    """
    capacity = query_length if capacity is None else capacity
    num_keys = capacity if lengths is None else lengths
    check_sizes(batch, num_heads, num_kv_heads, capacity, head_dim, query_length, num_keys, page_size)
    if query_length <= MAX_QUERY_LENGTH:
        raise ValueError(
            f"bench prefill is for more than {MAX_QUERY_LENGTH} queries per sequence, got {query_length=}; "
            f"bench attention is for 1 to {MAX_QUERY_LENGTH}"
        )
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"soft_cap must be positive and finite, got {soft_cap}")
    if window is not None and window < 1:
        raise ValueError(f"window must be a positive number of keys, got {window}")
    shape = AttentionShape(
        batch=batch,
        query_length=query_length,
        capacity=capacity,
        num_query_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        is_causal=is_causal,
        has_lengths=lengths is not None,
        local_window_size=None if window is None else (window - 1, 0),
        logits_soft_cap=soft_cap,
        kv_dtype=dtype if kv_dtype is None else kv_dtype,
        page_size=page_size,
        scales=None if kv_dtype is None else scales,
        has_query_offset=num_keys > query_length,
    )
    return PrefillCase(shape, num_keys)


TABLE = (
    *(prefill_case(1, 32, 32, length) for length in (1024, 4096, 8192, 16384)),
    prefill_case(1, 32, 32, 8192, is_causal=False),
    prefill_case(1, 32, 32, 8192, soft_cap=50.0),
    prefill_case(1, 32, 32, 8192, window=4096),
    prefill_case(1, 32, 32, 8192, lengths=8192),
    prefill_case(1, 32, 32, 4096, capacity=8192),
    prefill_case(1, 32, 32, 8192, page_size=64),
    prefill_case(1, 32, 32, 8192, kv_dtype="int8"),
    prefill_case(1, 32, 32, 8192, kv_dtype="float8_e4m3fn"),
    prefill_case(8, 32, 8, 1024),
    prefill_case(1, 32, 32, 8192, head_dim=64),
    prefill_case(1, 16, 8, 8192, head_dim=256),
    prefill_case(1, 16, 8, 8192, head_dim=256, soft_cap=50.0),
    prefill_case(1, 32, 8, 512, capacity=32768, lengths=32768),
    prefill_case(1, 32, 8, 512, capacity=32768, lengths=32768, page_size=64),
)


def bench_prefill(case: PrefillCase, *, quick: bool = False, implementation: str | None = None) -> BenchReport:
    """Times one shape, a line per kernel: `dot_product_attention` as planned with a unified max and with online softmax
    (by the kernel of the former, where that one has it), and jax.nn's cuDNN.

    Args:
      case: The shape.
      quick: Leaves out all but the unified max.
      implementation: The backend whose kernels are timed; None: as planned.

    Raises:
      NotImplementedError: The backend refuses the shape.
      Exception: The error of a kernel of ours; a peer may fail.
      MemoryError: The device has too little memory.
    """
    running = backends.only(implementation, device.current())
    plan = heuristics.plan_attention(case.shape, running, implementation)
    report.begin(running, "queries, keys and values", input_bytes(case.shape))
    candidates = _candidates(case, plan, running, quick)
    timings = _time(case, candidates, running)
    for name, error in timings.failures.items():
        if not candidates[name].is_peer:
            raise error
        progress.say("bench", f"{name} does not run: {report.first_line(error)}")

    def cells(name: str) -> tuple[str, ...]:
        seconds = timings.seconds.get(name)
        if seconds is None:
            return name, "does not run", "", "", ""
        peer = report.ratio(seconds, timings.best([_CUDNN]))
        return name, report.us(seconds), _tflops(case, seconds), report.ratio(seconds, _floor(case, running)), peer

    title = (
        f"Prefill attention on {running.kind}: B, N/K, T = {case.label}, {case.flops / 1e9:.1f} Gflop, "
        f"peak {running.bf16_tflops:g} Tflop/s; {plan.implementation}: {plan.reason}"
    )
    record = provenance() | {"prefill_attention": [_record(case, plan, candidates, timings)]}
    columns = ("kernel", "us", "Tflop/s", "x floor", "x cuDNN")
    return BenchReport(title, columns, tuple(cells(name) for name in candidates), record)


_COLUMNS = (
    "B, N/K, T",
    "Gflop",
    "unified us",
    "Tflop/s",
    "x floor",
    "SM us a block",
    "online us",
    "unified / online",
    "cuDNN us",
    "unified / cuDNN",
)
_NUM_QUICK_COLUMNS = 6


def bench_prefill_table(
    cases: Sequence[PrefillCase] = TABLE,
    *,
    quick: bool = False,
    record_path: str | None = None,
    implementation: str | None = None,
) -> BenchReport:
    """Times many shapes, a line per shape. A block is one of queries and keys that the kernel visits.

    A shape that no kernel takes on this device is a line with the plan's reason in the record. A kernel that fails
    leaves its cells empty, and its error in the record.

    Args:
      cases: The shapes.
      quick: Leaves out all but the unified max.
      record_path: File to which the record is written after each shape, so that a run cut short leaves what it has.
      implementation: The backend whose kernels are timed; None: as planned.

    Raises:
      NotImplementedError: The backend has no kernels for the device.
    """
    running = backends.only(implementation, device.current())
    columns = _COLUMNS[:_NUM_QUICK_COLUMNS] if quick else _COLUMNS
    record = provenance() | {"prefill_attention": list[dict[str, Any]]()}
    title = f"Prefill attention on {running.kind}: medians in microseconds, peak {running.bf16_tflops:g} Tflop/s"
    table = BenchReport(title, columns, (), record)
    for index, case in enumerate(cases):
        progress.say("bench", f"{index + 1} of {len(cases)}: {case.label}")
        plan = heuristics.plan_attention(case.shape, running)
        candidates = _candidates(case, plan, running, quick)
        if plan.backend == "xla":
            progress.say("bench", f"no kernel: {plan.reason}")
            candidates = {name: candidate for name, candidate in candidates.items() if candidate.is_peer}
        timings = _time(case, candidates, running) if candidates else None
        for name, error in ({} if timings is None else timings.failures).items():
            progress.say("bench", f"{name} does not run: {report.first_line(error)}")
        row = _table_cells(case, plan, timings, running)[: len(columns)]
        progress.say("bench", " | ".join(row))
        record["prefill_attention"].append(_record(case, plan, candidates, timings))
        table = dataclasses.replace(table, rows=(*table.rows, row))
        if record_path is not None:
            table.save(record_path)
    return table


def _table_cells(case: PrefillCase, plan: AttentionPlan, timings: Timings | None, running: Device) -> tuple[str, ...]:
    seconds = {} if timings is None else timings.seconds

    def cell(name: str) -> str:
        return report.us(seconds[name]) if name in seconds else "-"

    ours = seconds.get(_UNIFIED, math.nan)
    blocks = _num_blocks(case, plan)
    return (
        case.label,
        f"{case.flops / 1e9:.0f}",
        cell(_UNIFIED),
        "-" if math.isnan(ours) else _tflops(case, ours),
        report.ratio(ours, _floor(case, running)),
        "-" if blocks is None or math.isnan(ours) else f"{ours * 1e6 * running.num_sms / blocks:.2f}",
        cell(_ONLINE),
        report.ratio(ours, seconds.get(_ONLINE, math.nan)),
        cell(_CUDNN),
        report.ratio(ours, seconds.get(_CUDNN, math.nan)),
    )


def _num_blocks(case: PrefillCase, plan: AttentionPlan) -> int | None:
    config = plan.config
    return case.num_blocks(config.block_q, config.block_kv) if isinstance(config, PrefillAttentionConfig) else None


def _floor(case: PrefillCase, running: Device) -> float:
    """Seconds at the peak of the matrix units in 16 bits."""
    return case.flops / (running.bf16_tflops * 1e12)


def _tflops(case: PrefillCase, seconds: float) -> str:
    speed = case.flops / seconds / 1e12
    return f"{speed:.0f}" if speed >= 10 else f"{speed:.3f}"


def _record(
    case: PrefillCase, plan: AttentionPlan, candidates: dict[str, Candidate], timings: Timings | None
) -> dict[str, Any]:
    found = {} if timings is None else report.timings_record(candidates, timings, case.num_bytes)
    return {
        "label": case.label,
        "shape": dataclasses.asdict(case.shape),
        "num_keys": case.num_keys,
        "flops": case.flops,
        "num_blocks": _num_blocks(case, plan),
        "plan": dataclasses.asdict(plan) | {"implementation": plan.implementation},
    } | found


def _time(case: PrefillCase, candidates: dict[str, Candidate], running: Device) -> Timings:
    x, kv = inputs(case.shape, case.live_lengths())
    with device.target(running):
        return time_kernels(candidates, x, copies(kv, num_sets(case.num_bytes, running)), case.num_bytes)


def _candidates(case: PrefillCase, plan: AttentionPlan, running: Device, quick: bool) -> dict[str, Candidate]:
    shape = case.shape
    candidates = {_UNIFIED: Candidate(functools.partial(_op, shape, softmax=UnifiedMax(PHI), implementation=None))}
    if quick:
        return candidates
    # The same kernel: left to choose, the heuristics may take cuDNN.
    named: Any = None if plan.backend == "xla" else plan.implementation
    candidates[_ONLINE] = Candidate(functools.partial(_op, shape, softmax=None, implementation=named))
    # What the op leaves to others because of NaN, or of a window, cuDNN can be asked for all the same.
    plain = dataclasses.replace(shape, has_lengths=False, local_window_size=None)
    if running.is_nvidia and case.num_keys == shape.capacity and refuse_cudnn(plain, running) is None:
        candidates[_CUDNN] = Candidate(functools.partial(_cudnn, shape), is_peer=True)
    return candidates


def _op(
    shape: AttentionShape,
    x: dict[str, jax.Array],
    kv: dict[str, jax.Array],
    *,
    softmax: UnifiedMax | None,
    implementation: AttentionImplementation | None,
) -> jax.Array:
    arrays: dict[str, Any] = x | kv
    lengths = arrays.pop("lengths")
    if shape.has_lengths:
        arrays["key_value_seq_lengths"] = lengths
    return ops.dot_product_attention(
        **arrays,
        is_causal=shape.is_causal,
        local_window_size=shape.local_window_size,
        logits_soft_cap=shape.logits_soft_cap,
        softmax=softmax,
        implementation=implementation,
    )


def _cudnn(shape: AttentionShape, x: dict[str, jax.Array], kv: dict[str, jax.Array]) -> jax.Array:
    """Without lengths, since all keys are live: that spares it the mask."""
    return jax.nn.dot_product_attention(
        x["query"],
        kv["key"],
        kv["value"],
        is_causal=shape.is_causal,
        local_window_size=shape.local_window_size,
        implementation="cudnn",
    )
