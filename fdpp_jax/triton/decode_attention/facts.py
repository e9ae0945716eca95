"""Static facts of a call of `decode_attention`, and its arrays as the kernels name them."""

import dataclasses
from typing import Literal, NamedTuple

import triton.language as tl

from fdpp_jax.plans.shapes import ScaleKind


@dataclasses.dataclass(frozen=True)
class Facts:
    """Static facts of a call: a constant of the kernels.

    Attributes:
      batch: Sequences, B.
      query_length: Queries per sequence, T.
      num_kv_heads: K.
      group: Query heads per key/value head, G.
      head_dim: H.
      padded_dim: H, padded to a power of two.
      live_rows: Query rows per key/value head, G * T.
      rows: live_rows, padded to a power of two that the matrix unit takes.
      capacity: Keys that a sequence has room for, S.
      page_size: Keys per page; 0: the cache is contiguous.
      block_kv: Keys per tile.
      num_splits: CTAs that share a chunk and a key/value head.
      num_buffers: Tiles of keys, and of values, in shared memory.
      merged_at_once: Slots whose loads are on their way together where they are merged.
      chunk: Sequences that share CTAs.
      padded_chunk: chunk, padded to a power of two.
      num_slots: Of a chunk and a key/value head, for partial sums.
      padded_splits: num_splits, padded to a power of two.
      uses_dot: Whether products are the matrix unit's. Else there is one row, and each thread multiplies.
      scale: Factor on the scores.
      is_causal: A query sees the keys up to its position.
      has_window: Whether a query sees only the keys around its position, window_left and window_right of them.
      window_left: See has_window.
      window_right: See has_window.
      soft_cap: Cap of the scores; 0: none.
      phi: Whether phi is one number, one for each row, or missing: online softmax.
      has_offset: Whether there are query offsets.
      has_starts: Whether there are first live keys.
      has_sinks: Whether there are sinks.
      scales: Of the cache; None: it has none.
      den_min: Least safe denominator.
      den_max: Largest safe denominator.
      recompute: Whether rows outside the safe window are redone; else they are NaN.
      has_log_sum: Whether the log-sum-exp is a result.
      has_marks: Whether `marks` is.
      combines_later: Whether a second launch merges the partial sums.
    """

    batch: int
    query_length: int
    num_kv_heads: int
    group: int
    head_dim: int
    padded_dim: int
    live_rows: int
    rows: int
    capacity: int
    page_size: int
    block_kv: int
    num_splits: int
    num_buffers: int
    merged_at_once: int
    chunk: int
    padded_chunk: int
    num_slots: int
    padded_splits: int
    uses_dot: bool
    scale: float
    is_causal: bool
    has_window: bool
    window_left: int
    window_right: int
    soft_cap: float
    phi: Literal["none", "one", "rows"]
    has_offset: bool
    has_starts: bool
    has_sinks: bool
    scales: ScaleKind | None
    den_min: float
    den_max: float
    recompute: bool
    has_log_sum: bool
    has_marks: bool
    combines_later: bool


class Arrays(NamedTuple):
    """Pointers to operands, then results. One that a call lacks points to anything."""

    q: tl.tensor  # [B, T, N, H]
    k: tl.tensor  # [B, S, K, H], or pages [P, page_size, K, H]
    v: tl.tensor
    lengths: tl.tensor  # [B] int32
    phi: tl.tensor  # [] or [B, N] float32
    offset: tl.tensor  # [B] int32
    sinks: tl.tensor  # [N] float32
    pages: tl.tensor  # [B, pages per sequence] int32
    k_scale: tl.tensor  # [K], or as k without H
    v_scale: tl.tensor
    starts: tl.tensor  # [B] int32
    redone: tl.tensor  # [B, K] int32

    out: tl.tensor  # [B, T, N, H]
    log_sum: tl.tensor  # [B, T, N] float32, in natural-log units
    marks: tl.tensor  # [B, K] int32: redone, and 1 where a row was redone
    num: tl.tensor  # [slots, live rows, H] float32
    den: tl.tensor  # [slots, rows] float32
    row_max: tl.tensor  # [slots, rows] float32, with online softmax
    flags: tl.tensor  # [slots, words] int32: whose sums are there (`sums`)
