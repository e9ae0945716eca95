"""Partial sums of a sequence's query rows: how CTAs leave them, how they are merged, and what becomes of them.

A CTA that has a part of a sequence leaves its sums in a slot. The slots of a sequence are merged in the order of its
keys, whoever does it: the same bits every time.
"""

import triton
import triton.language as tl

from fdpp_jax.triton.decode_attention.rows import LOG2E, LOWEST, attend, elements

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def group_of(rows, f: tl.constexpr):
    """Index of a sequence and key/value head in [B, K]."""
    return rows.sequence * f.num_kv_heads + rows.kv_head


@triton.jit
def _slot(chunk, kv_head, share, i, is_first, f: tl.constexpr):
    """The slot of a share's sums of sequence i of the chunk.

    A share has at most two sequences in part, the last one with its first tile. For a second launch it leaves all of
    them: no two shares and sequences have the same sum of their indices.
    """
    if f.combines_later:
        slot = share + i
    else:
        slot = 2 * share + is_first.to(tl.int32)
    return (chunk * f.num_kv_heads + kv_head) * f.num_slots + slot


@triton.jit
def _elements_of_slot(slot, is_live, f: tl.constexpr):
    row = tl.arange(0, f.rows)
    place, is_element = elements(row, is_live, f)
    return slot.to(tl.int64) * (f.live_rows * f.head_dim) + place, is_element


@triton.jit
def hand_over(arrays, rows, num, den, row_max, chunk, share, i, is_first, f: tl.constexpr):
    """Leaves a share's sums of sequence i of the chunk; is_first: the share has the sequence's first tile."""
    slot = _slot(chunk, rows.kv_head, share, i, is_first, f)
    place, is_element = _elements_of_slot(slot, rows.is_live, f)
    tl.store(arrays.num + place, num, mask=is_element)
    row = slot * f.rows + tl.arange(0, f.rows)
    tl.store(arrays.den + row, den)
    if f.phi == "none":
        tl.store(arrays.row_max + row, row_max)


@triton.jit
def arrive(arrays, rows, f: tl.constexpr):
    """Says that the sums are there; returns how many CTAs said so before."""
    tl.debug_barrier()  # the sums of all threads come first
    before = tl.atomic_add(arrays.arrived + group_of(rows, f), 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()  # no thread loads before
    return before


@triton.jit
def merged(arrays, rows, phi, chunk, i, first, last, f: tl.constexpr):
    """The sums of the shares [first, last] of sequence i of the chunk, added in this order."""
    num = tl.full([f.rows, f.padded_dim], 0.0, tl.float32)
    den = tl.full([f.rows], 0.0, tl.float32)
    shift = phi
    if f.phi == "none":
        shift = tl.full([f.rows], LOWEST, tl.float32)
    at_once: tl.constexpr = f.merged_at_once
    for begin in tl.range(first, last + 1, at_once, num_stages=1):
        for ahead in tl.static_range(at_once):
            share = begin + ahead  # an int where the kernel is interpreted, and no tensor
            slot = _slot(chunk, rows.kv_head, share, i, share == first, f)
            is_there = rows.is_live & (tl.arange(0, f.rows) * 0 + share <= last)
            place, is_element = _elements_of_slot(slot, is_there, f)
            row = slot * f.rows + tl.arange(0, f.rows)
            other_num = tl.load(arrays.num + place, mask=is_element, other=0.0, cache_modifier=".cg")
            other_den = tl.load(arrays.den + row, mask=is_there, other=0.0, cache_modifier=".cg")
            if f.phi == "none":
                other_max = tl.load(arrays.row_max + row, mask=is_there, other=LOWEST, cache_modifier=".cg")
                new = tl.maximum(shift, other_max)
                alpha, beta = tl.exp2(shift - new), tl.exp2(other_max - new)
                num = num * alpha[:, None] + other_num * beta[:, None]
                den = den * alpha + other_den * beta
                shift = new
            else:
                num += other_num
                den += other_den
    return num, den, shift


@triton.jit
def _with_sinks(num, den, row_max, sinks, f: tl.constexpr):
    """The sums relative to the rows' maxima, with the sinks' terms and with the sinks among the maxima."""
    if f.has_sinks:
        shift = tl.maximum(row_max, sinks)
        alpha = tl.exp2(row_max - shift)
        num *= alpha[:, None]
        den = den * alpha + tl.exp2(sinks - shift)
        row_max = shift
    return num, den, row_max


@triton.jit
def finish(arrays, rows, keys, num, den, shift, f: tl.constexpr):
    """Writes the result of a sequence's rows from its sums, which are relative to phi or to the rows' maxima."""
    sinks = tl.full([f.rows], float("-inf"), tl.float32)
    if f.has_sinks:
        sinks = tl.load(arrays.sinks + rows.head, mask=rows.is_live, other=0.0) * LOG2E
    sees_key = rows.low < rows.high
    failed = rows.kv_head * 0
    is_safe = sees_key | True
    if f.phi == "none":
        num, den, shift = _with_sinks(num, den, shift, sinks, f)
    else:
        if f.has_sinks:
            den += tl.exp2(sinks - shift)
        checked = den + tl.sum(num - num, 1)  # NaN where a value as large as 1e18 made a sum infinite
        is_safe = (checked >= f.den_min) & (checked <= f.den_max)
        if f.recompute:
            has_failed = rows.is_live & sees_key & (is_safe == 0)
            failed = tl.max(has_failed.to(tl.int32), 0)
            is_safe = sees_key | True
            if failed > 0:
                num, den, shift = attend(arrays, rows, keys, keys.first, keys.first + keys.count, shift, f, True)
                num, den, shift = _with_sinks(num, den, shift, sinks, f)
    if f.has_marks:
        tl.store(arrays.marks + group_of(rows, f), tl.load(arrays.redone + group_of(rows, f)) | failed)
    factor = tl.where(is_safe, 1.0 / den, float("nan"))
    place, is_element = elements(rows.place, rows.is_live, f)
    # Rows that see no key are zeros, whatever their sums are.
    out = tl.where(sees_key[:, None], num * factor[:, None], 0.0)
    tl.store(arrays.out + place, out.to(arrays.out.dtype.element_ty), mask=is_element)
    if f.has_log_sum:
        log_sum = tl.where(is_safe, tl.log(den) + shift * LN2, float("nan"))
        tl.store(arrays.log_sum + rows.place, tl.where(sees_key, log_sum, sinks * LN2), mask=rows.is_live)
