"""Partial sums of a sequence's query rows: how CTAs leave them, how they are merged, and what becomes of them.

Of the CTAs that share a sequence, the owner has its first tile. The others, its helpers, leave their sums in slots and
raise flags. The owner waits for the flags, merges the slots in the order of the keys, and adds its own: the same bits
every time. With a second launch all leave their sums, and the launch merges them in the same order.

A flag is four words of scratch memory, which may hold anything at first. It is raised if all 128 bits equal a pattern.
The owner lowers a flag that it has awaited, so no flag of an earlier launch is found raised. Other data equals the
pattern with a chance of 2^-128.

A helper is a CTA of lower index than the owner, and raises its flag before it awaits others: the GPU starts it first.
"""

import triton
import triton.language as tl

from fdpp_jax.triton.decode_attention.rows import LOG2E, LOWEST, attend, elements

LN2 = tl.constexpr(0.6931471805599453)
WORDS = tl.constexpr(4)  # of a flag


@triton.jit
def group_of(rows, f: tl.constexpr):
    """Index of a sequence and key/value head in [B, K]."""
    return rows.sequence * f.num_kv_heads + rows.kv_head


@triton.jit
def _slot(chunk, kv_head, share, i, f: tl.constexpr):
    """The slot of a share's sums of sequence i of the chunk.

    A share is the helper of one sequence at most, that of its first tile. For a second launch it leaves all its sums:
    no two shares and sequences have the same sum of their indices.
    """
    slot = share
    if f.combines_later:
        slot = share + i
    return (chunk * f.num_kv_heads + kv_head) * f.num_slots + slot


@triton.jit
def _elements_of_slot(slot, is_live, f: tl.constexpr):
    row = tl.arange(0, f.rows)
    place, is_element = elements(row, is_live, f)
    return slot.to(tl.int64) * (f.live_rows * f.head_dim) + place, is_element


@triton.jit
def leave(arrays, rows, num, den, row_max, chunk, share, i, f: tl.constexpr):
    """Leaves a share's sums of sequence i of the chunk."""
    slot = _slot(chunk, rows.kv_head, share, i, f)
    place, is_element = _elements_of_slot(slot, rows.is_live, f)
    tl.store(arrays.num + place, num, mask=is_element)
    row = slot * f.rows + tl.arange(0, f.rows)
    tl.store(arrays.den + row, den)
    if f.phi == "none":
        tl.store(arrays.row_max + row, row_max)


@triton.jit
def raise_flag(arrays, rows, chunk, share, f: tl.constexpr):
    """Says that a helper's sums are there."""
    tl.debug_barrier()  # those of all threads
    word = tl.arange(0, WORDS)
    flag = arrays.flags + _slot(chunk, rows.kv_head, share, 0, f) * WORDS + word
    tl.atomic_xchg(flag, _pattern(word), sem="release", scope="gpu")


@triton.jit
def _pattern(word):
    return 0x5F3759DF ^ (word * 0x2545F491)


@triton.jit
def await_helpers(arrays, rows, chunk, first, last, f: tl.constexpr):
    """Waits until the flags of the shares [first, last] are raised, then lowers them."""
    lane = tl.arange(0, f.padded_splits * WORDS)
    share, word = first + lane // WORDS, lane % WORDS
    is_there = share <= last
    flag = arrays.flags + _slot(chunk, rows.kv_head, share, 0, f) * WORDS + word
    num_low = 1
    while num_low > 0:
        seen = tl.atomic_add(flag, word * 0, mask=is_there, sem="acquire", scope="gpu")
        num_low = tl.sum((is_there & (seen != _pattern(word))).to(tl.int32), 0)
    tl.store(flag, word * 0, mask=is_there)
    tl.debug_barrier()  # no thread loads before


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
            slot = _slot(chunk, rows.kv_head, share, i, f)
            is_there = rows.is_live & (tl.arange(0, f.rows) * 0 + share <= last)
            place, is_element = _elements_of_slot(slot, is_there, f)
            row = slot * f.rows + tl.arange(0, f.rows)
            other_num = tl.load(arrays.num + place, mask=is_element, other=0.0, cache_modifier=".cg")
            other_den = tl.load(arrays.den + row, mask=is_there, other=0.0, cache_modifier=".cg")
            other_max = shift
            if f.phi == "none":
                other_max = tl.load(arrays.row_max + row, mask=is_there, other=LOWEST, cache_modifier=".cg")
            num, den, shift = added(num, den, shift, other_num, other_den, other_max, f)
    return num, den, shift


@triton.jit
def added(num, den, shift, other_num, other_den, other_shift, f: tl.constexpr):
    """Two sums as one; shifts are phi, or the rows' maxima."""
    if f.phi == "none":
        new = tl.maximum(shift, other_shift)
        alpha, beta = tl.exp2(shift - new), tl.exp2(other_shift - new)
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
