"""Which CTA of a fused layer attends to which keys.

A unit is a sequence and a key/value head. The CTAs share the live tiles of all units evenly, each a range of them. The
CTA that has a unit's last tile is the owner: it merges the partial sums and writes the result. The other CTAs of the
unit are its helpers. So a CTA helps with one unit at most, that of its last tile, and owns the units before.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fdpp_jax.pallas.parts import ring
from fdpp_jax.plans.calls import AttentionOptions
from fdpp_jax.plans.shapes import cdiv, round_up

BLOCK_KV = 64  # keys of a tile
MAX_COLUMNS = 128  # of keys, or of values, in a stage of the ring


@dataclasses.dataclass(frozen=True)
class AttentionFacts:
    """Static facts of attention in a fused layer.

    Attributes:
      options: Of the call.
      batch: B.
      num_heads: N.
      num_kv_heads: K.
      head_dim: H.
      capacity: S.
      num_ctas: CTAs of the grid.
      min_tiles: Tiles that a CTA takes at least, where it takes any.
    """

    options: AttentionOptions
    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    capacity: int
    num_ctas: int
    min_tiles: int

    @property
    def group(self) -> int:
        """Query heads per key/value head, G."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_rows(self) -> int:
        """Query rows of a unit: G, padded to a multiple of 8."""
        return round_up(self.group, 8)

    @property
    def num_blocks(self) -> int:
        """Blocks of 64 columns of a head."""
        return self.head_dim // 64

    @property
    def block_size(self) -> int:
        """Elements of a block of 64 columns of a unit's sums."""
        return 64 * self.num_rows

    @property
    def stages_per_tile(self) -> int:
        """Stages of the ring that a tile's keys and values take."""
        return cdiv(self.head_dim, MAX_COLUMNS)


class Segment(NamedTuple):
    """Tiles [first, last) of a unit, of keys [low, high); all [] int32, empty if first = last.

    Attributes:
      sequence: The unit's.
      kv_head: The unit's.
      low: First key that the unit sees.
      high: End of its keys; the last one is new.
      first: First tile.
      last: End of the tiles.
      num_helpers: CTAs before this one that help its owner.
    """

    sequence: jax.Array
    kv_head: jax.Array
    low: jax.Array | int
    high: jax.Array
    first: jax.Array
    last: jax.Array
    num_helpers: jax.Array


class _Unit(NamedTuple):
    """A unit, and the position of its first tile among the tiles of all units."""

    sequence: jax.Array
    kv_head: jax.Array
    start: jax.Array


class Shares:
    """The segments of one CTA."""

    def __init__(self, lengths_gmem: jax.Ref, facts: AttentionFacts, cta: jax.Array):
        self.lengths, self.facts, self.cta = lengths_gmem, facts, cta
        self.total = facts.num_kv_heads * lax.fori_loop(
            0, facts.batch, lambda i, tiles: tiles + self._num_tiles(i), jnp.int32(0)
        )
        self.num_shares = jnp.clip(lax.div(self.total, jnp.int32(facts.min_tiles)), 1, facts.num_ctas)
        begin, end = ring.share(cta, self.num_shares, self.total)
        is_there = cta < self.num_shares
        self.begin, self.end = jnp.where(is_there, begin, 0), jnp.where(is_there, end, 0)
        self.first = self._unit_at(self.begin)
        self.last = self._unit_at(jnp.maximum(self.end - 1, 0))
        last_end = self.last.start + self._num_tiles(self.last.sequence)
        self.helps = is_there & (self.end < last_end)
        num_units = self._index(self.last) - self._index(self.first) + 1 - self.helps.astype(jnp.int32)
        self.num_owned = jnp.where(is_there, num_units, 0)

    def for_segments[C](self, work: Callable[[Segment, C], C], carry: C, *, is_helpers: bool) -> C:
        """carry = work(segment, carry) for the CTA's segment as a helper, which may be empty, or those as an owner."""
        if is_helpers:
            return work(self._segment(self.last, is_there=self.helps), carry)

        def own(_: jax.Array, state: tuple[_Unit, C]) -> tuple[_Unit, C]:
            unit, carry = state
            return self._following(unit), work(self._segment(unit), carry)

        return lax.fori_loop(0, self.num_owned, own, (self.first, carry))[1]

    def _segment(self, unit: _Unit, is_there: jax.Array | None = None) -> Segment:
        low, high = self._bounds(unit.sequence)
        base = lax.div(jnp.int32(low), jnp.int32(BLOCK_KV))
        stop = unit.start + self._num_tiles(unit.sequence)
        first = base + jnp.maximum(self.begin - unit.start, 0)
        last = base + jnp.minimum(self.end, stop) - unit.start
        if is_there is not None:
            last = jnp.where(is_there, last, first)
        # The CTA that takes a position has so many CTAs before it.
        rank = lax.div((unit.start + 1) * self.num_shares - 1, self.total)
        return Segment(unit.sequence, unit.kv_head, low, high, first, last, jnp.maximum(self.cta - rank, 0))

    def _bounds(self, sequence: jax.Array) -> tuple[jax.Array | int, jax.Array]:
        """The keys [low, high) that the new token of a sequence sees, itself the last."""
        high = jnp.minimum(self.lengths[sequence], self.facts.capacity)
        window = self.facts.options.local_window_size
        return (0 if window is None else jnp.maximum(high - 1 - window[0], 0)), high

    def _num_tiles(self, sequence: jax.Array) -> jax.Array:
        """Live tiles of a sequence, which has at least one."""
        low, high = self._bounds(sequence)
        block_kv = jnp.int32(BLOCK_KV)
        return jnp.maximum(lax.div(high + (block_kv - 1), block_kv) - lax.div(jnp.int32(low), block_kv), 1)

    def _unit_at(self, position: jax.Array) -> _Unit:
        """The unit of the tile at a position."""

        def size(sequence: jax.Array) -> jax.Array:
            return self.facts.num_kv_heads * self._num_tiles(sequence)

        sequence = start = jnp.int32(0)
        if self.facts.batch > 1:
            sequence, start = lax.while_loop(
                lambda place: position >= place[1] + size(place[0]),
                lambda place: (place[0] + 1, place[1] + size(place[0])),
                (sequence, start),
            )
        num_tiles = self._num_tiles(sequence)
        kv_head = lax.div(position - start, num_tiles)
        return _Unit(sequence, kv_head, start + kv_head * num_tiles)

    def _following(self, unit: _Unit) -> _Unit:
        is_last = unit.kv_head + 1 == self.facts.num_kv_heads
        sequence = jnp.minimum(unit.sequence + is_last.astype(jnp.int32), self.facts.batch - 1)
        kv_head = jnp.where(is_last, 0, unit.kv_head + 1)
        return _Unit(sequence, kv_head, unit.start + self._num_tiles(unit.sequence))

    def _index(self, unit: _Unit) -> jax.Array:
        return unit.sequence * self.facts.num_kv_heads + unit.kv_head
