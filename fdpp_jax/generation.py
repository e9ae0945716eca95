"""`generate` and `stream`: the host's side of generation.

The prompt is padded to a power of two and prefilled at once. Then chunks of decode steps run as one jitted loop each
(`decode_loop`), which the host hears of only at its end.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fdpp_jax import calibration, device_memory
from fdpp_jax.decode_loop import NOT_FINITE, decode_chunk, decode_compiler_options, executable, flattened, prefill
from fdpp_jax.models import KVCache, Tokenizer
from fdpp_jax.models.decoder import CausalLM
from fdpp_jax.ops.planned import warn_caller
from fdpp_jax.plans.shapes import round_up
from fdpp_jax.prompts import Prompts, PromptsLike, are_texts, check_prompts, encoded, positive_int, tokenizer_of
from fdpp_jax.sampling import Sampling, as_number, make_sampling
from fdpp_jax.unified_max import UnifiedMax

type Softmax = UnifiedMax | Literal["auto"] | None

_CAPACITY_MULTIPLE = 64
_STEPS_OF_DRIFT = 64  # how often phi fails is judged over the latest so many steps, or a chunk if that has more
_LOWER = "Lower max_new_tokens, the number of prompts or their length, or take a smaller model"
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
      prompts: The tokens of each prompt.
      tokenizer: What makes texts of tokens: the one that was given, or finds the model's; None: there is none.
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
    prompts: list[list[int]]
    tokenizer: Callable[[], Tokenizer | None] = dataclasses.field(repr=False, compare=False)

    @property
    def token_lists(self) -> list[list[int]]:
        """The new tokens of each row that count, as lists."""
        return [row[:length].tolist() for row, length in zip(self.tokens, self.lengths, strict=True)]

    @functools.cached_property
    def texts(self) -> list[str] | None:
        """The text that each row adds to its prompt's, without special tokens; None where there is no tokenizer.

        Raises:
          ValueError: The tokenizer beside the model's checkpoint is malformed.
        """
        tokenizer = self.tokenizer()
        if tokenizer is None:
            return None
        texts = []
        for prompt, tokens in zip(self.prompts, self.token_lists, strict=True):
            stream = tokenizer.stream(prompt)
            texts.append(stream.push(tokens) + stream.finish())
        return texts


@dataclasses.dataclass(frozen=True)
class StreamChunk:
    """What is new in a stream.

    Attributes:
      tokens: [B, n] int32 new tokens.
      lengths: [B] int32 new tokens that count, from the start of the stream on.
      texts: The text that each row has got; a character comes once it is complete. None where the prompts were tokens
        and no tokenizer was given.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    texts: list[str] | None = None


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
        checkpoint. The answer is the same; the result's softmax_reason says which it was.
      max_recompute_rate: If more than this share of the latest 64 steps redid a row, a warning says so, and what is
        left runs with online softmax, after one compilation: a phi that does not fit costs more than it saves. Steps
        that a short call lacks count as good ones. 1: never.
      tokenizer: Makes tokens of texts, and texts of tokens. None: the one beside the model's checkpoint.

    Returns:
      The tokens, how many count, their texts, and what it took.

    Raises:
      ValueError: An argument doesn't fit the others or the model. Raised before anything is computed.
      FloatingPointError: Logits are NaN or infinite; names the first row and step.
      MemoryError: The device has too little memory; names what takes it.

    Source: FlashDecoding++ (arXiv 2311.01282), section 3.
    """
    options = temperature, top_k, top_p, key, softmax, max_recompute_rate, tokenizer
    # Between two chunks the GPU waits, and drift is looked for: docs/experiments/decode_step.md#chunks-of-generate
    chunks = stream(model, tokens, prompt_lengths, max_new_tokens, eos_ids, *options, chunk_size=_STEPS_OF_DRIFT)
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
) -> Generator[StreamChunk, None, GenerationResult]:
    """`generate` in pieces: yields the first token, then up to `chunk_size` tokens at a time.

    The arguments are checked at once, before the first chunk is asked for. The generator returns the
    GenerationResult (the value of its StopIteration, or of `yield from`).

    Args:
      chunk_size: Tokens between two synchronisations with the host. The others: see `generate`.

    Raises:
      ValueError, FloatingPointError, MemoryError: As in `generate`.
    """
    chunk_size = positive_int("chunk_size", chunk_size)
    if are_texts(tokens):
        if prompt_lengths is not None:
            raise ValueError("prompt_lengths belong to a padded array [B, T], got texts as well")
        tokenizer = tokenizer or _needed_tokenizer(model)
        tokens = encoded(tokens, tokenizer)
        eos_ids = tokenizer.eos_ids if eos_ids is None else eos_ids
    prompts = check_prompts(model.config, tokens, prompt_lengths, max_new_tokens=max_new_tokens)
    end_ids = _checked_eos(() if eos_ids is None else eos_ids, model.config.vocab_size)
    sampling = make_sampling(temperature, top_k, top_p, vocab_size=model.config.vocab_size)
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
    max_recompute_rate = as_number("max_recompute_rate", max_recompute_rate)
    if not 0 <= max_recompute_rate <= 1:
        raise ValueError(f"max_recompute_rate must be within 0..1, got {max_recompute_rate}")
    job = _Job(
        prompts=prompts,
        max_new_tokens=int(max_new_tokens),
        eos_ids=end_ids,
        sampling=sampling,
        key=_checked_key(key),
        softmax=softmax,
        softmax_reason=reason,
        max_recompute_rate=max_recompute_rate,
        chunk_size=chunk_size,
        tokenizer=tokenizer,
    )
    return _run(model, job)


@dataclasses.dataclass(frozen=True)
class _Job:
    """The checked arguments of `stream`."""

    prompts: Prompts
    max_new_tokens: int
    eos_ids: tuple[int, ...]
    sampling: Sampling
    key: jax.Array
    softmax: UnifiedMax | None
    softmax_reason: str
    max_recompute_rate: float
    chunk_size: int
    tokenizer: Tokenizer | None


def _needed_tokenizer(model: CausalLM) -> Tokenizer:
    tokenizer = tokenizer_of(model)
    if tokenizer is None:
        where = "was not loaded from a checkpoint" if model.checkpoint is None else f"has none in {model.checkpoint}"
        raise ValueError(f"texts need a tokenizer, and the model {where}: pass tokens, or tokenizer=")
    return tokenizer


def _checked_eos(eos_ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    ids = np.asarray(eos_ids)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"eos_ids must be a sequence of token ids, got {eos_ids!r}")
    bad_ids = ids[(ids < 0) | (ids >= vocab_size)].tolist()
    if bad_ids:
        raise ValueError(f"eos_ids must be within 0..{vocab_size - 1}, got {bad_ids}")
    return tuple(ids.tolist())


def _checked_key(key: jax.Array | None) -> jax.Array:
    if key is None:
        return jax.random.key(0)
    if isinstance(key, jax.Array) and key.shape == () and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    default = jax.eval_shape(jax.random.PRNGKey, 0)
    if isinstance(key, jax.Array) and (key.shape, key.dtype) == (default.shape, default.dtype):
        return jax.random.wrap_key_data(key)
    got = f"{key.dtype} of shape {key.shape}" if isinstance(key, jax.Array | np.ndarray) else repr(key)
    raise ValueError(f"key must be a PRNG key such as jax.random.key(7), got {got}")


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


def _run(model: CausalLM, job: _Job) -> Generator[StreamChunk, None, GenerationResult]:
    """The host's side of `stream`."""
    softmax, sampling, max_new_tokens, chunk_size = job.softmax, job.sampling, job.max_new_tokens, job.chunk_size
    batch, prompt_bucket = job.prompts.tokens.shape
    structure, weights = flattened(model)
    capacity = round_up(prompt_bucket + max_new_tokens, _CAPACITY_MULTIPLE)
    eos = jnp.asarray(job.eos_ids, jnp.int32)
    options = decode_compiler_options(model, batch)
    # A CUDA graph is one launch, of which nothing queues up; and a loop in a loop takes longer to compile.
    block_size = max(n for n in range(1, _MAX_BLOCK + 1) if chunk_size % n == 0) if options else 1
    texts = _TextRows(job.tokenizer, job.prompts)
    explained = functools.partial(device_memory.explained, lambda: _held(model, weights, batch, capacity), _LOWER)

    started = time.perf_counter()
    with explained():
        # A copy of the key, since the loop donates its own and the caller keeps theirs.
        arrays = jnp.asarray(job.prompts.tokens), jnp.asarray(job.prompts.lengths)
        prefill_args = (weights, *arrays, sampling, eos, jax.random.clone(job.key))
        with_key_norms = softmax is not None and softmax.is_bound
        run_prefill, compile_seconds = executable(prefill, (structure, capacity, with_key_norms), prefill_args, {})
        started += compile_seconds
        loop, first = jax.block_until_ready(run_prefill(*prefill_args))
    new_tokens = np.full((batch, max_new_tokens), job.eos_ids[0] if job.eos_ids else 0, np.int32)
    new_tokens[:, 0] = _finite(np.asarray(first)[:, None], 0, model.dtype)[:, 0]
    prefill_seconds = time.perf_counter() - started
    num_tokens, decode_seconds, online_from, run_chunk = 1, 0.0, None, None
    judged = 0, 0  # steps that are known to be without drift, and of these the redone ones
    lengths, is_over = np.asarray(loop.lengths), max_new_tokens == 1 or bool(np.asarray(loop.finished).all())
    yield StreamChunk(new_tokens[:, :1].copy(), lengths, texts.push(new_tokens[:, :1], lengths, is_over))

    while not is_over:
        started = time.perf_counter()
        with explained():
            num_steps = jnp.int32(min(chunk_size, max_new_tokens - num_tokens))
            chunk_args = (weights, loop, num_steps, sampling, eos, softmax)
            if run_chunk is None:  # looking it up takes as long as a step
                statics = structure, chunk_size, block_size
                run_chunk, seconds = executable(decode_chunk, statics, chunk_args, options)
                compile_seconds += seconds
                started += seconds
            loop, chunk, steps_run = jax.block_until_ready(run_chunk(*chunk_args))
        new = _finite(np.asarray(chunk)[:, : int(steps_run)], num_tokens, model.dtype)
        new_tokens[:, num_tokens : num_tokens + new.shape[1]] = new
        decode_seconds += time.perf_counter() - started
        num_tokens += new.shape[1]
        lengths, is_over = (
            np.asarray(loop.lengths),
            num_tokens == max_new_tokens or bool(np.asarray(loop.finished).all()),
        )
        yield StreamChunk(new, lengths, texts.push(new, lengths, is_over))
        if softmax is not None:
            done = num_tokens - 1, int(loop.recomputed_steps)
            recent, redone = done[0] - judged[0], done[1] - judged[1]
            if redone > job.max_recompute_rate * max(recent, _STEPS_OF_DRIFT):
                _warn_of_drift(softmax, recent, redone, is_over)
                if not is_over:
                    softmax, online_from, run_chunk = None, num_tokens - 1, None
            elif recent >= _STEPS_OF_DRIFT:
                judged = done

    return GenerationResult(
        tokens=new_tokens,
        lengths=np.array(loop.lengths),
        recomputed_steps=int(loop.recomputed_steps),
        softmax_reason=job.softmax_reason,
        online_from=online_from,
        decode_steps=num_tokens - 1,
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        compile_seconds=compile_seconds,
        cache_capacity=capacity,
        prompts=job.prompts.rows(),
        tokenizer=functools.partial(tokenizer_of, model) if job.tokenizer is None else lambda: job.tokenizer,
    )


class _TextRows:
    """The text of each row of a stream, as far as it is certain."""

    def __init__(self, tokenizer: Tokenizer | None, prompts: Prompts):
        self._streams = None if tokenizer is None else [tokenizer.stream(prompt) for prompt in prompts.rows()]
        self._done = np.zeros(len(prompts.lengths), np.int32)
        self._num_tokens = 0

    def push(self, tokens: np.ndarray, lengths: np.ndarray, is_over: bool) -> list[str] | None:
        """What tokens [B, n] add to each row, of which `lengths` count in all; with its last token a row is whole."""
        if self._streams is None:
            return None
        self._num_tokens += tokens.shape[1]
        texts = []
        for i, stream in enumerate(self._streams):
            num_new = int(lengths[i] - self._done[i])
            text = stream.push(tokens[i, :num_new].tolist())
            has_ended = is_over or lengths[i] < self._num_tokens
            texts.append(text + stream.finish() if has_ended else text)
            self._done[i] += num_new
        return texts


def _held(model: CausalLM, weights: list[jax.Array], batch: int, capacity: int) -> dict[str, int]:
    """What takes the device's memory: names and bytes."""
    cache = jax.eval_shape(lambda: KVCache.create(model.config, batch, capacity, model.dtype))
    return {
        "the weights take": sum(x.nbytes for x in weights),
        f"the KV cache of {batch} x {capacity} tokens": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)),
    }


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
