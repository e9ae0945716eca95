"""Decode attention on Hopper (`pallas.decode_attention`): its config, what it refuses, and the rule that plans it.

Every constant of the rule was measured: docs/experiments/attention.md.
"""

import dataclasses
from typing import Literal

from fdpp_jax.plans import hopper, hopper_prefill
from fdpp_jax.plans.backend import AttentionOp, AttentionPlan
from fdpp_jax.plans.device import Device
from fdpp_jax.plans.hopper import MAX_STAGES, MIN_STAGES, with_stages_that_fit
from fdpp_jax.plans.shapes import AttentionShape, cdiv, round_up

# Who merges the partial sums of a sequence: the CTA that holds its first tile, through global memory ("kernel") or
# through the shared memory of a cluster ("cluster"), or a second launch ("launch").
Combine = Literal["kernel", "cluster", "launch"]

# Limits of the kernel.
BLOCK_KV = 64  # keys of the smallest tile
MAX_ROWS = 64  # query rows per key/value head
MAX_QUERY_LENGTH = 16
MAX_CHUNK = 32  # sequences that share CTAs; each CTA scans all their lengths
MAX_CLUSTER = 8  # CTAs of a cluster that every Hopper GPU can start together
MAX_SPLITS = 128  # a CTA has as many threads, and each waits for one other CTA
# A number per row, to a whole KiB as all that the kernel asks for, and up to 32 barriers.
_SMEM_RESERVE = 1024 + 256

# CTAs in a grid: docs/experiments/attention.md#a-grid-of-ctas
_GRID_FEW_SPLITS = 8  # below so many CTAs per head, run two per SM
_GRID_MAX_TILES_ALONE = 16  # tiles per SM up to which one sequence keeps one CTA per SM
_GRID_MANY_WIDE_TILES = 16  # tiles per CTA from which 8-bit caches take tiles of 2 * BLOCK_KV
_GRID_MAX_SHARERS = 16  # CTAs that share a sequence
_GRID_TILES_OF_MORE = 32  # tiles per CTA from which more of them share a sequence
_GRID_BYTES_IN_FLIGHT = 96 * 1024  # per SM

# One sequence in 16 bits, in clusters on half of the SMs: docs/experiments/attention.md#clusters
_CLUSTER_BYTES_IN_FLIGHT = 128 * 1024  # per SM
_CLUSTER_MAX_SHORT_SHARE = 8  # tiles per CTA up to which few CTAs, or online softmax, keep up
_CLUSTER_MAX_TILES = 20  # tiles per SM up to which pairs win where half of the SMs are fewer than two per head
_CLUSTER_MIN_SPLITS_EARLY = 4  # CTAs per cluster that an early start takes at least

# Behind a fused layer, whose CTAs end one by one: docs/experiments/attention.md#behind-a-fused-layer
_EARLY_SMEM_MARGIN = 4 * 1024  # bytes; `smem_bytes` counts a little too much


def padded_rows(shape: AttentionShape) -> int:
    """Query rows per key/value head, padded to the 8 that wgmma's N asks for."""
    return round_up(shape.live_rows, 8)


def padded_head_dim(shape: AttentionShape) -> int:
    """Head dim as the kernel holds it: whole swizzle tiles of 64."""
    return round_up(shape.head_dim, 64)


def reduction_bytes(rows: int) -> int:
    """Shared memory by which warps sum [block_kv, rows] float32 over the keys: 8 rows, or 16 at a time."""
    return 1024 * min(rows // 8, 2)


@dataclasses.dataclass(frozen=True)
class DecodeAttentionConfig:
    """Tiles of `pallas.decode_attention`.

    Attributes:
      block_kv: Keys per tile.
      num_splits: CTAs per key/value head. With combine="kernel" they share the live tiles of up to MAX_CHUNK sequences
        evenly, else every sequence has so many of its own.
      num_stages: Depth of the TMA ring.
      combine: Who merges the partial sums.
      unused_smem_bytes: Asked for so that no more CTAs share an SM than planned.
    """

    block_kv: int
    num_splits: int
    num_stages: int
    combine: Combine = "kernel"
    unused_smem_bytes: int = 0

    def smem_bytes(self, shape: AttentionShape) -> int:
        """Shared memory per CTA: the ring, the query, the next one, the weights p, what is unused."""
        head_dim, rows = padded_head_dim(shape), padded_rows(shape)
        num_queries = 2 if shape.batch > 1 and self.combine == "kernel" else 1
        ring = self.num_stages * 2 * self.block_kv * head_dim * shape.kv_itemsize
        if shape.kv_itemsize == 1:  # one tile in 16 bits
            ring += self.block_kv * head_dim * 2
        if shape.scales == "token":  # those of 4 heads are loaded together
            ring += self.num_stages * 2 * self.block_kv * 4 * 4
        operands = rows * (num_queries * head_dim + self.block_kv) * 2
        if self.combine == "cluster":  # the sums of the other CTAs, and the maxima of online softmax
            operands += (self.num_splits - 1) * (round_up(shape.live_rows, 2) * head_dim + 2 * rows) * 4
        return ring + operands + reduction_bytes(rows) + _SMEM_RESERVE + self.unused_smem_bytes


def refuse(shape: AttentionShape, device: Device, algorithm: str | None = "decode") -> str | None:
    """Why the kernel cannot compute `shape` on `device`, or None if it can; see `backend.Op`."""
    del algorithm  # there is one
    return hopper.refuse_device(device) or _refuse_shape(shape) or _refuse_smem(shape, device)


def _refuse_shape(shape: AttentionShape) -> str | None:
    if not 1 <= shape.query_length <= MAX_QUERY_LENGTH:
        return f"the decode kernel takes 1 to {MAX_QUERY_LENGTH} queries, got T = {shape.query_length}"
    if (refusal := hopper.refuse_attention(shape, "decode")) is not None:
        return refusal
    if (rows := padded_rows(shape)) > MAX_ROWS:
        return f"the decode kernel holds {MAX_ROWS} query rows a key/value head, got {rows}"
    return None


def _refuse_smem(shape: AttentionShape, device: Device) -> str | None:
    smem_bytes = DecodeAttentionConfig(BLOCK_KV, 1, MIN_STAGES).smem_bytes(shape)
    if smem_bytes <= device.smem_bytes:
        return None
    rows = f"{padded_rows(shape)} query rows of head dim {shape.head_dim}"
    return f"{rows} need {smem_bytes} bytes of shared memory, a CTA gets {device.smem_bytes}"


def decode_attention_config(shape: AttentionShape, device: Device) -> DecodeAttentionConfig:
    """Tiles and splits of the kernel by rule, whether or not it is the plan's choice."""
    return _cluster_config(shape, device) or grid_attention_config(shape, device)


def _cluster_config(shape: AttentionShape, device: Device) -> DecodeAttentionConfig | None:
    """A cluster for each head of one sequence, on half of the SMs if these suffice; None where a grid is faster.

    Behind a fused layer the other SMs begin with the next layer's weights.
    """
    if shape.batch != 1 or shape.kv_itemsize == 1 or device.compute_capability < 90:
        return None
    num_heads, num_tiles = max(shape.num_kv_heads, 1), cdiv(shape.capacity, BLOCK_KV)
    half_share = device.num_sms // 2 // num_heads
    num_splits = min(max(half_share, 2), MAX_CLUSTER, num_tiles)
    if num_splits < 2 or num_splits * num_heads > device.num_sms:
        return None
    if shape.starts_early and half_share < _CLUSTER_MIN_SPLITS_EARLY:
        return None
    if (half_share > MAX_CLUSTER or shape.is_online) and num_tiles > _CLUSTER_MAX_SHORT_SHARE * num_splits:
        return None
    if half_share < 2 and num_tiles * num_heads > _CLUSTER_MAX_TILES * device.num_sms:
        return None
    num_stages = min(cdiv(num_tiles, num_splits), cdiv(_CLUSTER_BYTES_IN_FLIGHT, _stage_bytes(BLOCK_KV, shape)))
    config = DecodeAttentionConfig(BLOCK_KV, num_splits, min(max(num_stages, MIN_STAGES), MAX_STAGES), "cluster")
    config = with_stages_that_fit(config, shape, device.smem_bytes)
    return config if config.smem_bytes(shape) <= device.smem_bytes else None


def grid_attention_config(shape: AttentionShape, device: Device) -> DecodeAttentionConfig:
    """The kernel without clusters: CTAs that fill the SMs once or twice share the tiles of all sequences."""
    chunk = min(shape.batch, MAX_CHUNK)
    num_heads = max(1, cdiv(shape.batch, max(chunk, 1)) * shape.num_kv_heads)  # each with CTAs of its own
    is_narrow = shape.kv_itemsize == 1
    smallest = DecodeAttentionConfig(BLOCK_KV, 1, MIN_STAGES).smem_bytes(shape)
    has_few = device.num_sms < _GRID_FEW_SPLITS * num_heads
    num_tiles = cdiv(shape.capacity, BLOCK_KV)
    is_short = num_tiles * num_heads <= _GRID_MAX_TILES_ALONE * device.num_sms
    # Below 8 CTAs per head, run two per SM. Exception: one short sequence that does not start early.
    wants_two = is_narrow or (has_few and not (is_short and shape.batch == 1 and not shape.starts_early))
    ctas_per_sm = 2 if wants_two and smallest <= device.smem_bytes_shared(2) else 1
    num_splits = ctas_per_sm * device.num_sms // num_heads
    if num_splits > chunk and 8 * (num_splits % chunk) <= num_splits:
        num_splits -= num_splits % chunk  # shares that end with sequences of one length need no merge
    max_sharers = MAX_SPLITS if is_narrow else max(_GRID_MAX_SHARERS, num_tiles // _GRID_TILES_OF_MORE)
    num_splits = max(1, min(num_splits, chunk * min(num_tiles, max_sharers), MAX_SPLITS))
    ctas_per_sm = min(ctas_per_sm, cdiv(num_heads * num_splits, device.num_sms))
    num_wide_tiles = chunk * cdiv(shape.capacity, 2 * BLOCK_KV)
    wants_wide = num_wide_tiles >= num_splits * (_GRID_MANY_WIDE_TILES if is_narrow else 1)
    if wants_wide and padded_rows(shape) <= 16 and (is_narrow or not has_few):
        wide = _with_stages(2 * BLOCK_KV, num_splits, ctas_per_sm, shape, device)
        if wide.smem_bytes(shape) <= device.smem_bytes_shared(ctas_per_sm):
            return wide
    return _with_stages(BLOCK_KV, num_splits, ctas_per_sm, shape, device)


def _stage_bytes(block_kv: int, shape: AttentionShape) -> int:
    """Of a tile of keys and one of values."""
    return 2 * block_kv * padded_head_dim(shape) * shape.kv_itemsize


def _with_stages(
    block_kv: int, num_splits: int, ctas_per_sm: int, shape: AttentionShape, device: Device
) -> DecodeAttentionConfig:
    """As many stages as keep enough loads in flight and fit, at least two."""
    num_stages = min(MAX_STAGES, cdiv(_GRID_BYTES_IN_FLIGHT, ctas_per_sm * _stage_bytes(block_kv, shape)))
    config = DecodeAttentionConfig(block_kv, num_splits, max(num_stages, MIN_STAGES))
    config = with_stages_that_fit(config, shape, device.smem_bytes_shared(ctas_per_sm))
    if shape.starts_early and shape.batch > 1:  # an SM that is free early would take CTAs meant for others
        least = device.smem_bytes_shared(ctas_per_sm + 1) + _EARLY_SMEM_MARGIN
        config = dataclasses.replace(config, unused_smem_bytes=max(0, least - config.smem_bytes(shape)))
    return config


def _reason(shape: AttentionShape, device: Device, config: DecodeAttentionConfig) -> str:
    """ "8 CTAs a head share the keys of 1 sequence: 256 on 132 SMs (memory-bound: intensity 1 < ridge 223)"."""
    chunk = min(shape.batch, MAX_CHUNK)
    num_ctas = cdiv(shape.batch, max(chunk, 1)) * shape.num_kv_heads * config.num_splits
    shared = f"{config.num_splits} CTAs a head share" if config.num_splits > 1 else "1 CTA a head takes"
    keys = f"the keys of {chunk} sequence" + ("s" if chunk != 1 else "")
    if config.combine == "cluster":
        shared = f"a cluster of {config.num_splits} CTAs a head shares"
    # QK^T and PV: 4 B T N S H flop over 2 B K S H elements.
    intensity = 2 * shape.group_size * shape.query_length / shape.kv_itemsize
    return f"{shared} {keys}: {num_ctas} on {device.num_sms} SMs ({hopper.bound(intensity, device)})"


def _rule_algorithm(shape: AttentionShape, device: Device) -> str:
    del device  # the number of queries decides, and how many heads of a group each of them has
    fits_decode = shape.query_length <= MAX_QUERY_LENGTH and padded_rows(shape) <= MAX_ROWS
    return "decode" if fits_decode else "prefill"


def _refuse(shape: AttentionShape, device: Device, algorithm: str | None) -> str | None:
    meant = algorithm or _rule_algorithm(shape, device)
    by = hopper_prefill.refuse if meant == "prefill" else refuse
    return by(shape, device, algorithm)


def _config(
    shape: AttentionShape, device: Device, algorithm: str
) -> DecodeAttentionConfig | hopper_prefill.PrefillAttentionConfig:
    if algorithm == "prefill":
        return hopper_prefill.prefill_attention_config(shape, device)
    return decode_attention_config(shape, device)


def _plan(shape: AttentionShape, device: Device, why: str) -> AttentionPlan:
    del why  # it is the first choice wherever it runs
    if _rule_algorithm(shape, device) == "prefill":
        return hopper_prefill.plan(shape, device)
    config = decode_attention_config(shape, device)
    return AttentionPlan(hopper.NAME, "decode", config, _reason(shape, device, config), recompute="kernel")


OP = AttentionOp(
    configs={"decode": DecodeAttentionConfig, "prefill": hopper_prefill.PrefillAttentionConfig},
    algorithm=_rule_algorithm,
    refuse=_refuse,
    config=_config,
    plan=_plan,
    recomputes=("kernel", "launch", "cond"),
    weights_dtype=lambda shape: shape.dtype,
)
