"""The refs of `prefill_attention`, by memory space, and its static facts. A ref that a call lacks is None."""

from typing import NamedTuple

import jax

from fdpp_jax.pallas.parts import ring
from fdpp_jax.plans.calls import AttentionOptions
from fdpp_jax.plans.hopper_prefill import PrefillAttentionConfig


class GlobalRefs(NamedTuple):
    """Refs in global memory: operands, then results. R is T, padded to whole blocks of queries."""

    q: jax.Ref  # [B, T, N, H]
    k: jax.Ref  # [B, S, K, H]
    v: jax.Ref
    lengths: jax.Ref | None = None  # [B] int32
    starts: jax.Ref | None = None  # [B] int32
    phi: jax.Ref | None = None  # [1 or B * N] float32; None: online softmax
    offset: jax.Ref | None = None  # [B] int32
    sinks: jax.Ref | None = None  # [N] float32
    failed: jax.Ref | None = None  # [B, N, R] float32, 1 where a row must be recomputed; again: [B, N, blocks]
    out: jax.Ref | None = None  # [B, T, N, H]; an operand of the second launch, as is log_sum
    log_sum: jax.Ref | None = None  # [B, N, R] float32


class SharedRefs(NamedTuple):
    """Refs in shared memory; H' is the head dim padded to whole swizzle tiles."""

    q: jax.Ref  # [consumers, 64, H'], queries, then results on their way out
    k: jax.Ref  # [stages, block_kv, H']
    v: jax.Ref
    by_row: jax.Ref  # [consumers, 64] float32
    q_ready: ring.Barrier
    k_ready: ring.Barrier
    v_ready: ring.Barrier
    k_free: ring.Barrier
    v_free: ring.Barrier
    turn: ring.Barrier  # the consumers' turns on the tensor cores
    cleared: ring.Barrier


class Facts(NamedTuple):
    """Static facts of a launch."""

    config: PrefillAttentionConfig
    options: AttentionOptions
    query_length: int
    num_heads: int
    group: int
    padded_dim: int
    capacity: int
    is_again: bool  # whether it is the second launch
    is_interpreted: bool
