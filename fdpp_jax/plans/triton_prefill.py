"""Prefill attention in Triton (`triton.prefill_attention`): its config, what it refuses, and the rule that plans it."""

import dataclasses

from fdpp_jax.plans import triton
from fdpp_jax.plans.backend import AttentionPlan
from fdpp_jax.plans.device import Device
from fdpp_jax.plans.hopper_prefill import heads_together
from fdpp_jax.plans.shapes import AttentionShape, cdiv
from fdpp_jax.plans.xla import leave_to_cudnn

_MIN_BLOCK = 16  # rows of the smallest product on every matrix unit
_FLOAT8_CAPABILITY = 89  # NVIDIA's first with the conversion
_SCALE_BYTES = 4
_BARRIER_BYTES = 2048  # at most, and what aligns tiles


@dataclasses.dataclass(frozen=True)
class PrefillAttentionConfig:
    """Blocks of `triton.prefill_attention`.

    Attributes:
      block_q: Rows per program: queries of one head, or of a group of them; a power of two.
      block_kv: Keys per block, a power of two.
      num_warps: Of a program.
      num_stages: Blocks of keys, and of values, on their way or in use.
      arch: What the kernel is compiled for: "sm_80", "gfx90a", ...
      packs_group: Whether the query heads of a key/value head are rows of one program, query by query.
      heads_together: Heads (of any sequence) whose programs start in turns, those with most keys first.
    """

    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int
    arch: str
    packs_group: bool = False
    heads_together: int = 1

    def smem_bytes(self, shape: AttentionShape) -> int:
        """Shared memory per program, at most: Triton keeps in registers what it can.

        The ring of keys and values, where they have 8 bits a block of each in 16, the queries and the weights. Only
        asynchronous products, from Hopper on, hold the block that they read: elsewhere the ring is a stage shorter. On
        AMD's GPUs the ring takes the place of the queries.
        """
        row = padded_head_dim(shape.head_dim) * 2
        blocks, queries, weights = 2 * self.block_kv * row, self.block_q * row, self.block_q * self.block_kv * 2
        is_amd = self.arch.startswith("gfx")
        num_slots = self.num_stages if not is_amd and _has_async_products(self.arch) else max(self.num_stages - 1, 1)
        ring = num_slots * blocks
        if shape.kv_itemsize == 1:
            ring = ring // 2 + blocks
        if shape.scales == "token":
            ring += num_slots * 2 * self.block_kv * _SCALE_BYTES
        return max(ring + weights, queries) if is_amd else ring + queries + weights + _BARRIER_BYTES


def _has_async_products(arch: str) -> bool:
    return arch in ("sm_90", "sm_100", "sm_103")


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile: a power of two."""
    return max(_MIN_BLOCK, 1 << (head_dim - 1).bit_length())


def converts_float8(arch: str) -> bool:
    """Whether Triton widens float8_e4m3fn on an architecture."""
    return arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= _FLOAT8_CAPABILITY


def prefill_attention_config(shape: AttentionShape, device: Device) -> PrefillAttentionConfig:
    """Blocks by rule: as large as the registers hold, and as many stages as the shared memory does.

    Programs have half of the rows where those with all of them would leave SMs without one. Heads are packed where a
    program for each would fill no more than half of its rows, and the device has no SM for each.
    """
    block_q, block_kv, num_warps, num_stages = _blocks(shape, device.arch)
    num_programs = shape.batch * shape.num_query_heads * cdiv(shape.query_length, block_q)
    packs = shape.group_size > 1 and 2 * shape.query_length <= block_q and num_programs > device.num_sms
    num_heads, num_rows = (
        (shape.num_kv_heads, shape.live_rows) if packs else (shape.num_query_heads, shape.query_length)
    )
    if block_q > 64 and (num_rows <= 64 or shape.batch * num_heads * cdiv(num_rows, block_q) < device.num_sms):
        block_q, num_warps = block_q // 2, 8 if shape.head_dim > 128 else 4
    config = PrefillAttentionConfig(block_q, block_kv, num_warps, num_stages, device.arch, packs)
    config = _that_fits(config, shape, device.smem_bytes)
    return dataclasses.replace(config, heads_together=heads_together(shape, device, config.block_q, packs))


def _blocks(shape: AttentionShape, arch: str) -> tuple[int, int, int, int]:
    """Rows, keys, warps and stages where shared memory is no limit; none of them spills registers."""
    is_wide = shape.head_dim > 128
    # Without asynchronous products, which read shared memory, blocks of 8 bits are widened in registers.
    block_kv = 32 if shape.kv_itemsize == 1 and not _has_async_products(arch) else 64
    if arch.startswith("gfx"):
        return (64, 32, 8, 2) if is_wide else (128, block_kv, 8 if block_kv == 64 else 4, 2)
    if not is_wide:
        return 128, block_kv, 8, 3
    if arch == "sm_90":
        return 128, 32, 8, 3
    return 64, block_kv, 8, 2 if _has_async_products(arch) else 3


def _that_fits(config: PrefillAttentionConfig, shape: AttentionShape, smem_bytes: int) -> PrefillAttentionConfig:
    """The config with as many keys per block, then as many stages, as fit. A block of less than 32 does not pay."""
    while config.block_kv > 32 and config.smem_bytes(shape) > smem_bytes:
        config = dataclasses.replace(config, block_kv=config.block_kv // 2)
    while config.num_stages > 1 and config.smem_bytes(shape) > smem_bytes:
        config = dataclasses.replace(config, num_stages=config.num_stages - 1)
    return config


def refuse(shape: AttentionShape, device: Device, algorithm: str | None = "prefill") -> str | None:
    """Why the kernel cannot compute `shape` on `device`, or None if it can; see `backend.Op`."""
    refusal = triton.refuse_device(device) or _refuse_shape(shape)
    if refusal is None and shape.kv_dtype == "float8_e4m3fn" and not converts_float8(device.arch):
        return f"{device.arch} has no conversion of float8_e4m3fn, which sm_{_FLOAT8_CAPABILITY} and newer have"
    if refusal is None and (num_bytes := prefill_attention_config(shape, device).smem_bytes(shape)) > device.smem_bytes:
        return f"the prefill kernel needs {num_bytes} bytes of shared memory, a program gets {device.smem_bytes}"
    return refusal or leave_to_cudnn(shape, device, algorithm)


def _refuse_shape(shape: AttentionShape) -> str | None:
    if shape.query_length < 1:
        return f"the prefill kernel takes 1 query and more, got T = {shape.query_length}"
    return triton.refuse_attention(shape, "prefill")


def plan(shape: AttentionShape, device: Device) -> AttentionPlan:
    """The rule's plan of a shape that is not refused."""
    config = prefill_attention_config(shape, device)
    num_heads, num_rows = shape.num_query_heads, shape.query_length
    if config.packs_group:
        num_heads, num_rows = shape.num_kv_heads, shape.live_rows
    num_programs = shape.batch * num_heads * cdiv(num_rows, config.block_q)
    rows = "queries of a group of heads" if config.packs_group else "queries of a head"
    reason = f"{config.block_q} {rows} per program: {num_programs} on {device.num_sms} SMs"
    return AttentionPlan(triton.NAME, "prefill", config, reason, recompute="kernel")
