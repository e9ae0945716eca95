"""Attention in plain XLA in blocks of queries and keys, with gradients: where all scores at once take too much memory.

A loop over blocks of queries holds one over blocks of keys, which leaves out the blocks that no query sees. Softmax is
online, in float32. The gradients compute the log-sum-exp of a block of queries first, and then its scores again.
Beside operands and results, memory is one block of scores, and float32 sums as large as what is summed.

Weights and gradients of scores meet bfloat16 arrays in bfloat16, and all others in float32.

Source: FlashAttention-2 (arXiv 2307.08691), section 3.1.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fdpp_jax.ops import reference
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions
from fdpp_jax.plans.shapes import cdiv

# Of a block's scores in float32: enough work for a launch of each operation, and little beside the arrays of a call
# whose scores are a multiple of this.
_BLOCK_BYTES = 64 << 20
_LARGEST, _SMALLEST = 1024, 64  # queries, or keys
_CACHE = ("key", "value", "key_scale", "value_scale")


def attention(arrays: AttentionArrays, options: AttentionOptions) -> Any:
    """As `reference.attention`, of arrays without phi."""
    call = _Call.of(arrays, options)
    out, log_sum = jnp.zeros_like(arrays.query), jnp.zeros(arrays.query.shape[:3], jnp.float32)

    def rows(i: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        state = call.softmax(i)
        found = (_by_query(x) for x in (state.out, state.log_sum))
        return tuple(call.put(whole, x, i) for whole, x in zip(results, found, strict=True))  # type: ignore[return-value]

    out, log_sum = lax.fori_loop(0, call.num_row_blocks, rows, (out, log_sum))
    return (out, log_sum) if options.return_residual else out


def gradients(
    arrays: AttentionArrays,
    options: AttentionOptions,
    moved: Sequence[str],
    grads: Sequence[jax.Array],
    *,
    copies: int = 1,
) -> dict[str, jax.Array]:
    """Gradients of the arrays named in `moved`, from those of the results.

    Args:
      arrays: Of the call, without phi.
      options: Its static facts.
      moved: Names of arrays of floating-point numbers.
      grads: Of the output [B, T, N, H], and with return_residual of the log-sum-exp [B, T, N].
      copies: How many calls vmap computes at once: their blocks are held together.
    """
    cache = {name: getattr(arrays, name) for name in _CACHE if name in moved}
    dense, pull_back = jax.vjp(lambda cache: reference.dense_cache(arrays._replace(**cache)), cache)
    call = _Call.of(arrays, options, dense, copies)
    sums = {"query": jnp.zeros_like(arrays.query)} if "query" in moved else {}
    for name, like in (("key", dense[0]), ("value", dense[1])):
        if {name, f"{name}_scale"} & set(moved):
            sums[name] = jnp.zeros(like.shape, jnp.float32)
    for name in ("scale", "bias"):
        if name in moved:
            sums[name] = jnp.zeros(getattr(arrays, name).shape, jnp.float32)
    if "sinks" in moved:  # by sequence until the end, so that devices that share the batch need not add up in each step
        sums["sinks"] = jnp.zeros((arrays.query.shape[0], arrays.query.shape[2]), jnp.float32)

    sums = lax.fori_loop(0, call.num_row_blocks, functools.partial(_add_rows, call, grads), sums)
    dense_grads = tuple(
        sums.pop(name).astype(x.dtype) if name in sums else jnp.zeros_like(x)
        for name, x in zip(("key", "value"), dense, strict=True)
    )
    if "sinks" in sums:
        sums["sinks"] = sums["sinks"].sum(axis=0)
    (found,) = pull_back(dense_grads)
    return found | {name: x.astype(getattr(arrays, name).dtype) for name, x in sums.items()}


def _add_rows(
    call: "_Call", grads: Sequence[jax.Array], i: jax.Array, sums: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Adds what block i of the queries gives to the gradients."""
    state = call.softmax(i)
    grad = call.by_head(call.rows(grads[0], i))  # [B, T, K, G, H]
    less = (_by_row(grad.astype(jnp.float32)) * state.out).sum(axis=-1)  # [B, K, G, T]
    if call.options.return_residual:
        of_log_sum = _by_row(call.by_head(call.rows(grads[1], i)))
        less -= jnp.where(jnp.isneginf(state.log_sum), 0.0, of_log_sum)
    if "sinks" in sums:
        share = jnp.exp(call.sink - state.log_sum)
        share = jnp.where(call.is_new(i) & ~jnp.isneginf(state.log_sum), share * -less, 0.0)
        sums = sums | {"sinks": sums["sinks"] + share.sum(axis=3).reshape(share.shape[0], -1)}
    shift = jnp.where(jnp.isneginf(state.log_sum), 0.0, state.log_sum)[..., None]
    query = call.by_head(call.rows(call.arrays.query, i))

    def add_keys(j: jax.Array, carry: tuple[jax.Array, dict[str, jax.Array]]) -> Any:
        of_query, sums = carry[0], dict(carry[1])

        def add(name: str, x: jax.Array) -> None:
            if name in sums:
                sums[name] = call.put(sums[name], call.keys(sums[name], j) + x, j, axis=1, is_keys=True)

        block = call.block(query, i, j)
        weights = jnp.where(block.mask, jnp.exp(block.scores - shift), 0.0)
        add("value", _dot("bkgts,btkgh->bskh", weights.astype(_weights_dtype(block.value)), grad))
        of_scores = _dot("btkgh,bskh->bkgts", grad, block.value)
        of_scores = jnp.where(block.mask, weights * (of_scores - less[..., None]), 0.0)
        if "bias" in sums:
            sums["bias"] = call.add_to_bias(sums["bias"], of_scores, i, j)
        of_scores *= block.slope
        if "scale" in sums:
            sums["scale"] += (of_scores * block.products).sum()
        of_products = of_scores * call.scale
        of_products = of_products.astype(_weights_dtype(query, block.key))
        add("key", _dot("bkgts,btkgh->bskh", of_products, query))
        if "query" in sums:
            of_query += _dot("bkgts,bskh->btkgh", of_products, block.key)
        return of_query, sums

    of_query = jnp.zeros(query.shape, jnp.float32)
    of_query, sums = lax.fori_loop(*call.live_key_blocks(i), add_keys, (of_query, sums))
    if "query" in sums:
        sums = sums | {"query": call.put(sums["query"], of_query, i)}
    return sums


class _Rows(NamedTuple):
    """The results of a block of queries, in float32: out [B, K, G, T, H], log_sum [B, K, G, T]."""

    out: jax.Array
    log_sum: jax.Array


class _Block(NamedTuple):
    """Scores of a block of queries with a block of keys, float32 [B, K, G, T, S] each.

    Attributes:
      products: Of queries and keys.
      scores: What softmax takes; -inf where a key is hidden.
      slope: Of the scores' soft cap, from which a gradient of the scores goes on; 1 without one.
      mask: Which query sees which key, each axis whole or 1.
      key: [B, S, K, H], zero where no query of the block sees it.
      value: As key.
    """

    products: jax.Array
    scores: jax.Array
    slope: jax.Array | float
    mask: jax.Array
    key: jax.Array
    value: jax.Array


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call, cut into blocks. The last block ends with the last query or key, and so begins within the one before."""

    arrays: AttentionArrays
    options: AttentionOptions
    key: jax.Array  # [B, S, K, H]
    value: jax.Array
    block_q: int
    block_kv: int
    spans: tuple[jax.Array, jax.Array] | None  # of `_key_spans`

    @classmethod
    def of(
        cls,
        arrays: AttentionArrays,
        options: AttentionOptions,
        dense: tuple[jax.Array, jax.Array] | None = None,
        copies: int = 1,
    ) -> "_Call":
        """The call, of keys and values [B, S, K, H] where they have been made already."""
        key, value = reference.dense_cache(arrays) if dense is None else dense
        batch, query_length, num_heads, _ = arrays.query.shape
        blocks = _block_sizes(copies * batch * num_heads, query_length, key.shape[1])
        return cls(arrays, options, key, value, *blocks, _key_spans(arrays, options, key.shape[1], *blocks))

    @property
    def num_row_blocks(self) -> int:
        return cdiv(self.arrays.query.shape[1], self.block_q)

    @property
    def scale(self) -> jax.Array | float:
        return self.options.scale if self.arrays.scale is None else self.arrays.scale

    @property
    def sink(self) -> jax.Array:
        """[1, K, G, 1] float32, -inf where there is none."""
        num_kv_heads, group = self._heads
        if self.arrays.sinks is None:
            return jnp.full((1, num_kv_heads, group, 1), -jnp.inf)
        return self.arrays.sinks.astype(jnp.float32).reshape(1, num_kv_heads, group, 1)

    @property
    def _heads(self) -> tuple[int, int]:
        num_kv_heads = self.key.shape[2]
        return num_kv_heads, self.arrays.query.shape[2] // num_kv_heads

    def by_head(self, x: jax.Array) -> jax.Array:
        """[B, T, N, ...] -> [B, T, K, G, ...]."""
        return x.reshape(*x.shape[:2], *self._heads, *x.shape[3:])

    def _start(self, i: jax.Array, *, is_keys: bool = False) -> jax.Array:
        """The first query, or key, of block i."""
        size, whole = (self.block_kv, self.key.shape[1]) if is_keys else (self.block_q, self.arrays.query.shape[1])
        return jnp.minimum(i * size, whole - size)

    def rows(self, x: jax.Array, i: jax.Array, axis: int = 1) -> jax.Array:
        """Block i of the queries, of an array that has an axis T."""
        return lax.dynamic_slice_in_dim(x, self._start(i), self.block_q, axis)

    def keys(self, x: jax.Array, j: jax.Array, axis: int = 1) -> jax.Array:
        """Block j of the keys, of an array that has an axis S."""
        return lax.dynamic_slice_in_dim(x, self._start(j, is_keys=True), self.block_kv, axis)

    def is_new(self, i: jax.Array) -> jax.Array:
        """Which queries of block i are not in the block before, [T]."""
        return self._start(i) + jnp.arange(self.block_q) >= i * self.block_q

    def put(self, whole: jax.Array, x: jax.Array, i: jax.Array, axis: int = 1, *, is_keys: bool = False) -> jax.Array:
        """An array with an axis T, or S, in which block i is x; of queries only those not in the block before."""
        x = x.reshape(*whole.shape[:axis], -1, *whole.shape[axis + 1 :]).astype(whole.dtype)
        if not is_keys:
            is_new = self.is_new(i).reshape(-1, *[1] * (whole.ndim - axis - 1))
            x = jnp.where(is_new, x, self.rows(whole, i, axis))
        return lax.dynamic_update_slice_in_dim(whole, x, self._start(i, is_keys=is_keys), axis)

    def live_key_blocks(self, i: jax.Array) -> tuple[Any, Any]:
        """First and last + 1 of the key blocks of which a query of block i, in any sequence, sees a key."""
        return (
            (0, cdiv(self.key.shape[1], self.block_kv)) if self.spans is None else (self.spans[0][i], self.spans[1][i])
        )

    def block(self, query: jax.Array, i: jax.Array, j: jax.Array) -> _Block:
        """Of block i of the queries, [B, T, K, G, H], with block j of the keys."""
        queries = self._start(i) + jnp.arange(self.block_q)
        keys = self._start(j, is_keys=True) + jnp.arange(self.block_kv)
        mask = reference.sees(self.arrays, self.options, queries, keys)
        mask &= (keys >= j * self.block_kv) & self.is_new(i)[:, None]
        mask = mask[:, None, None]  # [B or 1, 1, 1, T, S]
        if self.arrays.mask is not None:
            mask &= reference.by_group(self._of_scores(self.arrays.mask, i, j), self._heads)
        is_live = mask.any(axis=(2, 3)).swapaxes(1, 2)[..., None]  # [B or 1, S, K or 1, 1]
        key, value = (jnp.where(is_live, self.keys(x, j), 0) for x in (self.key, self.value))  # 0 * NaN would be NaN
        products = _dot("btkgh,bskh->bkgts", query, key)
        scores = products * self.scale
        slope: jax.Array | float = 1.0
        if (cap := self.options.logits_soft_cap) is not None:
            capped = jnp.tanh(scores / cap)
            scores, slope = cap * capped, 1.0 - capped**2
        if self.arrays.bias is not None:
            scores += reference.by_group(self._of_scores(self.arrays.bias, i, j).astype(jnp.float32), self._heads)
        return _Block(products, jnp.where(mask, scores, -jnp.inf), slope, mask, key, value)

    def _of_scores(self, x: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        """Of an array [B, N, T, S], each axis whole or 1, what meets block i of the queries and block j of the keys."""
        x = x if x.shape[2] == 1 else self.rows(x, i, 2)
        return x if x.shape[3] == 1 else self.keys(x, j, 3)

    def add_to_bias(self, total: jax.Array, of_scores: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        """The gradient of the bias, and that of the scores of a block [B, K, G, T, S]."""
        x = of_scores.reshape(of_scores.shape[0], -1, *of_scores.shape[3:])  # [B, N, T, S]
        x = x.sum(axis=[axis for axis in range(4) if total.shape[axis] == 1], keepdims=True)
        starts = [0, 0, 0 if total.shape[2] == 1 else self._start(i)]
        starts += [0 if total.shape[3] == 1 else self._start(j, is_keys=True)]
        x += lax.dynamic_slice(total, starts, x.shape)
        return lax.dynamic_update_slice(total, x, starts)

    def softmax(self, i: jax.Array) -> _Rows:
        """The results of block i of the queries; of those that are in the block before, any."""
        query = self.by_head(self.rows(self.arrays.query, i))
        by_row = (query.shape[0], *self._heads, self.block_q)

        def step(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top_before, den, num = state
            block = self.block(query, i, j)
            top = jnp.maximum(top_before, block.scores.max(axis=-1))
            shift = jnp.where(jnp.isneginf(top), 0.0, top)
            weights = jnp.where(block.mask, jnp.exp(block.scores - shift[..., None]), 0.0)
            decay = jnp.exp(top_before - shift)
            products = _dot("bkgts,bskh->bkgth", weights.astype(_weights_dtype(block.value)), block.value)
            return top, den * decay + weights.sum(axis=-1), num * decay[..., None] + products

        state = jnp.full(by_row, -jnp.inf), jnp.zeros(by_row), jnp.zeros((*by_row, query.shape[-1]))
        top, den, num = lax.fori_loop(*self.live_key_blocks(i), step, state)
        sees_key, sink = ~jnp.isneginf(top), jnp.broadcast_to(self.sink, by_row)
        shift = jnp.maximum(top, sink)
        shift = jnp.where(jnp.isneginf(shift), 0.0, shift)
        decay = jnp.exp(top - shift)
        den = jnp.where(sees_key, den * decay + jnp.exp(sink - shift), 1.0)  # a row without keys: 0 / 1
        log_sum = jnp.where(sees_key, jnp.log(den) + shift, sink)
        return _Rows(num * (decay / den)[..., None], log_sum)


def _key_spans(
    arrays: AttentionArrays, options: AttentionOptions, capacity: int, block_q: int, block_kv: int
) -> tuple[jax.Array, jax.Array] | None:
    """For each block of queries the first and last + 1 of the key blocks with a key that any of them, in any sequence,
    sees; None: all blocks.

    For all of them at once, so that devices that share the batch need not ask each other in each step.
    """
    is_cut = options.is_causal or options.local_window_size is not None
    if not is_cut and arrays.lengths is None and arrays.starts is None:
        return None
    query_length = arrays.query.shape[1]
    start = jnp.minimum(jnp.arange(cdiv(query_length, block_q)) * block_q, query_length - block_q)
    position = start if arrays.query_offset is None else start + arrays.query_offset[:, None]  # [B, blocks] or [blocks]
    first, last = jnp.zeros_like(position), jnp.full_like(position, capacity - 1)
    if options.is_causal:
        last = jnp.minimum(last, position + block_q - 1)
    if options.local_window_size is not None:
        left, right = options.local_window_size
        first, last = jnp.maximum(first, position - left), jnp.minimum(last, position + block_q - 1 + right)
    if arrays.lengths is not None:
        last = jnp.minimum(last, arrays.lengths[:, None] - 1)
    if arrays.starts is not None:
        first = jnp.maximum(first, arrays.starts[:, None])
    first, last = (jnp.broadcast_to(x, jnp.broadcast_shapes(first.shape, last.shape)) for x in (first, last))
    sees = first <= last
    sequences = tuple(range(sees.ndim - 1))
    first, last = jnp.where(sees, first, capacity).min(axis=sequences), jnp.where(sees, last, -1).max(axis=sequences)
    first, last = _of_all_copies(first, last)
    return first // block_kv, last // block_kv + 1


@jax.custom_batching.custom_vmap
def _of_all_copies(first: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first and the last key of all calls under vmap, so that one loop serves them all."""
    return first, last


@_of_all_copies.def_vmap
def _of_mapped_copies(
    axis_size: int, is_mapped: list[bool], first: jax.Array, last: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[bool, bool]]:
    del axis_size
    first, last = first.min(axis=0) if is_mapped[0] else first, last.max(axis=0) if is_mapped[1] else last
    return _of_all_copies(first, last), (False, False)


def _block_sizes(num_heads: int, query_length: int, capacity: int) -> tuple[int, int]:
    """Queries and keys of a block: as many as have `_BLOCK_BYTES` of scores, of the heads of all sequences."""
    block_q = block_kv = _LARGEST
    while 4 * num_heads * min(block_q, query_length) * min(block_kv, capacity) > _BLOCK_BYTES:
        if block_kv == _SMALLEST:
            break
        # Keys last: the sums of values are read and written for each block of keys.
        block_q, block_kv = (block_q // 2, block_kv) if block_q == block_kv else (block_q, block_kv // 2)
    return min(block_q, query_length), min(block_kv, capacity)


def _dot(axes: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A product, accumulated in float32; as exact as the wider one of the arrays."""
    dtype = jnp.promote_types(x.dtype, y.dtype)
    return jnp.einsum(axes, x, y, precision=reference.precision(dtype), preferred_element_type=jnp.float32)


def _weights_dtype(*arrays: jax.Array) -> Any:
    """The dtype in which weights, or gradients of scores, meet arrays: float16 would be too narrow for them."""
    return jnp.bfloat16 if all(x.dtype == jnp.bfloat16 for x in arrays) else jnp.float32


def _by_row(x: jax.Array) -> jax.Array:
    """[B, T, K, G, ...] -> [B, K, G, T, ...]."""
    return jnp.moveaxis(x, 1, 3)


def _by_query(x: jax.Array) -> jax.Array:
    """[B, K, G, T, ...] -> [B, T, N, ...]."""
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])
