"""How fast decode attention is: kernel, ablations and public op, beside jax.nn and the read floor of the live keys.

Ours gets lengths, as a decode step has them. jax.nn gets none where all keys are live, which spares it the mask.
"""

import dataclasses
import functools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fdpp_jax import heuristics, ops, progress
from fdpp_jax.bench import report
from fdpp_jax.bench.clock import Candidate, Timings, copies, num_sets, random_normal, time_kernels
from fdpp_jax.bench.provenance import provenance
from fdpp_jax.bench.report import BenchReport
from fdpp_jax.ops.running import module_of
from fdpp_jax.plans import backends, device
from fdpp_jax.plans.backend import AttentionPlan
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions
from fdpp_jax.plans.device import Device
from fdpp_jax.plans.hopper_attention import MAX_CHUNK, MAX_QUERY_LENGTH, DecodeAttentionConfig, grid_attention_config
from fdpp_jax.plans.shapes import PAGE_SIZES, AttentionShape, ScaleKind
from fdpp_jax.unified_max import Recompute, UnifiedMax

type Lengths = Literal["full", "mixed"] | int

PHI = 6.0  # the scores of normal queries and keys are normal: every row is safe
_SHORTEST_MIXED = 64
_INT8_STEP = 1 / 32  # normal keys and values reach 127 steps at 4
_UNIFIED, _PUBLIC, _ONLINE, _SEPARATE = "unified max", "public op", "online softmax", "separate combine"
_CUDNN, _XLA = "jax.nn, cudnn", "jax.nn, xla"
_PEERS = (_CUDNN, _XLA)
_PLACES: tuple[Recompute, ...] = ("kernel", "launch", "cond")


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """One shape to time.

    Attributes:
      shape: Of the call; see `attention_case`.
      lengths: Live keys of each sequence: all ("full"), so many, or "mixed": from 64 to the capacity, log-uniform
        and the same every time, both ends included.
    """

    shape: AttentionShape
    lengths: Lengths = "full"

    def live_lengths(self) -> tuple[int, ...]:
        """Live keys of each sequence, B of them."""
        batch, capacity = self.shape.batch, self.shape.capacity
        if self.lengths != "mixed":
            return (capacity if self.lengths == "full" else self.lengths,) * batch
        seeded = random.Random(0)
        octaves = math.log2(capacity / _SHORTEST_MIXED)
        between = [round(_SHORTEST_MIXED * 2 ** (octaves * seeded.random())) for _ in range(batch - 2)]
        lengths = [_SHORTEST_MIXED, capacity, *between]
        seeded.shuffle(lengths)
        return tuple(lengths)

    @property
    def live_bytes(self) -> int:
        """Bytes of the live keys and values, and of their scales where every token has one."""
        shape = self.shape
        token_bytes = shape.head_dim * shape.kv_itemsize + (4 if shape.scales == "token" else 0)
        return 2 * sum(self.live_lengths()) * shape.num_kv_heads * token_bytes

    @property
    def label(self) -> str:
        """B, heads, S and what is special: "8, 32/8, 4096, pages of 16"."""
        shape = self.shape
        parts = [str(shape.batch), f"{shape.num_query_heads}/{shape.num_kv_heads}", str(shape.capacity)]
        if shape.query_length > 1:
            parts.append(f"T {shape.query_length}")
        if self.lengths == "mixed":
            parts.append(f"lengths {_SHORTEST_MIXED}..{shape.capacity}")
        elif self.lengths != "full":
            parts.append(f"length {self.lengths}")
        return ", ".join([*parts, *cache_labels(shape)])


def cache_labels(shape: AttentionShape) -> list[str]:
    """What is special about the cache of a shape: "pages of 16", "int8 a token"."""
    labels = [] if shape.page_size is None else [f"pages of {shape.page_size}"]
    if shape.scales is not None:
        labels.append(f"{'fp8' if shape.kv_dtype == 'float8_e4m3fn' else shape.kv_dtype} a {shape.scales}")
    return labels


def attention_case(
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    capacity: int,
    *,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    query_length: int = 1,
    lengths: Lengths = "full",
    page_size: int | None = None,
    kv_dtype: str | None = None,
    scales: ScaleKind = "head",
) -> AttentionCase:
    """A case from sizes. Several queries are the last tokens of their sequence, causally masked (speculation).

    Raises:
      ValueError: The sizes do not fit together.
    """
    if query_length > MAX_QUERY_LENGTH:
        raise ValueError(
            f"bench attention is for 1 to {MAX_QUERY_LENGTH} queries per sequence, got {query_length=}; "
            "bench prefill is for more"
        )
    if lengths == "mixed" and (batch < 2 or capacity < _SHORTEST_MIXED):
        raise ValueError(f"mixed lengths need two sequences and {_SHORTEST_MIXED} keys, got {batch=} {capacity=}")
    shortest = _SHORTEST_MIXED if lengths == "mixed" else capacity if lengths == "full" else lengths
    check_sizes(batch, num_heads, num_kv_heads, capacity, head_dim, query_length, shortest, page_size)
    shape = AttentionShape(
        batch=batch,
        query_length=query_length,
        capacity=capacity,
        num_query_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        is_causal=query_length > 1,
        kv_dtype=dtype if kv_dtype is None else kv_dtype,
        page_size=page_size,
        scales=None if kv_dtype is None else scales,
        has_query_offset=query_length > 1,
    )
    return AttentionCase(shape, lengths)


def check_sizes(
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    capacity: int,
    head_dim: int,
    query_length: int,
    shortest: int,
    page_size: int | None,
) -> None:
    """Raises ValueError unless the sizes of a case fit together; `shortest` is the fewest live keys of a sequence."""
    if min(batch, num_heads, num_kv_heads, capacity, head_dim, query_length) < 1 or num_heads % num_kv_heads:
        raise ValueError(
            "expected positive sizes and query heads that are a multiple of the key/value heads, got "
            f"{batch=} {num_heads=} {num_kv_heads=} {capacity=} {head_dim=} {query_length=}"
        )
    if query_length > capacity:
        raise ValueError(f"capacity must be at least query_length, got {capacity=} {query_length=}")
    if not query_length <= shortest <= capacity:
        raise ValueError(f"lengths must lie in {query_length=}..{capacity=}, got {shortest}")
    if page_size is not None and (page_size < 1 or capacity % page_size):
        raise ValueError(f"the capacity must be whole pages, got {capacity=} and {page_size=}")
    if page_size is not None and page_size not in PAGE_SIZES:
        raise ValueError(f"pages must hold {', '.join(map(str, PAGE_SIZES))} keys, got {page_size=}")


TABLE = (
    attention_case(1, 32, 32, 1024),
    attention_case(1, 32, 32, 4096),
    attention_case(1, 32, 32, 16384),
    attention_case(8, 32, 32, 1024),
    attention_case(8, 32, 32, 4096),
    attention_case(32, 32, 32, 1024),
    attention_case(1, 32, 8, 4096),
    attention_case(8, 32, 8, 4096),
    attention_case(1, 64, 8, 16384),
    attention_case(8, 32, 8, 8192, lengths="mixed"),
    attention_case(1, 32, 32, 16384, lengths=1024),
    attention_case(8, 32, 8, 4096, page_size=16),
    attention_case(8, 32, 8, 4096, page_size=64),
    attention_case(8, 32, 8, 4096, page_size=256),
    attention_case(8, 32, 8, 4096, kv_dtype="int8"),
    attention_case(8, 32, 8, 4096, kv_dtype="int8", scales="token"),
    attention_case(8, 32, 8, 4096, kv_dtype="float8_e4m3fn"),
    attention_case(8, 32, 32, 4096, kv_dtype="int8"),
    attention_case(8, 32, 32, 4096, kv_dtype="int8", scales="token"),
    attention_case(8, 32, 32, 4096, kv_dtype="float8_e4m3fn"),
    attention_case(8, 32, 8, 16384),
    attention_case(8, 32, 8, 16384, kv_dtype="int8"),
    attention_case(8, 32, 8, 16384, kv_dtype="float8_e4m3fn"),
)


def bench_attention(case: AttentionCase, *, quick: bool = False, implementation: str | None = None) -> BenchReport:
    """Times one shape, a line per kernel.

    - unified max: the kernel as planned, without a recompute; only where there is a kernel
    - public op: dot_product_attention with UnifiedMax, and with the recompute in its other places
    - online softmax: the kernel with a running max, as planned for it
    - separate combine: the kernel whose partial sums a second launch merges, on Hopper without clusters; not where that
      is the plan
    - jax.nn's two implementations, which take neither a paged nor a quantised cache

    Args:
      case: The shape.
      quick: Leaves out ablations and peers.
      implementation: The backend whose kernels are timed; None: as planned.

    Raises:
      NotImplementedError: The backend refuses the shape.
      Exception: The error of a kernel of ours; a peer may fail.
      MemoryError: The device has too little memory.
    """
    running = backends.only(implementation, device.current())
    heuristics.plan_attention(case.shape, running, implementation)  # raises where it refuses
    report.begin(running, "queries, keys and values", input_bytes(case.shape))
    candidates, timings, plan = _measure(case, running, quick, () if quick else _PLACES)
    title = (
        f"Decode attention on {running.kind}: B, N/K, S = {case.label}, H {case.shape.head_dim}, {case.shape.dtype}, "
        f"{case.live_bytes / 1e6:.1f} MB of live K and V; {plan.implementation}: {plan.reason}"
    )
    what = {"attention": _record(case, plan)}
    baseline = _UNIFIED if _UNIFIED in candidates else _PUBLIC
    return report.kernel_report(title, candidates, timings, case.live_bytes, what, baseline)


_COLUMNS = (
    "B, N/K, S",
    "MB",
    "floor us",
    "ours us",
    "x floor",
    "public op us",
    "online us (saved)",
    "separate combine us (saved)",
    "cuDNN us",
    "XLA us",
    "x best peer",
)
_NUM_QUICK_COLUMNS = 6


def bench_attention_table(
    cases: Sequence[AttentionCase] = TABLE,
    *,
    quick: bool = False,
    record_path: str | None = None,
    implementation: str | None = None,
) -> BenchReport:
    """Times many shapes, a line per shape; "ours" is the kernel as planned, or the public op where there is no kernel.

    Only `bench_attention` times the recompute in its other places: `lax.cond` takes the longest to compile. A kernel
    that fails, ours or a peer, leaves its cell empty and its error in the record. A shape that a named backend refuses
    is a line of the floor and the peers, with the plan's reason in the record.

    Args:
      cases: The shapes.
      quick: Leaves out ablations and peers.
      record_path: File to which the record is written after each shape, so that a run cut short leaves what it has.
      implementation: The backend whose kernels are timed; None: as planned.

    Raises:
      NotImplementedError: The backend has no kernels for the device.
    """
    running = backends.only(implementation, device.current())
    columns = _COLUMNS[:_NUM_QUICK_COLUMNS] if quick else _COLUMNS
    rows: list[tuple[str, ...]] = []
    record = provenance() | {"attention_table": list[dict[str, Any]]()}
    table = BenchReport(f"Decode attention on {running.kind}: medians in microseconds", columns, (), record)
    for index, case in enumerate(cases):
        progress.say("bench", f"{index + 1} of {len(cases)}: {case.label}")
        candidates, timings, plan = _measure(case, running, quick)
        if running.only_backend not in (None, plan.backend):
            progress.say("bench", f"no kernel of {running.only_backend}: {plan.reason}")
        for name, error in timings.failures.items():
            progress.say("bench", f"{name} does not run: {report.first_line(error)}")
        rows.append(_table_cells(case, timings)[: len(columns)])
        progress.say("bench", " | ".join(rows[-1]))
        record["attention_table"].append(
            _record(case, plan) | report.timings_record(candidates, timings, case.live_bytes)
        )
        table = dataclasses.replace(table, rows=tuple(rows))
        if record_path is not None:
            table.save(record_path)
    return table


def _table_cells(case: AttentionCase, timings: Timings) -> tuple[str, ...]:
    def cell(name: str) -> str:
        return report.us(timings.seconds[name]) if name in timings.seconds else "-"

    def cell_saved(name: str) -> str:
        other = timings.seconds.get(name)
        return "-" if other is None else f"{cell(name)} ({report.saving(timings.seconds.get(ours), other)})"

    ours = _UNIFIED if _UNIFIED in timings.seconds else _PUBLIC
    ours_seconds = timings.seconds.get(ours, math.nan)
    return (
        case.label,
        f"{case.live_bytes / 1e6:.1f}",
        report.us(timings.floor),
        cell(ours),
        report.ratio(ours_seconds, timings.floor),
        cell(_PUBLIC),
        cell_saved(_ONLINE),
        cell_saved(_SEPARATE),
        cell(_CUDNN),
        cell(_XLA),
        report.ratio(ours_seconds, timings.best(_PEERS)),
    )


def _record(case: AttentionCase, plan: AttentionPlan) -> dict[str, Any]:
    return {
        "label": case.label,
        "shape": dataclasses.asdict(case.shape),
        "lengths": list(case.live_lengths()),
        "plan": dataclasses.asdict(plan) | {"implementation": plan.implementation},
    }


def _measure(
    case: AttentionCase, running: Device, quick: bool, places: Sequence[Recompute] = ()
) -> tuple[dict[str, Candidate], Timings, AttentionPlan]:
    plan = heuristics.plan_attention(case.shape, running)
    candidates = _candidates(case, plan, running, quick, places)
    x, kv = inputs(case.shape, case.live_lengths())
    sets = copies(kv, num_sets(case.live_bytes, running))
    # Each query is the result before, as in a model. The values become small, which no kernel minds.
    with device.target(running):
        timings = time_kernels(candidates, x, sets, case.live_bytes, lambda x, out: x | {"query": out})
    return candidates, timings, plan


# The candidates are functions of x (the query, lengths and other small arrays) and of one cache.


def _candidates(
    case: AttentionCase, plan: AttentionPlan, running: Device, quick: bool, places: Sequence[Recompute]
) -> dict[str, Candidate]:
    def ours(function: Callable[..., jax.Array], *, place: Recompute | None = None, **static: Any) -> Candidate:
        # lax.cond breaks the command buffer, and takes the longest to compile.
        return Candidate(functools.partial(function, case.shape, **static), is_short=place == "cond")

    candidates = {}
    has_kernel, is_refused = plan.backend != "xla", running.only_backend not in (None, plan.backend)
    if has_kernel:
        candidates[_UNIFIED] = ours(_kernel, plan=plan, phi=PHI)
    if not is_refused:
        candidates[_PUBLIC] = ours(_op, softmax=UnifiedMax(PHI), place=plan.recompute)
    if quick:
        return candidates
    if has_kernel:
        op = backends.by_name(plan.backend).attention
        assert op is not None
        for place in places:
            if place != plan.recompute and place in op.recomputes:
                candidates[f"{_PUBLIC}, {place}"] = ours(_op, softmax=UnifiedMax(PHI, place), place=place)
        online = heuristics.plan_attention(dataclasses.replace(case.shape, is_online=True), running, plan.backend)
        candidates[_ONLINE] = ours(_kernel, plan=online, phi=None)
        separate = _separate_combine(case.shape, plan, running)
        if separate is not None:
            candidates[_SEPARATE] = ours(_kernel, plan=separate, phi=PHI)
    elif not is_refused:
        candidates[_ONLINE] = ours(_op, softmax=None)
    if case.shape.page_size is None and case.shape.scales is None:
        if running.is_nvidia and case.shape.dtype != "float32":
            candidates[_CUDNN] = Candidate(functools.partial(_jax_nn, case, implementation="cudnn"), is_peer=True)
        candidates[_XLA] = Candidate(functools.partial(_jax_nn, case, implementation="xla"), is_peer=True)
    return candidates


def _separate_combine(shape: AttentionShape, plan: AttentionPlan, running: Device) -> AttentionPlan | None:
    """The plan with a second launch that merges; None where it has one, or nothing to merge."""
    config = plan.config
    if plan.algorithm != "decode" or config.combine == "launch":
        return None
    if isinstance(config, DecodeAttentionConfig):
        grid = grid_attention_config(shape, running)
        splits = max(1, grid.num_splits // min(shape.batch, MAX_CHUNK))  # per sequence
        config = dataclasses.replace(grid, num_splits=splits)
    return dataclasses.replace(plan, config=dataclasses.replace(config, combine="launch"))


def _kernel(
    shape: AttentionShape,
    x: dict[str, jax.Array],
    kv: dict[str, jax.Array],
    *,
    plan: AttentionPlan,
    phi: float | None,
) -> jax.Array:
    arrays = AttentionArrays(**x, **kv, phi=None if phi is None else jnp.float32(phi))
    options = AttentionOptions(1 / math.sqrt(shape.head_dim), shape.is_causal)
    out: jax.Array = module_of(plan).attention(arrays, options, plan)
    return out


def _op(
    shape: AttentionShape, x: dict[str, jax.Array], kv: dict[str, jax.Array], *, softmax: UnifiedMax | None
) -> jax.Array:
    arrays: dict[str, Any] = x | kv
    lengths = arrays.pop("lengths")
    return ops.dot_product_attention(
        **arrays, key_value_seq_lengths=lengths, is_causal=shape.is_causal, softmax=softmax
    )


def _jax_nn(
    case: AttentionCase, x: dict[str, jax.Array], kv: dict[str, jax.Array], *, implementation: Any
) -> jax.Array:
    shape, mask = case.shape, None
    if shape.is_causal:  # jax.nn's own causal mask starts at key 0
        query_pos = x["query_offset"][:, None] + jnp.arange(shape.query_length)
        mask = (jnp.arange(shape.capacity) <= query_pos[:, :, None])[:, None]  # [B, 1, T, S]
    return jax.nn.dot_product_attention(
        x["query"],
        kv["key"],
        kv["value"],
        mask=mask,
        key_value_seq_lengths=None if case.lengths == "full" else x["lengths"],
        implementation=implementation,
    )


def inputs(shape: AttentionShape, live_lengths: Sequence[int]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The small arrays of a call and one cache, random; the pages of a sequence lie anywhere in the pool.

    The queries are the last of their sequence, where the shape has an offset.
    """
    keys = jax.random.split(jax.random.key(0), 5)
    query_shape = (shape.batch, shape.query_length, shape.num_query_heads, shape.head_dim)
    x = {
        "query": random_normal(keys[0], query_shape, jnp.dtype(shape.dtype)),
        "lengths": jnp.array(live_lengths, jnp.int32),
    }
    if shape.has_query_offset:
        x["query_offset"] = x["lengths"] - shape.query_length
    rows = (shape.batch, shape.capacity)
    if shape.page_size is not None:
        pages = np.random.default_rng(0).permutation(shape.batch * shape.capacity // shape.page_size)
        x["page_table"] = jnp.asarray(pages.reshape(shape.batch, -1), jnp.int32)
        rows = (pages.size, shape.page_size)
    cache_shape = (*rows, shape.num_kv_heads, shape.head_dim)
    kv = {"key": _random_cache(keys[1], cache_shape, shape), "value": _random_cache(keys[2], cache_shape, shape)}
    if shape.scales is not None:
        # Within a quarter of the scale that makes the values normal again.
        middle = _INT8_STEP if shape.kv_dtype == "int8" else 1.0
        per_token = shape.scales == "token"
        scale_shape = cache_shape[:3] if per_token else (shape.num_kv_heads,)
        for name, seed in (("key_scale", keys[3]), ("value_scale", keys[4])):
            scale = jax.random.uniform(seed, scale_shape, jnp.float32, 0.75 * middle, 1.25 * middle)
            (kv if per_token else x)[name] = scale
    return x, kv


def input_bytes(shape: AttentionShape) -> int:
    """Bytes of `inputs`, without small ones."""
    query_bytes = shape.query_length * shape.num_query_heads * jnp.dtype(shape.dtype).itemsize
    kv_bytes = 2 * shape.capacity * shape.num_kv_heads * shape.kv_itemsize
    return shape.batch * shape.head_dim * (query_bytes + kv_bytes)


def _random_cache(key: jax.Array, cache_shape: tuple[int, ...], shape: AttentionShape) -> jax.Array:
    if shape.kv_dtype == "int8":
        return _random_int8(key, cache_shape)
    return random_normal(key, cache_shape, jnp.dtype(shape.kv_dtype or shape.dtype))


@functools.partial(jax.jit, static_argnames="cache_shape")
def _random_int8(key: jax.Array, cache_shape: tuple[int, ...]) -> jax.Array:
    steps = jnp.round(jax.random.normal(key, cache_shape, jnp.float32) / _INT8_STEP)
    return jnp.clip(steps, -127, 127).astype(jnp.int8)
