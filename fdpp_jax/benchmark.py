"""How fast: a decode step, one attention, one matmul, each beside its peers and the read floor of the same run.

Kernels are timed as a model runs them: many in one jitted program, one after the other, each on its own
buffers, so that launches come from command buffers and nothing is found in L2. Timings are medians.
"""

import dataclasses
import datetime
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdpp_jax import device, heuristics, models, ops
from fdpp_jax.config import AttentionShape, MatmulImplementation, MatmulShape, round_up
from fdpp_jax.generation import DECODE_COMPILER_OPTIONS, decode_step
from fdpp_jax.models import KVCache, LlamaConfig, LlamaForCausalLM
from fdpp_jax.unified_max import UnifiedMax

# Bytes that one timed program reads: on a GPU half a millisecond of reads, which hides the dispatch.
_GPU_PROGRAM_BYTES = 2 << 30
_CPU_PROGRAM_BYTES = 32 << 20
_MAX_SETS = 64
_PAST_L2 = 4  # buffers of so many times the L2's size are not found in it
# A read of this size runs at the full speed of the memory; a longer one takes as much longer.
_LONGEST_READ_BYTES = 1 << 30
_READ_COLUMNS = 4096
_REPEATS = 7
_PROGRAMS_A_REPEAT = 5
_CAPACITY_MULTIPLE = 64


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


def time_kernel(step: Callable[[jax.Array, Any], jax.Array], x: jax.Array, sets: Sequence[Any]) -> float:
    """Seconds that one step(x, set) takes when many run one after the other.

    Args:
      step: The kernel; traced once for each set.
      x: Its small argument, the same every time.
      sets: Its large arguments, pytrees of equal shapes, in distinct buffers.

    Returns:
      The median over several runs, of the wall time of back-to-back programs by the number of steps.
    """

    @jax.jit
    def program(x: jax.Array, sets: Sequence[Any]) -> list[jax.Array]:
        outs = []
        for buffers in sets:
            # The barrier makes a step wait for the one before, and keeps XLA from merging them.
            x, out = jax.lax.optimization_barrier((x, step(x, buffers)))
            outs.append(out)
        return outs

    jax.block_until_ready([program(x, sets) for _ in range(2)])  # the first compiles
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        jax.block_until_ready([program(x, sets) for _ in range(_PROGRAMS_A_REPEAT)])
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) / (_PROGRAMS_A_REPEAT * len(sets))


def num_sets(set_bytes: int, running: device.Device) -> int:
    """How many sets of this size one timed program rotates through: past the L2, and long enough.

    At most _MAX_SETS, since every set is a step to compile: sets below some 3 MB stay in an H200's L2.
    """
    program_bytes = _GPU_PROGRAM_BYTES if running.is_gpu else _CPU_PROGRAM_BYTES
    past_l2 = -(-_PAST_L2 * running.l2_bytes // set_bytes) if running.is_gpu else 1
    return max(2, min(_MAX_SETS, max(past_l2, program_bytes // set_bytes)))


def read_floor(num_bytes: int) -> float:
    """Seconds that reading so many bytes takes: x.astype(float32).sum(1) in bfloat16, as XLA compiles it.

    Beyond 1 GiB the time is scaled up from that of 1 GiB.
    """
    rows = max(1, min(num_bytes, _LONGEST_READ_BYTES) // (2 * _READ_COLUMNS))
    read_bytes = rows * 2 * _READ_COLUMNS
    keys = jax.random.split(jax.random.key(0), num_sets(read_bytes, device.current()))
    sets = [_random(key, (rows, _READ_COLUMNS), jnp.bfloat16) for key in keys]
    seconds = time_kernel(lambda x, w: w.astype(jnp.float32).sum(1) + x, jnp.ones((rows,), jnp.float32), sets)
    return seconds * num_bytes / read_bytes


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _random(key: jax.Array, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> jax.Array:
    """Normal values: zeros would cost a GPU less power, and so less time."""
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


# One kernel.

_Candidate = tuple[Callable[[jax.Array, Any], jax.Array], bool]  # the kernel, and whether it is a peer


def bench_attention(shape: AttentionShape) -> BenchReport:
    """Times one decode attention over a full cache: ours, jax.nn's two, and the read floor of K and V.

    Args:
      shape: Of the call, with query_length 1; all `capacity` keys are live.

    Raises:
      ValueError: query_length is not 1.
    """
    if shape.query_length != 1:
        raise ValueError(f"decode attention has query_length 1, got {shape.query_length}")
    running, dtype = device.current(), jnp.dtype(shape.dtype)
    kv_shape = (shape.batch, shape.capacity, shape.num_kv_heads, shape.head_dim)
    kv_bytes = 2 * dtype.itemsize * shape.batch * shape.capacity * shape.num_kv_heads * shape.head_dim
    key, *keys = jax.random.split(jax.random.key(0), 1 + 2 * num_sets(kv_bytes, running))
    tensors = [_random(k, kv_shape, dtype) for k in keys]
    lengths = jnp.full((shape.batch,), shape.capacity, jnp.int32)
    sets = [(k, v, lengths) for k, v in zip(tensors[::2], tensors[1::2], strict=True)]
    query = _random(key, (shape.batch, 1, shape.num_query_heads, shape.head_dim), dtype)

    def ours(query: jax.Array, cache: Any, softmax: UnifiedMax | None) -> jax.Array:
        key, value, lengths = cache
        return ops.unchecked_decode_attention(query, key, value, key_value_seq_lengths=lengths, softmax=softmax)

    def theirs(query: jax.Array, cache: Any, implementation: Any) -> jax.Array:
        key, value, lengths = cache
        return jax.nn.dot_product_attention(
            query, key, value, key_value_seq_lengths=lengths, implementation=implementation
        )

    plan = heuristics.plan_attention(dataclasses.replace(shape, has_lengths=True), running)
    candidates: dict[str, _Candidate] = {
        f"ours, unified max ({plan.implementation})": (functools.partial(ours, softmax=UnifiedMax()), False),
        f"ours, online softmax ({plan.implementation})": (functools.partial(ours, softmax=None), False),
        "jax.nn, xla": (functools.partial(theirs, implementation="xla"), True),
    }
    if running.is_nvidia and dtype != jnp.float32:
        candidates["jax.nn, cudnn"] = (functools.partial(theirs, implementation="cudnn"), True)
    title = (
        f"Decode attention on {running.kind}: B {shape.batch}, N/K {shape.num_query_heads}/{shape.num_kv_heads}, "
        f"S {shape.capacity}, H {shape.head_dim}, {shape.dtype}, {kv_bytes / 1e6:.1f} MB of K and V"
    )
    return _bench_kernel(title, candidates, query, sets, kv_bytes, {"attention": dataclasses.asdict(shape)})


def bench_matmul(shape: MatmulShape) -> BenchReport:
    """Times x [m, k] @ w [k, n]: each of our kernels that takes the shape, XLA's, and the read floor of w."""
    running, dtype = device.current(), jnp.dtype(shape.dtype)
    weight_bytes = dtype.itemsize * shape.k * shape.n
    key, *keys = jax.random.split(jax.random.key(0), 1 + num_sets(weight_bytes, running))
    sets = [_random(k, (shape.k, shape.n), dtype, 0.02) for k in keys]
    x = _random(key, (shape.m, shape.k), dtype)

    planned = heuristics.plan_matmul(shape, running).implementation
    candidates: dict[str, _Candidate] = {}
    kernels: tuple[MatmulImplementation, ...] = ("gemv", "flat")
    for name in kernels:
        if heuristics.refuse_kernel_matmul(shape, running, name) is None:
            label = f"ours, {name}" + (" (planned)" if name == planned else "")
            candidates[label] = (functools.partial(ops.flat_matmul, implementation=name), False)
    candidates["jnp.dot" + (" (planned)" if planned == "xla" else "")] = (jnp.dot, True)
    title = (
        f"Matmul on {running.kind}: [{shape.m}, {shape.k}] @ [{shape.k}, {shape.n}], {shape.dtype}, "
        f"{weight_bytes / 1e6:.1f} MB of weights"
    )
    return _bench_kernel(title, candidates, x, sets, weight_bytes, {"matmul": dataclasses.asdict(shape)})


def _bench_kernel(
    title: str,
    candidates: dict[str, _Candidate],
    x: jax.Array,
    sets: Sequence[Any],
    num_bytes: int,
    what: dict[str, Any],
) -> BenchReport:
    """Times every candidate on the same buffers. A peer may fail; ours may not."""
    running = device.current()
    if running.is_gpu and len(sets) * num_bytes < _PAST_L2 * running.l2_bytes:
        title += "; so small that L2 holds it"
    _progress("read floor")
    floor = read_floor(num_bytes)
    times: dict[str, float | None] = {}
    for name, (step, is_peer) in candidates.items():
        _progress(name)
        try:
            times[name] = time_kernel(step, x, sets)
        except Exception as error:
            if not is_peer:
                raise
            _progress(f"{name} does not run: {str(error).splitlines()[0]}")
            times[name] = None
    peers = [times[name] for name, (_, is_peer) in candidates.items() if is_peer]
    best_peer = min((seconds for seconds in peers if seconds is not None), default=float("nan"))

    def cells(name: str, seconds: float | None) -> tuple[str, ...]:
        if seconds is None:
            return name, "does not run", "", "", ""
        speed = num_bytes / seconds / 1e12
        return name, f"{seconds * 1e6:.1f}", f"{speed:.2f}", f"{seconds / floor:.2f}", f"{seconds / best_peer:.2f}"

    rows = [cells(name, seconds) for name, seconds in times.items()]
    rows.append(cells("read floor", floor))
    times_us = {name: None if seconds is None else seconds * 1e6 for name, seconds in times.items()}
    record = _provenance() | what | {"bytes": num_bytes, "read_floor_us": floor * 1e6, "time_us": times_us}
    return BenchReport(title, ("kernel", "us", "TB/s", "x floor", "x best peer"), tuple(rows), record)


# The decode step.


def bench_decode(config: LlamaConfig, batch: int = 1, context: int = 1024, steps: int = 64) -> BenchReport:
    """Times greedy decoding with random weights: ours, ours with online softmax, plain XLA, and the read floor.

    The floor is that of all weights that a step needs and the live keys and values.

    Args:
      config: The model's shapes.
      batch: Rows decoded together, B.
      context: Live tokens of every row after the last step.
      steps: Decode steps of one timed loop.

    Raises:
      ValueError: batch or steps is not positive, or context is too short for the steps.
    """
    if batch < 1 or steps < 1 or context <= steps:
        raise ValueError(
            f"expected a batch and steps of at least 1 and context above steps, got {batch=} {steps=} {context=}"
        )
    running = device.current()
    dtype = jnp.dtype(jnp.bfloat16 if running.is_gpu else jnp.float32)
    _progress("random weights")
    model = models.random_model(config, dtype)
    live_tokens = context - steps / 2  # on average
    weight_bytes = _weight_bytes(model)
    kv_bytes = int(2 * config.num_hidden_layers * batch * live_tokens * config.kv_size * dtype.itemsize)
    _progress("read floor")
    floor = read_floor(weight_bytes + kv_bytes)

    variants: dict[str, tuple[UnifiedMax | None, Any]] = {
        "ours, unified max": (UnifiedMax(jnp.float32(6.0)), None),
        "ours, online softmax": (None, None),
        "plain XLA": (None, "xla"),
    }
    seconds, recomputed = {}, {}
    for name, (softmax, implementation) in variants.items():
        _progress(name)
        seconds[name], recomputed[name] = _time_decode(model, batch, context, steps, softmax, implementation)
    baseline = seconds["plain XLA"]
    rows = [
        (
            name,
            f"{per_step * 1e3:.3f}",
            f"{batch / per_step:.1f}",
            f"{per_step / floor:.2f}",
            f"{baseline / per_step:.2f}x",
            str(recomputed[name]),
        )
        for name, per_step in seconds.items()
    ]
    rows.append(("read floor", f"{floor * 1e3:.3f}", f"{batch / floor:.1f}", "1.00", f"{baseline / floor:.2f}x", ""))
    title = (
        f"Decode on {running.kind}: {config.num_hidden_layers} layers of {config.hidden_size}, batch {batch}, "
        f"context {context}, {dtype.name}, {weight_bytes / 1e9:.2f} GB of weights, {kv_bytes / 1e9:.2f} GB of K and V"
    )
    record = _provenance() | {
        "config": dataclasses.asdict(config),
        "decode": {"batch": batch, "context": context, "steps": steps, "dtype": dtype.name},
        "bytes": {"weights": weight_bytes, "keys_and_values": kv_bytes},
        "read_floor_ms": floor * 1e3,
        "ms_per_step": {name: per_step * 1e3 for name, per_step in seconds.items()},
        "recomputed_steps": recomputed,
    }
    columns = ("decoding", "ms/token", "tokens/s", "x floor", "vs XLA", f"redone of {steps}")
    return BenchReport(title, columns, tuple(rows), record)


def _weight_bytes(model: LlamaForCausalLM) -> int:
    """Bytes of weights that a decode step reads: all, but of an embedding that is no head only a few rows."""
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return total if model.config.tie_word_embeddings else total - model.model.embed_tokens.weight[...].nbytes


def _time_decode(
    model: LlamaForCausalLM, batch: int, context: int, steps: int, softmax: UnifiedMax | None, implementation: Any
) -> tuple[float, int]:
    """Median seconds a step, and how many of the loop's steps were redone."""
    graphdef, weights = nnx.split(model)
    cache = _random_cache(model, batch, round_up(context, _CAPACITY_MULTIPLE))

    @functools.partial(jax.jit, donate_argnums=1, compiler_options=DECODE_COMPILER_OPTIONS)
    def loop(
        weights: nnx.State, cache: KVCache, tokens: jax.Array, softmax: UnifiedMax | None
    ) -> tuple[KVCache, jax.Array, jax.Array]:
        model = nnx.merge(graphdef, weights)

        def body(_: jax.Array, carry: Any) -> Any:
            cache, tokens, redone = carry
            if implementation is None:
                logits, cache, is_redone = decode_step(model, tokens, cache, softmax)
                redone += is_redone
            else:
                logits, cache, _ = model.decode(tokens, cache, implementation=implementation)
            return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32), redone

        return jax.lax.fori_loop(0, steps, body, (cache, tokens, jnp.int32(0)))

    tokens = jnp.arange(batch, dtype=jnp.int32) % model.config.vocab_size
    seconds = []
    for _ in range(1 + _REPEATS):  # the first compiles
        cache = dataclasses.replace(cache, lengths=jnp.full((batch,), context - steps, jnp.int32))
        jax.block_until_ready((weights, cache))
        started = time.perf_counter()
        cache, _, redone = jax.block_until_ready(loop(weights, cache, tokens, softmax))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]) / steps, int(redone)


def _random_cache(model: LlamaForCausalLM, batch: int, capacity: int) -> KVCache:
    """A cache full of normal values, made array by array."""
    empty = jax.eval_shape(lambda: KVCache.create(model.config, batch, capacity, model.dtype))
    leaves, treedef = jax.tree.flatten((empty.keys, empty.values))
    seeds = jax.random.split(jax.random.key(1), len(leaves))
    filled = [_random(seed, leaf.shape, leaf.dtype) for seed, leaf in zip(seeds, leaves, strict=True)]
    keys, values = jax.tree.unflatten(treedef, filled)
    return KVCache(keys, values, jnp.zeros((batch,), jnp.int32))


# The record.


def _provenance() -> dict[str, Any]:
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


def _progress(what: str) -> None:
    """One line on stderr: compiling and timing take a while."""
    sys.stderr.write(f"bench: {what}\n")
    sys.stderr.flush()
