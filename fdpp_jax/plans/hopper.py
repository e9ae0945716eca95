"""What the plans of all Mosaic GPU kernels share: the device, stages of the ring, the roofline."""

import dataclasses
from typing import Any, Protocol

from fdpp_jax.plans import attention
from fdpp_jax.plans.device import Device
from fdpp_jax.plans.shapes import AttentionShape

NAME = "mosaic_gpu"
ARCHITECTURE = "sm_90"  # wgmma exists on Hopper only
HEAD_DIMS = (64, 80, 96, 128, 256)  # of both attention kernels
MIN_STAGES, MAX_STAGES = 2, 8
# Bytes of barriers, alignment and reduction scratch that Mosaic GPU adds to what a kernel asks for.
SMEM_RESERVE = 8 * 1024


class _Config(Protocol):
    """The config of a kernel that streams through a ring."""

    @property
    def num_stages(self) -> int: ...

    def smem_bytes(self, shape: Any) -> int: ...


def refuse_device(device: Device) -> str | None:
    """Why no Mosaic GPU kernel runs on a device, or None if they do."""
    if device.arch == ARCHITECTURE:
        return None
    return f"Mosaic GPU's kernels are for {ARCHITECTURE}, got {device.arch}"


def refuse_attention(shape: AttentionShape, kernel: str) -> str | None:
    """Why an attention kernel cannot compute a shape, or None: what both kernels ask for alike."""
    if (refusal := attention.refuse_attention(shape, kernel)) is not None:
        return refusal
    if shape.head_dim not in HEAD_DIMS:
        return f"the {kernel} kernel takes head dims {HEAD_DIMS}, got H = {shape.head_dim}"
    if shape.kv_itemsize == 1 and shape.head_dim % 64:
        return f"8-bit tiles are widened 64 columns at a time, got H = {shape.head_dim}"
    if shape.scales == "token" and shape.num_kv_heads % 4:
        return f"TMA strides are whole 16 bytes: scales per token need 4, 8, ... heads, got K = {shape.num_kv_heads}"
    return None


def with_stages_that_fit[C: _Config](config: C, shape: Any, smem_bytes: int) -> C:
    """The config with no more stages than fit `smem_bytes` with a shape of its kernel, but at least two."""
    while config.num_stages > MIN_STAGES and config.smem_bytes(shape) > smem_bytes:
        config = dataclasses.replace(config, num_stages=config.num_stages - 1)  # type: ignore[type-var]
    return config


def bound(intensity: float, device: Device) -> str:
    """ "memory-bound: intensity 8 < ridge 153", flop per byte."""
    if intensity < device.ridge:
        return f"memory-bound: intensity {intensity:.0f} < ridge {device.ridge:.0f}"
    return f"compute-bound: intensity {intensity:.0f} >= ridge {device.ridge:.0f}"
