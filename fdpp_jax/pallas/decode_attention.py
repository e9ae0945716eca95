"""Split-KV decode attention with a unified max, in one launch, for Hopper (Mosaic GPU).

The CTAs of a key/value head share the live KV tiles of all sequences evenly. K and V come through a ring of TMA
stages; both products run on the tensor cores with the tile as the 64-row operand and the query rows (the G heads of
the group times T tokens, padded to 8) as the narrow one:

    s [block_kv, rows] = K [block_kv, H] @ q^T [H, rows]
    o [H, rows]       += V^T [H, block_kv] @ p [block_kv, rows],   p = e^(s - phi)

With phi fixed in advance no CTA keeps a running max, so o and sum(p) only add up, in any order: of the CTAs that share
a sequence, that of its first tile adds to its own sums those that the others publish, and writes the result. With
combine="cluster" a sequence and head has a cluster of its own. If a denominator left the safe window, the CTA that adds
up goes over the keys of the sequence for the rows' maxima, and then over the sequence again with them in the place of
phi. With phi=None there is online softmax: each CTA keeps the running max of its share, and the shares are rescaled
when they are added.

Source: FlashDecoding++ (arXiv 2311.01282), sections 3 and 4.
"""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax import unified_max
from fdpp_jax.config import MAX_CHUNK, MAX_CLUSTER, DecodeAttentionConfig, reduction_bytes, round_up
from fdpp_jax.pallas import attention_rows, handover, kv_tiles, overlap, ring
from fdpp_jax.pallas.attention_rows import LOG2E, Rows
from fdpp_jax.pallas.kv_shares import Facts, Place, Share, bounds


# Jitted so that a model's layers share one trace and one lowering: a kernel takes some 0.3 s to lower.
@functools.partial(
    jax.jit,
    static_argnames=(
        "scale",
        "config",
        "is_causal",
        "local_window_size",
        "logits_soft_cap",
        "recompute",
        "is_appended",
        "interpret",
    ),
)
def decode_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    phi: jax.Array | None,
    *,
    scale: float,
    config: DecodeAttentionConfig,
    query_offset: jax.Array | None = None,
    is_causal: bool = False,
    local_window_size: tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    page_table: jax.Array | None = None,
    key_scale: jax.Array | None = None,
    value_scale: jax.Array | None = None,
    recompute: bool = False,
    prior: jax.Array | None = None,
    redone: jax.Array | None = None,
    is_appended: bool = False,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Any:
    """softmax(scale * q k^T) v for a few query tokens a sequence.

    Args:
      query: [B, T, N, H] bfloat16 or float16; H is a multiple of 16 up to 256.
      key: [B, S, K, H], or with a page table the pool [num_pages, page_size, K, H]; K divides N. The query's dtype,
        or, where H is a multiple of 64, int8 or float8_e4m3fn with scales.
      value: As key.
      lengths: [B] int32 live keys; all S where there are more. What lies beyond is not used, NaN included.
      phi: float32 in natural-log units, one for all rows [] or [B, N]; None for online softmax.
      scale: Factor on the scores.
      config: Tiles, splits and stages.
      query_offset: [B] int32 position of query 0 among the keys; None for 0.
      is_causal: Query t sees keys up to query_offset + t.
      local_window_size: (left, right) keys around query_offset + t that query t sees.
      logits_soft_cap: Scores become cap * tanh(scores / cap).
      sinks: [N] float32 logits that join the denominators only.
      page_table: [B, pages] int32; an entry beyond the length may be anything.
      key_scale: float32 factors of int8 or float8 keys: [K], or one for every token and head, key.shape[:3].
      value_scale: As key_scale.
      recompute: Redo rows outside the safe window inside the kernel; not with combine="launch".
      prior: [B, T, N, H], an earlier result. Only the heads of a sequence that hold NaN in it are computed, the
        others are copied.
      redone: [B, K] int32, with recompute or prior. Where a row is redone it becomes 1; the others stay as they are,
        so that one array serves all calls of a step, and costs where something fails only.
      is_appended: Whether, of keys, values, lengths and offsets, the launch before this one wrote at most each
        sequence's last key and value, as the fused layer does: but for combine="launch" this one is launched before
        that one has ended (`overlap`), and loads the other keys meanwhile.
      interpret: Runs the kernel interpreted on the CPU.

    Returns:
      [B, T, N, H] in the query's dtype, and with redone the pair of this and redone. Without recompute, rows whose
      denominator left the safe window are NaN and must be recomputed with phi=None.
    """
    batch, query_length, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    group = num_heads // num_kv_heads
    live_rows = group * query_length
    rows, padded_dim = round_up(live_rows, 8), round_up(head_dim, 64)
    token_scales = key_scale is not None and key_scale.ndim == 3
    in_kernel = config.combine != "launch"
    in_cluster = config.combine == "cluster" and interpret is None  # to the interpreter it is a grid like another
    chunk = min(batch, MAX_CHUNK) if config.combine == "kernel" else 1
    num_chunks = -(-batch // chunk)
    assert in_kernel or not recompute
    assert redone is None or recompute or prior is not None
    assert config.combine != "kernel" or config.num_splits <= handover.MAX_GIVERS + 1
    assert config.combine != "cluster" or 2 <= config.num_splits <= MAX_CLUSTER

    def by_group(x: jax.Array) -> jax.Array:  # [B, T, N, ...] -> [B, K, T * G, ...]
        x = x.reshape(*x.shape[:2], num_kv_heads, group, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(x.shape[0], num_kv_heads, live_rows, *x.shape[4:])

    def padded(x: jax.Array, num: int) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, 0), (0, num)] + [(0, 0)] * (x.ndim - 3)) if num else x

    def by_row(x: jax.Array) -> jax.Array:  # [1 or B, N] -> [1 or B, K, rows] float32
        x = jnp.broadcast_to(x[:, None], (x.shape[0], query_length, num_heads))
        return padded(by_group(x).astype(jnp.float32), rows - live_rows)

    capacity = key.shape[1] * (1 if page_table is None else page_table.shape[1])
    if dead_keys := -key.shape[1] % 8:  # TMA reads tiles of 8 keys; a capacity that is a multiple of 8 saves this copy
        key, value = (jnp.pad(x, ((0, 0), (0, dead_keys), (0, 0), (0, 0))) for x in (key, value))
    out_rows = ring.loadable_rows(live_rows)
    grouped_query = padded(by_group(query), out_rows - live_rows)
    operands: dict[str, Any] = dict(q=grouped_query, k=key, v=value, lengths=lengths.astype(jnp.int32))
    if phi is not None:
        operands["phi"] = phi.astype(jnp.float32).reshape(1) if phi.ndim == 0 else by_row(phi)
    if query_offset is not None:
        operands["offset"] = query_offset.astype(jnp.int32)
    if sinks is not None:
        operands["sinks"] = by_row(sinks[None])
    if page_table is not None:
        operands["pages"] = page_table.astype(jnp.int32)
    if key_scale is not None and value_scale is not None:
        operands |= dict(k_scale=key_scale, v_scale=value_scale)
    if prior is not None:
        operands["prior"] = padded(by_group(prior), out_rows - live_rows)
    if redone is not None:
        operands["redone"] = jax.new_ref(redone)  # updated in place

    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    grid = num_chunks, num_kv_heads, config.num_splits
    out_types: dict[str, Any] = dict(
        num=f32((*grid, handover.num_pairs(live_rows), 2 * padded_dim)), den=f32((*grid, rows))
    )
    if phi is None:
        out_types["max"] = f32((*grid, rows))
    if in_kernel:
        out_types["flag"] = jax.ShapeDtypeStruct((*grid, handover.WORDS), jnp.int32)
        handed_over = {} if in_cluster else out_types
        out_types = dict(out=jax.ShapeDtypeStruct(grouped_query.shape, query.dtype)) | handed_over

    transforms = ring.tile_transforms(head_dim)
    scratch: dict[str, Any] = dict(
        q=plgpu.SMEM((2 if chunk > 1 else 1, rows, padded_dim), query.dtype, transforms=transforms),
        p=plgpu.SMEM((1, rows, config.block_kv), query.dtype, transforms=transforms),
        by_row=plgpu.SMEM((rows,), jnp.float32),
        q_ready=plgpu.Barrier(num_barriers=2 if chunk > 1 else 1),
        **kv_tiles.scratch(
            key, config, padded_dim, query.dtype, paged=page_table is not None, token_scales=token_scales
        ),
    )
    if in_cluster:
        given = dict(given_num=(handover.num_pairs(live_rows), 2 * padded_dim), given_den=(rows,))
        given |= {} if phi is not None else dict(given_max=(rows,))
        scratch |= {name: plgpu.SMEM((config.num_splits - 1, *shape), jnp.float32) for name, shape in given.items()}
    if config.unused_smem_bytes:
        scratch["unused"] = plgpu.SMEM((config.unused_smem_bytes,), jnp.int8)
    facts = Facts(
        config=config,
        scale=scale,
        batch=batch,
        query_length=query_length,
        group=group,
        capacity=capacity,
        chunk=chunk,
        is_causal=is_causal,
        window=local_window_size,
        cap=logits_soft_cap,
        recompute=recompute and phi is not None,
        is_interpreted=interpret is not None,
        is_appended=is_appended and in_kernel,
    )

    def body(*refs: Any, **smem: Any) -> None:
        gmem = dict(zip((*operands, *out_types), refs, strict=True))
        _body(types.SimpleNamespace(**gmem), types.SimpleNamespace(**smem), facts)

    outs = plgpu.kernel(
        body,
        out_type=list(out_types.values()),
        scratch_types=scratch,
        **_axes(grid, in_cluster=in_cluster),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=reduction_bytes(rows),
            # They would be around every store and before every load: here each has its place and its reason.
            unsafe_no_auto_barriers=True,
        ),
        interpret=interpret,
        kernel_name=f"decode_attention_{'unified' if 'phi' in operands else 'online'}",
    )(*operands.values())
    if in_kernel:
        out = outs[0]
    else:
        num, den, *row_max = outs
        phi, sinks = operands.get("phi"), operands.get("sinks")
        out = _combine(num, den, row_max, lengths, query_offset, phi, sinks, facts, query.dtype)
        out = out.astype(query.dtype)
    out = out[:, :, :live_rows, :head_dim].reshape(batch, num_kv_heads, query_length, group, head_dim)
    out = out.swapaxes(1, 2).reshape(query.shape)
    return out if redone is None else (out, jax.freeze(operands["redone"]))


def _axes(grid: tuple[int, int, int], *, in_cluster: bool) -> dict[str, Any]:
    """The kernel's: chunks, key/value heads, and the CTAs of each, which may be a cluster."""
    names = ("chunk", "kv_head", "share")
    if not in_cluster:
        return dict(grid=grid, grid_names=names)
    return dict(grid=grid[:2], grid_names=names[:2], cluster=grid[2:], cluster_names=names[2:])


# Of the loop over sequences: the place of the next one, its turn, and bits.
type _Carry = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _body(gmem: Any, smem: Any, facts: Facts) -> None:
    """One CTA: its share of the live tiles of a chunk of sequences, for one key/value head."""
    share = Share(gmem, facts, *(lax.axis_index(name) for name in ("chunk", "kv_head", "share")))
    stream = kv_tiles.Stream(gmem, smem, share)
    load_query = functools.partial(attention_rows.load_query, gmem, smem, share)

    if facts.config.combine == "launch":  # which adds up all shares, also empty ones
        load_query(share.first[0], jnp.int32(0))
        stream.fill(share.begin, share.first)
        rows = Rows(gmem, smem, share, stream, share.first, jnp.int32(0))
        rows.publish(rows.attend())
        return

    if hasattr(gmem, "prior"):

        def copy(i: jax.Array, _: None) -> None:
            is_mine = lax.rem(i, jnp.int32(facts.config.num_splits)) == share.index
            is_there = share.first_sequence + i < facts.batch
            copy = functools.partial(attention_rows.copy_prior, gmem, smem, share, i)
            pl.when(is_mine & is_there & jnp.logical_not(share.prior_is_nan(i)))(copy)

        lax.fori_loop(0, facts.chunk, copy, None)

    settled = None
    if facts.is_appended:
        settled = share.first[1] + share.live(share.first[0]).count - 1  # before the first sequence's last tile
        stream.fill(share.begin, share.first, until=settled)
        overlap.await_predecessor(is_interpreted=facts.is_interpreted)
        overlap.let_successor_start(is_interpreted=facts.is_interpreted)

    @pl.when(share.end > share.begin)
    def _start() -> None:
        load_query(share.first[0], jnp.int32(0))
        stream.fill(share.begin, share.first, since=settled)

    def following(rows: Rows) -> Place:
        """The sequence after the rows' one, behind the CTA's share if that was the last."""
        has_next = rows.stop < share.end
        i, start = share.locate(jnp.where(has_next, rows.stop, rows.start), rows.place)
        return i, jnp.where(has_next, start, share.end)

    def attend(carry: _Carry) -> _Carry:
        """The sequence at a place, how many came before, and the bits of those with a row that left the safe window."""
        i, start, turn, failed = carry
        slot = lax.rem(turn, jnp.int32(2)) if facts.chunk > 1 else turn
        rows = Rows(gmem, smem, share, stream, (i, start), slot)
        next_i, next_start = following(rows)
        if facts.chunk > 1:
            pl.when(next_start < share.end)(lambda: load_query(next_i, 1 - slot))
        sums = rows.attend()
        is_owner = start >= share.begin
        pl.when(jnp.logical_not(is_owner))(lambda: rows.publish(sums))
        if facts.recompute:
            has_failed = lax.cond(is_owner, lambda: rows.finish(sums), lambda: jnp.bool_(False))
            failed |= lax.shift_left(has_failed.astype(jnp.int32), i)
        else:
            pl.when(is_owner)(lambda: (rows.finish(sums), None)[1])
        return next_i, next_start, turn + 1, failed

    first = *share.first, jnp.int32(0), jnp.int32(0)
    if facts.chunk == 1:
        has_tiles = share.end > share.begin
        failed = lax.cond(has_tiles, lambda: attend(first)[-1], lambda: jnp.int32(0))
    else:
        *_, failed = lax.while_loop(lambda carry: carry[1] < share.end, attend, first)
    if not facts.recompute:
        return

    def redo(place: Place) -> Place:
        rows = Rows(gmem, smem, share, stream, place, jnp.int32(0), is_again=True)

        @pl.when((lax.shift_right_logical(failed, place[0]) & 1) > 0)
        def _redo() -> None:
            load_query(place[0], jnp.int32(0))
            rows.redo()

        return following(rows)

    # After all others, in code of its own: what it needs is not kept in registers before.
    if facts.chunk == 1:
        redo(share.first)
    else:
        pl.when(failed != 0)(lambda: (lax.while_loop(lambda place: place[1] < share.end, redo, share.first), None)[1])


def _combine(
    num: jax.Array,  # [B, K, splits, pairs of live rows, 2 H]
    den: jax.Array,  # [B, K, splits, rows]
    row_max: list[jax.Array],  # as den, with online softmax
    lengths: jax.Array,
    offset: jax.Array | None,
    phi: jax.Array | None,
    sinks: jax.Array | None,
    facts: Facts,
    dtype: Any,
) -> jax.Array:
    """Adds the splits up in XLA, a launch of its own: [B, K, live rows, H] float32."""
    # Rows last, as in memory: [B, K, splits, pairs, H, 2]. Only the result is put in order.
    num = num.reshape(*num.shape[:-1], -1, 2)
    odd = 2 * num.shape[3] - facts.live_rows  # of an odd number of rows the last of the last pair is none

    def pairs(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, odd),)).reshape(*x.shape[:-1], -1, 1, 2)

    den, *row_max = (x[..., : facts.live_rows] for x in (den, *row_max))
    if sinks is not None:
        sinks = sinks[..., : facts.live_rows] * LOG2E
    if phi is None:
        shift = row_max[0].max(axis=2)  # [B, K, live rows]
        if sinks is not None:
            shift = jnp.maximum(shift, sinks)
        weight = jnp.exp2(row_max[0] - shift[:, :, None])
        num, den = num * pairs(weight), den * weight
    else:
        shift = (phi if phi.ndim == 1 else phi[..., : facts.live_rows]) * LOG2E
    den = den.sum(axis=2)
    num = handover.unpacked(num.sum(axis=2).reshape(*num.shape[:2], num.shape[3], -1))[..., : facts.live_rows, :]
    if sinks is not None:
        den += jnp.exp2(sinks - shift)
    if phi is not None:
        checked = den + (num - num).sum(axis=-1)
        den = jnp.where(unified_max.leaves_window(checked, facts.capacity, dtype), jnp.nan, den)
    position = 0 if offset is None else offset[:, None]
    token = jnp.arange(facts.live_rows) // facts.group
    low, high = bounds(lengths[:, None], position, token, facts)  # [B, live rows], or [B, 1]
    return jnp.where((high > low)[:, None, :, None], num / den[..., None], 0.0)
