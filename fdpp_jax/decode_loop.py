"""The programs of generation: prefill of a new cache or behind one, and chunks of decode steps as one jitted loop each.

The KV cache is donated from call to call and updated in place. Rows that leave the safe window of unified-max softmax
are redone inside the attention kernel. Where there is none, the whole step is redone by one `lax.cond` with online
softmax: it writes the same cache slots again.
"""

import concurrent.futures
import dataclasses
import functools
import sys
import threading
import time
from collections.abc import Hashable
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdpp_jax.models.cache import KVCache
from fdpp_jax.models.decoder import CausalLM
from fdpp_jax.ops.layer import compiler_options
from fdpp_jax.plans import device, hopper
from fdpp_jax.sampling import Sampling, rows_are_finite, sample
from fdpp_jax.unified_max import UnifiedMax

type Structure = tuple[nnx.GraphDef, jax.tree_util.PyTreeDef]

# In the place of a token: the host sees it once a chunk, so that no step waits.
NOT_FINITE = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loop:
    """What a decode step hands to the next: the last tokens, and the cache of all before them."""

    cache: KVCache
    tokens: jax.Array  # [B] int32
    finished: jax.Array  # [B] bool
    lengths: jax.Array  # [B] int32
    recomputed_steps: jax.Array  # [] int32
    key: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkReport[Array: (jax.Array, np.ndarray)]:
    """What the host hears of a chunk of decode steps: arrays apart from the loop, which the next chunk is given."""

    tokens: Array  # [B, chunk_size] int32, NOT_FINITE for a row whose logits were not finite
    num_steps: Array  # [] int32, those that count
    lengths: Array  # [B] int32, as the loop's
    recomputed_steps: Array  # [] int32, as the loop's
    is_over: Array  # [] bool, whether every row has ended


_THREADS = "fdpp_jax-chunks"  # what their names begin with

# The report, and the seconds from the start of the chunk, or the end of the one before, to its own end.
type RunningChunk = concurrent.futures.Future[tuple[ChunkReport[np.ndarray], float]]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def prefill(
    structure: Structure,
    capacity: int,
    with_key_norms: bool,
    prefill_chunk_size: int | None,
    weights: list[jax.Array],
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    sampling: Sampling,
    eos_ids: jax.Array,
    key: jax.Array,
    softmax: UnifiedMax | None,
) -> tuple[Loop, jax.Array]:
    """Fills a new cache from the prompts and draws the first token of every row, NOT_FINITE where none can be."""
    model = rebuilt(structure, weights)
    cache = KVCache.create(model.config, prompts.shape[0], capacity, model.dtype, with_key_norms=with_key_norms)
    options: dict[str, Any] = dict(softmax=softmax, prefill_chunk_size=prefill_chunk_size)
    return _first_tokens(*model.prefill(prompts, prompt_lengths, cache, **options), sampling, eos_ids, key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def resume(capacity: int, with_key_norms: bool, cache: KVCache, lengths: jax.Array) -> KVCache:
    """A copy of the cache with another capacity, and with `lengths` [B] int32 of its tokens, its own or fewer."""
    return dataclasses.replace(cache, lengths=lengths).resized(capacity, with_key_norms=with_key_norms)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def extend(
    structure: Structure,
    prefill_chunk_size: int | None,
    weights: list[jax.Array],
    cache: KVCache,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    sampling: Sampling,
    eos_ids: jax.Array,
    key: jax.Array,
    softmax: UnifiedMax | None,
) -> tuple[Loop, jax.Array]:
    """`prefill` behind the tokens that the cache holds."""
    model = rebuilt(structure, weights)
    options: dict[str, Any] = dict(softmax=softmax, prefill_chunk_size=prefill_chunk_size)
    return _first_tokens(*model.extend(prompts, prompt_lengths, cache, **options), sampling, eos_ids, key)


def _first_tokens(
    logits: jax.Array, cache: KVCache, sampling: Sampling, eos_ids: jax.Array, key: jax.Array
) -> tuple[Loop, jax.Array]:
    """The loop behind a prefill, and the first token of every row [B] int32, NOT_FINITE where none can be drawn."""
    key, sample_key = _next_keys(key, sampling)
    tokens = sample(logits, sample_key, sampling)
    loop = Loop(
        cache=cache,
        tokens=tokens,
        finished=(tokens[:, None] == eos_ids).any(axis=1),
        lengths=jnp.ones((cache.batch,), jnp.int32),
        recomputed_steps=jnp.zeros((), jnp.int32),
        key=key,
    )
    return loop, jnp.where(rows_are_finite(logits, sampling), tokens, NOT_FINITE)


def _next_keys(key: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """The loop's next key, and that of a draw. Greedy steps draw nothing, and need not launch what makes keys."""
    if sampling.temperature is None:
        return key, key
    next_key, sample_key = jax.random.split(key)
    return next_key, sample_key


class _Block(NamedTuple):
    """What a step of a block hands to the next."""

    cache: KVCache
    last: jax.Array  # [B] int32, drawn by the step before
    key: jax.Array
    drawn: jax.Array  # [B, block_size] int32, by the steps so far; NOT_FINITE where none can be
    redone: jax.Array  # [block_size] bool


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def decode_chunk(
    structure: Structure,
    chunk_size: int,
    block_size: int,
    weights: list[jax.Array],
    loop: Loop,
    num_steps: jax.Array,
    sampling: Sampling,
    eos_ids: jax.Array,
    softmax: UnifiedMax | None,
) -> tuple[Loop, ChunkReport[jax.Array]]:
    """Up to num_steps <= chunk_size decode steps, fewer if every row ends; the rest of their block is dropped.

    block_size divides chunk_size, and num_steps where another chunk follows. The steps of a block launch little but the
    model: none asks whether to go on, and which rows have ended is seen at the block's end, from its tokens.
    """
    model = rebuilt(structure, weights)
    pad = eos_ids[0] if eos_ids.size else jnp.int32(0)
    num_rows = loop.tokens.shape[0]

    def is_live(carry: tuple[Loop, jax.Array, jax.Array]) -> jax.Array:
        loop, _, step = carry
        return (step < num_steps) & ~loop.finished.all()

    def take_block(carry: tuple[Loop, jax.Array, jax.Array]) -> tuple[Loop, jax.Array, jax.Array]:
        loop, chunk, first_step = carry

        def take_step(i: jax.Array, carry: _Block) -> _Block:
            logits, cache, redone = decode_step(model, carry.last, carry.cache, softmax)
            key, sample_key = _next_keys(carry.key, sampling)
            tokens = sample(logits, sample_key, sampling)
            is_asked = first_step + i < num_steps  # beyond that the cache has no slot
            lengths = jnp.where(is_asked, cache.lengths, carry.cache.lengths)
            drawn = jnp.where(rows_are_finite(logits, sampling), tokens, NOT_FINITE)[:, None]
            put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i)  # .at asks if i is inside
            return _Block(
                cache=dataclasses.replace(cache, lengths=lengths),
                last=tokens,
                key=key,
                drawn=put(carry.drawn, drawn, axis=1),
                redone=carry.redone if softmax is None else put(carry.redone, redone[None], axis=0),
            )

        block = _Block(
            cache=loop.cache,
            last=loop.tokens,
            key=loop.key,
            drawn=jnp.zeros((num_rows, block_size), jnp.int32),
            redone=jnp.zeros((block_size,), bool),
        )
        block = jax.lax.fori_loop(0, block_size, take_step, block)

        ends = (block.drawn[:, :, None] == eos_ids).any(axis=2)
        over = jnp.cumsum(jnp.concatenate([loop.finished[:, None], ends[:, :-1]], axis=1), axis=1) > 0  # before a step
        counts = (first_step + jnp.arange(block_size) < num_steps) & ~over.all(axis=0)
        num_counted = counts.sum(dtype=jnp.int32)
        finished = loop.finished | (ends & counts).any(axis=1)
        next_loop = Loop(
            cache=dataclasses.replace(block.cache, lengths=loop.cache.lengths + num_counted),
            tokens=jnp.where(over[:, -1], pad, block.last),  # a token that ends a row is run, for the cache
            finished=finished,
            lengths=loop.lengths + (counts & ~over).sum(axis=1, dtype=jnp.int32),
            recomputed_steps=loop.recomputed_steps + (counts & block.redone).sum(dtype=jnp.int32),
            key=block.key,
        )
        tokens = jnp.where(over, pad, block.drawn)
        chunk = jax.lax.dynamic_update_slice_in_dim(chunk, tokens, first_step, axis=1)
        return next_loop, chunk, first_step + num_counted

    chunk = jnp.full((num_rows, chunk_size), pad, jnp.int32)
    loop, chunk, step = jax.lax.while_loop(is_live, take_block, (loop, chunk, jnp.int32(0)))
    return loop, ChunkReport(chunk, step, loop.lengths, loop.recomputed_steps, loop.finished.all())


class Chunks:
    """Runs chunks of decode steps one behind the other, while the host does something else.

    A thread of its own calls the programs: on a GPU, XLA reads on the host whether a loop goes on, so that the call
    returns when the loop has ended. Another thread fetches the reports, and notes when each was there.

    Attributes:
      loop: Behind the last chunk whose report was waited for, if none was started since.
    """

    def __init__(self, weights: list[jax.Array], loop: Loop):
        self._weights, self.loop = weights, loop
        self._caller, self._reader = (concurrent.futures.ThreadPoolExecutor(1, _THREADS) for _ in range(2))
        self._last_ready = 0.0
        self._is_exiting = sys.is_finalizing  # bound here, since modules may lose their names by then

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the chunk that runs, so that the memory of the loop is free then; what has not begun never does.

        A loop that nobody closed may be collected as the interpreter exits, which has ended the threads itself, or in
        one of the threads, which cannot wait for itself.
        """
        if self._is_exiting():
            return
        is_own = threading.current_thread().name.startswith(_THREADS)
        for thread in (self._caller, self._reader):
            thread.shutdown(wait=not is_own, cancel_futures=True)

    def start(self, program: jax.stages.Compiled, *args: Any) -> RunningChunk:
        """Has the program of `decode_chunk` run with the weights, the loop and args, behind the chunks before."""
        return self._reader.submit(self._read, self._caller.submit(self._call, program, args))

    def _call(self, program: jax.stages.Compiled, args: tuple[Any, ...]) -> tuple[float, ChunkReport[jax.Array]]:
        started = time.perf_counter()
        self.loop, report = program(self._weights, self.loop, *args)
        return started, report

    def _read(
        self, called: concurrent.futures.Future[tuple[float, ChunkReport[jax.Array]]]
    ) -> tuple[ChunkReport[np.ndarray], float]:
        started, on_device = called.result()
        report = jax.device_get(on_device)
        started, self._last_ready = max(started, self._last_ready), time.perf_counter()
        return report, self._last_ready - started


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


def decode_compiler_options(model: CausalLM, batch: int) -> dict[str, str | bool]:
    """XLA's options for a loop of the model's decode steps with a batch of rows."""
    return compiler_options(model.layer_plan(batch))


def prefill_compiler_options() -> dict[str, str | bool]:
    """XLA's options for a prefill on the device that JAX runs on.

    On Hopper without XLA's own Triton matmuls, which cost seconds of compilation and are slower for long prompts:
    docs/experiments/prefill.md#matmuls-of-a-prompt
    """
    return {"xla_gpu_enable_triton_gemm": False} if device.current().arch == hopper.ARCHITECTURE else {}


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


class Request:
    """What to compile: a jitted function for arguments like these. Making one takes as long as a decode step."""

    def __init__(
        self,
        function: Any,
        statics: tuple[Hashable, ...],
        args: tuple[Any, ...],
        options: dict[str, str | bool],
    ):
        leaves, treedef = jax.tree.flatten(args)
        avals = tuple(
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if x.committed else None) for x in leaves
        )
        self.function, self.statics = function, statics
        self._treedef, self._avals, self._options = treedef, avals, tuple(options.items())
        self._key = function, statics, treedef, avals, self._options
        self._hash = hash(self._key)  # of all modules of a model

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Request) and self._key == other._key

    def compile(self) -> jax.stages.Compiled:
        """The program: ahead of its call, so that compilation is not measured as decoding."""
        lowered = self.function.lower(*self.statics, *jax.tree.unflatten(self._treedef, self._avals))
        return lowered.compile(compiler_options=dict(self._options))


def executable(request: Request) -> tuple[jax.stages.Compiled, float]:
    """The program, and the seconds that it took to compile: 0 where it was there."""
    started = time.perf_counter()
    misses = _compile.cache_info().misses
    compiled = _compile(request)
    seconds = time.perf_counter() - started
    return compiled, seconds if _compile.cache_info().misses > misses else 0.0


@functools.lru_cache(maxsize=32)
def _compile(request: Request) -> jax.stages.Compiled:
    return request.compile()
