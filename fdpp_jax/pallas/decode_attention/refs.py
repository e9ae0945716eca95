"""The refs of `decode_attention`, by memory space. A ref that a call lacks, such as that of its sinks, is None."""

from typing import NamedTuple

import jax

from fdpp_jax.pallas.parts.ring import Barrier


class GlobalRefs(NamedTuple):
    """Refs in global memory: operands, then results.

    R is the number of query rows per key/value head, G * T, or from 8 on a multiple of 8 (`ring.loadable_rows`). R' is
    that number padded to a multiple of 8 always, and H' is the head dim padded to a multiple of 64. Partial sums have
    the axes [chunks, K, CTAs] in front.
    """

    q: jax.Ref  # [B, K, R, H]
    k: jax.Ref  # [B, S, K, H], or pages [P, page_size, K, H]
    v: jax.Ref
    lengths: jax.Ref  # [B] int32
    phi: jax.Ref | None = None  # [1] or [B, K, R'] float32; None: online softmax
    offset: jax.Ref | None = None  # [B] int32
    sinks: jax.Ref | None = None  # [1, K, R'] float32
    pages: jax.Ref | None = None  # [B, pages per sequence] int32
    k_scale: jax.Ref | None = None  # [K], or as k without H
    v_scale: jax.Ref | None = None
    starts: jax.Ref | None = None  # [B] int32
    prior: jax.Ref | None = None  # [B, K, R, H], an earlier result
    redone: jax.Ref | None = None  # [B, K] int32

    out: jax.Ref | None = None  # [B, K, R, H]; None: XLA merges the partial sums
    log_sum: jax.Ref | None = None  # [B, K, R'] float32, in natural-log units
    num: jax.Ref | None = None  # [..., pairs of rows, 2 H'] float32; None in a cluster, as are den, max and flag
    den: jax.Ref | None = None  # [..., R'] float32
    max: jax.Ref | None = None  # [..., R'] float32, with online softmax
    flag: jax.Ref | None = None  # [..., handover.WORDS] int32; None: XLA merges the partial sums

    @property
    def sums(self) -> tuple[jax.Ref, ...]:
        """num, den and, with online softmax, max: where CTAs leave their partial sums."""
        return tuple(ref for ref in (self.num, self.den, self.max) if ref is not None)


class SharedRefs(NamedTuple):
    """Refs in shared memory; R' and H' as in `GlobalRefs`. The kernel's scratch has the same names."""

    q: jax.Ref  # [1 or 2, R', H'], queries of this sequence and of the next one, and results on their way out
    p: jax.Ref  # [1, R', block_kv], the weights
    by_row: jax.Ref  # [R'] float32
    q_ready: Barrier
    k: jax.Ref  # [stages, block_kv, H']
    v: jax.Ref
    k_ready: Barrier
    v_ready: Barrier
    v_wide: jax.Ref | None = None  # [1, block_kv, H'], 8-bit values in 16 bits
    k_factors: jax.Ref | None = None  # [stages, block_kv, heads loaded together] float32, scales per token
    v_factors: jax.Ref | None = None
    given_num: jax.Ref | None = None  # [helpers, pairs of rows, 2 H'] float32, in a cluster
    given_den: jax.Ref | None = None  # [helpers, R'] float32
    given_max: jax.Ref | None = None  # [helpers, R'] float32, with online softmax
    unused: jax.Ref | None = None  # keeps other CTAs off the SM

    @property
    def given(self) -> tuple[jax.Ref, ...]:
        """num, den and, with online softmax, max: where the owner gets its helpers' sums in a cluster, else empty."""
        return tuple(ref for ref in (self.given_num, self.given_den, self.given_max) if ref is not None)

    @property
    def is_narrow(self) -> bool:
        """Whether keys and values have 8 bits."""
        return self.v_wide is not None
