"""How fast a model's prefill is: with a unified max and with online softmax, beside the whole prompt through cuDNN.

A prefill is bound by its products, so the floor here is the time that they take at the device's peak.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fdpp_jax import models, ops, progress
from fdpp_jax.bench import clock
from fdpp_jax.bench.prefill import PrefillCase
from fdpp_jax.bench.provenance import provenance
from fdpp_jax.bench.report import BenchReport, begin
from fdpp_jax.decode_loop import Structure, flattened, prefill_compiler_options, rebuilt
from fdpp_jax.models import CausalLM, DecoderConfig, KVCache
from fdpp_jax.models.cache import cache_bytes
from fdpp_jax.models.plans import prefill_plans, prefill_shape
from fdpp_jax.plans import backends, device
from fdpp_jax.plans.shapes import round_up
from fdpp_jax.unified_max import UnifiedMax

_LONGEST_DEFAULT = 8192
_CAPACITY_MULTIPLE = 64
_PHI_TOKENS = 2048
_UNIFIED, _ONLINE, _WHOLE = "ours, unified max", "ours, online softmax", "whole prompt, cuDNN"


@dataclasses.dataclass(frozen=True)
class _Variant:
    """One way to prefill: whether with a unified max, tokens of a row in a piece, and what computes attention."""

    is_unified: bool
    chunk_size: int
    attention: str


class _Timing(NamedTuple):
    seconds: float
    temp_bytes: int | None  # None where XLA does not say
    compile_seconds: float  # traced, lowered and compiled


def bench_model_prefill(
    config: DecoderConfig,
    batch: int = 1,
    query_length: int | None = None,
    *,
    prefill_chunk_size: int | None = None,
    quick: bool = False,
    implementation: str | None = None,
) -> BenchReport:
    """Times the prefill of a new cache with random weights and tokens, all rows full, a line per way in turns.

    A unified max is timed where a kernel that knows it computes attention. phi is the middle of what the rows of the
    first 2,048 tokens have for ln sum e^score, recorded before the timing: as for decode, no phi is right for all
    shapes. Rows behind them have little more, ln(T / 2048), and the window has room for 44 on either side.

    The whole prompt at once is timed where cuDNN computes all its attention and ours runs in pieces.

    Args:
      config: The model's shapes.
      batch: Rows, B.
      query_length: Tokens of a row, T; None: as many as the model was made for, at most 8,192.
      prefill_chunk_size: Tokens of a row that run at once, as in `generate`; None for the planned number.
      quick: Leaves out all but the first way.
      implementation: The backend whose kernels are timed; None: as planned.

    Raises:
      NotImplementedError: The backend refuses the attention of all layers with a unified max.
      ValueError: batch, query_length or prefill_chunk_size is not positive, or the model has fewer positions.
      FloatingPointError: The logits are not finite.
      MemoryError: The device has too little memory.
    """
    length = _query_length(config, query_length)
    if batch < 1 or length < 1:
        raise ValueError(f"expected a batch and a query_length of at least 1, got batch={batch} query_length={length}")
    if config.has_learned_positions and length > config.max_position_embeddings:
        raise ValueError(
            f"expected a query_length of at most the model's {config.max_position_embeddings}, got {length}"
        )
    running = backends.only(implementation, device.current())
    dtype = jnp.dtype(jnp.bfloat16 if running.is_gpu else jnp.float32)
    with device.target(running):
        variants = _variants(config, batch, length, dtype, prefill_chunk_size, quick=quick)
    begin(running, "keys and values", cache_bytes(config, batch, length, dtype))
    progress.say("bench", "random weights")
    model = models.random_model(config, dtype)
    tokens = jax.random.randint(jax.random.key(2), (batch, length), 0, config.vocab_size, jnp.int32)
    phi = None
    if _UNIFIED in variants:
        progress.say("bench", "scores")
        phi = _measured_phi(model, tokens[:1, :_PHI_TOKENS])
    with device.target(running):
        timings = _time(model, tokens, variants, phi)

    flops = _flops(config, batch, length, dtype)
    floor = flops / (running.bf16_tflops * 1e12)

    def speeds(seconds: float) -> tuple[str, ...]:
        tflops = flops / seconds / 1e12
        return (
            f"{seconds * 1e3:.3f}",
            f"{batch * length / seconds:.0f}",
            f"{tflops:.0f}" if tflops >= 10 else f"{tflops:.3f}",
            f"{seconds / floor:.2f}",
        )

    def cells(name: str, variant: _Variant) -> tuple[str, ...]:
        seconds, temp_bytes, compile_seconds = timings[name]
        temp = "-" if temp_bytes is None else f"{temp_bytes / 1e9:.3g}"
        return name, variant.attention, str(variant.chunk_size), *speeds(seconds), temp, f"{compile_seconds:.1f}"

    rows = [cells(name, variant) for name, variant in variants.items()]
    rows.append(("floor", "", "", *speeds(floor), "", ""))
    weight_bytes = sum(x.nbytes for x in flattened(model)[1])
    title = (
        f"Prefill on {running.kind}: {config.num_hidden_layers} layers of {config.hidden_size}, batch {batch}, "
        f"{length} tokens, {dtype.name}, {weight_bytes / 1e9:.2f} GB of weights, {flops / 1e12:.3g} Tflop, "
        f"peak {running.bf16_tflops:g} Tflop/s"
        + ("" if implementation is None else f", kernels of {implementation}")
        + ("" if phi is None else f", phi {phi:.1f}")
    )
    record = provenance() | {
        "config": dataclasses.asdict(config),
        "prefill": {
            "batch": batch,
            "query_length": length,
            "prefill_chunk_size": prefill_chunk_size,
            "implementation": implementation,
            "dtype": dtype.name,
            "phi": phi,
            "flops": flops,
        },
        "bytes": {"weights": weight_bytes},
        "floor_ms": floor * 1e3,
        "variants": {
            name: dataclasses.asdict(variant)
            | {
                "ms": timings[name].seconds * 1e3,
                "temp_bytes": timings[name].temp_bytes,
                "compile_seconds": timings[name].compile_seconds,
            }
            for name, variant in variants.items()
        },
    }
    columns = ("prefill", "attention", "piece", "ms", "tokens/s", "Tflop/s", "x floor", "temp GB", "compile s")
    return BenchReport(title, columns, tuple(rows), record)


def _query_length(config: DecoderConfig, given: int | None) -> int:
    return min(_LONGEST_DEFAULT, config.max_position_embeddings) if given is None else given


def _variants(
    config: DecoderConfig,
    batch: int,
    length: int,
    dtype: jax.typing.DTypeLike,
    prefill_chunk_size: int | None,
    *,
    quick: bool,
) -> dict[str, _Variant]:
    """What there is to time on the target, by name; the first is what `generate` runs by default.

    Raises:
      NotImplementedError: The device has one backend's kernels alone, which refuses all attention.
    """
    running = device.planned()

    def variant(has_unified_max: bool, chunk_size: int | None) -> _Variant:
        plans = prefill_plans(
            config,
            batch=batch,
            length=length,
            capacity=round_up(length, _CAPACITY_MULTIPLE),
            device=running,
            dtype=dtype,
            has_unified_max=has_unified_max,
            chunk_size=chunk_size,
        )
        name = running.only_backend
        if has_unified_max and name is not None and all(plan.backend != name for _, _, plan in plans):
            raise NotImplementedError(
                f"implementation={name!r} computes no attention of this prefill: {plans[0][2].reason}"
            )
        runs = dict.fromkeys(f"{plan.backend} {plan.algorithm}" for _, _, plan in plans)
        _, shape, _ = plans[0]
        return _Variant(not shape.is_online, shape.query_length, ", ".join(runs))

    unified, online, whole = (
        variant(True, prefill_chunk_size),
        variant(False, prefill_chunk_size),
        variant(False, length),
    )
    found = {_UNIFIED: unified} if unified.is_unified else {}
    if not (quick and found):
        found[_ONLINE] = online
    if not quick and whole.attention == "xla cudnn" and online.chunk_size < length:
        found[_WHOLE] = whole
    return found


def _flops(config: DecoderConfig, batch: int, length: int, dtype: jax.typing.DTypeLike) -> float:
    """Of all products: matmuls of the layers, both of attention over the keys that each query sees, one head a row."""
    hidden = config.hidden_size
    layer = hidden * (config.qkv_size + config.mlp_in_size) + (config.query_size + config.intermediate_size) * hidden
    shapes = (prefill_shape(config, i, batch, length, None, dtype, True) for i in range(config.num_hidden_layers))
    attention = sum(PrefillCase(shape, length).flops for shape in shapes)
    return 2 * batch * (length * config.num_hidden_layers * layer + hidden * config.vocab_size) + attention


def _time(
    model: CausalLM, tokens: jax.Array, variants: Mapping[str, _Variant], phi: float | None
) -> dict[str, _Timing]:
    """By name, in turns; the host's clock serves, for a prefill takes far longer than its dispatch."""
    structure, weights = flattened(model)
    batch, length = tokens.shape
    lengths = jnp.full((batch,), length, jnp.int32)
    cache = KVCache.create(model.config, batch, round_up(length, _CAPACITY_MULTIPLE), model.dtype)
    softmaxes = {name: UnifiedMax(jnp.float32(phi)) if v.is_unified else None for name, v in variants.items()}
    programs, compile_seconds = dict[str, jax.stages.Compiled](), dict[str, float]()
    options = prefill_compiler_options()
    for name, variant in variants.items():
        progress.say("bench", f"compile {name}")
        run = jax.jit(functools.partial(_prefill, structure, variant.chunk_size), donate_argnums=1)
        started = time.perf_counter()
        programs[name] = run.lower(weights, cache, tokens, lengths, softmaxes[name]).compile(compiler_options=options)
        compile_seconds[name] = time.perf_counter() - started

    progress.say("bench", "time")
    samples = {name: list[float]() for name in variants}
    for turn in range(1 + clock.REPEATS):  # the first runs of a process are the slowest
        for name in clock.in_turn(variants, turn):
            jax.block_until_ready((weights, cache))
            started = time.perf_counter()
            logits, cache = jax.block_until_ready(programs[name](weights, cache, tokens, lengths, softmaxes[name]))
            if turn > 0:
                samples[name].append(time.perf_counter() - started)
            elif not jnp.isfinite(logits).all():
                raise FloatingPointError(f"the logits of {name} are not finite: this would time the wrong work")
    timings = {}
    for name, program in programs.items():
        memory = program.memory_analysis()
        temp_bytes = None if memory is None else memory.temp_size_in_bytes
        timings[name] = _Timing(statistics.median(samples[name]), temp_bytes, compile_seconds[name])
    return timings


def _prefill(
    structure: Structure,
    chunk_size: int,
    weights: list[jax.Array],
    cache: KVCache,
    tokens: jax.Array,
    lengths: jax.Array,
    softmax: UnifiedMax | None,
) -> tuple[jax.Array, KVCache]:
    model = rebuilt(structure, weights)
    return model.prefill(tokens, lengths, cache, softmax=softmax, prefill_chunk_size=chunk_size)


def _measured_phi(model: CausalLM, tokens: jax.Array) -> float:
    """The phi with the same room at both ends for the rows of tokens [B, T]."""
    structure, weights = flattened(model)
    low, high = jax.jit(functools.partial(_log_denominators, structure))(weights, tokens)
    return (float(low) + float(high)) / 2


def _log_denominators(structure: Structure, weights: list[jax.Array], tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least and the largest ln sum e^score of tokens [B, T], over all layers and heads."""
    model = rebuilt(structure, weights)
    low, high = jnp.float32(jnp.inf), jnp.float32(-jnp.inf)

    def attend(layer: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        nonlocal low, high
        options = model.config.prefill_options(layer, query.shape[1])
        out, log_den = ops.dot_product_attention(query, key, value, is_causal=True, return_residual=True, **options)
        low, high = jnp.minimum(low, log_den.min()), jnp.maximum(high, log_den.max())
        return out

    model.hidden_states(tokens, jnp.arange(tokens.shape[1])[None], attend)
    return low, high
