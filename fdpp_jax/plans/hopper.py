"""What the plans of all Mosaic GPU kernels share: the device, dtypes, stages of the ring, the roofline."""

import dataclasses
from typing import Any, Protocol

from fdpp_jax.plans.device import Device
from fdpp_jax.plans.shapes import PAGE_SIZES, QUANTISED_DTYPES, AttentionShape

NAME = "mosaic_gpu"
ARCHITECTURE = "sm_90"  # wgmma exists on Hopper only
DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 80, 96, 128, 256)  # of both attention kernels
MAX_SOFT_CAP = 1000.0  # tanh is 1 - 2 / (e^2x + 1), off by up to 3e-7 of the cap
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
    if device.is_gpu:
        return f"no kernel for {device.arch} yet"
    return f"no kernel for {device.kind}"


def refuse_attention(shape: AttentionShape, kernel: str) -> str | None:
    """Why an attention kernel cannot compute a shape, or None: what both kernels ask for alike."""
    batch, heads, kv_heads, capacity = shape.batch, shape.num_query_heads, shape.num_kv_heads, shape.capacity
    if shape.has_bias:
        return f"the {kernel} kernel takes no bias"
    if shape.has_mask:
        return f"the {kernel} kernel takes no mask as an array: lengths, causal masks and windows are its own"
    if shape.dtype not in DTYPES:
        return f"the {kernel} kernel takes {' or '.join(DTYPES)}, got {shape.dtype}"
    if shape.kv_dtype not in (None, shape.dtype, *QUANTISED_DTYPES):
        return f"the {kernel} kernel takes a cache of {shape.dtype}, int8 or float8_e4m3fn, got {shape.kv_dtype}"
    if shape.head_dim not in HEAD_DIMS:
        return f"the {kernel} kernel takes head dims {HEAD_DIMS}, got H = {shape.head_dim}"
    if shape.page_size not in (None, *PAGE_SIZES):
        return f"the {kernel} kernel takes page sizes {PAGE_SIZES}, got {shape.page_size}"
    if shape.scales == "token" and shape.dtype == "float16":
        return "a weight times its token's scale may leave float16's range"
    if shape.kv_itemsize == 1 and shape.head_dim % 64:
        return f"8-bit tiles are widened 64 columns at a time, got H = {shape.head_dim}"
    if shape.scales == "token" and kv_heads % 4:
        return f"TMA strides are whole 16 bytes: scales per token need 4, 8, ... heads, got K = {kv_heads}"
    if shape.logits_soft_cap is not None and shape.logits_soft_cap > MAX_SOFT_CAP:
        return f"the {kernel} kernel's tanh is good for caps up to {MAX_SOFT_CAP:g}, got {shape.logits_soft_cap:g}"
    if shape.has_traced_scale:
        return "kernels take a scale that is known before the call is traced"
    if not (batch and heads and capacity):
        sizes = f"B = {batch}, N = {heads}, S = {capacity}"
        return f"the {kernel} kernel needs a sequence, a query head and a key, got {sizes}"
    return None


def is_other_gpu(device: Device) -> bool:
    """Whether the device is a GPU of another architecture, whose reason also says what the rule would choose."""
    return device.is_gpu and device.arch != ARCHITECTURE


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
