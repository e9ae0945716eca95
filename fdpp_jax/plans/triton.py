"""What the plans of all Triton kernels share: devices, dtypes, and what a device's kernels are compiled for."""

from fdpp_jax.plans import attention
from fdpp_jax.plans.device import Device
from fdpp_jax.plans.shapes import AttentionShape

NAME = "triton"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx90a", "gfx942")
DTYPES = attention.DTYPES
MAX_HEAD_DIM = 256
FIRST_FOR_ITSELF = 90  # from this compute capability on, Triton's code is for one architecture alone ("sm_90a")


def refuse_device(device: Device) -> str | None:
    """Why no Triton kernel runs on a device, or None if they do."""
    if device.arch in ARCHITECTURES:
        return device.why_no_triton
    if device.is_gpu:
        return f"no Triton kernel for {device.arch}"
    return f"no kernel for {device.kind}"


def refuse_attention(shape: AttentionShape, kernel: str) -> str | None:
    """Why an attention kernel cannot compute a shape, or None: what both kernels ask for alike."""
    if (refusal := attention.refuse_attention(shape, kernel)) is not None:
        return refusal
    if shape.head_dim % 8 or not 8 <= shape.head_dim <= MAX_HEAD_DIM:
        return f"the {kernel} kernel takes head dims 8, 16, ... {MAX_HEAD_DIM}, got H = {shape.head_dim}"
    return None


def refuse_arch(arch: str, device: Device) -> str | None:
    """Why a device cannot run code compiled for an architecture, or None: NVIDIA's run what is for Ampere and Ada."""
    is_older = arch.startswith("sm_") and int(arch[3:]) < min(device.compute_capability, FIRST_FOR_ITSELF)
    if arch in ARCHITECTURES and (arch == device.arch or is_older):
        return None
    return f"{device.kind} runs no code for {arch}"
