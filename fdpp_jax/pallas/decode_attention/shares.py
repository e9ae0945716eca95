"""Which CTA takes which keys: the CTAs of a key/value head share the live KV tiles of a chunk of sequences evenly.

The tiles of the chunk, one sequence after the other, have positions 0, 1, ...; each CTA takes positions [begin, end).
The CTA that holds a sequence's first tile is the sequence's owner: it merges the partial sums of the others, its
helpers. A shared sequence comes last in the owner's share and first in the helpers', so their sums are ready early.
CTAs of higher index take earlier positions: an owner waits only for CTAs of lower index, as `handover` demands.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fdpp_jax.pallas.decode_attention.refs import GlobalRefs
from fdpp_jax.pallas.parts import ring
from fdpp_jax.plans.calls import AttentionOptions
from fdpp_jax.plans.hopper_attention import DecodeAttentionConfig
from fdpp_jax.plans.shapes import round_up


@dataclasses.dataclass(frozen=True)
class AttentionFacts:
    """Static facts of a call.

    Attributes:
      config: Tiles, splits and stages.
      options: Scale, masks and cap.
      batch: Sequences, B.
      query_length: Queries per sequence, T.
      num_kv_heads: K.
      group: Query heads per key/value head, G.
      head_dim: H.
      capacity: Keys that a sequence has room for, S.
      chunk: Sequences that share CTAs.
      recompute: Whether rows that left the safe window are recomputed in this launch.
      starts_early: Whether the kernel starts before its predecessor ends.
      is_interpreted: Whether the interpreter runs it.
    """

    config: DecodeAttentionConfig
    options: AttentionOptions
    batch: int
    query_length: int
    num_kv_heads: int
    group: int
    head_dim: int
    capacity: int
    chunk: int
    recompute: bool
    starts_early: bool
    is_interpreted: bool

    @property
    def live_rows(self) -> int:
        """Query rows per key/value head."""
        return self.group * self.query_length

    @property
    def num_rows(self) -> int:
        """live_rows, padded to the 8 that wgmma's N asks for."""
        return round_up(self.live_rows, 8)

    @property
    def padded_dim(self) -> int:
        """The head dim, padded to whole swizzle tiles."""
        return round_up(self.head_dim, 64)


@dataclasses.dataclass(frozen=True)
class LiveKeys:
    """What the queries of a sequence see: keys [low, high) of [start, length), `count` tiles from tile `first` on."""

    start: jax.Array | int
    length: jax.Array
    offset: jax.Array | int
    low: jax.Array | int
    high: jax.Array
    first: jax.Array
    count: jax.Array


class Place(NamedTuple):
    """Sequence i of the chunk, and the position of its first tile; both [] int32."""

    i: jax.Array
    start: jax.Array


def bounds(
    start: jax.Array | int,
    length: jax.Array,
    offset: jax.Array | int,
    token: jax.Array | int,
    facts: AttentionFacts,
) -> tuple[jax.Array | int, jax.Array]:
    """The keys [low, high) of [start, length) that query `token` sees."""
    low, high = start, length
    if facts.options.is_causal:
        high = jnp.minimum(high, offset + token + 1)
    if facts.options.local_window_size is not None:
        left, right = facts.options.local_window_size
        low, high = jnp.maximum(offset + token - left, start), jnp.minimum(high, offset + token + right + 1)
    return low, high


class Share:
    """The positions [begin, end) of CTA `index` of those that share a chunk and a key/value head."""

    def __init__(
        self, gmem: GlobalRefs, facts: AttentionFacts, chunk: jax.Array, kv_head: jax.Array, index: jax.Array
    ) -> None:
        self.gmem, self.facts, self.chunk, self.kv_head, self.index = gmem, facts, chunk, kv_head, index
        self.first_sequence = chunk * facts.chunk
        # One sequence has its length loaded once.
        self._only: LiveKeys | None = None
        if facts.chunk == 1:
            self._only = self.live(jnp.int32(0))
        counts = [self.live(jnp.int32(i)).count for i in range(facts.chunk)]
        self.total = sum(counts[1:], counts[0])
        # Owners wait for every CTA between, so no share may be empty. CTAs beyond num_shares have nothing to do.
        self.num_shares = jnp.clip(self.total, 1, facts.config.num_splits)
        positions = ring.share(self.num_shares - 1 - index, self.num_shares, self.total)
        self.begin, self.end = (jnp.maximum(position, 0) for position in positions)
        self.first = _place(counts, self.begin)

    def sequence(self, i: jax.Array) -> jax.Array:
        """Index in the batch of sequence i of the chunk, clamped: the last chunk may have fewer sequences."""
        return jnp.minimum(self.first_sequence + i, self.facts.batch - 1)

    def live(self, i: jax.Array) -> LiveKeys:
        """The live keys of sequence i of the chunk."""
        if self._only is not None:
            return self._only
        sequence, facts = self.sequence(i), self.facts
        length = jnp.minimum(self.gmem.lengths[sequence], facts.capacity)  # beyond it, TMA would read keys of zeros
        offset = 0 if self.gmem.offset is None else self.gmem.offset[sequence]
        start: jax.Array | int = 0
        if self.gmem.starts is not None:
            start = jnp.clip(self.gmem.starts[sequence], 0, facts.capacity)
        low, _ = bounds(start, length, offset, 0, facts)
        _, high = bounds(start, length, offset, facts.query_length - 1, facts)
        first = lax.div(jnp.int32(low), jnp.int32(facts.config.block_kv))
        # A sequence that sees no key has one tile all the same: its owner writes zeros.
        block_kv = jnp.int32(facts.config.block_kv)
        count = jnp.maximum(lax.div(high + (block_kv - 1), block_kv) - first, 1)
        if facts.batch % facts.chunk:
            count = jnp.where(self.first_sequence + i < facts.batch, count, 0)
        if self.gmem.prior is not None:
            count = jnp.where(self.is_nan(self.gmem.prior, i), count, 0)
        return LiveKeys(start, length, offset, low, high, first, count)

    def is_nan(self, prior_gmem: jax.Ref, i: jax.Array) -> jax.Array:
        """Whether a row of an earlier result is NaN, in sequence i of the chunk and this key/value head."""
        rows = [
            prior_gmem[self.sequence(i), self.kv_head, row, 0].astype(jnp.float32)
            for row in range(self.facts.live_rows)
        ]
        return functools.reduce(jnp.logical_or, [row != row for row in rows])

    def locate(self, position: jax.Array, place: Place) -> Place:
        """The place of the sequence that holds a position, which is not before `place`."""
        if self.facts.chunk == 1:
            return place

        def stop(place: Place) -> jax.Array:
            return place.start + self.live(place.i).count

        return lax.while_loop(
            lambda place: position >= stop(place), lambda place: Place(place.i + 1, stop(place)), place
        )

    def num_sharers(self, stop: jax.Array) -> jax.Array:
        """How many CTAs take the rest of a sequence that ends before position `stop`, this CTA included."""
        return self._rank(stop - 1) - self._rank(self.begin) + 1

    def _rank(self, position: jax.Array) -> jax.Array:
        """How many CTAs take earlier positions than the CTA that takes `position`."""
        return lax.div((position + 1) * self.num_shares - 1, self.total)


def _place(counts: list[jax.Array], position: jax.Array) -> Place:
    """The place of the sequence that holds a position, given the tiles of each sequence."""
    i = start = stop = jnp.int32(0)
    for count in counts[:-1]:
        stop += count
        is_beyond = position >= stop
        i, start = i + is_beyond.astype(jnp.int32), jnp.where(is_beyond, stop, start)
    return Place(i, start)
