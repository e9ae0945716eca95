"""Prefill and the decode loop.

The prompt is padded to a power of two and prefilled at once. Then chunks of decode steps run as one jitted
loop each, which the host hears of only at its end. The KV cache is donated from call to call and updated in
place. Rows that leave the safe window of unified-max softmax are redone inside the attention kernel. Where there is
none, the whole step is redone by one `lax.cond` with online softmax: it writes the same cache slots again.
"""

import dataclasses
import functools
import time
import warnings
from collections.abc import Generator, Hashable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdpp_jax import calibration
from fdpp_jax.models.cache import KVCache
from fdpp_jax.models.decoder import CausalLM
from fdpp_jax.ops.layer import compiler_options
from fdpp_jax.plans.shapes import round_up
from fdpp_jax.sampling import Sampling, make_sampling, sample
from fdpp_jax.unified_max import UnifiedMax

type Softmax = UnifiedMax | Literal["auto"] | None
type Structure = tuple[nnx.GraphDef, jax.tree_util.PyTreeDef]

_MIN_PROMPT_BUCKET = 16
_CAPACITY_MULTIPLE = 64
_STEPS_OF_DRIFT = 64  # how often phi fails is judged over the latest so many steps, or a chunk if that has more
_MAX_BLOCK = 8  # launches of so many decode steps queue up before the host looks whether to go on


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """What `generate` returns.

    Attributes:
      tokens: [B, max_new_tokens] int32 new tokens. After a row's end: the first of eos_ids, or 0.
      lengths: [B] int32 new tokens that count, the end-of-sequence token included.
      recomputed_steps: Decode steps of which a row, or all, was redone, having left the safe window.
      softmax_reason: Which softmax it began with, and why, in one line.
      online_from: The decode step from which on all ran with online softmax, since too many were redone; None: none.
      decode_steps: Decode steps that ran; the first token comes from the prefill.
      prefill_seconds: From the start to the first token on the host, without compilation.
      decode_seconds: The time of all decode steps, without compilation and without the consumer of a stream.
      compile_seconds: Spent tracing and compiling; 0 when the shapes were seen before.
      cache_capacity: Slots a row of the KV cache had, S: what the attention kernel was planned for.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    recomputed_steps: int
    softmax_reason: str
    online_from: int | None
    decode_steps: int
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    cache_capacity: int


@dataclasses.dataclass(frozen=True)
class StreamChunk:
    """The next tokens of a stream: tokens [B, n] int32, and lengths [B] int32 that count from the start."""

    tokens: np.ndarray
    lengths: np.ndarray


def generate(
    model: CausalLM,
    tokens: Any,
    prompt_lengths: Any = None,
    max_new_tokens: int = 64,
    eos_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    softmax: Softmax = "auto",
    max_recompute_rate: float = 0.1,
) -> GenerationResult:
    """Continues a batch of prompts.

    Args:
      model: The model.
      tokens: [B, T] integer prompts, right-padded; the padding may hold anything.
      prompt_lengths: [B] int, 1..T. None: T for every row.
      max_new_tokens: New tokens a row gets at most.
      eos_ids: Tokens that end a row.
      temperature: 0 takes the best token.
      top_k: Sample among the k best tokens only.
      top_p: Sample among the fewest best tokens whose probabilities reach top_p only.
      key: PRNG key; None: jax.random.key(0).
      softmax: None: online softmax. UnifiedMax: asynchronous, with what leaves the window redone. "auto": what the
        calibration beside the model's checkpoint says (`calibration.choose_softmax`), and None for a model without a
        checkpoint. The answer is the same; the result's softmax_reason says which it was.
      max_recompute_rate: If more than this share of the latest 64 steps redid a row, a warning says so, and what is
        left runs with online softmax, after one compilation: a phi that does not fit costs more than it saves. Steps
        that a short call lacks count as good ones. 1: never.

    Returns:
      The tokens, how many count, and what it took.

    Raises:
      ValueError: An argument doesn't fit the others or the model. Raised before anything is computed.

    Source: FlashDecoding++ (arXiv 2311.01282), section 3.
    """
    options = temperature, top_k, top_p, key, softmax, max_recompute_rate
    # Between two chunks the GPU waits, and drift is looked for: docs/experiments/decode_step.md#chunks-of-generate
    chunks = stream(model, tokens, prompt_lengths, max_new_tokens, eos_ids, *options, chunk_size=_STEPS_OF_DRIFT)
    while True:
        try:
            next(chunks)
        except StopIteration as stop:
            return stop.value


def stream(
    model: CausalLM,
    tokens: Any,
    prompt_lengths: Any = None,
    max_new_tokens: int = 64,
    eos_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    softmax: Softmax = "auto",
    max_recompute_rate: float = 0.1,
    chunk_size: int = 32,
) -> Generator[StreamChunk, None, GenerationResult]:
    """`generate` in pieces: yields the first token, then up to `chunk_size` tokens at a time.

    The arguments are checked at once, before the first chunk is asked for. The generator returns the
    GenerationResult (the value of its StopIteration, or of `yield from`).

    Args:
      chunk_size: Tokens between two synchronisations with the host. The others: see `generate`.

    Raises:
      ValueError: An argument doesn't fit the others or the model.
    """
    prompts, lengths = _check_prompts(model, tokens, prompt_lengths, max_new_tokens, chunk_size)
    vocab_size = model.config.vocab_size
    bad_ids = [token for token in eos_ids if not 0 <= token < vocab_size]
    if bad_ids:
        raise ValueError(f"eos_ids must be within 0..{vocab_size - 1}, got {bad_ids}")
    sampling = make_sampling(temperature, top_k, top_p, vocab_size=vocab_size)
    softmax, reason = _chosen(model, softmax)
    if softmax is not None and softmax.phi is not None:
        rows = (model.config.num_hidden_layers, prompts.shape[0], model.config.num_attention_heads)
        phi_shape = np.shape(softmax.phi)
        fits = all(n in (1, row) for n, row in zip(phi_shape[::-1], rows[::-1], strict=False))
        if len(phi_shape) > 3 or not fits or (len(phi_shape) == 3 and phi_shape[0] != rows[0]):
            raise ValueError(
                f"phi must broadcast to [B, N] = {list(rows[1:])}, or be one a layer, [L, B or 1, N or 1] with "
                f"L = {rows[0]}, got shape {phi_shape}"
            )
        # One dtype for a Python float and an array, so that a new phi never compiles.
        softmax = dataclasses.replace(softmax, phi=jnp.asarray(softmax.phi, jnp.float32))
    if not 0 <= max_recompute_rate <= 1:
        raise ValueError(f"max_recompute_rate must be within 0..1, got {max_recompute_rate}")
    key = jax.random.key(0) if key is None else key
    policy = softmax, reason, max_recompute_rate
    return _run(model, prompts, lengths, max_new_tokens, tuple(eos_ids), sampling, key, policy, chunk_size)


def _chosen(model: CausalLM, softmax: Softmax) -> tuple[UnifiedMax | None, str]:
    """The policy, and which it is and why."""
    if softmax is None:
        return None, "online, as asked"
    if isinstance(softmax, UnifiedMax):
        return softmax, "bound, as asked" if softmax.is_bound else "unified, as asked"
    if softmax != "auto":
        raise ValueError(f'softmax must be None, "auto" or a UnifiedMax, got {softmax!r}')
    if model.checkpoint is None:
        return None, "online: the model was not loaded from a checkpoint"
    return calibration.choose_softmax(model.config, model.checkpoint, model.dtype)


def _check_prompts(
    model: CausalLM, tokens: Any, prompt_lengths: Any, max_new_tokens: int, chunk_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts padded with zeros to their bucket, [B, T'] int32, and their lengths, [B] int32."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or tokens.size == 0:
        raise ValueError(f"tokens must be integers [B, T], got {tokens.dtype} of shape {tokens.shape}")
    batch, width = tokens.shape
    lengths = np.full(batch, width) if prompt_lengths is None else np.asarray(prompt_lengths)
    if lengths.shape != (batch,) or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"prompt_lengths must be integers [{batch}], got {lengths.dtype} of shape {lengths.shape}")
    if lengths.min() < 1 or lengths.max() > width:
        raise ValueError(f"prompt_lengths must be within 1..{width} (the width of tokens), got {lengths.tolist()}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    longest, limit = int(lengths.max()), model.config.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"prompt of {longest} tokens and {max_new_tokens=} need {longest + max_new_tokens} positions, "
            f"the model has {limit} (max_position_embeddings)"
        )
    live = np.arange(width) < lengths[:, None]  # [B, T]
    unknown = tokens[live & ((tokens < 0) | (tokens >= model.config.vocab_size))]
    if unknown.size:
        raise ValueError(f"tokens must be within 0..{model.config.vocab_size - 1}, got {int(unknown[0])}")

    bucket = min(max(_MIN_PROMPT_BUCKET, 1 << (longest - 1).bit_length()), limit)
    prompts = np.zeros((batch, bucket), np.int32)
    prompts[:, :longest] = np.where(live, tokens, 0)[:, :longest]
    return prompts, lengths.astype(np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Loop:
    """What a decode step hands to the next: the last tokens, and the cache of all before them."""

    cache: KVCache
    tokens: jax.Array  # [B] int32
    finished: jax.Array  # [B] bool
    lengths: jax.Array  # [B] int32
    recomputed_steps: jax.Array  # [] int32
    key: jax.Array


def _run(
    model: CausalLM,
    prompts: np.ndarray,
    prompt_lengths: np.ndarray,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    sampling: Sampling,
    key: jax.Array,
    policy: tuple[UnifiedMax | None, str, float],
    chunk_size: int,
) -> Generator[StreamChunk, None, GenerationResult]:
    """The host's side of `stream`, with arguments that are checked."""
    softmax, softmax_reason, max_recompute_rate = policy
    structure, weights = flattened(model)
    capacity = round_up(prompts.shape[1] + max_new_tokens, _CAPACITY_MULTIPLE)
    eos = jnp.asarray(eos_ids, jnp.int32)
    options = decode_compiler_options(model, prompts.shape[0])
    # A CUDA graph is one launch, of which nothing queues up; and a loop in a loop takes longer to compile.
    block_size = max(n for n in range(1, _MAX_BLOCK + 1) if chunk_size % n == 0) if options else 1
    # A copy, since the loop donates its key and the caller keeps theirs.
    prefill_args = (weights, jnp.asarray(prompts), jnp.asarray(prompt_lengths), sampling, eos, jax.random.clone(key))

    started = time.perf_counter()
    with_key_norms = softmax is not None and softmax.is_bound
    prefill, compile_seconds = _executable(_prefill, (structure, capacity, with_key_norms), prefill_args, {})
    started += compile_seconds
    loop = jax.block_until_ready(prefill(*prefill_args))
    new_tokens = np.full((prompts.shape[0], max_new_tokens), eos_ids[0] if eos_ids else 0, np.int32)
    new_tokens[:, 0] = loop.tokens
    prefill_seconds = time.perf_counter() - started
    yield StreamChunk(new_tokens[:, :1].copy(), np.asarray(loop.lengths))

    num_tokens, decode_seconds, online_from, decode_chunk = 1, 0.0, None, None
    judged = 0, 0  # steps that are known to be without drift, and of these the redone ones
    is_over = max_new_tokens == 1 or bool(np.asarray(loop.finished).all())
    while not is_over:
        started = time.perf_counter()
        num_steps = jnp.int32(min(chunk_size, max_new_tokens - num_tokens))
        chunk_args = (weights, loop, num_steps, sampling, eos, softmax)
        if decode_chunk is None:  # looking it up takes as long as a step
            decode_chunk, seconds = _executable(_decode_chunk, (structure, chunk_size, block_size), chunk_args, options)
            compile_seconds += seconds
            started += seconds
        loop, chunk, steps_run = jax.block_until_ready(decode_chunk(*chunk_args))
        steps = int(steps_run)
        new_tokens[:, num_tokens : num_tokens + steps] = np.asarray(chunk)[:, :steps]
        decode_seconds += time.perf_counter() - started
        yield StreamChunk(new_tokens[:, num_tokens : num_tokens + steps].copy(), np.asarray(loop.lengths))
        num_tokens += steps
        is_over = num_tokens == max_new_tokens or bool(np.asarray(loop.finished).all())
        if softmax is not None:
            done = num_tokens - 1, int(loop.recomputed_steps)
            recent, redone = done[0] - judged[0], done[1] - judged[1]
            if redone > max_recompute_rate * max(recent, _STEPS_OF_DRIFT):
                _warn_of_drift(softmax, recent, redone, is_over)
                if not is_over:
                    softmax, online_from, decode_chunk = None, num_tokens - 1, None
            elif recent >= _STEPS_OF_DRIFT:
                judged = done

    return GenerationResult(
        tokens=new_tokens,
        lengths=np.array(loop.lengths),
        recomputed_steps=int(loop.recomputed_steps),
        softmax_reason=softmax_reason,
        online_from=online_from,
        decode_steps=num_tokens - 1,
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        compile_seconds=compile_seconds,
        cache_capacity=capacity,
    )


def _warn_of_drift(softmax: UnifiedMax, steps: int, redone: int, is_over: bool) -> None:
    rest = "" if is_over else ": the rest runs with online softmax"
    instead = "softmax=None" if softmax.is_bound else "UnifiedMax.bound()"
    warnings.warn(
        f"{redone} of the latest {steps} decode steps left the safe window of unified-max softmax{rest}. Calibrate phi "
        f"on text like this (fdpp_jax.calibrate), or use {instead}",
        stacklevel=2,
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(
    structure: Structure,
    capacity: int,
    with_key_norms: bool,
    weights: list[jax.Array],
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    sampling: Sampling,
    eos_ids: jax.Array,
    key: jax.Array,
) -> _Loop:
    """Fills a new cache from the prompts and draws the first token of every row."""
    model = rebuilt(structure, weights)
    batch = prompts.shape[0]
    cache = KVCache.create(model.config, batch, capacity, model.dtype, with_key_norms=with_key_norms)
    logits, cache = model.prefill(prompts, prompt_lengths, cache)
    key, sample_key = jax.random.split(key)
    tokens = sample(logits, sample_key, sampling)
    return _Loop(
        cache=cache,
        tokens=tokens,
        finished=(tokens[:, None] == eos_ids).any(axis=1),
        lengths=jnp.ones((batch,), jnp.int32),
        recomputed_steps=jnp.zeros((), jnp.int32),
        key=key,
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _decode_chunk(
    structure: Structure,
    chunk_size: int,
    block_size: int,
    weights: list[jax.Array],
    loop: _Loop,
    num_steps: jax.Array,
    sampling: Sampling,
    eos_ids: jax.Array,
    softmax: UnifiedMax | None,
) -> tuple[_Loop, jax.Array, jax.Array]:
    """Up to num_steps <= chunk_size decode steps, fewer if every row ends; the rest of their block changes nothing.

    block_size divides chunk_size: of the steps in a block none asks whether to go on.

    Returns:
      (loop, tokens [B, chunk_size], steps that count).
    """
    model = rebuilt(structure, weights)
    pad = eos_ids[0] if eos_ids.size else jnp.int32(0)

    def is_live(carry: tuple[_Loop, jax.Array, jax.Array]) -> jax.Array:
        loop, _, step = carry
        return (step < num_steps) & ~loop.finished.all()

    def take_step(i: jax.Array, carry: tuple[_Loop, jax.Array, jax.Array]) -> tuple[_Loop, jax.Array, jax.Array]:
        del i
        (loop, chunk, step), counts = carry, is_live(carry)
        logits, cache, redone = decode_step(model, loop.tokens, loop.cache, softmax)
        key, sample_key = jax.random.split(loop.key)
        tokens = jnp.where(loop.finished, pad, sample(logits, sample_key, sampling))
        next_loop = _Loop(
            cache=dataclasses.replace(cache, lengths=jnp.where(counts, cache.lengths, loop.cache.lengths)),
            tokens=tokens,
            finished=loop.finished | (tokens[:, None] == eos_ids).any(axis=1),
            lengths=loop.lengths + (counts & ~loop.finished),
            recomputed_steps=loop.recomputed_steps + (counts & redone),
            key=key,
        )
        return next_loop, chunk.at[:, step].set(tokens), step + counts

    def take_block(carry: tuple[_Loop, jax.Array, jax.Array]) -> tuple[_Loop, jax.Array, jax.Array]:
        return jax.lax.fori_loop(0, block_size, take_step, carry)

    chunk = jnp.full((loop.tokens.shape[0], chunk_size), pad, jnp.int32)
    return jax.lax.while_loop(is_live, take_block, (loop, chunk, jnp.int32(0)))


def flattened(model: CausalLM) -> tuple[Structure, list[jax.Array]]:
    """The hashable part of a model, and its arrays as a list.

    A list passes through jit's dispatch faster than an NNX state does:
    docs/experiments/decode_step.md#start-and-end-of-a-loop
    """
    graphdef, state = nnx.split(model)
    weights, treedef = jax.tree.flatten(state)
    return (graphdef, treedef), weights


def rebuilt(structure: Structure, weights: list[jax.Array]) -> CausalLM:
    """The model that `flattened` took apart."""
    graphdef, treedef = structure
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, weights))


def decode_compiler_options(model: CausalLM, batch: int) -> dict[str, str]:
    """XLA's options for a loop of the model's decode steps with a batch of rows."""
    return compiler_options(model.layer_plan(batch))


def decode_step(
    model: CausalLM, tokens: jax.Array, cache: KVCache, softmax: UnifiedMax | None
) -> tuple[jax.Array, KVCache, jax.Array]:
    """One decode step that is exact whatever the scores are.

    Args:
      model: The model.
      tokens: [B] int32, the last token of every row.
      cache: The keys and values of the tokens before.
      softmax: None, or the policy whose failures are redone.

    Returns:
      (logits [B, V] float32, the cache with one more token, whether a row or all of the step was redone [] bool).
    """
    lengths, norms = cache.lengths, cache.key_max_norms
    logits, cache, overflow, redone = model.decode(tokens, cache, softmax=softmax)
    if overflow is False:  # lax.cond would stay in the program
        return logits, cache, jnp.asarray(redone)

    def redo(logits: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        del logits
        # Keys behind an overflow are NaN, and so are the norms that took them in.
        cache = dataclasses.replace(cache, lengths=lengths, key_max_norms=norms)
        logits, cache, *_ = model.decode(tokens, cache, softmax=None)
        return logits, cache

    def keep(logits: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        return logits, cache

    logits, cache = jax.lax.cond(overflow, redo, keep, logits, cache)
    return logits, cache, jnp.logical_or(overflow, redone)


def _executable(
    function: Any, statics: tuple[Hashable, ...], args: tuple[Any, ...], options: dict[str, str]
) -> tuple[jax.stages.Compiled, float]:
    """The program for arguments like these, and the seconds that it took to get it."""
    started = time.perf_counter()
    leaves, treedef = jax.tree.flatten(args)
    avals = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if x.committed else None) for x in leaves)
    misses = _compile.cache_info().misses
    compiled = _compile(function, statics, treedef, avals, tuple(options.items()))
    seconds = time.perf_counter() - started
    return compiled, seconds if _compile.cache_info().misses > misses else 0.0


@functools.lru_cache(maxsize=32)
def _compile(
    function: Any,
    statics: tuple[Hashable, ...],
    treedef: jax.tree_util.PyTreeDef,
    avals: tuple[jax.ShapeDtypeStruct, ...],
    options: tuple[tuple[str, str], ...],
) -> jax.stages.Compiled:
    """Compiles ahead of the call, so that compilation is not measured as decoding."""
    return function.lower(*statics, *jax.tree.unflatten(treedef, avals)).compile(compiler_options=dict(options))
