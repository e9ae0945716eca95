"""The fused layer's epilogue of queries, keys and values: biases, norms over a head, rotation, cache."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from fdpp_jax.pallas.fused_layer.columns import Columns, Halves, biased, by_row, rounded
from fdpp_jax.pallas.fused_layer.norms import Finish
from fdpp_jax.pallas.fused_layer.phases import LayerFacts
from fdpp_jax.pallas.fused_layer.refs import GlobalRefs, present
from fdpp_jax.pallas.parts import grid_sync
from fdpp_jax.pallas.parts.accumulators import LAYOUT
from fdpp_jax.pallas.parts.registers import load


class Heads:
    """The epilogues of the units of queries, keys and values of one CTA.

    Attributes:
      key: First column of keys.
      value: First column of values.
    """

    def __init__(self, gmem: GlobalRefs, facts: LayerFacts):
        self.gmem, self.facts = gmem, facts
        self.columns = Columns(facts.num_rows, facts.is_interpreted)
        self.key = facts.num_heads * facts.head_dim
        self.value = self.key + facts.num_kv_heads * facts.head_dim

    def finish(self, unit: jax.Array, low: jax.Array, high: jax.Array) -> Finish:
        """The epilogue of a unit whose columns begin at low, and whose partner columns at high."""
        gmem, spec = self.gmem, self.facts.spec
        cache_rows = present(gmem.cache_rows)
        biases = self.columns.load_both(gmem.qkv_bias, low, high)
        gains = self._gains(low, high) if spec.norms_queries_and_keys else None
        rotation = self._rotation(low) if self.facts.num_rotated else None
        targets = (
            (present(gmem.query), 0, self.key, None),
            (present(gmem.keys), self.key, self.value, cache_rows),
            (present(gmem.values), self.value, None, cache_rows),
        )

        def finish(y: jax.Array, partner: jax.Array) -> None:
            halves = biased(y, partner, biases)
            if gains is not None:
                halves = self._normed(unit, low < self.value, halves, gains)
            if rotation is not None:
                halves = _rotated(halves, rotation)
            for target, start, end, rows in targets:
                is_here = low >= start if end is None else (low >= start) & (low < end)
                for half, column in zip(halves, (low, high), strict=True):
                    pl.when(is_here)(functools.partial(self.columns.store, half, target, column - start, rows))

        return finish

    def _gains(self, low: jax.Array, high: jax.Array) -> Halves:
        """Of queries or keys, as the columns are, and 1 for values."""
        head_dim, offset = jnp.int32(self.facts.head_dim), self.facts.spec.norm.gain_offset
        of_query, of_key, of_value = (
            share.astype(jnp.float32)
            for share in (low < self.key, (low >= self.key) & (low < self.value), low >= self.value)
        )

        def gains(column: jax.Array) -> jax.Array:
            column = lax.rem(column, head_dim)
            query, key = (
                self.columns.load(present(ref), column) + offset for ref in (self.gmem.query_norm, self.gmem.key_norm)
            )
            return query * of_query + key * of_key + of_value

        return gains(low), gains(high)

    def _normed(self, unit: jax.Array, is_normed: jax.Array, halves: Halves, gains: Halves) -> Halves:
        """Queries and keys normalised over their head, once the CTAs of its other units have stored their sums.

        The interpreter runs one CTA after the other: it runs the step twice, and all sums are there the second time.
        """
        facts, sums = self.facts, present(self.gmem.head_sums)
        y, partner = halves
        self.columns.store_sums(y * y + partner * partner, sums.at[pl.ds(2 * unit, 2)])
        head = lax.div(unit, jnp.int32(facts.units_per_head))
        if not facts.is_interpreted:
            counter = self.gmem.head_counters.at[head]
            grid_sync.count(counter)
            grid_sync.await_count(counter, jnp.int32(facts.units_per_head))
        num_sums = 2 * facts.units_per_head
        square = sum(load(sums.at[head * num_sums + i], LAYOUT.reduce(0), optimized=False) for i in range(num_sums))
        share = is_normed.astype(jnp.float32)
        factor = lax.rsqrt(square / facts.head_dim + facts.spec.norm.eps) * share + (1.0 - share)
        return rounded(by_row(factor, y) * gains[0]), rounded(by_row(factor, partner) * gains[1])

    def _rotation(self, low: jax.Array) -> Halves:
        """Cosines and sines of columns and partners, which turn by no angle where they do not rotate."""
        facts, rotation = self.facts, present(self.gmem.rotation)
        place = lax.rem(low, jnp.int32(facts.head_dim))
        is_rotated = low < self.value
        if facts.num_rotated < facts.head_dim:
            is_rotated &= place < facts.num_rotated
            place = jnp.where(is_rotated, place, 0)
        share = is_rotated.astype(jnp.float32)
        cos, sin = (self.columns.load(rotation.at[i], place) for i in range(2))
        return cos * share + (1.0 - share), sin * share


def _rotated(halves: Halves, rotation: Halves) -> Halves:
    """The two halves of a head turned together."""
    (y, partner), (cos, sin) = halves, rotation
    return y * cos - partner * sin, partner * cos + y * sin
