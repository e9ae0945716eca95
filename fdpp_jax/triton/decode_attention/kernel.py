"""Split-KV decode attention with a unified max, in one launch, in Triton.

The CTAs of a key/value head share the live KV tiles of all sequences evenly. A tile of keys, and one of values, meets
the query rows (the G heads of the group times T tokens, padded to 16) on the matrix unit:

    s [rows, block_kv] = q [rows, H] @ K^T [H, block_kv]
    o [rows, H]       += p [rows, block_kv] @ V [block_kv, H],   p = e^(s - phi)

phi is fixed in advance, so no CTA keeps a running max: o and sum(p) add up in any order. Of the CTAs that share a
sequence, the owner holds the first tile. It merges the partial sums of the others, its helpers, with its own, and
writes the result. On AMD, and where its own sums leave no registers for theirs, a second launch merges.

Where a denominator left the safe window, whoever merges attends to all keys of the sequence again, with online softmax.
With phi=None there is online softmax: each CTA keeps the running max of its share, and the merge rescales the sums.

Roles: `facts`, `shares` (which CTA takes which tiles), `rows` (a sequence in one CTA), `sums` (from many CTAs to one).

Source: FlashDecoding++ (arXiv 2311.01282), sections 3 and 4.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from fdpp_jax import unified_max
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions, attention_shape
from fdpp_jax.plans.shapes import cdiv
from fdpp_jax.plans.triton_attention import MAX_CHUNK, DecodeAttentionConfig, padded_dim, padded_rows
from fdpp_jax.triton import bridge
from fdpp_jax.triton.decode_attention.facts import Arrays, Facts
from fdpp_jax.triton.decode_attention.rows import attend as attend_rows
from fdpp_jax.triton.decode_attention.rows import phi_of, rows_of
from fdpp_jax.triton.decode_attention.shares import begin_of, cut_chunk, live_keys, place_of, share_of
from fdpp_jax.triton.decode_attention.sums import WORDS, added, await_helpers, finish, leave, merged, raise_flag


@triton.jit
def decode_attention(
    q,
    k,
    v,
    lengths,
    phi,
    offset,
    sinks,
    pages,
    k_scale,
    v_scale,
    starts,
    redone,
    out,
    log_sum,
    marks,
    num,
    den,
    row_max,
    flags,
    f: tl.constexpr,
):
    """One CTA: its share of the live tiles of a chunk of sequences, for one key/value head."""
    arrays = Arrays(
        q,
        k,
        v,
        lengths,
        phi,
        offset,
        sinks,
        pages,
        k_scale,
        v_scale,
        starts,
        redone,
        out,
        log_sum,
        marks,
        num,
        den,
        row_max,
        flags,
    )
    # A CTA waits for shares behind its own, so these have lower indices.
    share, kv_head, chunk = f.num_splits - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    counts, cut = cut_chunk(arrays, chunk, f)
    begin, end = begin_of(share, cut), begin_of(share + 1, cut)
    i, start = place_of(begin, counts)
    while begin < end:
        sequence = chunk * f.chunk + i
        keys = live_keys(arrays, sequence, f)
        rows = rows_of(sequence, kv_head, keys, f)
        stop = start + keys.count
        until = tl.minimum(stop, end)
        shift = tl.full([f.rows], 0.0, tl.float32)
        if f.phi != "none":
            shift = phi_of(arrays, rows, f)
        of_tile = keys.first - start
        is_online: tl.constexpr = f.phi == "none"
        sum_num, sum_den, shift = attend_rows(arrays, rows, keys, begin + of_tile, until + of_tile, shift, f, is_online)
        if f.combines_later:
            leave(arrays, rows, sum_num, sum_den, shift, chunk, share, i, f)
        elif f.num_splits == 1:
            finish(arrays, rows, keys, sum_num, sum_den, shift, f)
        elif begin > start:
            leave(arrays, rows, sum_num, sum_den, shift, chunk, share, i, f)
            raise_flag(arrays, rows, chunk, share, f)
        else:
            if until < stop:
                first, last = share + 1, share_of(stop - 1, cut)
                await_helpers(arrays, rows, chunk, first, last, f)
                # By themselves: added to products, each slot would be brought to where the matrix unit has those.
                others = merged(arrays, rows, shift, chunk, i, first, last, f)
                sum_num, sum_den, shift = added(sum_num, sum_den, shift, others[0], others[1], others[2], f)
            finish(arrays, rows, keys, sum_num, sum_den, shift, f)
        begin, start, i = until, stop, i + 1


@triton.jit
def merge_shares(
    q,
    k,
    v,
    lengths,
    phi,
    offset,
    sinks,
    pages,
    k_scale,
    v_scale,
    starts,
    redone,
    num,
    den,
    row_max,
    out,
    log_sum,
    marks,
    f: tl.constexpr,
):
    """One CTA of the second launch: a sequence and a key/value head."""
    arrays = Arrays(
        q,
        k,
        v,
        lengths,
        phi,
        offset,
        sinks,
        pages,
        k_scale,
        v_scale,
        starts,
        redone,
        out,
        log_sum,
        marks,
        num,
        den,
        row_max,
        lengths,
    )
    sequence, kv_head = tl.program_id(0), tl.program_id(1)
    chunk, i = sequence // f.chunk, sequence % f.chunk
    counts, cut = cut_chunk(arrays, chunk, f)
    start = tl.sum(tl.where(tl.arange(0, f.padded_chunk) < i, counts, 0), 0)
    keys = live_keys(arrays, sequence, f)
    rows = rows_of(sequence, kv_head, keys, f)
    shift = tl.full([f.rows], 0.0, tl.float32)
    if f.phi != "none":
        shift = phi_of(arrays, rows, f)
    first, last = share_of(start, cut), share_of(start + keys.count - 1, cut)
    sum_num, sum_den, shift = merged(arrays, rows, shift, chunk, i, first, last, f)
    finish(arrays, rows, keys, sum_num, sum_den, shift, f)


def attend(
    arrays: AttentionArrays,
    options: AttentionOptions,
    config: DecodeAttentionConfig,
    *,
    recompute: bool = False,
    redone: jax.Array | None = None,
) -> Any:
    """softmax(scale * q k^T) v for a few query tokens per sequence.

    Args:
      arrays: With lengths. H is a multiple of 8 up to 256.
      options: Static facts.
      config: Tiles, splits and stages.
      recompute: Redoes rows that left the safe window; else they are NaN.
      redone: [B, K] int32, with recompute; becomes 1 where a row was redone.

    Returns:
      [B, T, N, H], with options.return_residual the pair of this and the rows' log-sum-exp [B, T, N] float32, with
      redone the pair of this and redone.
    """
    assert arrays.lengths is not None
    facts = _facts(arrays, options, config, recompute=recompute, has_marks=redone is not None)
    batch, num_kv_heads, num_chunks = facts.batch, facts.num_kv_heads, cdiv(facts.batch, facts.chunk)
    operands = _operands(arrays, redone)
    f32 = jnp.float32
    slots = num_chunks * num_kv_heads * facts.num_slots
    out = dict(
        out=jax.ShapeDtypeStruct(arrays.query.shape, arrays.query.dtype),
        log_sum=jax.ShapeDtypeStruct(arrays.query.shape[:3] if facts.has_log_sum else (1,), f32),
        marks=jax.ShapeDtypeStruct((batch, num_kv_heads) if facts.has_marks else (1,), jnp.int32),
    )
    sums = dict(
        num=jax.ShapeDtypeStruct((slots, facts.live_rows, facts.head_dim), f32),
        den=jax.ShapeDtypeStruct((slots, facts.rows), f32),
        row_max=jax.ShapeDtypeStruct((slots, facts.rows) if facts.phi == "none" else (1,), f32),
    )
    launch: dict[str, Any] = dict(
        arch=config.arch, num_warps=config.num_warps, num_stages=config.num_buffers + 1, f=facts
    )
    grid = config.num_splits, num_kv_heads, num_chunks
    if facts.combines_later:
        later = {name: jax.ShapeDtypeStruct((1,), x.dtype) for name, x in out.items()}
        flags = dict(flags=jax.ShapeDtypeStruct((1,), jnp.int32))
        results = bridge.call(
            decode_attention, *operands, results=[*(later | sums | flags).values()], grid=grid, **launch
        )
        results = bridge.call(
            merge_shares, *operands, *results[3:6], results=[*out.values()], grid=(batch, num_kv_heads), **launch
        )
    else:
        flags = dict(flags=jax.ShapeDtypeStruct((slots * WORDS.value,), jnp.int32))
        results = bridge.call(
            decode_attention, *operands, results=[*(out | sums | flags).values()], grid=grid, **launch
        )
    result: Any = results[0]
    if options.return_residual:
        result = result, results[1]
    return result if redone is None else (result, results[2])


def _facts(
    arrays: AttentionArrays,
    options: AttentionOptions,
    config: DecodeAttentionConfig,
    *,
    recompute: bool,
    has_marks: bool,
) -> Facts:
    query, phi = arrays.query, arrays.phi
    batch, query_length, num_heads, head_dim = query.shape
    num_kv_heads = arrays.key.shape[2]
    live_rows = num_heads // num_kv_heads * query_length
    chunk = min(batch, MAX_CHUNK)
    left, right = options.local_window_size or (0, 0)
    den_min, den_max = unified_max.window(query.dtype, arrays.capacity)
    combines_later = config.combine == "launch"
    assert config.uses_dot or live_rows == 1
    return Facts(
        batch=batch,
        query_length=query_length,
        num_kv_heads=num_kv_heads,
        group=num_heads // num_kv_heads,
        head_dim=head_dim,
        padded_dim=padded_dim(head_dim),
        live_rows=live_rows,
        rows=padded_rows(live_rows) if config.uses_dot else 1,
        capacity=arrays.capacity,
        page_size=0 if arrays.page_table is None else arrays.key.shape[1],
        block_kv=config.block_kv,
        num_splits=config.num_splits,
        num_buffers=config.num_buffers,
        merged_at_once=config.merged_at_once(attention_shape(arrays, options, is_online=phi is None)),
        chunk=chunk,
        padded_chunk=triton.next_power_of_2(chunk),
        num_slots=config.num_splits + chunk - 1 if combines_later else config.num_splits,
        padded_splits=triton.next_power_of_2(config.num_splits),
        uses_dot=config.uses_dot,
        scale=options.scale,
        is_causal=options.is_causal,
        has_window=options.local_window_size is not None,
        window_left=left,
        window_right=right,
        soft_cap=options.logits_soft_cap or 0.0,
        phi="none" if phi is None else "rows" if phi.ndim else "one",
        has_offset=arrays.query_offset is not None,
        has_starts=arrays.starts is not None,
        has_sinks=arrays.sinks is not None,
        scales=None if arrays.key_scale is None else "head" if arrays.key_scale.ndim == 1 else "token",
        den_min=den_min,
        den_max=den_max,
        recompute=recompute and phi is not None,
        has_log_sum=options.return_residual,
        has_marks=has_marks,
        combines_later=combines_later,
    )


def _operands(arrays: AttentionArrays, redone: jax.Array | None) -> list[jax.Array]:
    """The operands as `Arrays` has them; in place of those that the call lacks: the lengths."""
    assert arrays.lengths is not None
    lengths = arrays.lengths.astype(jnp.int32)

    def given(x: jax.Array | None, dtype: jax.typing.DTypeLike) -> jax.Array:
        return lengths if x is None else x.astype(dtype)

    return [
        arrays.query,
        arrays.key,
        arrays.value,
        lengths,
        given(arrays.phi, jnp.float32),
        given(arrays.query_offset, jnp.int32),
        given(arrays.sinks, jnp.float32),
        given(arrays.page_table, jnp.int32),
        given(arrays.key_scale, jnp.float32),
        given(arrays.value_scale, jnp.float32),
        given(arrays.starts, jnp.int32),
        given(redone, jnp.int32),
    ]
