"""Which CTA takes which keys: the CTAs of a key/value head share the live KV tiles of a chunk of sequences evenly.

The tiles of the chunk, one sequence after the other, have positions 0, 1, ...; each CTA takes positions [begin, end).
"""

from typing import NamedTuple

import triton
import triton.language as tl


class LiveKeys(NamedTuple):
    """What the queries of a sequence see: keys [low, high) of [start, length), `count` tiles from tile `first` on."""

    start: tl.tensor
    length: tl.tensor
    offset: tl.tensor
    low: tl.tensor
    high: tl.tensor
    first: tl.tensor
    count: tl.tensor


class Cut(NamedTuple):
    """`total` tiles cut into `num` shares: the first `longer` of them have one tile more than `size`."""

    total: tl.tensor
    num: tl.tensor
    size: tl.tensor
    longer: tl.tensor


@triton.jit
def bounds(start, length, offset, token, f: tl.constexpr):
    """The keys [low, high) of [start, length) that query `token` sees."""
    low = start + token * 0
    high = length + token * 0
    if f.is_causal:
        high = tl.minimum(high, offset + token + 1)
    if f.has_window:
        low = tl.maximum(offset + token - f.window_left, low)
        high = tl.minimum(high, offset + token + (f.window_right + 1))
    return low, high


@triton.jit
def live_keys(arrays, sequence, f: tl.constexpr):
    """The live keys of a sequence, or of many."""
    length = tl.minimum(tl.load(arrays.lengths + sequence), f.capacity)
    start = length * 0
    offset = length * 0
    if f.has_starts:
        start = tl.minimum(tl.maximum(tl.load(arrays.starts + sequence), 0), f.capacity)
    if f.has_offset:
        offset = tl.load(arrays.offset + sequence)
    low, _ = bounds(start, length, offset, length * 0, f)
    _, high = bounds(start, length, offset, length * 0 + (f.query_length - 1), f)
    first = tl.minimum(low, f.capacity - 1) // f.block_kv  # a page that there is, however far the queries are
    # A sequence that sees no key has one tile all the same: whoever takes it writes zeros.
    count = tl.maximum((high + (f.block_kv - 1)) // f.block_kv - first, 1)
    return LiveKeys(start, length, offset, low, high, first, count)


@triton.jit
def cut_chunk(arrays, chunk, f: tl.constexpr):
    """The tiles [padded chunk] of the chunk's sequences, and how they are cut into shares."""
    i = tl.arange(0, f.padded_chunk)
    sequence = chunk * f.chunk + i
    keys = live_keys(arrays, tl.minimum(sequence, f.batch - 1), f)
    counts = tl.where((i < f.chunk) & (sequence < f.batch), keys.count, 0)
    total = tl.sum(counts, 0)
    num = tl.minimum(total, f.num_splits)
    return counts, Cut(total, num, total // num, total % num)


@triton.jit
def begin_of(share, cut):
    """The first position of a share; the end of all where there are not so many shares."""
    return tl.minimum(share * cut.size + tl.minimum(share, cut.longer), cut.total)


@triton.jit
def share_of(position, cut):
    """The share that has a position."""
    in_longer = cut.longer * (cut.size + 1)
    return tl.where(position < in_longer, position // (cut.size + 1), cut.longer + (position - in_longer) // cut.size)


@triton.jit
def place_of(position, counts):
    """The sequence of the chunk that has a position, and the position of its first tile."""
    ends = tl.cumsum(counts, 0)
    is_before = ends <= position
    return tl.sum(is_before.to(tl.int32), 0), tl.sum(tl.where(is_before, counts, 0), 0)
