"""Partial sums of a sequence's query rows: how the owner gets those of its helpers, and how they are merged.

Sums are num [H, rows], den [rows] and, with online softmax, max [rows]. Scores, phi and max are in base 2, that is
multiplied by log2(e). A helper hands its sums to the owner (see `shares`) through global memory or, in a cluster,
through the owner's shared memory. With combine="launch" there is no owner: every CTA leaves its sums, and XLA merges
them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax import unified_max
from fdpp_jax.pallas.decode_attention.refs import GlobalRefs, SharedRefs
from fdpp_jax.pallas.decode_attention.shares import AttentionFacts, Share, bounds
from fdpp_jax.pallas.parts import handover
from fdpp_jax.pallas.parts.registers import load
from fdpp_jax.pallas.parts.scores import LN2, LOG2E, LOWEST
from fdpp_jax.plans.calls import AttentionArrays
from fdpp_jax.plans.shapes import cdiv

ROW = plgpu.Layout.WGMMA.reduce(0)  # one value per query row

_LOAD_REGISTERS = 180  # per thread, for sums of helpers on their way
_LOADS_OF_MANY = 8  # helpers whose sums are loaded together where a chunk has many sequences, most with few helpers

type Sums = tuple[jax.Array, ...]


def hand_over(sums: Sums, gmem: GlobalRefs, smem: SharedRefs, share: Share) -> None:
    """Leaves the sums for the owner or for XLA, of num the live rows only, and says so."""
    facts = share.facts
    if smem.given:
        owner = share.num_shares - 1  # a cluster has one sequence
        for value, ref in zip(laid_out(sums), smem.given, strict=True):
            handover.store(value, ref.at[share.index], owner=owner)
        handover.arrive()
        return
    here = share.chunk, share.kv_head, share.index
    for value, ref in zip(laid_out(sums), gmem.sums, strict=True):
        if not facts.is_interpreted:
            handover.store(value, ref.at[here])
        else:
            ref[here] = handover.packed(value, facts.live_rows) if value.ndim == 2 else value
    if gmem.flag is not None and not facts.is_interpreted:
        handover.raise_flag(gmem.flag.at[here])


def merge_helpers(sums: Sums, stop: jax.Array, gmem: GlobalRefs, smem: SharedRefs, share: Share) -> Sums:
    """The owner's sums merged with those of its helpers, the CTAs whose indices are just below the owner's.

    Args:
      sums: The owner's.
      stop: The position behind the sequence's last tile.
      gmem: Global memory.
      smem: Shared memory.
      share: The owner's.
    """
    facts = share.facts
    num_helpers = share.num_sharers(stop) - 1
    first = share.index - num_helpers
    max_helpers = facts.config.num_splits - 1
    if not max_helpers:
        return sums
    num_registers = facts.num_rows // 4 * (facts.padded_dim // 32 + len(sums) - 1)
    most = min(_LOAD_REGISTERS // num_registers, _LOADS_OF_MANY if facts.chunk > 1 else max_helpers)
    num_rounds = cdiv(max_helpers, max(1, most))
    unroll = cdiv(max_helpers, num_rounds)

    def merge_some(turn: jax.Array, sums: Sums) -> Sums:
        given = [_given(first, turn * unroll + i, num_helpers, gmem, smem, share) for i in range(unroll)]
        for others in given:
            sums = merged(sums, others)
        return laid_out(sums)

    if smem.given:
        pl.when(num_helpers > 0)(handover.await_cluster)
    elif gmem.flag is not None and not facts.is_interpreted:  # the interpreter runs one CTA after the other
        flag = gmem.flag.at[share.chunk, share.kv_head, first]
        pl.when(num_helpers > 0)(lambda: handover.await_flags(flag, num_helpers))
    return lax.fori_loop(0, lax.div(num_helpers + (unroll - 1), jnp.int32(unroll)), merge_some, sums)


def _given(
    first: jax.Array, index: jax.Array, num_helpers: jax.Array, gmem: GlobalRefs, smem: SharedRefs, share: Share
) -> Sums:
    """The sums of CTA first + index, or those of no keys if index is not below num_helpers."""
    facts = share.facts
    is_there = index < num_helpers
    helper = first + jnp.minimum(index, num_helpers - 1)
    there = (helper,) if smem.given else (share.chunk, share.kv_head, helper)
    num_ref, *row_refs = smem.given or gmem.sums
    if facts.is_interpreted:
        num = jnp.where(is_there, handover.unpacked(num_ref[there]).T, 0.0)
        num = jnp.pad(num, ((0, 0), (0, facts.num_rows - num.shape[1])))
    else:
        num = handover.load(num_ref.at[there], facts.num_rows, is_there, in_smem=bool(smem.given))
    den, *row_max = (load(ref.at[there], ROW, optimized=False) for ref in row_refs)
    weight = is_there.astype(jnp.float32)
    return num, den * weight, *(x * weight + LOWEST * (1 - weight) for x in row_max)


def merged(sums: Sums, others: Sums) -> Sums:
    """The sums of two shares; with online softmax both are rescaled to the larger max first."""
    if len(sums) == 2:
        return sums[0] + others[0], sums[1] + others[1]
    row_max = jnp.maximum(sums[2], others[2])
    weight, other_weight = jnp.exp2(sums[2] - row_max), jnp.exp2(others[2] - row_max)
    num = sums[0] * across(weight, sums[0].shape) + others[0] * across(other_weight, others[0].shape)
    return num, sums[1] * weight + others[1] * other_weight, row_max


def full(shape: tuple[int, ...], fill: float, layout: Any) -> jax.Array:
    """A float32 array of one value, with its layout."""
    return plgpu.layout_cast(jnp.full(shape, fill, jnp.float32), layout)


def laid_out(sums: Sums) -> Sums:
    """The sums with their layouts: without them the compiler's search for layouts fails at branches."""
    return plgpu.layout_cast(sums[0], plgpu.Layout.WGMMA), *(plgpu.layout_cast(x, ROW) for x in sums[1:])


def across(x: jax.Array, shape: tuple[int, ...], axis: int = 1) -> jax.Array:
    """x [n] along `axis` of a matrix."""
    return lax.broadcast_in_dim(x, shape, [axis])


def merge_by_xla(
    sums: Sums, arrays: AttentionArrays, phi: jax.Array | None, sinks: jax.Array | None, facts: AttentionFacts
) -> tuple[jax.Array, jax.Array]:
    """Merges the sums of all CTAs in XLA, a launch of its own.

    Args:
      sums: num [B, K, splits, pairs of live rows, 2 H], den [B, K, splits, rows], and max as den with online softmax.
      arrays: The call's, for starts, lengths and offsets.
      phi: [1] or [B, K, rows]; None: online softmax.
      sinks: [1, K, rows].
      facts: Static facts.

    Returns:
      [B, K, live rows, H] float32, and the rows' log-sum-exp [B, K, live rows].
    """
    num, *by_row = sums
    # Rows last, as in memory: [B, K, splits, pairs, H, 2]. Only the result is put in order.
    num = num.reshape(*num.shape[:-1], -1, 2)
    num_padded = 2 * num.shape[3] - facts.live_rows  # 1 where the last pair has one live row

    def pairs(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, num_padded),)).reshape(*x.shape[:-1], -1, 1, 2)

    den, *row_max = (x[..., : facts.live_rows] for x in by_row)
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
        den = jnp.where(unified_max.leaves_window(checked, facts.capacity, arrays.query.dtype), jnp.nan, den)
    assert arrays.lengths is not None
    position = 0 if arrays.query_offset is None else arrays.query_offset[:, None]
    token = jnp.arange(facts.live_rows) // facts.group
    start = 0 if arrays.starts is None else arrays.starts[:, None]
    low, high = bounds(start, arrays.lengths[:, None], position, token, facts)  # [B, live rows], or [B, 1]
    sees_key = high > low
    nothing = -jnp.inf if sinks is None else sinks * LN2
    log_sum = jnp.where(sees_key[:, None], jnp.log(den) + shift * LN2, nothing)
    return jnp.where(sees_key[:, None, :, None], num / den[..., None], 0.0), log_sum
