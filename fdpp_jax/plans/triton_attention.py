"""Decode attention in Triton (`triton.decode_attention`): its config, what it refuses, and the rule that plans it."""

import dataclasses
from typing import Literal

from fdpp_jax.plans import triton, triton_prefill
from fdpp_jax.plans.backend import AttentionOp, AttentionPlan
from fdpp_jax.plans.device import Device
from fdpp_jax.plans.hopper import bound
from fdpp_jax.plans.shapes import AttentionShape, cdiv

# Who merges the partial sums of a sequence: the CTA that holds its first tile ("kernel"), or a second launch
# ("launch").
Combine = Literal["kernel", "launch"]

# Limits of the kernel.
MAX_QUERY_LENGTH = 16
MAX_ROWS = 64  # query rows per key/value head
MAX_CHUNK = 1024  # sequences that share CTAs; each CTA scans all their lengths
_MIN_ROWS = 16  # of a product on the matrix unit
_FIRST_WITH_FLOAT8 = 89  # compute capability
_MAX_MERGED_AT_ONCE = 8

# The rule.
_CTAS_PER_SM = 2
_BLOCKS_KV = (64, 32, 16)
_AMD_BLOCKS_KV = (32, 16)  # with 64 keys the masks of a tile do not fit the scalar registers
_MAX_BUFFERS = 6
_BYTES_IN_FLIGHT = 128 * 1024  # per SM
_MAX_SHARERS = 16  # CTAs that share a sequence
_MAX_SHARERS_OF_MANY = 3  # the same of each of several sequences, for two CTAs per SM on NVIDIA's GPUs
_TILES_OF_MORE = 4  # tiles per CTA from which more of them share a sequence
_MAX_SUMS_OF_FOUR_WARPS = 64 * 128  # numbers; twice as many take eight warps
_MERGED_PER_THREAD = 128  # numbers of partial sums that a thread loads at once
_MAX_SUMS_PER_THREAD = 16  # numbers; a CTA that has more for each thread spills those of others beside its own


def _power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def padded_rows(live_rows: int) -> int:
    """Query rows per key/value head, padded for the matrix unit."""
    return max(_MIN_ROWS, _power_of_two(live_rows))


def padded_dim(head_dim: int) -> int:
    """Head dim as the kernel holds it."""
    return max(16, _power_of_two(head_dim))


@dataclasses.dataclass(frozen=True)
class DecodeAttentionConfig:
    """Tiles of `triton.decode_attention`.

    Attributes:
      arch: What the kernel is compiled for: "sm_80", "gfx90a", ...
      block_kv: Keys per tile.
      num_splits: CTAs per key/value head; they share the live tiles of up to MAX_CHUNK sequences evenly.
      num_buffers: Tiles of keys, and as many of values, that are on their way or in use.
      num_warps: Of a CTA.
      combine: Who merges the partial sums.
      uses_dot: Whether products are the matrix unit's. False: each thread multiplies, for one row.
    """

    arch: str
    block_kv: int
    num_splits: int
    num_buffers: int
    num_warps: int = 4
    combine: Combine = "kernel"
    uses_dot: bool = True

    def smem_bytes(self, shape: AttentionShape) -> int:
        """Shared memory per CTA: tiles, weights, and on NVIDIA's GPUs the query; a little too much."""
        dim, rows = padded_dim(shape.head_dim), self._rows(shape)
        tile = 2 * self.block_kv * dim * shape.kv_itemsize
        tiles = self.num_buffers * tile
        weights = rows * self.block_kv * 2
        if self.arch.startswith("gfx"):
            # Its compiler gives each tile of pages but one another copy.
            return tiles + weights + (0 if shape.page_size is None else max(1, self.num_buffers - 1) * tile)
        scalars = self.num_buffers * 3 * self.block_kv * 4  # scales of keys and values, pages
        return tiles + weights + rows * dim * 2 + scalars + _SMEM_RESERVE

    def merged_at_once(self, shape: AttentionShape) -> int:
        """Slots of partial sums on their way to who merges them: as many as the registers hold."""
        return min(_MAX_MERGED_AT_ONCE, max(1, _MERGED_PER_THREAD // self.sums_per_thread(shape)))

    def sums_per_thread(self, shape: AttentionShape) -> int:
        """Numbers of a sequence's sums that a thread holds."""
        return cdiv(self._rows(shape) * padded_dim(shape.head_dim), 32 * self.num_warps)

    def _rows(self, shape: AttentionShape) -> int:
        return padded_rows(shape.live_rows) if self.uses_dot else 1


_SMEM_RESERVE = 1024  # of what warps reduce, and to whole KiB


def refuse(shape: AttentionShape, device: Device) -> str | None:
    """Why the kernel cannot compute `shape` on `device`, or None if it can."""
    return triton.refuse_device(device) or _refuse_shape(shape, device)


def _refuse_shape(shape: AttentionShape, device: Device) -> str | None:
    if not 1 <= shape.query_length <= MAX_QUERY_LENGTH:
        return f"the decode kernel takes 1 to {MAX_QUERY_LENGTH} queries, got T = {shape.query_length}"
    if (refusal := triton.refuse_attention(shape, "decode")) is not None:
        return refusal
    if shape.kv_itemsize == 1 and shape.head_dim % 16:
        return f"8-bit rows are loaded 16 bytes at a time, got H = {shape.head_dim}"
    if shape.kv_dtype == "float8_e4m3fn" and device.is_nvidia and device.compute_capability < _FIRST_WITH_FLOAT8:
        return f"{device.arch} cannot convert float8_e4m3fn, and reads int8 caches"
    if shape.live_rows > MAX_ROWS:
        return f"the decode kernel holds {MAX_ROWS} query rows a key/value head, got {shape.live_rows}"
    return None


def decode_attention_config(shape: AttentionShape, device: Device) -> DecodeAttentionConfig:
    """Tiles and splits of the kernel by rule, whether or not it is the plan's choice."""
    num_sums = padded_rows(shape.live_rows) * padded_dim(shape.head_dim)
    config = DecodeAttentionConfig(
        arch=device.arch if device.is_gpu else "sm_80",
        block_kv=_BLOCKS_KV[-1],
        num_splits=1,
        num_buffers=_min_buffers(device),
        num_warps=4 if num_sums <= _MAX_SUMS_OF_FOUR_WARPS else 8,
    )
    chunk = max(1, min(shape.batch, MAX_CHUNK))
    max_sharers = _MAX_SHARERS_OF_MANY if chunk > 1 and device.is_nvidia else _MAX_SHARERS
    for num_ctas in (_CTAS_PER_SM, 1):
        if num_ctas > 1 and not _fits(config, shape, device, num_ctas):
            continue
        tiled = _with_tiles(config, shape, device, num_ctas)
        tiled = dataclasses.replace(tiled, num_splits=_num_splits(tiled, shape, num_ctas * device.num_sms))
        if tiled.num_splits <= max_sharers * chunk:
            break  # with more of them, merging takes longer than two CTAs an SM save
    is_light = tiled.num_splits == 1 or tiled.sums_per_thread(shape) <= _MAX_SUMS_PER_THREAD
    return dataclasses.replace(tiled, combine="kernel" if device.is_nvidia and is_light else "launch")


def _min_buffers(device: Device) -> int:
    """AMD's loads wait in registers while a tile is in use."""
    return 2 if device.is_nvidia else 1


def _fits(config: DecodeAttentionConfig, shape: AttentionShape, device: Device, num_ctas: int) -> bool:
    """Whether so many CTAs of a config share an SM."""
    return config.smem_bytes(shape) <= device.smem_bytes_shared(num_ctas)


def _with_tiles(
    config: DecodeAttentionConfig, shape: AttentionShape, device: Device, num_ctas: int
) -> DecodeAttentionConfig:
    """The widest tiles of which enough fit an SM, and as many as keep enough loads in flight."""
    for block_kv in _BLOCKS_KV if device.is_nvidia else _AMD_BLOCKS_KV:
        tile_bytes = 2 * block_kv * padded_dim(shape.head_dim) * shape.kv_itemsize
        wanted = min(max(cdiv(_BYTES_IN_FLIGHT, num_ctas * tile_bytes), _min_buffers(device)), _MAX_BUFFERS)
        for num_buffers in range(wanted, _min_buffers(device) - 1, -1):
            wider = dataclasses.replace(config, block_kv=block_kv, num_buffers=num_buffers)
            if _fits(wider, shape, device, num_ctas):
                return wider
    return config


def _num_splits(config: DecodeAttentionConfig, shape: AttentionShape, num_ctas: int) -> int:
    """CTAs per key/value head of so many on the device."""
    chunk = min(shape.batch, MAX_CHUNK)
    num_tiles = cdiv(shape.capacity, config.block_kv)
    num_splits = num_ctas // max(1, cdiv(shape.batch, max(chunk, 1)) * shape.num_kv_heads)
    if num_splits > chunk and 8 * (num_splits % chunk) <= num_splits:
        num_splits -= num_splits % chunk  # shares that end with sequences of one length need no merge
    max_sharers = max(_MAX_SHARERS, num_tiles // _TILES_OF_MORE)
    return max(1, min(num_splits, chunk * min(num_tiles, max_sharers)))


def plan(shape: AttentionShape, device: Device) -> AttentionPlan:
    """The rule's plan of decoding."""
    config = decode_attention_config(shape, device)
    return AttentionPlan(triton.NAME, "decode", config, _reason(shape, device, config), recompute="kernel")


def _reason(shape: AttentionShape, device: Device, config: DecodeAttentionConfig) -> str:
    """ "8 CTAs a head share the keys of 1 sequence: 256 on 108 SMs (memory-bound: intensity 1 < ridge 153)"."""
    chunk = min(shape.batch, MAX_CHUNK)
    num_ctas = cdiv(shape.batch, chunk) * shape.num_kv_heads * config.num_splits
    shared = f"{config.num_splits} CTAs a head share" if config.num_splits > 1 else "1 CTA a head takes"
    keys = f"the keys of {chunk} sequence" + ("s" if chunk != 1 else "")
    # QK^T and PV: 4 B T N S H flop over 2 B K S H elements.
    intensity = 2 * shape.group_size * shape.query_length / shape.kv_itemsize
    return f"{shared} {keys}: {num_ctas} on {device.num_sms} SMs ({bound(intensity, device)})"


def _rule_algorithm(shape: AttentionShape, device: Device) -> str:
    del device  # the number of queries decides, and how many heads of a group each of them has
    fits_decode = shape.query_length <= MAX_QUERY_LENGTH and shape.live_rows <= MAX_ROWS
    return "decode" if fits_decode else "prefill"


def _refuse(shape: AttentionShape, device: Device, algorithm: str | None) -> str | None:
    if (algorithm or _rule_algorithm(shape, device)) == "prefill":
        return triton_prefill.refuse(shape, device, algorithm)
    return refuse(shape, device)


def _config(
    shape: AttentionShape, device: Device, algorithm: str
) -> DecodeAttentionConfig | triton_prefill.PrefillAttentionConfig:
    if algorithm == "prefill":
        return triton_prefill.prefill_attention_config(shape, device)
    return decode_attention_config(shape, device)


def _plan(shape: AttentionShape, device: Device, why: str) -> AttentionPlan:
    del why  # its own reason says enough
    return triton_prefill.plan(shape, device) if _rule_algorithm(shape, device) == "prefill" else plan(shape, device)


OP = AttentionOp(
    configs={"decode": DecodeAttentionConfig, "prefill": triton_prefill.PrefillAttentionConfig},
    algorithm=_rule_algorithm,
    refuse=_refuse,
    config=_config,
    plan=_plan,
    recomputes=("kernel", "cond"),
    weights_dtype=lambda shape: shape.dtype,
)
