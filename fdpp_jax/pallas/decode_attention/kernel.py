"""Split-KV decode attention with a unified max, in one launch, for Hopper (Mosaic GPU).

The CTAs of a key/value head share the live KV tiles of all sequences evenly. K and V come through a ring of TMA
stages. Both products run on the tensor cores, with the tile as the 64-row operand and the query rows (the G heads of
the group times T tokens, padded to 8) as the narrow one:

    s [block_kv, rows] = K [block_kv, H] @ q^T [H, rows]
    o [H, rows]       += V^T [H, block_kv] @ p [block_kv, rows],   p = e^(s - phi)

phi is fixed in advance, so no CTA keeps a running max: o and sum(p) add up in any order. Of the CTAs that share a
sequence, the owner holds the first tile. The owner merges the partial sums of the others, its helpers, with its own,
and writes the result. With combine="cluster" each sequence and head has a cluster of its own. With combine="launch"
there is no owner, and XLA merges the partial sums.

Where a denominator left the safe window, the owner recomputes the sequence: it finds the rows' maxima, and then
attends to all keys with the maxima in place of phi. With phi=None there is online softmax: each CTA keeps the running
max of its share, and the merge rescales the partial sums.

Roles: `shares` (which CTA takes which tiles), `tiles` (from the cache to the tensor cores), `rows` (one sequence in
one CTA), `sums` (from helpers to the owner), `refs`.

Source: FlashDecoding++ (arXiv 2311.01282), sections 3 and 4.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.pallas.decode_attention import rows as attention_rows
from fdpp_jax.pallas.decode_attention import tiles as kv_tiles
from fdpp_jax.pallas.decode_attention.refs import GlobalRefs, SharedRefs
from fdpp_jax.pallas.decode_attention.rows import Rows
from fdpp_jax.pallas.decode_attention.shares import AttentionFacts, Place, Share
from fdpp_jax.pallas.decode_attention.sums import merge_by_xla
from fdpp_jax.pallas.parts import handover, overlap, ring
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions
from fdpp_jax.plans.hopper_attention import MAX_CHUNK, MAX_CLUSTER, DecodeAttentionConfig, reduction_bytes
from fdpp_jax.plans.manual_axes import vary_as_operands
from fdpp_jax.plans.shapes import cdiv


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
    return_residual: bool = False,
    sinks: jax.Array | None = None,
    page_table: jax.Array | None = None,
    key_scale: jax.Array | None = None,
    value_scale: jax.Array | None = None,
    starts: jax.Array | None = None,
    recompute: bool = False,
    prior: jax.Array | None = None,
    redone: jax.Array | None = None,
    starts_early: bool = False,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Any:
    """softmax(scale * q k^T) v for a few query tokens per sequence.

    Args:
      query: [B, T, N, H] bfloat16 or float16; H is a multiple of 16 up to 256.
      key: [B, S, K, H], or with a page table the pool [num_pages, page_size, K, H]; K divides N. The query's dtype,
        or, where H is a multiple of 64, int8 or float8_e4m3fn with scales.
      value: As key.
      lengths: [B] int32 live keys; a length beyond S counts as S. Keys beyond the length are not used, NaN included.
      phi: float32 in natural-log units, one for all rows [] or [B, N]; None for online softmax.
      scale: Factor on the scores.
      config: Tiles, splits and stages.
      query_offset: [B] int32 position of query 0 among the keys; None for 0.
      is_causal: Query t sees keys up to query_offset + t.
      local_window_size: (left, right) keys around query_offset + t that query t sees.
      logits_soft_cap: Scores become cap * tanh(scores / cap).
      return_residual: The rows' log-sum-exp is a second result.
      sinks: [N] float32 logits that join the denominators only.
      page_table: [B, pages] int32; an entry beyond the length may be anything.
      key_scale: float32 factors of int8 or float8 keys: [K], or one per token and head, key.shape[:3].
      value_scale: As key_scale.
      starts: [B] int32, the first live key; None for 0. Keys before it are not used, NaN included, and tiles of such
        keys are not read.
      recompute: Recompute rows outside the safe window in this launch; not with combine="launch".
      prior: [B, T, N, H], an earlier result. Where a sequence's rows of a key/value head hold NaN in it, they are
        computed; all others are copied.
      redone: [B, K] int32, with recompute or prior. Becomes 1 where a row is redone, and stays as it is elsewhere. One
        array may serve all calls of a step: it costs time only where a row is redone.
      starts_early: The kernel starts before the launch before it has ended, except with combine="launch". Of lengths,
        starts, offsets, pages, keys and values, that launch may write only each sequence's last key and value. The
        kernel loads the other keys meanwhile.
      interpret: Runs the kernel interpreted on the CPU.

    Returns:
      [B, T, N, H] in the query's dtype; with return_residual the pair of this and the log-sum-exp [B, T, N] float32,
      which is undefined where rows are copied from prior; with redone the pair of this and redone. Without recompute,
      rows whose denominator left the safe window are NaN and must be recomputed with phi=None.
    """
    arrays = AttentionArrays(
        query, key, value, lengths, phi, query_offset, sinks, page_table, key_scale, value_scale, starts=starts
    )
    options = AttentionOptions(scale, is_causal, local_window_size, logits_soft_cap, return_residual)
    return attend(
        arrays,
        options,
        config,
        recompute=recompute,
        prior=prior,
        redone=redone,
        starts_early=starts_early,
        interpret=interpret,
    )


# Jitted so that all layers of a model share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("options", "config", "recompute", "starts_early", "interpret"))
@vary_as_operands
def attend(
    arrays: AttentionArrays,
    options: AttentionOptions,
    config: DecodeAttentionConfig,
    *,
    recompute: bool = False,
    prior: jax.Array | None = None,
    redone: jax.Array | None = None,
    starts_early: bool = False,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Any:
    """`decode_attention` of arrays, with lengths, and options that travel whole."""
    in_kernel = config.combine != "launch"
    assert in_kernel or not recompute
    assert redone is None or recompute or prior is not None
    assert config.combine != "kernel" or config.num_splits <= handover.MAX_HELPERS + 1
    assert config.combine != "cluster" or 2 <= config.num_splits <= MAX_CLUSTER
    query = arrays.query
    batch, query_length, num_heads, head_dim = query.shape
    num_kv_heads = arrays.key.shape[2]
    facts = AttentionFacts(
        config=config,
        options=options,
        batch=batch,
        query_length=query_length,
        num_kv_heads=num_kv_heads,
        group=num_heads // num_kv_heads,
        head_dim=head_dim,
        capacity=arrays.capacity,
        chunk=min(batch, MAX_CHUNK) if config.combine == "kernel" else 1,
        recompute=recompute and arrays.phi is not None,
        starts_early=starts_early and in_kernel,
        is_interpreted=interpret is not None,
    )
    in_cluster = config.combine == "cluster" and interpret is None  # to the interpreter it is a grid like another
    grid = cdiv(batch, facts.chunk), num_kv_heads, config.num_splits
    operands = _operands(arrays, prior, redone, facts)
    results = _results(operands["q"], grid, facts, is_online=arrays.phi is None, in_cluster=in_cluster)

    def body(*refs: jax.Ref, **smem: jax.Ref) -> None:
        gmem = GlobalRefs(**dict(zip((*operands, *results), refs, strict=True)))
        _attend(gmem, SharedRefs(**smem), facts)

    outs = plgpu.kernel(
        body,
        out_type=list(results.values()),
        scratch_types=_scratch(arrays, facts, in_cluster=in_cluster),
        **_axes(grid, in_cluster=in_cluster),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=reduction_bytes(facts.num_rows),
            # Automatic barriers would surround every access. The few that are needed are placed by hand.
            unsafe_no_auto_barriers=True,
        ),
        interpret=interpret,
        kernel_name=f"decode_attention_{'online' if arrays.phi is None else 'unified'}",
    )(*operands.values())
    if in_kernel:
        given = dict(zip(results, outs, strict=True))
        out, log_sum = given["out"], given.get("log_sum")
    else:
        out, log_sum = merge_by_xla(tuple(outs), arrays, operands.get("phi"), operands.get("sinks"), facts)
        out = out.astype(query.dtype)

    def by_query(x: jax.Array) -> jax.Array:  # [B, K, rows, ...] -> [B, T, N, ...]
        x = x[:, :, : facts.live_rows].reshape(batch, num_kv_heads, query_length, facts.group, *x.shape[3:])
        return x.swapaxes(1, 2).reshape(batch, query_length, num_heads, *x.shape[4:])

    result: Any = by_query(out[..., :head_dim])
    if options.return_residual:
        assert log_sum is not None
        result = result, by_query(log_sum)
    return result if redone is None else (result, jax.freeze(operands["redone"]))


def _operands(
    arrays: AttentionArrays, prior: jax.Array | None, redone: jax.Array | None, facts: AttentionFacts
) -> dict[str, Any]:
    """The kernel's operands, by the names of their refs in `GlobalRefs`."""

    def by_group(x: jax.Array) -> jax.Array:  # [B, T, N, ...] -> [B, K, T * G, ...]
        x = x.reshape(*x.shape[:2], facts.num_kv_heads, facts.group, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(x.shape[0], facts.num_kv_heads, facts.live_rows, *x.shape[4:])

    def padded(x: jax.Array, num_rows: int) -> jax.Array:  # [B, K, T * G, ...] -> [B, K, num_rows, ...]
        dead_rows = num_rows - facts.live_rows
        return jnp.pad(x, [(0, 0), (0, 0), (0, dead_rows)] + [(0, 0)] * (x.ndim - 3)) if dead_rows else x

    def by_row(x: jax.Array) -> jax.Array:  # [1 or B, N] -> [1 or B, K, rows] float32
        x = jnp.broadcast_to(x[:, None], (x.shape[0], facts.query_length, x.shape[1]))
        return padded(by_group(x).astype(jnp.float32), facts.num_rows)

    key, value, phi, loadable_rows = arrays.key, arrays.value, arrays.phi, ring.loadable_rows(facts.live_rows)
    if dead_keys := -key.shape[1] % 8:  # TMA reads tiles of 8 keys; a capacity that is a multiple of 8 saves this copy
        key, value = (jnp.pad(x, ((0, 0), (0, dead_keys), (0, 0), (0, 0))) for x in (key, value))
    query = padded(by_group(arrays.query), loadable_rows)
    assert arrays.lengths is not None
    operands: dict[str, Any] = dict(q=query, k=key, v=value, lengths=arrays.lengths.astype(jnp.int32))
    if phi is not None:
        operands["phi"] = phi.astype(jnp.float32).reshape(1) if phi.ndim == 0 else by_row(phi)
    if arrays.query_offset is not None:
        operands["offset"] = arrays.query_offset.astype(jnp.int32)
    if arrays.starts is not None:
        operands["starts"] = arrays.starts.astype(jnp.int32)
    if arrays.sinks is not None:
        operands["sinks"] = by_row(arrays.sinks[None])
    if arrays.page_table is not None:
        operands["pages"] = arrays.page_table.astype(jnp.int32)
    if arrays.key_scale is not None:
        operands |= dict(k_scale=arrays.key_scale, v_scale=arrays.value_scale)
    if prior is not None:
        operands["prior"] = padded(by_group(prior), loadable_rows)
    if redone is not None:
        operands["redone"] = jax.new_ref(redone)  # updated in place
    return operands


def _results(
    query: jax.Array, grid: tuple[int, int, int], facts: AttentionFacts, *, is_online: bool, in_cluster: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    """The kernel's results, by the names of their refs in `GlobalRefs`; query is the operand [B, K, rows, H]."""
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    pairs = handover.num_pairs(facts.live_rows)
    sums = dict(num=f32((*grid, pairs, 2 * facts.padded_dim)), den=f32((*grid, facts.num_rows)))
    if is_online:
        sums["max"] = f32((*grid, facts.num_rows))
    if facts.config.combine == "launch":
        return sums
    out = dict(out=jax.ShapeDtypeStruct(query.shape, query.dtype))
    if facts.options.return_residual:
        out["log_sum"] = f32((*query.shape[:2], facts.num_rows))
    if in_cluster:
        return out
    return out | sums | dict(flag=jax.ShapeDtypeStruct((*grid, handover.WORDS), jnp.int32))


def _scratch(arrays: AttentionArrays, facts: AttentionFacts, *, in_cluster: bool) -> dict[str, Any]:
    """The kernel's shared memory and barriers, by the names of their refs in `SharedRefs`."""
    config, dtype, num_rows, padded_dim = facts.config, arrays.query.dtype, facts.num_rows, facts.padded_dim
    num_queries = 2 if facts.chunk > 1 else 1
    transforms = ring.tile_transforms(facts.head_dim)
    scratch = dict(
        q=plgpu.SMEM((num_queries, num_rows, padded_dim), dtype, transforms=transforms),
        p=plgpu.SMEM((1, num_rows, config.block_kv), dtype, transforms=transforms),
        by_row=plgpu.SMEM((num_rows,), jnp.float32),
        q_ready=plgpu.Barrier(num_barriers=num_queries),
        **kv_tiles.scratch(arrays, config, padded_dim),
    )
    if in_cluster:
        given = dict(given_num=(handover.num_pairs(facts.live_rows), 2 * padded_dim), given_den=(num_rows,))
        if arrays.phi is None:
            given["given_max"] = (num_rows,)
        scratch |= {name: plgpu.SMEM((config.num_splits - 1, *shape), jnp.float32) for name, shape in given.items()}
    if config.unused_smem_bytes:
        scratch["unused"] = plgpu.SMEM((config.unused_smem_bytes,), jnp.int8)
    return scratch


def _axes(grid: tuple[int, int, int], *, in_cluster: bool) -> dict[str, Any]:
    """The kernel's axes: chunks, key/value heads, and the CTAs of each, which may be a cluster."""
    names = ("chunk", "kv_head", "share")
    if not in_cluster:
        return dict(grid=grid, grid_names=names)
    return dict(grid=grid[:2], grid_names=names[:2], cluster=grid[2:], cluster_names=names[2:])


class _LoopState(NamedTuple):
    """Loop state: the next sequence, sequences done, and the bitmask of sequences to recompute."""

    place: Place
    num_done: jax.Array
    failed: jax.Array


def _attend(gmem: GlobalRefs, smem: SharedRefs, facts: AttentionFacts) -> None:
    """One CTA: its share of the live tiles of a chunk of sequences, for one key/value head."""
    share = Share(gmem, facts, *(lax.axis_index(name) for name in ("chunk", "kv_head", "share")))
    stream = kv_tiles.Stream(gmem, smem, share)
    load_query = functools.partial(attention_rows.load_query, gmem, smem, share)

    if facts.config.combine == "launch":  # XLA merges all shares, also empty ones
        load_query(share.first.i, jnp.int32(0))
        stream.fill(share.begin, share.first)
        rows = Rows(gmem, smem, share, stream, share.first, jnp.int32(0))
        rows.hand_over(rows.attend())
        return

    if gmem.prior is not None:
        _copy_priors(gmem, smem, share, gmem.prior)

    settled = None
    if facts.starts_early:
        # The first sequence's last tile. The predecessor writes no key of the tiles before.
        settled = share.first.start + share.live(share.first.i).count - 1
        stream.fill(share.begin, share.first, until=settled)
        overlap.await_predecessor(is_interpreted=facts.is_interpreted)
        overlap.let_successor_start(is_interpreted=facts.is_interpreted)

    @pl.when(share.end > share.begin)
    def _start() -> None:
        load_query(share.first.i, jnp.int32(0))
        stream.fill(share.begin, share.first, since=settled)

    def following(rows: Rows) -> Place:
        """The sequence after that of the rows; it starts at the share's end if there is none."""
        has_next = rows.stop < share.end
        i, start = share.locate(jnp.where(has_next, rows.stop, rows.start), rows.place)
        return Place(i, jnp.where(has_next, start, share.end))

    def step(state: _LoopState) -> _LoopState:
        (i, start), num_done, failed = state
        slot = lax.rem(num_done, jnp.int32(2)) if facts.chunk > 1 else num_done
        rows = Rows(gmem, smem, share, stream, state.place, slot)
        following_place = following(rows)
        if facts.chunk > 1:
            pl.when(following_place.start < share.end)(lambda: load_query(following_place.i, 1 - slot))
        sums = rows.attend()
        is_owner = start >= share.begin
        pl.when(jnp.logical_not(is_owner))(lambda: rows.hand_over(sums))
        if facts.recompute:
            has_failed = lax.cond(is_owner, lambda: rows.finish(sums), lambda: jnp.bool_(False))
            failed |= lax.shift_left(has_failed.astype(jnp.int32), i)
        else:
            pl.when(is_owner)(lambda: (rows.finish(sums), None)[1])
        return _LoopState(following_place, num_done + 1, failed)

    first = _LoopState(share.first, jnp.int32(0), jnp.int32(0))
    if facts.chunk == 1:
        failed = lax.cond(share.end > share.begin, lambda: step(first).failed, lambda: jnp.int32(0))
    else:
        failed = lax.while_loop(lambda state: state.place.start < share.end, step, first).failed
    if not facts.recompute:
        return

    def redo(place: Place) -> Place:
        rows = Rows(gmem, smem, share, stream, place, jnp.int32(0), is_again=True)

        @pl.when((lax.shift_right_logical(failed, place.i) & 1) > 0)
        def _redo() -> None:
            load_query(place.i, jnp.int32(0))
            rows.redo()

        return following(rows)

    # After all sequences, in code of its own: the loop above keeps nothing in registers for it.
    if facts.chunk == 1:
        redo(share.first)
    else:
        pl.when(failed != 0)(
            lambda: (lax.while_loop(lambda place: place.start < share.end, redo, share.first), None)[1]
        )


def _copy_priors(gmem: GlobalRefs, smem: SharedRefs, share: Share, prior_gmem: jax.Ref) -> None:
    """Copies earlier results without NaN; the CTAs of a chunk take turns."""
    facts = share.facts

    def copy(i: jax.Array, _: None) -> None:
        is_mine = lax.rem(i, jnp.int32(facts.config.num_splits)) == share.index
        is_there = share.first_sequence + i < facts.batch
        copy = functools.partial(attention_rows.copy_prior, gmem, smem, share, i)
        pl.when(is_mine & is_there & jnp.logical_not(share.is_nan(prior_gmem, i)))(copy)

    lax.fori_loop(0, facts.chunk, copy, None)
