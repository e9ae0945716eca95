"""The query rows of one sequence and key/value head against tiles of its keys and values.

Scores, phi and maxima are in base 2, that is multiplied by log2(e).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fdpp_jax.triton.decode_attention.shares import bounds

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32: a maximum of nothing that is not infinite


class Rows(NamedTuple):
    """The rows [rows] of a sequence's queries of one key/value head: the heads of a group for each token."""

    sequence: tl.tensor
    kv_head: tl.tensor
    is_live: tl.tensor  # others pad
    place: tl.tensor  # among all B * T * N
    head: tl.tensor
    low: tl.tensor  # each sees keys [low, high)
    high: tl.tensor


@triton.jit
def rows_of(sequence, kv_head, keys, f: tl.constexpr):
    """The rows of a sequence, whose live keys are given, and a key/value head."""
    row = tl.arange(0, f.rows)
    token = row // f.group
    head = kv_head * f.group + row % f.group
    low, high = bounds(keys.start, keys.length, keys.offset, token, f)
    place = (sequence * f.query_length + token) * (f.num_kv_heads * f.group) + head
    return Rows(sequence, kv_head, row < f.live_rows, place, head, low, high)


@triton.jit
def elements(place, is_live, f: tl.constexpr):
    """Offsets [rows, H] of rows of H numbers at their places, and which are live."""
    dim = tl.arange(0, f.padded_dim)
    return place.to(tl.int64)[:, None] * f.head_dim + dim[None, :], is_live[:, None] & (dim < f.head_dim)[None, :]


@triton.jit
def phi_of(arrays, rows, f: tl.constexpr):
    """phi [rows]."""
    if f.phi == "one":
        phi = tl.load(arrays.phi) + tl.full([f.rows], 0.0, tl.float32)
    else:
        place = rows.sequence * (f.num_kv_heads * f.group) + rows.head
        phi = tl.load(arrays.phi + place, mask=rows.is_live, other=0.0)
    return phi * LOG2E


@triton.jit
def by_row(x, f: tl.constexpr):
    """x [rows] beside scores: [rows, 1], or [1] where there is one row without an axis."""
    return x[:, None] if f.uses_dot else x


@triton.jit
def by_key(x, f: tl.constexpr):
    """x [block_kv] beside scores."""
    return x[None, :] if f.uses_dot else x


@triton.jit
def first_key(arrays, sequence, tile, key, f: tl.constexpr):
    """Where in the cache a tile's keys are, in keys: one number if they follow each other, else [block_kv]; int64."""
    position = tile * f.block_kv
    if f.page_size == 0:
        first = sequence.to(tl.int64) * f.capacity + position
    else:
        table = arrays.pages + sequence.to(tl.int64) * (f.capacity // f.page_size)
        if f.page_size >= f.block_kv:
            page = tl.load(table + position // f.page_size)
        else:
            position += key
            page = tl.load(table + position // f.page_size, mask=position < f.capacity, other=0)
        first = page.to(tl.int64) * f.page_size + position % f.page_size
    return first


@triton.jit
def attend(arrays, rows, keys, begin, end, phi, f: tl.constexpr, is_online: tl.constexpr):
    """The sums over the tiles [begin, end).

    Returns:
      num [rows, H], den [rows], and with online softmax the rows' maxima, else phi.
    """
    key = tl.arange(0, f.block_kv)
    dim = tl.arange(0, f.padded_dim)
    width: tl.constexpr = f.num_kv_heads * f.head_dim
    is_dim = (dim < f.head_dim)[None, :]
    place, is_query = elements(rows.place, rows.is_live, f)
    q = tl.load(arrays.q + place, mask=is_query, other=0.0)
    dtype: tl.constexpr = q.dtype
    if not f.uses_dot:
        q = q.to(tl.float32)
    k_head = arrays.k + rows.kv_head * f.head_dim
    v_head = arrays.v + rows.kv_head * f.head_dim
    scale = f.scale
    if f.scales == "head":
        scale = tl.load(arrays.k_scale + rows.kv_head) * f.scale

    row_max = phi
    if is_online:
        row_max = tl.full([f.rows], LOWEST, tl.float32)
    if f.uses_dot:
        num = tl.full([f.rows, f.padded_dim], 0.0, tl.float32)
        den = tl.full([f.rows, f.block_kv], 0.0, tl.float32)
    else:
        num = tl.full([f.block_kv, f.padded_dim], 0.0, tl.float32)
        den = tl.full([f.block_kv], 0.0, tl.float32)

    # Triton gives each of two loads that follow each other half of the stages: a page's number, and what is in it.
    num_stages: tl.constexpr = f.num_buffers * (1 if f.page_size == 0 else 2) + 1
    for tile in tl.range(begin, end, num_stages=num_stages):
        position = tile * f.block_kv + key
        is_key = (position >= keys.low) & (position < keys.high)
        where = first_key(arrays, rows.sequence, tile, key, f)
        if f.page_size != 0 and f.page_size < f.block_kv:
            offset = (where * width)[:, None] + dim[None, :]
            k_tile, v_tile = k_head, v_head
            scale_place = where * f.num_kv_heads + rows.kv_head
        else:
            offset = (key * width)[:, None] + dim[None, :]
            k_tile, v_tile = k_head + where * width, v_head + where * width
            scale_place = (where + key) * f.num_kv_heads + rows.kv_head
        k = tl.load(k_tile + offset, mask=is_key[:, None] & is_dim, other=0.0).to(dtype)
        if f.uses_dot:
            s = tl.dot(q, tl.trans(k))
        else:
            s = tl.sum(k.to(tl.float32) * q, 1)
        if f.scales == "token":
            s *= by_key(tl.load(arrays.k_scale + scale_place, mask=is_key, other=0.0), f)
        if f.soft_cap == 0:
            s *= scale * LOG2E
        else:
            s = 1.0 - 2.0 / (tl.exp2(s * (scale * (2.0 * LOG2E / f.soft_cap))) + 1.0)
            s *= f.soft_cap * LOG2E
        position = by_key(position, f)
        is_live = (position >= by_row(rows.low, f)) & (position < by_row(rows.high, f))
        if is_online:
            # Behind a select the product stays rounded, as the maximum is: the largest score minus the maximum is 0.
            s = tl.where(is_live, s, LOWEST)
            shift = tl.maximum(row_max, tl.max(s, 1 if f.uses_dot else 0))
            alpha = tl.exp2(row_max - shift)
            num *= by_row(alpha, f)
            den *= by_row(alpha, f)
            row_max = shift
        p = tl.where(is_live, tl.exp2(s - by_row(row_max, f)), 0.0)

        v = tl.load(v_tile + offset, mask=is_key[:, None] & is_dim, other=0.0).to(dtype)
        if f.scales == "token":
            den += p
            p *= by_key(tl.load(arrays.v_scale + scale_place, mask=is_key, other=0.0), f)
        if f.uses_dot:
            p = p.to(dtype)
            if f.scales != "token":
                # The weights as rounded: a rounding error common to numerator and denominator cancels.
                den += p.to(tl.float32)
            num = tl.dot(p, v, num)
        else:
            if f.scales != "token":
                den += p
            num += p[:, None] * v.to(tl.float32)

    if f.uses_dot:
        den = tl.sum(den, 1)
    else:
        num = tl.sum(num, 0)[None, :]
        den = tl.sum(den, 0) + tl.full([1], 0.0, tl.float32)
    if f.scales == "head":
        num *= tl.load(arrays.v_scale + rows.kv_head)
    return num, den, row_max
