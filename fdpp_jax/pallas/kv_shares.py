"""Who takes which keys: the live KV tiles of a chunk of sequences, shared evenly by the CTAs of a key/value head.

The tiles of the sequences, one sequence after the other, have positions 0, 1, ...; a CTA takes positions
[begin, end). The CTA of a sequence's first tile adds up: that is its last sequence, and the first one of the others,
so that they are done with it early. And it has the highest index of them all, since CTAs of lower index take later
positions: see `handover`.

`gmem` holds the kernel's refs by name, as `decode_attention` sets them up.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdpp_jax.config import DecodeAttentionConfig
from fdpp_jax.pallas import ring

type Place = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is static of a call. Sizes are those of `decode_attention`; a chunk is the sequences that share CTAs."""

    config: DecodeAttentionConfig
    scale: float
    batch: int
    query_length: int
    group: int
    capacity: int
    chunk: int
    is_causal: bool
    window: tuple[int, int] | None
    cap: float | None
    recompute: bool
    is_interpreted: bool
    is_appended: bool

    @property
    def live_rows(self) -> int:
        """Query rows of a key/value head, which are padded to 8."""
        return self.group * self.query_length


@dataclasses.dataclass(frozen=True)
class Live:
    """What the queries of a sequence see: keys [low, high) of its `length`, in `count` tiles from `first` on."""

    length: jax.Array
    offset: jax.Array | int
    low: jax.Array | int
    high: jax.Array
    first: jax.Array
    count: jax.Array


def bounds(length: Any, offset: Any, token: Any, facts: Facts) -> tuple[Any, Any]:
    """The keys [low, high) that query `token` sees."""
    low: Any = 0
    high = length
    if facts.is_causal:
        high = jnp.minimum(high, offset + token + 1)
    if facts.window is not None:
        left, right = facts.window
        low, high = jnp.maximum(offset + token - left, 0), jnp.minimum(high, offset + token + right + 1)
    return low, high


class Share:
    """The positions of one CTA. A place (i, start) is a sequence of the chunk and the position of its first tile."""

    def __init__(self, gmem: Any, facts: Facts, chunk: jax.Array, kv_head: jax.Array, index: jax.Array):
        self.gmem, self.facts, self.chunk, self.kv_head, self.index = gmem, facts, chunk, kv_head, index
        self.first_sequence = chunk * facts.chunk
        # With one sequence there is one answer, and its length is loaded once.
        self._only: Live | None = None
        if facts.chunk == 1:
            self._only = self.live(jnp.int32(0))
        counts = [self.live(jnp.int32(i)).count for i in range(facts.chunk)]
        self.total = sum(counts[1:], counts[0])
        # No share between others may be empty: the sums of all are waited for. CTAs beyond have nothing to do.
        self.num_shares = jnp.clip(self.total, 1, facts.config.num_splits)
        positions = ring.share(self.num_shares - 1 - index, self.num_shares, self.total)
        self.begin, self.end = (jnp.maximum(position, 0) for position in positions)
        self.first = _place(counts, self.begin)

    def sequence(self, i: jax.Array) -> jax.Array:
        """The sequence's index in the batch; the last chunk may have fewer sequences than others."""
        return jnp.minimum(self.first_sequence + i, self.facts.batch - 1)

    def live(self, i: jax.Array) -> Live:
        """What is live of sequence i of the chunk."""
        if self._only is not None:
            return self._only
        sequence, facts = self.sequence(i), self.facts
        length = jnp.minimum(self.gmem.lengths[sequence], facts.capacity)  # beyond it, TMA would read keys of zeros
        offset = self.gmem.offset[sequence] if hasattr(self.gmem, "offset") else 0
        low, _ = bounds(length, offset, 0, facts)
        _, high = bounds(length, offset, facts.query_length - 1, facts)
        first = lax.div(jnp.int32(low), jnp.int32(facts.config.block_kv))
        # A sequence that sees no key has one tile all the same: someone must write its zeros.
        block_kv = jnp.int32(facts.config.block_kv)
        count = jnp.maximum(lax.div(high + (block_kv - 1), block_kv) - first, 1)
        if facts.batch % facts.chunk:
            count = jnp.where(self.first_sequence + i < facts.batch, count, 0)
        if hasattr(self.gmem, "prior"):
            count = jnp.where(self.prior_is_nan(i), count, 0)
        return Live(length, offset, low, high, first, count)

    def prior_is_nan(self, i: jax.Array) -> jax.Array:
        """Whether a row of the sequence's earlier result is NaN."""
        rows = [
            self.gmem.prior[self.sequence(i), self.kv_head, row, 0].astype(jnp.float32)
            for row in range(self.facts.live_rows)
        ]
        return functools.reduce(jnp.logical_or, [row != row for row in rows])

    def locate(self, position: jax.Array, place: Place) -> Place:
        """The place of the sequence that holds a position, which is not before `place`."""
        if self.facts.chunk == 1:
            return place

        def is_beyond(place: Place) -> jax.Array:
            return position >= place[1] + self.live(place[0]).count

        return lax.while_loop(is_beyond, lambda place: (place[0] + 1, place[1] + self.live(place[0]).count), place)

    def num_sharers(self, stop: jax.Array) -> jax.Array:
        """How many CTAs take the rest of a sequence that ends before position `stop`, this one included."""
        return self._of(stop - 1) - self._of(self.begin) + 1

    def _of(self, position: jax.Array) -> jax.Array:
        """Whose a position is, counted from the first."""
        return lax.div((position + 1) * self.num_shares - 1, self.total)


def _place(counts: list[jax.Array], position: jax.Array) -> Place:
    """The place of the sequence that holds a position."""
    i = start = stop = jnp.int32(0)
    for count in counts[:-1]:
        stop += count
        is_beyond = position >= stop
        i, start = i + is_beyond.astype(jnp.int32), jnp.where(is_beyond, stop, start)
    return i, start
