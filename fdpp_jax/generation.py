"""`generate` and `stream`: the host's side of generation.

The prompt is padded to a power of two and prefilled, at once or in pieces, behind what a cache holds. Then chunks of
decode steps run as one jitted loop each (`decode_loop`), which the host hears of only at its end. By then the next one
has been started, which does nothing if every row has ended.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Generator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fdpp_jax import calibration, decode_loop, device_memory
from fdpp_jax.decode_loop import (
    NOT_FINITE,
    Chunks,
    Loop,
    Request,
    RunningChunk,
    Structure,
    decode_chunk,
    decode_compiler_options,
    executable,
    flattened,
    prefill_compiler_options,
)
from fdpp_jax.models import KVCache, Tokenizer
from fdpp_jax.models.cache import cache_bytes
from fdpp_jax.models.checks import positive_int
from fdpp_jax.models.decoder import CausalLM
from fdpp_jax.models.text_stream import TextRows
from fdpp_jax.ops.planned import warn_caller
from fdpp_jax.plans.shapes import round_up
from fdpp_jax.prompts import (
    PromptCache,
    Prompts,
    PromptsLike,
    are_texts,
    check_prompts,
    encoded,
    needed_tokenizer,
    tokenizer_of,
)
from fdpp_jax.results import GenerationResult, StreamChunk
from fdpp_jax.sampling import Sampling, as_number, checked_eos, checked_key, make_sampling
from fdpp_jax.unified_max import UnifiedMax

type Softmax = UnifiedMax | Literal["auto"] | None

_CAPACITY_MULTIPLE = 64
_STEPS_OF_DRIFT = 64  # how often phi fails is judged over the latest so many steps
# Steps of `generate` between two synchronisations: docs/experiments/decode_step.md#chunks-of-generate
_UNWATCHED_CHUNK = 256
_LOWER = "Lower max_new_tokens, the number of prompts, their length or prefill_chunk_size, or take a smaller model"
_MAX_BLOCK = 8  # launches of so many decode steps queue up before the host looks whether to go on
_MAX_RUNNING = 2  # chunks: one begins when the other ends, whenever the host looks


def generate(
    model: CausalLM,
    tokens: PromptsLike,
    prompt_lengths: Any = None,
    max_new_tokens: int = 64,
    eos_ids: Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    softmax: Softmax = "auto",
    max_recompute_rate: float = 0.1,
    tokenizer: Tokenizer | None = None,
    *,
    cache: PromptCache | None = None,
    return_cache: bool = False,
    prefill_chunk_size: int | None = None,
) -> GenerationResult:
    """Continues a batch of prompts.

    Args:
      model: The model.
      tokens: The prompts: [B, T] integers, right-padded with anything; a list of each prompt's tokens; a text or a
        list of texts, for which the tokenizer adds BOS where the checkpoint asks for it.
      prompt_lengths: [B] int, 1..T, of a padded array. None: T for every row.
      max_new_tokens: New tokens a row gets at most.
      eos_ids: Tokens that end a row. None: the tokenizer's where the prompts are texts, else none.
      temperature: 0 takes the best token.
      top_k: Sample among the k best tokens only.
      top_p: Sample among the fewest best tokens whose probabilities reach top_p only.
      key: PRNG key of the sampling; None: jax.random.key(0).
      softmax: None: online softmax. UnifiedMax: asynchronous, with what leaves the window redone. "auto": what the
        calibration beside the model's checkpoint says (`calibration.choose_softmax`), and None for a model without a
        checkpoint, or for decode steps where the layers' plan prefers it (`LayerPlan.prefers_online`). The answer is
        the same; the result's softmax_reason says which it was.
      max_recompute_rate: If more than this share of the latest 64 steps redid a row, a warning says so, and what is not
        running yet gets online softmax, after one compilation: a phi that does not fit costs more than it saves. Steps
        that a short call lacks count as good ones. 1: never.
      tokenizer: Makes tokens of texts, and texts of tokens. None: the one beside the model's checkpoint.
      cache: The `cache` of an earlier result of this model. The prompts are then new tokens only, which go on where
        each of its rows ended; texts get no special tokens. It is left as it was, and a larger copy serves this call.
        `cache.matched` divides whole prompts into what a cache holds and what is new.
      return_cache: Whether the result has a `cache`, which takes memory of the device for as long as it is held. Behind
        a cache it always has.
      prefill_chunk_size: Tokens of a prompt that run at once: longer ones are prefilled in pieces, so that the memory
        besides weights and cache does not depend on the prompt. None: 4,096; or all, on a GPU with cuDNN's attention
        for a whole prompt and no kernel for pieces.

    Returns:
      The tokens, how many count, their texts, and what it took.

    Raises:
      ValueError: An argument doesn't fit the others or the model. Raised before anything is computed.
      FloatingPointError: Logits are NaN or infinite; names the first row and step.
      MemoryError: The device has too little memory; names what takes it.

    Source: FlashDecoding++ (arXiv 2311.01282), section 3.
    """
    positional = temperature, top_k, top_p, key, softmax, max_recompute_rate, tokenizer, _UNWATCHED_CHUNK
    options: dict[str, Any] = dict(cache=cache, return_cache=return_cache, prefill_chunk_size=prefill_chunk_size)
    chunks = stream(model, tokens, prompt_lengths, max_new_tokens, eos_ids, *positional, **options)
    while True:
        try:
            next(chunks)
        except StopIteration as stop:
            return stop.value


def stream(
    model: CausalLM,
    tokens: PromptsLike,
    prompt_lengths: Any = None,
    max_new_tokens: int = 64,
    eos_ids: Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    softmax: Softmax = "auto",
    max_recompute_rate: float = 0.1,
    tokenizer: Tokenizer | None = None,
    chunk_size: int = 32,
    *,
    cache: PromptCache | None = None,
    return_cache: bool = False,
    prefill_chunk_size: int | None = None,
) -> Generator[StreamChunk, None, GenerationResult]:
    """`generate` in pieces: yields the first token, then up to `chunk_size` tokens at a time.

    The arguments are checked at once, before the first chunk is asked for. The generator returns the
    GenerationResult (the value of its StopIteration, or of `yield from`).

    While the caller has a chunk, the next one runs. A generator that is closed early waits for its end.

    Args:
      chunk_size: Tokens between two synchronisations with the host; with a unified max, whose failures are counted
        there, 64 at most. The others: see `generate`.

    Raises:
      ValueError, FloatingPointError, MemoryError: As in `generate`.
    """
    chunk_size = positive_int("chunk_size", chunk_size)
    if prefill_chunk_size is not None:
        prefill_chunk_size = positive_int("prefill_chunk_size", prefill_chunk_size)
    if cache is not None:
        _check_cache(model, cache)
    if are_texts(tokens):
        if prompt_lengths is not None:
            raise ValueError("prompt_lengths belong to a padded array [B, T], got texts as well")
        tokenizer = tokenizer or needed_tokenizer(model)
        tokens = encoded(tokens, tokenizer, add_special_tokens=cache is None)
        eos_ids = tokenizer.eos_ids if eos_ids is None else eos_ids
    prompts = check_prompts(model.config, tokens, prompt_lengths, max_new_tokens=max_new_tokens, cache=cache)
    end_ids = checked_eos(() if eos_ids is None else eos_ids, model.config.vocab_size)
    sampling = make_sampling(temperature, top_k, top_p, vocab_size=model.config.vocab_size)
    is_asked = not isinstance(softmax, str)
    softmax, reason = _chosen(model, softmax)
    if softmax is not None and softmax.phi is not None:
        rows = (model.config.num_hidden_layers, len(prompts.lengths), model.config.num_attention_heads)
        phi_shape = np.shape(softmax.phi)
        fits = all(n in (1, row) for n, row in zip(phi_shape[::-1], rows[::-1], strict=False))
        if len(phi_shape) > 3 or not fits or (len(phi_shape) == 3 and phi_shape[0] != rows[0]):
            raise ValueError(
                f"phi must broadcast to [B, N] = {list(rows[1:])}, or be one a layer, [L, B or 1, N or 1] with "
                f"L = {rows[0]}, got shape {phi_shape}"
            )
        # One dtype for a Python float and an array, so that a new phi never compiles.
        softmax = dataclasses.replace(softmax, phi=jnp.asarray(softmax.phi, jnp.float32))
    capacity = round_up(prompts.width + int(max_new_tokens), _CAPACITY_MULTIPLE)
    if cache is not None:
        capacity = max(capacity, cache.kv.capacity)
    of_steps, plan = softmax, model.layer_plan(len(prompts.lengths))
    if softmax is not None and not is_asked and plan.prefers_online(capacity):
        of_steps = None
        reason = f"online in decode steps, mostly faster there up to {plan.online_up_to} slots; the prompt: {reason}"
    max_recompute_rate = as_number("max_recompute_rate", max_recompute_rate)
    if not 0 <= max_recompute_rate <= 1:
        raise ValueError(f"max_recompute_rate must be within 0..1, got {max_recompute_rate}")
    job = _Job(
        prompts=prompts,
        capacity=capacity,
        max_new_tokens=int(max_new_tokens),
        eos_ids=end_ids,
        sampling=sampling,
        key=checked_key(key),
        softmax=softmax,
        softmax_of_steps=of_steps,
        softmax_reason=reason,
        max_recompute_rate=max_recompute_rate,
        chunk_size=chunk_size,
        tokenizer=tokenizer,
        cache=cache,
        keeps_cache=return_cache or cache is not None,
        prefill_chunk_size=prefill_chunk_size,
    )
    return _run(model, job)


@dataclasses.dataclass(frozen=True)
class _Job:
    """The checked arguments of `stream`; softmax is that of the prompts."""

    prompts: Prompts
    capacity: int
    max_new_tokens: int
    eos_ids: tuple[int, ...]
    sampling: Sampling
    key: jax.Array
    softmax: UnifiedMax | None
    softmax_of_steps: UnifiedMax | None
    softmax_reason: str
    max_recompute_rate: float
    chunk_size: int
    tokenizer: Tokenizer | None
    cache: PromptCache | None
    keeps_cache: bool
    prefill_chunk_size: int | None


def _check_cache(model: CausalLM, cache: PromptCache) -> None:
    if not isinstance(cache, PromptCache):
        raise ValueError(f"cache must be the cache of a GenerationResult, got {type(cache).__name__}")
    kv = cache.kv
    fresh = jax.eval_shape(lambda: KVCache.create(model.config, kv.batch, kv.capacity, model.dtype))
    expected, got = (f"{len(x.keys)} layers of {x.keys[0].dtype}{list(x.keys[0].shape)}" for x in (fresh, kv))
    if got != expected:
        raise ValueError(f"cache must be of this model, {expected}; got {got}")


def _chosen(model: CausalLM, softmax: Softmax) -> tuple[UnifiedMax | None, str]:
    """The policy, and which it is and why."""
    if softmax is None:
        return None, "online, as asked"
    if isinstance(softmax, UnifiedMax):
        phi = f", phi {softmax.phi:g}" if isinstance(softmax.phi, int | float) else ""
        return softmax, "bound, as asked" if softmax.is_bound else f"unified{phi}, as asked"
    if not isinstance(softmax, str) or softmax != "auto":
        raise ValueError(f'softmax must be None, "auto" or a UnifiedMax, got {softmax!r}')
    if model.checkpoint is None:
        return None, "online: the model was not loaded from a checkpoint"
    return calibration.choose_softmax(model.config, model.checkpoint, model.dtype)


def _run(model: CausalLM, job: _Job) -> Generator[StreamChunk, None, GenerationResult]:
    """The host's side of `stream`."""
    started = time.perf_counter()
    sampling, max_new_tokens, chunk_size = job.sampling, job.max_new_tokens, job.chunk_size
    softmax = job.softmax_of_steps
    batch = len(job.prompts.lengths)
    structure, weights = flattened(model)
    eos = jnp.asarray(job.eos_ids, jnp.int32)
    options = decode_compiler_options(model, batch)
    # A step that is a CUDA graph is one launch: nothing queues up, and a loop in a loop takes longer to compile.
    has_many_launches = model.layer_plan(batch).overlaps_attention
    block_size = max(n for n in range(1, _MAX_BLOCK + 1) if chunk_size % n == 0) if has_many_launches else 1
    steps_of_drift = _STEPS_OF_DRIFT - _STEPS_OF_DRIFT % block_size  # whole blocks
    streams = None if job.tokenizer is None else map(job.tokenizer.stream, job.prompts.rows())
    texts = None if streams is None else TextRows(list(streams))
    explained = functools.partial(device_memory.explained, lambda: _held(model, weights, job), _LOWER)

    def chunk_of(tokens: np.ndarray, lengths: np.ndarray, is_over: bool) -> StreamChunk:
        new = None if texts is None else texts.push(tokens.tolist(), lengths.tolist(), is_over)
        return StreamChunk(tokens, lengths, new)

    def request_of(loop: Loop, softmax: UnifiedMax | None) -> Request:
        statics = structure, chunk_size, block_size
        return Request(decode_chunk, statics, (weights, loop, jnp.int32(0), sampling, eos, softmax), options)

    with explained():
        loop, first, compile_seconds = _prefilled(model, structure, weights, job, eos)
        started += compile_seconds
        request = request_of(loop, softmax)  # while the prompts run
        first = jax.block_until_ready(first)
    new_tokens = np.full((batch, max_new_tokens), job.eos_ids[0] if job.eos_ids else 0, np.int32)
    new_tokens[:, 0] = _finite(np.asarray(first)[:, None], 0, model.dtype)[:, 0]
    prefill_seconds = time.perf_counter() - started
    lengths, is_over = np.array(loop.lengths), max_new_tokens == 1 or bool(np.array(loop.finished).all())
    yield chunk_of(new_tokens[:, :1].copy(), lengths, is_over)

    num_tokens, num_started, decode_seconds = 1, 1, 0.0  # tokens that are here, and with those of started chunks
    recomputed_steps, online_from, program = 0, None, None
    judged = 0, 0  # steps that are known to be without drift, and of these the redone ones
    running = collections.deque[RunningChunk]()
    with Chunks(weights, loop) as chunks:
        while not is_over:
            with explained():
                while len(running) < _MAX_RUNNING and num_started < max_new_tokens:
                    longest = chunk_size if softmax is None else min(chunk_size, steps_of_drift)
                    num_steps = min(longest, max_new_tokens - num_started)
                    if program is None:
                        program, seconds = executable(request)
                        compile_seconds += seconds
                    running.append(chunks.start(program, jnp.int32(num_steps), sampling, eos, softmax))
                    num_started += num_steps
                report, seconds = running.popleft().result()
            decode_seconds += seconds
            new = _finite(report.tokens[:, : int(report.num_steps)], num_tokens, model.dtype)
            new_tokens[:, num_tokens : num_tokens + new.shape[1]] = new
            num_tokens += new.shape[1]
            lengths, recomputed_steps = report.lengths, int(report.recomputed_steps)
            is_over = num_tokens == max_new_tokens or bool(report.is_over)
            yield chunk_of(new, lengths, is_over)
            if softmax is not None:
                done = num_tokens - 1, recomputed_steps
                recent, redone = done[0] - judged[0], done[1] - judged[1]
                if redone > job.max_recompute_rate * max(recent, _STEPS_OF_DRIFT):
                    is_last = is_over or num_started == max_new_tokens
                    _warn_of_drift(softmax, recent, redone, is_last)
                    softmax, program = None, None
                    if not is_last:
                        online_from, request = num_started - 1, request_of(loop, softmax)
                elif recent >= _STEPS_OF_DRIFT:
                    judged = done
        with explained():
            for chunk in running:  # of no steps, since every row has ended
                chunk.result()

    return GenerationResult(
        tokens=new_tokens,
        lengths=np.array(lengths),
        recomputed_steps=recomputed_steps,
        softmax_reason=job.softmax_reason,
        is_online=job.softmax_of_steps is None,
        online_from=online_from if online_from is not None and online_from < num_tokens - 1 else None,
        decode_steps=num_tokens - 1,
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        compile_seconds=compile_seconds,
        cache_capacity=job.capacity,
        prompts=job.prompts.rows(),
        cached_tokens=job.prompts.cached,
        tokenizer=functools.partial(tokenizer_of, model) if job.tokenizer is None else lambda: job.tokenizer,
        kept_cache=_kept(job, chunks.loop, new_tokens, num_tokens) if job.keeps_cache else None,
    )


def _prefilled(
    model: CausalLM, structure: Structure, weights: list[jax.Array], job: _Job, eos: jax.Array
) -> tuple[Loop, jax.Array, float]:
    """The loop behind the prefill and the first tokens [B], which may still be computed, and the compile seconds."""
    batch, length = job.prompts.tokens.shape
    softmax, capacity, is_behind_cache = job.softmax, job.capacity, job.cache is not None
    plan = model.prefill_plan(batch, length, capacity, softmax, job.prefill_chunk_size, is_behind_cache=is_behind_cache)
    with_key_norms = softmax is not None and softmax.is_bound
    policy = softmax if plan.takes_unified_max else None  # where it would not count, one program serves all policies
    key = jax.random.clone(job.key)  # a copy, since the loop donates its own and the caller keeps theirs
    arrays = jnp.asarray(job.prompts.tokens), jnp.asarray(job.prompts.lengths), job.sampling, eos, key, policy
    options = prefill_compiler_options()
    if job.cache is None:
        statics = structure, capacity, with_key_norms, plan.chunk_size
        run, seconds = executable(Request(decode_loop.prefill, statics, (weights, *arrays), options))
        return *run(weights, *arrays), seconds
    resume_args = job.cache.kv, jnp.asarray(job.prompts.cached)
    resume, seconds = executable(Request(decode_loop.resume, (capacity, with_key_norms), resume_args, {}))
    args = weights, resume(*resume_args), *arrays
    run, more_seconds = executable(Request(decode_loop.extend, (structure, plan.chunk_size), args, options))
    return *run(*args), seconds + more_seconds


def _kept(job: _Job, loop: Loop, new_tokens: np.ndarray, num_tokens: int) -> PromptCache:
    """The cache behind `num_tokens` steps, the prefill's included; of a row that ended, without what it ran on."""
    lengths = np.asarray(loop.lengths)
    # A step runs the token that was drawn before it, so the last one of the longest rows has not been run.
    live = job.prompts.cached + job.prompts.lengths + np.minimum(lengths, num_tokens - 1)
    before = [[]] * len(lengths) if job.cache is None else job.cache.tokens
    rows = zip(before, job.prompts.cached, job.prompts.rows(), new_tokens, lengths, strict=True)
    tokens = [old[:n] + prompt + new[:length].tolist() for old, n, prompt, new, length in rows]
    return PromptCache(dataclasses.replace(loop.cache, lengths=jnp.asarray(live, jnp.int32)), tokens)


def _held(model: CausalLM, weights: list[jax.Array], job: _Job) -> dict[str, int]:
    """What takes the device's memory: names and bytes."""
    batch, capacity, config = len(job.prompts.lengths), job.capacity, model.config
    held = {"the weights take": sum(x.nbytes for x in weights)}
    held[f"the KV cache of {batch} x {capacity} tokens"] = cache_bytes(config, batch, capacity, model.dtype)
    if job.cache is not None:
        kv = job.cache.kv
        held["the one that it goes on from"] = cache_bytes(config, kv.batch, kv.capacity, model.dtype)
    return held


def _finite(tokens: np.ndarray, num_before: int, dtype: jnp.dtype) -> np.ndarray:
    """The tokens [B, n] of a chunk, none of which stands for logits that were not finite.

    Raises:
      FloatingPointError: One does.
    """
    bad = tokens == NOT_FINITE
    if not bad.any():
        return tokens
    step = int(bad.any(axis=0).argmax())
    row = int(bad[:, step].argmax())
    where = "of the prompt" if num_before + step == 0 else f"of decode step {num_before + step}"
    wider = " Try dtype bfloat16 or float32, which have a wider range." if dtype == jnp.float16 else ""
    raise FloatingPointError(
        f"expected finite logits, got NaN or infinity in row {row} {where}: weights are damaged, or activations exceed "
        f"{dtype.name}.{wider}"
    )


def _warn_of_drift(softmax: UnifiedMax, steps: int, redone: int, is_over: bool) -> None:
    rest = "" if is_over else ": the rest runs with online softmax"
    instead = "softmax=None" if softmax.is_bound else "UnifiedMax.bound()"
    warn_caller(
        f"{redone} of the latest {steps} decode steps left the safe window of unified-max softmax{rest}. Calibrate phi "
        f"on text like this (fdpp_jax.calibrate), or use {instead}"
    )
