"""Shapes, kernel configs and plans: what the heuristics decide and the kernels take.

Everything here is a frozen dataclass of plain Python values, so that a plan can be cached, printed,
stored as JSON and compared. No arrays, no device, no JAX.
"""

import dataclasses
from typing import Literal

AttentionImplementation = Literal["mosaic_gpu", "triton", "xla"]
MatmulImplementation = Literal["gemv", "flat", "xla"]
# The axes of a weight: [K, N], or [N, K] as PyTorch and Hugging Face store it.
WeightOrder = Literal["kn", "nk"]
# Where a row that left the safe window is redone: by the CTA that holds its sequence's first tile, by a second launch
# that exits early where no row failed, or by a second call under lax.cond.
Recompute = Literal["kernel", "launch", "cond"]
# Who adds up the partial sums of a sequence: the CTA that holds its first tile, through global memory or through the
# shared memory of a cluster, which has CTAs of one sequence only, or a second launch.
Combine = Literal["kernel", "cluster", "launch"]
ScaleKind = Literal["head", "token"]

QUANTISED_DTYPES = ("int8", "float8_e4m3fn")
PAGE_SIZES = (16, 32, 64, 128, 256)
# Sequences that share the CTAs of `pallas.decode_attention`, each of which scans their lengths.
MAX_CHUNK = 32
# CTAs of a cluster that every Hopper GPU can start together.
MAX_CLUSTER = 8
# Columns of a result that one CTA of `pallas.fused_layer` finishes, half the rows of wgmma's large operand.
UNIT_WIDTH = 32
# Pieces of a result that its CTAs can wait for one by one: a thread of a warpgroup each.
MAX_COUNTERS = 128


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def in_order[T](w_order: WeightOrder, k: T, n: T) -> tuple[T, T]:
    """What belongs to a weight's K and to its N, in the order of its axes."""
    return (k, n) if w_order == "kn" else (n, k)


def reduction_bytes(rows: int) -> int:
    """Shared memory by which warps add up [block_kv, rows] float32 over the keys: of 8 rows, or of 16 at a time."""
    return 1024 * min(rows // 8, 2)


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Static facts of one attention call.

    Sizes are B, T, S (cache capacity, of all pages of a sequence where the cache is paged), N, K and H of
    `dot_product_attention`. `has_lengths` says whether key_value_seq_lengths is given, which the heuristics
    need because cuDNN's padding mask lets NaN behind the length through. `kv_dtype` None means `dtype`,
    `page_size` None a contiguous cache, and `scales` is one of "head" [K] and "token" [B, S, K] if the cache is
    quantised. `is_appended`: the call follows a fused layer, and is launched while that one ends. `is_online`: with a
    running max, which a unified max does without.
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
    kv_dtype: str | None = None
    page_size: int | None = None
    scales: ScaleKind | None = None
    has_sinks: bool = False
    has_query_offset: bool = False
    is_appended: bool = False
    is_online: bool = False

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def live_rows(self) -> int:
        """Query rows a CTA holds for one key/value head."""
        return self.group_size * self.query_length

    @property
    def rows(self) -> int:
        """live_rows, padded to the 8 that wgmma's N asks for."""
        return round_up(self.live_rows, 8)

    @property
    def padded_head_dim(self) -> int:
        """Head dim as the kernel holds it: whole swizzle tiles of 64."""
        return round_up(self.head_dim, 64)

    @property
    def kv_itemsize(self) -> int:
        """Bytes of one element of the cache."""
        dtype = self.kv_dtype or self.dtype
        return 1 if dtype in QUANTISED_DTYPES else 4 if dtype == "float32" else 2


@dataclasses.dataclass(frozen=True)
class MatmulShape:
    """x [m, k] @ w [k, n], or with w stored [n, k]."""

    m: int
    k: int
    n: int
    dtype: str = "bfloat16"
    w_order: WeightOrder = "kn"

    @property
    def w_shape(self) -> tuple[int, int]:
        """[k, n] or [n, k]."""
        return in_order(self.w_order, self.k, self.n)


@dataclasses.dataclass(frozen=True)
class DecodeAttentionConfig:
    """Tiles of `pallas.decode_attention`: keys a tile, CTAs a key/value head, depth of the TMA ring.

    The `num_splits` CTAs of a head share the live tiles of up to MAX_CHUNK sequences evenly; with combine="cluster" or
    "launch" each sequence has so many of its own. `unused_smem_bytes` keep more CTAs from sharing an SM than are
    planned to.
    """

    block_kv: int
    num_splits: int
    num_stages: int
    combine: Combine = "kernel"
    unused_smem_bytes: int = 0

    def smem_bytes(self, shape: AttentionShape) -> int:
        """Shared memory one CTA asks for: the ring, the query, the next one, the weights p, what is unused."""
        head_dim, rows = shape.padded_head_dim, shape.rows
        num_queries = 2 if shape.batch > 1 and self.combine == "kernel" else 1
        ring = self.num_stages * 2 * self.block_kv * head_dim * shape.kv_itemsize
        if shape.kv_itemsize == 1:  # one tile in 16 bits
            ring += self.block_kv * head_dim * 2
        if shape.scales == "token":  # those of 4 heads are loaded together
            ring += self.num_stages * 2 * self.block_kv * 4 * 4
        operands = rows * (num_queries * head_dim + self.block_kv) * 2
        if self.combine == "cluster":  # the sums of the others, and the maxima of online softmax
            operands += (self.num_splits - 1) * (round_up(shape.live_rows, 2) * head_dim + 2 * rows) * 4
        return ring + operands + reduction_bytes(rows) + _ATTENTION_SMEM_RESERVE + self.unused_smem_bytes


@dataclasses.dataclass(frozen=True)
class XlaAttentionConfig:
    """How "xla" computes attention: cuDNN's fused kernel, or `reference` in float32."""

    backend: Literal["cudnn", "reference"]


@dataclasses.dataclass(frozen=True)
class FlatMatmulConfig:
    """Tiles of `pallas.flat_matmul`: CTAs, output columns and contraction depth of a tile, depth of the TMA ring.

    The CTAs share all tiles evenly, those of one column block, too.
    """

    num_ctas: int
    block_n: int
    block_k: int
    num_stages: int

    def smem_bytes(self, shape: MatmulShape) -> int:
        """Shared memory one CTA asks for: the ring of w and x tiles."""
        return self.num_stages * (self.block_n + round_up(shape.m, 8)) * self.block_k * 2 + _SMEM_RESERVE


@dataclasses.dataclass(frozen=True)
class GemvConfig:
    """Tiles of `pallas.gemv`: output columns and contraction depth a tile, depth of the TMA ring, splits of K."""

    block_n: int
    block_k: int
    num_stages: int
    split_k: int

    def smem_bytes(self, shape: MatmulShape) -> int:
        """Shared memory one CTA asks for: the ring of w and x tiles."""
        del shape  # the same for every shape
        return self.num_stages * (self.block_n + 1) * self.block_k * 2 + _SMEM_RESERVE


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """One layer's matmuls for `batch` rows, from attention's output to the next layer's queries, keys and values."""

    batch: int
    hidden_size: int
    intermediate_size: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"

    @property
    def rows(self) -> int:
        """Rows of the products: the batch, padded to a multiple of 8."""
        return round_up(self.batch, 8)


@dataclasses.dataclass(frozen=True)
class FusedLayerConfig:
    """Tiles of `pallas.fused_layer`.

    Attributes:
      num_ctas: CTAs, one an SM.
      block_k: Columns of a tile of weights, which has 64 rows.
      num_stages: Tiles in the ring of weights.
      num_x_tiles: Tiles of x, each of block_k columns, that are loaded together: a chunk.
      num_x_stages: Chunks in the ring of x.
    """

    num_ctas: int
    block_k: int
    num_stages: int
    num_x_tiles: int
    num_x_stages: int

    @property
    def chunk(self) -> int:
        """Columns of x that are loaded together."""
        return self.num_x_tiles * self.block_k

    def smem_bytes(self, shape: LayerShape) -> int:
        """Shared memory one CTA asks for: both rings, and what partners are swapped through."""
        ring = self.num_stages * 2 * UNIT_WIDTH * self.block_k * 2
        x_ring = self.num_x_stages * shape.rows * self.chunk * 2
        return ring + x_ring + 2 * UNIT_WIDTH * shape.rows * 4 + _SMEM_RESERVE


# Barriers, alignment and the reduction scratch that Mosaic GPU adds to what a kernel asks for.
_SMEM_RESERVE = 8 * 1024
# A number a row, to a whole KiB as all that the attention kernel asks for, and up to 32 barriers.
_ATTENTION_SMEM_RESERVE = 1024 + 256


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """Which attention implementation runs, with what config, and why (one line).

    `recompute` is where a row that left the window is redone, unless `UnifiedMax.recompute` names a place.
    """

    implementation: AttentionImplementation
    config: DecodeAttentionConfig | XlaAttentionConfig
    reason: str
    recompute: Recompute = "cond"


@dataclasses.dataclass(frozen=True)
class MatmulPlan:
    """Which matmul implementation runs, with what config (None for "xla"), and why (one line)."""

    implementation: MatmulImplementation
    config: FlatMatmulConfig | GemvConfig | None
    reason: str


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """Whether a layer's matmuls are one launch ("fused", with what config) or one each ("unfused"), and why."""

    implementation: Literal["fused", "unfused"]
    config: FusedLayerConfig | None
    reason: str
