"""The refs of `prefill_attention`, by memory space, its static facts, and where a CTA is.

A ref that a call lacks is None.
"""

from typing import NamedTuple

import jax

from fdpp_jax.pallas.parts import ring
from fdpp_jax.plans.calls import AttentionOptions
from fdpp_jax.plans.hopper_prefill import PrefillAttentionConfig
from fdpp_jax.plans.shapes import cdiv


class GlobalRefs(NamedTuple):
    """Refs in global memory: operands, then results.

    R is the number of query rows per sequence and row head, T * pack: `pack` query heads of a group are rows of one
    row head, query by query. M is the number of row heads, N / pack. R' is R, padded to whole blocks of rows.
    """

    q: jax.Ref  # [B, R, M, H]
    k: jax.Ref  # [B, S, K, H], or pages [P, page_size, K, H]
    v: jax.Ref
    lengths: jax.Ref | None = None  # [B] int32
    starts: jax.Ref | None = None  # [B] int32
    phi: jax.Ref | None = None  # [1] or [B, N] float32, or by row [B, M, R']; None: online softmax
    offset: jax.Ref | None = None  # [B] int32
    sinks: jax.Ref | None = None  # [1, N] float32, or by row [1, M, R']
    pages: jax.Ref | None = None  # [B, pages per sequence] int32
    k_scale: jax.Ref | None = None  # [K], or as k without H
    v_scale: jax.Ref | None = None
    out: jax.Ref | None = None  # [B, R, M, H]
    log_sum: jax.Ref | None = None  # [B, M, R'] float32
    counter: jax.Ref | None = None  # [1] int32, tiles that CTAs have claimed; zero at launch


class SharedRefs(NamedTuple):
    """Refs in shared memory; H' is the head dim padded to whole swizzle tiles."""

    q: jax.Ref  # [places, consumers, 64, H'], queries, then results on their way out; a CTA's tiles take turns
    k: jax.Ref  # [stages, block_kv, H']
    v: jax.Ref
    by_row: jax.Ref  # [consumers, 64] float32
    has_failed: jax.Ref  # [consumers] int32
    q_ready: ring.Barrier  # [places * consumers]
    k_ready: ring.Barrier
    v_ready: ring.Barrier
    k_free: ring.Barrier
    v_free: ring.Barrier
    turn: ring.Barrier  # the consumers' turns on the tensor cores
    cleared: ring.Barrier
    verdict: ring.Barrier  # whether rows of the CTA have failed is known
    q_free: ring.Barrier | None = None  # as q_ready, where a CTA has many tiles
    tiles: jax.Ref | None = None  # [MAX_TILES + 1] int32, those of the CTA, then a number that is none
    tile_failed: jax.Ref | None = None  # [consumers, MAX_TILES] int32
    narrow: jax.Ref | None = None  # [1 or 2, block_kv, H'], keys and values of 8 bits in turn
    narrow_scales: jax.Ref | None = None  # [1 or 2, block_kv, heads loaded together] float32, scales per token
    narrow_ready: ring.Barrier | None = None
    k_factors: jax.Ref | None = None  # [stages, block_kv] float32, those of the head
    v_factors: jax.Ref | None = None


class Facts(NamedTuple):
    """Static facts of a launch."""

    config: PrefillAttentionConfig
    options: AttentionOptions
    num_ctas: int
    batch: int
    num_rows: int  # R
    row_heads: int  # M
    pack: int
    row_heads_per_kv_head: int
    padded_dim: int
    capacity: int
    recompute: bool
    is_interpreted: bool

    @property
    def num_blocks(self) -> int:
        """Blocks of rows per head."""
        return cdiv(self.num_rows, self.config.block_q)

    @property
    def num_tiles(self) -> int:
        """Blocks of rows of all heads."""
        return self.batch * self.row_heads * self.num_blocks

    @property
    def is_persistent(self) -> bool:
        """Whether CTAs have more than one tile; the other kernel has no loop over them."""
        return self.num_ctas < self.num_tiles

    @property
    def has_positions(self) -> bool:
        """Whether what a query sees depends on its position. With unused ones the search for layouts has no end."""
        return self.options.is_causal or self.options.local_window_size is not None


class Past(NamedTuple):
    """What a CTA of many tiles had before one of them: how many tiles, and how many key blocks."""

    tiles: jax.Array
    blocks: jax.Array
