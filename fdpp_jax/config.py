"""Shapes, kernel configs and plans: what the heuristics decide and the kernels take.

Everything here is a frozen dataclass of plain Python values, so that a plan can be cached, printed,
stored as JSON and compared. No arrays, no device, no JAX.
"""

import dataclasses
from typing import Literal

AttentionImplementation = Literal["mosaic_gpu", "triton", "xla"]
MatmulImplementation = Literal["gemv", "flat", "xla"]


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Static facts of one attention call.

    Sizes are B, T, S (cache capacity), N, K and H of `dot_product_attention`. `has_lengths` says
    whether key_value_seq_lengths is given, which the heuristics need because cuDNN's padding mask
    lets NaN behind the length through.
    """

    batch: int
    query_length: int
    capacity: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    is_causal: bool = False
    has_lengths: bool = True
    local_window_size: tuple[int, int] | None = None
    logits_soft_cap: float | None = None

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def rows(self) -> int:
        """Query rows a CTA holds for one key/value head, padded to the 8 that wgmma's N asks for."""
        return round_up(self.group_size * self.query_length, 8)


@dataclasses.dataclass(frozen=True)
class MatmulShape:
    """x [m, k] @ w [k, n]."""

    m: int
    k: int
    n: int
    dtype: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class DecodeAttentionConfig:
    """Tiles of `pallas.decode_attention`: keys a tile, KV splits (CTAs) a head, depth of the TMA ring."""

    block_kv: int
    num_splits: int
    num_stages: int

    def smem_bytes(self, shape: AttentionShape) -> int:
        """Shared memory one CTA asks for: the K and V ring, the query, the weights p and the float32 result."""
        ring = self.num_stages * 2 * self.block_kv * shape.head_dim * 2
        return (
            ring + shape.rows * (shape.head_dim + self.block_kv) * 2 + shape.rows * shape.head_dim * 4 + _SMEM_RESERVE
        )


@dataclasses.dataclass(frozen=True)
class XlaAttentionConfig:
    """How "xla" computes attention: cuDNN's fused kernel, or `reference` in float32."""

    backend: Literal["cudnn", "reference"]


@dataclasses.dataclass(frozen=True)
class FlatMatmulConfig:
    """Tiles of `pallas.flat_matmul`: output columns and contraction depth a tile, ring depth, K splits."""

    block_n: int
    block_k: int
    num_stages: int
    split_k: int

    def smem_bytes(self, shape: MatmulShape) -> int:
        """Shared memory one CTA asks for: the ring of w and x tiles, and the float32 result."""
        rows = round_up(shape.m, 8)
        return self.num_stages * (self.block_n + rows) * self.block_k * 2 + rows * self.block_n * 4 + _SMEM_RESERVE


@dataclasses.dataclass(frozen=True)
class GemvConfig:
    """Tiles of `pallas.gemv`: as FlatMatmulConfig, for one row on CUDA cores."""

    block_n: int
    block_k: int
    num_stages: int
    split_k: int

    def smem_bytes(self, shape: MatmulShape) -> int:
        """Shared memory one CTA asks for: the ring of w and x tiles."""
        del shape  # the same for every shape
        return self.num_stages * (self.block_n + 1) * self.block_k * 2 + _SMEM_RESERVE


# Barriers, alignment and the reduction scratch that Mosaic GPU adds to what a kernel asks for.
_SMEM_RESERVE = 8 * 1024


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """Which attention implementation runs, with what config, and why (one line)."""

    implementation: AttentionImplementation
    config: DecodeAttentionConfig | XlaAttentionConfig
    reason: str


@dataclasses.dataclass(frozen=True)
class MatmulPlan:
    """Which matmul implementation runs, with what config (None for "xla"), and why (one line)."""

    implementation: MatmulImplementation
    config: FlatMatmulConfig | GemvConfig | None
    reason: str
