"""How fast a decode step is, beside plain XLA and the read floor of the same run."""

import concurrent.futures
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fdpp_jax import models, progress
from fdpp_jax.bench import clock
from fdpp_jax.bench.clock import read_floor
from fdpp_jax.bench.generate import KINDS, generate_timers
from fdpp_jax.bench.provenance import provenance
from fdpp_jax.bench.report import BenchReport, begin
from fdpp_jax.decode_loop import Structure, decode_compiler_options, decode_step, flattened, rebuilt
from fdpp_jax.models import CausalLM, DecoderConfig, KVCache
from fdpp_jax.models.cache import cache_bytes
from fdpp_jax.models.checks import check_context
from fdpp_jax.models.layers import Embedding
from fdpp_jax.models.step_cache import StepCache
from fdpp_jax.plans import backends, device
from fdpp_jax.plans.backend import Plan
from fdpp_jax.plans.shapes import AttentionShape, round_up
from fdpp_jax.unified_max import UnifiedMax

_CAPACITY_MULTIPLE = 64

# A softmax policy, and which implementation: None for ours.
type _Variant = tuple[UnifiedMax | None, Literal["xla"] | None]


def bench_decode(
    config: DecoderConfig,
    batch: int = 1,
    context: int = 1024,
    steps: int = 64,
    *,
    implementation: str | None = None,
    generate: Sequence[str] = (),
) -> BenchReport:
    """Times greedy decoding with random weights: ours, ours with online softmax, and plain XLA, in turns.

    phi is the middle of what the rows of the same steps have for ln sum e^score, recorded before the timing: random
    weights make other scores than a checkpoint's, and no phi is right for all shapes.

    The read floor is that of the weights that a step needs, and of the live keys and values inside a layer's window.

    Args:
      config: The model's shapes.
      batch: Rows decoded together, B.
      context: Live tokens of every row after the last step.
      steps: Decode steps of one timed loop.
      implementation: The backend whose kernels are timed, of attention, matmuls and fused layers; plain XLA computes
        what the backend leaves to it. None: as planned.
      generate: Kinds of sampling (`bench.generate.KINDS`) with which `generate` is timed as well. It takes turns with
        the loops, and makes as many tokens; its cache has more slots where context - steps is no power of two.

    Raises:
      NotImplementedError: The backend refuses the attention of a layer.
      ValueError: batch or steps is not positive, or context is too short for the steps or too long for the model, or
        a kind of sampling is unknown, or `generate` has one step only.
      MemoryError: The device has too little memory.
    """
    if batch < 1 or steps < 1 or context <= steps:
        raise ValueError(
            f"expected a batch and steps of at least 1 and context above steps, got {batch=} {steps=} {context=}"
        )
    if unknown := [kind for kind in generate if kind not in KINDS]:
        raise ValueError(f"generate must be among {', '.join(KINDS)}, got {', '.join(unknown)}")
    if generate and steps < 2:
        raise ValueError(f"expected steps of at least 2 where generate is timed, got {steps=}")
    check_context(context, config.position_limit)
    running = backends.only(implementation, device.current())
    dtype = jnp.dtype(jnp.bfloat16 if running.is_gpu else jnp.float32)
    capacity = round_up(context, _CAPACITY_MULTIPLE)
    plans = models.model_plans(config, batch=batch, capacity=capacity, device=running, dtype=dtype, is_online=False)
    for _, shape, plan in plans:
        if isinstance(shape, AttentionShape) and implementation not in (None, plan.backend):
            raise NotImplementedError(f"{implementation=} computes no attention of this step: {plan.reason}")
    begin(running, "keys and values", cache_bytes(config, batch, capacity, dtype))
    progress.say("bench", "random weights")
    model = models.random_model(config, dtype)
    weight_bytes = _weight_bytes(model)
    kv_bytes = int(batch * _kv_bytes(config, context - steps / 2, dtype))  # live tokens on average
    progress.say("bench", "read floor")
    floors = [read_floor(weight_bytes + kv_bytes)]

    cache = _random_cache(model, batch, capacity)
    progress.say("bench", "scores")
    phi, cache = _measured_phi(model, cache, context, steps)
    variants: dict[str, _Variant] = {
        "ours, unified max": (UnifiedMax(jnp.float32(phi)), None),
        "ours, online softmax": (None, None),
        "plain XLA": (None, "xla"),
    }
    others = generate_timers(model, batch, context, steps, generate)
    with device.target(running):
        seconds, recomputed = _time_decode(model, cache, context, steps, variants, others)
    floors.append(
        read_floor(weight_bytes + kv_bytes)
    )  # before and behind the loops: the floor drifts as the GPU warms up
    floor = statistics.mean(floors)
    baseline = seconds["plain XLA"]
    rows = [
        (
            name,
            f"{per_step * 1e3:.3f}",
            f"{batch / per_step:.1f}",
            f"{per_step / floor:.2f}",
            f"{baseline / per_step:.2f}x",
            str(recomputed.get(name, "")),
        )
        for name, per_step in seconds.items()
    ]
    rows.append(("read floor", f"{floor * 1e3:.3f}", f"{batch / floor:.1f}", "1.00", f"{baseline / floor:.2f}x", ""))
    title = (
        f"Decode on {running.kind}: {config.num_hidden_layers} layers of {config.hidden_size}, batch {batch}, "
        f"context {context}, {dtype.name}, {weight_bytes / 1e9:.2f} GB of weights, {kv_bytes / 1e9:.2f} GB of K and V, "
        f"phi {phi:.1f}; {_kernels_text(plans)}"
    )
    record = provenance() | {
        "config": dataclasses.asdict(config),
        "decode": {"batch": batch, "context": context, "steps": steps, "dtype": dtype.name, "phi": phi}
        | {"implementation": implementation},
        "plans": {name: dataclasses.asdict(plan) for name, _, plan in plans},
        "bytes": {"weights": weight_bytes, "keys_and_values": kv_bytes},
        "read_floor_ms": floor * 1e3,
        "ms_per_step": {name: per_step * 1e3 for name, per_step in seconds.items()},
        "recomputed_steps": recomputed,
    }
    columns = ("decoding", "ms/token", "tokens/s", "x floor", "vs XLA", f"redone of {steps}")
    return BenchReport(title, columns, tuple(rows), record)


def _kernels_text(plans: Sequence[tuple[str, Any, Plan]]) -> str:
    """Who computes what of a step: "triton: qkv, attention, o, gate_up, down; xla: head"."""
    names: dict[str, list[str]] = {}
    for name, _, plan in plans:
        if plan.algorithm != "unfused":
            names.setdefault(plan.backend, []).append(name)
    return "; ".join(f"{backend}: {', '.join(kinds)}" for backend, kinds in names.items())


def _weight_bytes(model: CausalLM) -> int:
    """Bytes of weights that a decode step reads: all but an embedding that is no head, of which it reads a few rows."""
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    head = model.embedding if model.config.tie_word_embeddings else None
    tables = [m for _, m in nnx.iter_modules(model) if isinstance(m, Embedding) and m is not head]
    return total - sum(table.weight[...].nbytes for table in tables)


def _kv_bytes(config: DecoderConfig, live_tokens: float, dtype: jnp.dtype) -> float:
    """Bytes of keys and values that a decode step reads per row: the live ones, in a windowed layer those inside."""
    options = map(config.attention_options, range(config.num_hidden_layers))
    windows = (option.get("local_window_size") for option in options)
    seen = sum(live_tokens if window is None else min(live_tokens, window[0] + 1) for window in windows)
    return 2 * seen * config.kv_size * dtype.itemsize


def _time_decode(
    model: CausalLM,
    cache: KVCache,
    context: int,
    steps: int,
    variants: Mapping[str, _Variant],
    others: Mapping[str, Callable[[], float]],
) -> tuple[dict[str, float], dict[str, int]]:
    """By name: median seconds per step of loops that take turns, and how many steps of a loop were redone.

    The others time themselves, and take turns with the loops.
    """
    structure, weights = flattened(model)
    tokens = _first_tokens(model, cache.batch)
    progress.say("bench", f"compile {', '.join(variants)}")
    compiling = {}
    with concurrent.futures.ThreadPoolExecutor() as pool:  # one is compiled while the next is lowered
        for name, (softmax, implementation) in variants.items():
            options = decode_compiler_options(model, cache.batch) if implementation is None else {}
            loop = jax.jit(functools.partial(_decode_loop, structure, steps, implementation), donate_argnums=1)
            lowered = loop.lower(weights, cache, tokens, softmax)
            compiling[name] = pool.submit(lowered.compile, compiler_options=options)
    loops = {name: future.result() for name, future in compiling.items()}

    progress.say("bench", "time")
    samples, redone = {name: list[float]() for name in (*variants, *others)}, dict[str, int]()
    for turn in range(1 + clock.REPEATS):  # the first loops of a process are the slowest
        for name in clock.in_turn(samples, turn):
            if name in others:
                seconds = others[name]()
            else:
                softmax, _ = variants[name]
                cache = _rewound(cache, context - steps)
                jax.block_until_ready((weights, cache))
                started = time.perf_counter()
                cache, _, count = jax.block_until_ready(loops[name](weights, cache, tokens, softmax))
                seconds = (time.perf_counter() - started) / steps
                redone[name] = int(count)
            if turn > 0:
                samples[name].append(seconds)
    return {name: statistics.median(times) for name, times in samples.items()}, redone


def _decode_loop(
    structure: Structure,
    steps: int,
    implementation: Literal["xla"] | None,
    weights: list[jax.Array],
    cache: KVCache,
    tokens: jax.Array,
    softmax: UnifiedMax | None,
) -> tuple[KVCache, jax.Array, jax.Array]:
    """Greedy decoding: the cache, the last tokens and how many steps were redone."""
    model = rebuilt(structure, weights)

    def body(_: jax.Array, carry: Any) -> Any:
        cache, tokens, redone = carry
        if implementation is None:
            logits, cache, is_redone = decode_step(model, tokens, cache, softmax)
            redone += is_redone
        else:
            logits, cache = model.decode(tokens, cache, implementation=implementation)[:2]
        return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32), redone

    return jax.lax.fori_loop(0, steps, body, (cache, tokens, jnp.int32(0)))


class _Probe(StepCache):
    """A step in plain XLA that notes the least and the largest ln sum e^score of its rows."""

    def __init__(self, config: DecoderConfig, cache: KVCache):
        super().__init__(config, cache, None, "xla")
        self.low, self.high = jnp.float32(jnp.inf), jnp.float32(-jnp.inf)

    def attend(self, layer: int, query: jax.Array, *, starts_early: bool = False) -> jax.Array:
        options = self._config.attention_options(layer)
        key, _ = self.arrays(layer)
        grouped = query.reshape(query.shape[0], key.shape[2], -1, query.shape[3])  # [B, K, G, H]
        scores = jnp.einsum("bkgh,bskh->bkgs", grouped, key, preferred_element_type=jnp.float32)
        scores *= options.get("scale", query.shape[3] ** -0.5)
        if (cap := options.get("logits_soft_cap")) is not None:
            scores = cap * jnp.tanh(scores / cap)
        position, slots = jnp.arange(key.shape[1]), self.slots[:, None]  # a step's own key is the last
        live = position <= slots
        if (window := options.get("local_window_size")) is not None:
            live &= position >= slots - window[0]
        log_den = jax.nn.logsumexp(jnp.where(live[:, None, None], scores, -jnp.inf), axis=-1)
        self.low, self.high = jnp.minimum(self.low, log_den.min()), jnp.maximum(self.high, log_den.max())
        return super().attend(layer, query, starts_early=starts_early)


def _measured_phi(model: CausalLM, cache: KVCache, context: int, steps: int) -> tuple[float, KVCache]:
    """The phi with the same room at both ends for the rows of these steps, and the cache, which is donated."""
    structure, weights = flattened(model)
    loop = jax.jit(functools.partial(_probe_loop, structure, steps), donate_argnums=1)
    cache, low, high = loop(weights, _rewound(cache, context - steps), _first_tokens(model, cache.batch))
    return (float(low) + float(high)) / 2, cache


def _probe_loop(
    structure: Structure, steps: int, weights: list[jax.Array], cache: KVCache, tokens: jax.Array
) -> tuple[KVCache, jax.Array, jax.Array]:
    """`_decode_loop` in plain XLA: the cache, and the least and largest ln sum e^score."""
    model = rebuilt(structure, weights)

    def body(_: jax.Array, carry: Any) -> Any:
        cache, tokens, low, high = carry
        step = _Probe(model.config, cache)
        logits = model.decode_logits(tokens, step)
        low, high = jnp.minimum(low, step.low), jnp.maximum(high, step.high)
        return step.grown(), jnp.argmax(logits, axis=-1).astype(jnp.int32), low, high

    ends = jnp.float32(jnp.inf), jnp.float32(-jnp.inf)
    cache, _, low, high = jax.lax.fori_loop(0, steps, body, (cache, tokens, *ends))
    return cache, low, high


def _first_tokens(model: CausalLM, batch: int) -> jax.Array:
    """Where every loop starts, [B]."""
    return jnp.arange(batch, dtype=jnp.int32) % model.config.vocab_size


def _rewound(cache: KVCache, length: int) -> KVCache:
    """The cache with `length` live tokens in every row."""
    return dataclasses.replace(cache, lengths=jnp.full((cache.batch,), length, jnp.int32))


def _random_cache(model: CausalLM, batch: int, capacity: int) -> KVCache:
    """A cache full of normal values, made array by array."""
    empty = jax.eval_shape(lambda: KVCache.create(model.config, batch, capacity, model.dtype))
    leaves, treedef = jax.tree.flatten((empty.keys, empty.values))
    seeds = jax.random.split(jax.random.key(1), len(leaves))
    filled = [clock.random_normal(seed, leaf.shape, leaf.dtype) for seed, leaf in zip(seeds, leaves, strict=True)]
    keys, values = jax.tree.unflatten(treedef, filled)
    return KVCache(keys, values, jnp.zeros((batch,), jnp.int32))
