"""Attention of many queries per sequence over a cache, with a unified max or online softmax, in Triton.

A program has `block_q` rows, the queries of one head, or of a group of heads (`packs_group`), and goes through the
blocks of keys that its queries see:

    s [block_q, block_kv] = Q K^T        p = e^(s - phi)        o [block_q, H] += p V

With phi fixed, a step depends on none before, and o is never rescaled. With phi=None there is online softmax. Blocks
that a mask, a window or the lengths hide from all queries of the program are not read. Only blocks that some of them
see in part are masked.

Where a denominator left the safe window, the row is NaN, or the program computes its rows again with online softmax.

Source: FlashDecoding++ (arXiv 2311.01282), section 3, and FlashAttention-2 (arXiv 2307.08691), section 3.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from fdpp_jax import unified_max
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions
from fdpp_jax.plans.shapes import ScaleKind, cdiv
from fdpp_jax.plans.triton_prefill import PrefillAttentionConfig, padded_head_dim
from fdpp_jax.triton import bridge

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(float(jnp.finfo(jnp.float32).min))  # finite, so max - max is not NaN where there are no keys


class Facts(NamedTuple):
    """Static facts of a launch, the kernel's one constant."""

    query_length: int
    capacity: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    padded_dim: int  # a power of two
    num_row_heads: int  # of all sequences
    num_blocks: int  # of rows, per row head
    pack: int  # query heads that are rows of one row head, query by query
    page_size: int | None
    scales: ScaleKind | None
    scale: float
    soft_cap: float | None
    is_causal: bool
    left: int | None  # keys of the local window
    right: int | None
    has_starts: bool
    has_offset: bool
    has_sinks: bool
    is_online: bool
    has_phi_by_head: bool
    recompute: bool
    den_min: float
    den_max: float
    block_q: int
    block_kv: int
    num_stages: int
    heads_together: int


@functools.partial(jax.jit, static_argnames=("options", "config", "recompute"))
def prefill_attention(
    arrays: AttentionArrays, options: AttentionOptions, config: PrefillAttentionConfig, *, recompute: bool = False
) -> Any:
    """softmax(scale * q k^T) v for many query tokens per sequence.

    Args:
      arrays: query [B, T, N, H] bfloat16 or float16; key and value in its dtype, or int8 or float8_e4m3fn with scales,
        [B, S, K, H] or pages; phi None is online softmax. No bias, mask or traced scale.
      options: Static facts.
      config: Blocks, warps and stages.
      recompute: Recompute rows outside the safe window; else they are NaN.

    Returns:
      [B, T, N, H] in the query's dtype; with options.return_residual the pair of this and the rows' log-sum-exp
      [B, T, N] float32.
    """
    query, key = arrays.query, arrays.key
    batch, query_length, num_heads, head_dim = query.shape
    num_kv_heads, phi, scales = key.shape[2], arrays.phi, arrays.key_scale
    pack = num_heads // num_kv_heads if config.packs_group else 1
    left, right = options.local_window_size or (None, None)
    den_min, den_max = unified_max.window(query.dtype, arrays.capacity)
    facts = Facts(
        query_length=query_length,
        capacity=arrays.capacity,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        padded_dim=padded_head_dim(head_dim),
        num_row_heads=batch * num_heads // pack,
        num_blocks=cdiv(query_length * pack, config.block_q),
        pack=pack,
        page_size=None if arrays.page_table is None else key.shape[1],
        scales=None if scales is None else "head" if scales.ndim == 1 else "token",
        scale=float(options.scale),
        soft_cap=options.logits_soft_cap,
        is_causal=options.is_causal,
        left=left,
        right=right,
        has_starts=arrays.starts is not None,
        has_offset=arrays.query_offset is not None,
        has_sinks=arrays.sinks is not None,
        is_online=phi is None,
        has_phi_by_head=phi is not None and phi.ndim > 0,
        recompute=recompute and phi is not None,
        den_min=den_min,
        den_max=den_max,
        block_q=config.block_q,
        block_kv=config.block_kv,
        num_stages=config.num_stages,
        heads_together=min(config.heads_together, batch * num_heads // pack),
    )
    lengths = jnp.full((batch,), arrays.capacity, jnp.int32) if arrays.lengths is None else arrays.lengths
    if phi is not None:
        phi = jnp.broadcast_to(phi, (batch, num_heads)) if phi.ndim else phi.reshape(1)

    def given(x: jax.Array | None, dtype: Any) -> jax.Array:  # what a call lacks is not read
        return lengths if x is None else x.astype(dtype)

    out, log_sum = bridge.call(
        attend,
        query,
        key,
        arrays.value,
        lengths.astype(jnp.int32),
        given(arrays.starts, jnp.int32),
        given(arrays.query_offset, jnp.int32),
        given(phi, jnp.float32),
        given(arrays.sinks, jnp.float32),
        given(arrays.page_table, jnp.int32),
        given(scales, jnp.float32),
        given(arrays.value_scale, jnp.float32),
        results=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct(query.shape[:3], jnp.float32),
        ],
        grid=(facts.num_row_heads * facts.num_blocks,),
        arch=config.arch,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        facts=facts,
    )
    return (out, log_sum) if options.return_residual else out


@triton.jit
def attend(
    query,  # [B, T, N, H]
    key,  # [B, S, K, H], or pages [P, page_size, K, H]
    value,
    lengths,  # [B] int32, as starts and offsets
    starts,
    offsets,
    phi,  # [1] or [B, N] float32
    sinks,  # [N] float32
    pages,  # [B, pages per sequence] int32
    key_scale,  # [K], or as key without H, float32
    value_scale,
    out,  # [B, T, N, H]
    log_sum,  # [B, T, N] float32
    facts: tl.constexpr,
):
    """One program: a block of rows, from the first key block to the result."""
    block_q: tl.constexpr = facts.block_q
    padded_dim: tl.constexpr = facts.padded_dim
    batch, head, first_row = _place(facts)
    kv_head = head if facts.pack > 1 else head // (facts.num_heads // facts.num_kv_heads)

    length = tl.minimum(tl.load(lengths + batch), facts.capacity)
    start = 0
    if facts.has_starts:
        start = tl.maximum(tl.load(starts + batch), 0)
    offset = 0
    if facts.has_offset:
        offset = tl.load(offsets + batch)

    # The blocks of keys that the rows see: [begin, end), of which [inner, outer) are seen whole.
    last_row = tl.minimum(first_row + facts.block_q, facts.query_length * facts.pack) - 1
    low, inner_high = _bounds(offset + first_row // facts.pack, start, length, facts)
    inner_low, high = _bounds(offset + last_row // facts.pack, start, length, facts)
    begin = low // facts.block_kv
    end = tl.where(high > low, tl.cdiv(high, facts.block_kv), begin)
    inner = tl.minimum(tl.maximum(tl.cdiv(inner_low, facts.block_kv), begin), end)
    outer = tl.minimum(tl.maximum(tl.maximum(inner_high, 0) // facts.block_kv, inner), end)

    first_query = first_row // facts.pack
    row = first_row + tl.arange(0, facts.block_q)
    in_block = row // facts.pack - first_query
    position = offset + first_query + in_block
    heads = head + tl.zeros([block_q], tl.int32)
    if facts.pack > 1:
        heads = head * facts.pack + row % facts.pack
    is_row = row < facts.query_length * facts.pack
    column = tl.arange(0, facts.padded_dim)

    first_place = (batch * facts.query_length + first_query).to(tl.int64) * facts.num_heads
    places = in_block * facts.num_heads + heads
    elements = places[:, None] * facts.head_dim + column[None, :]
    is_element = is_row[:, None]
    if facts.head_dim != facts.padded_dim:
        is_element = is_element & (column < facts.head_dim)[None, :]
    q = tl.load(query + first_place * facts.head_dim + elements, mask=is_element, other=0.0)

    scale = facts.scale
    if facts.scales == "head":
        scale = scale * tl.load(key_scale + kv_head)
    shift = tl.full([block_q], _LOWEST, tl.float32)
    if not facts.is_online:
        if facts.has_phi_by_head:
            shift = tl.load(phi + batch * facts.num_heads + heads, mask=is_row, other=0.0) * _LOG2E
        else:
            shift = tl.full([block_q], 1.0, tl.float32) * (tl.load(phi) * _LOG2E)

    # Where the keys of this head stand: of the sequence, or of the pool.
    first_key = 0 * batch.to(tl.int64)
    if facts.page_size is None:
        first_key = batch.to(tl.int64) * facts.capacity
    else:
        pages += batch * (facts.capacity // facts.page_size)
    first_key = first_key * facts.num_kv_heads + kv_head
    key += first_key * facts.head_dim
    value += first_key * facts.head_dim
    if facts.scales == "token":
        key_scale += first_key
        value_scale += first_key
    row_low, row_high = _bounds(position, start, length, facts)

    acc = tl.zeros([block_q, padded_dim], tl.float32)
    den = tl.zeros([block_q], tl.float32)
    is_online: tl.constexpr = facts.is_online
    if facts.has_starts or facts.left is not None:
        acc, den, shift = _walk(
            begin, inner, q, key, value, pages, key_scale, value_scale, acc, den, shift, scale, low, high, row_low,
            row_high, facts, is_online, True,
        )  # fmt: skip
        acc, den, shift = _walk(
            inner, outer, q, key, value, pages, key_scale, value_scale, acc, den, shift, scale, low, high, row_low,
            row_high, facts, is_online, False,
        )  # fmt: skip
    else:
        acc, den, shift = _walk(
            begin, outer, q, key, value, pages, key_scale, value_scale, acc, den, shift, scale, low, high, row_low,
            row_high, facts, is_online, False,
        )  # fmt: skip
    acc, den, shift = _walk(
        outer, end, q, key, value, pages, key_scale, value_scale, acc, den, shift, scale, low, high, row_low,
        row_high, facts, is_online, True,
    )  # fmt: skip

    sees_key = row_high > row_low
    value_factor = 1.0
    if facts.scales == "head":
        value_factor = tl.load(value_scale + kv_head)
    sink = tl.full([block_q], float("-inf"), tl.float32)
    if facts.has_sinks:
        sink = tl.load(sinks + heads) * _LOG2E
    acc, sums, is_safe = _finish(acc, den, shift, sink, sees_key, value_factor, facts, is_online)
    if facts.recompute:
        if tl.max((is_row & sees_key & ~is_safe).to(tl.int32), axis=0) > 0:  # rare: less code goes before speed
            acc = tl.zeros([block_q, padded_dim], tl.float32)
            den = tl.zeros([block_q], tl.float32)
            shift = tl.full([block_q], _LOWEST, tl.float32)
            acc, den, shift = _walk(
                begin, end, q, key, value, pages, key_scale, value_scale, acc, den, shift, scale, low, high, row_low,
                row_high, facts, True, True,
            )  # fmt: skip
            acc, sums, is_safe = _finish(acc, den, shift, sink, sees_key, value_factor, facts, True)
    tl.store(out + first_place * facts.head_dim + elements, acc.to(out.dtype.element_ty), mask=is_element)
    tl.store(log_sum + first_place + places, sums, mask=is_row)


@triton.jit
def _place(facts: tl.constexpr):
    """Sequence, row head and first row of a program.

    `heads_together` heads come after each other. Of these the last rows are first: with a causal mask they have most
    keys to read, and what ends last should be short.
    """
    num_blocks: tl.constexpr = facts.num_blocks
    row_heads: tl.constexpr = facts.num_heads // facts.pack
    index = tl.program_id(0)
    section = index // (facts.heads_together * num_blocks)
    index -= section * (facts.heads_together * num_blocks)
    num_here = tl.minimum(facts.heads_together, facts.num_row_heads - section * facts.heads_together)
    head = section * facts.heads_together + index % num_here
    return head // row_heads, head % row_heads, (num_blocks - 1 - index // num_here) * facts.block_q


@triton.jit
def _bounds(position, start, length, facts: tl.constexpr):
    """[low, high) of the keys that a query at a position sees."""
    low = start + 0 * position
    high = length + 0 * position
    if facts.is_causal:
        high = tl.minimum(high, position + 1)
    if facts.left is not None:
        low = tl.maximum(low, position - facts.left)
        high = tl.minimum(high, position + facts.right + 1)
    return low, high


@triton.jit
def _walk(
    begin,
    end,
    q,
    keys,
    values,
    pages,
    key_scales,
    value_scales,
    acc,
    den,
    shift,
    scale,
    low,
    high,
    row_low,
    row_high,
    facts: tl.constexpr,
    is_online: tl.constexpr,
    is_masked: tl.constexpr,
):
    """Adds blocks [begin, end) of keys: acc += p V, den += sum p. Shifts are phi, or the rows' maxima, in base 2."""
    # A product with a scale that is positive for certain may follow the max.
    is_fused: tl.constexpr = facts.soft_cap is None and facts.scales is None and facts.scale > 0
    column = tl.arange(0, facts.padded_dim)
    for block in tl.range(begin, end, num_stages=facts.num_stages):
        first = block * facts.block_kv
        key = first + tl.arange(0, facts.block_kv)
        is_live = (key >= low) & (key < high)  # seen by some row
        base, row = _rows(first, key, is_live, pages, facts, is_masked)
        k = _tile(keys, base, row, column, is_live, facts, is_masked)
        s = tl.dot(q, tl.trans(k.to(q.dtype)))
        if facts.scales == "token":
            s *= _scales(key_scales, base, row, is_live, facts, is_masked)
        factor = scale * _LOG2E
        if facts.soft_cap is not None:
            # tanh from exp2: the hardware's is good to 11 bits only.
            s = 1.0 - 2.0 / (tl.exp2(s * (scale * (2.0 * _LOG2E / facts.soft_cap))) + 1.0)
            factor = facts.soft_cap * _LOG2E
        if not is_fused and is_online:
            s *= factor
            factor = 1.0
        if is_masked:
            is_seen = (key[None, :] < row_high[:, None]) & (key[None, :] >= row_low[:, None])
            if not is_fused and not is_online:
                s *= factor
                factor = 1.0
            s = tl.where(is_seen, s, float("-inf"))
        if is_online:
            old = shift
            shift = tl.maximum(old, tl.max(s, axis=1) * factor)
            alpha = tl.exp2(old - shift)
            acc *= alpha[:, None]
            den *= alpha
        p = tl.exp2(s * factor - shift[:, None])
        den += tl.sum(p, axis=1)
        if facts.scales == "token":
            p *= _scales(value_scales, base, row, is_live, facts, is_masked)
        v = _tile(values, base, row, column, is_live, facts, is_masked)
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc)
    return acc, den, shift


@triton.jit
def _rows(first, key, is_live, pages, facts: tl.constexpr, is_masked: tl.constexpr):
    """Where the keys of a block stand, in rows of the sequence or of the pool: one int64 for all, and [block_kv]."""
    if facts.page_size is None:
        base = first.to(tl.int64)
        row = tl.arange(0, facts.block_kv)
    elif facts.page_size >= facts.block_kv:  # one page
        page = tl.load(pages + first // facts.page_size).to(tl.int64)
        base = page * facts.page_size + first % facts.page_size
        row = tl.arange(0, facts.block_kv)
    else:
        if is_masked:
            page = tl.load(pages + key // facts.page_size, mask=is_live, other=0)
        else:
            page = tl.load(pages + key // facts.page_size)
        base = 0 * first.to(tl.int64)
        row = page.to(tl.int64) * facts.page_size + key % facts.page_size
    return base, row


@triton.jit
def _tile(head, base, row, column, is_live, facts: tl.constexpr, is_masked: tl.constexpr):
    """Keys or values [block_kv, padded_dim]; zeros where no row sees them: 0 * NaN would be NaN."""
    stride: tl.constexpr = facts.num_kv_heads * facts.head_dim
    place = head + base * stride + (row[:, None] * stride + column[None, :])
    if facts.head_dim != facts.padded_dim:
        is_there = (column < facts.head_dim)[None, :]
        if is_masked:
            is_there = is_there & is_live[:, None]
        tile = tl.load(place, mask=is_there, other=0.0)
    elif is_masked:
        tile = tl.load(place, mask=is_live[:, None], other=0.0)
    else:
        tile = tl.load(place)
    return tile


@triton.jit
def _scales(head, base, row, is_live, facts: tl.constexpr, is_masked: tl.constexpr):
    """Scales of a block's keys or values [1, block_kv]; zeros where no row sees them."""
    place = head + base * facts.num_kv_heads + row * facts.num_kv_heads
    if is_masked:
        scales = tl.load(place, mask=is_live, other=0.0)
    else:
        scales = tl.load(place)
    return scales[None, :]


@triton.jit
def _finish(acc, den, shift, sink, sees_key, value_factor, facts: tl.constexpr, is_online: tl.constexpr):
    """The rows divided by their denominators, their log-sum-exps, and which denominators are in the safe window."""
    if facts.has_sinks:
        if is_online:
            old = shift
            shift = tl.maximum(old, sink)
            alpha = tl.exp2(old - shift)
            acc *= alpha[:, None]
            den = den * alpha + tl.exp2(sink - shift)
        else:
            den += tl.exp2(sink - shift)
    factor = value_factor / den
    sums = (shift + tl.log2(den)) * _LN2
    is_safe = sees_key
    if not is_online:
        checked = den + tl.sum(acc - acc, axis=1)  # NaN where a value as large as 1e18 made a sum infinite
        is_safe = (checked >= facts.den_min) & (checked <= facts.den_max)
        factor = tl.where(is_safe, factor, float("nan"))
        sums = tl.where(is_safe, sums, float("nan"))
    factor = tl.where(sees_key, factor, 0.0)
    sums = tl.where(sees_key, sums, sink * _LN2)
    return acc * factor[:, None], sums, is_safe
