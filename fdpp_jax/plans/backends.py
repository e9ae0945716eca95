"""The table of backends, in the order in which they are asked. The last one refuses nothing."""

from typing import Literal

from fdpp_jax.plans import (
    hopper,
    hopper_attention,
    hopper_layer,
    hopper_matmul,
    triton,
    triton_attention,
    triton_matmul,
    xla,
)
from fdpp_jax.plans.backend import Backend
from fdpp_jax.plans.device import Device

MOSAIC_GPU = Backend(
    name=hopper.NAME,
    architectures=(hopper.ARCHITECTURE,),
    run="fdpp_jax.pallas.run",
    attention=hopper_attention.OP,
    matmul=hopper_matmul.OP,
    layer=hopper_layer.OP,
)

TRITON = Backend(
    name=triton.NAME,
    architectures=triton.ARCHITECTURES,
    run="fdpp_jax.triton.run",
    attention=triton_attention.OP,
    matmul=triton_matmul.OP,
)

BACKENDS: tuple[Backend, ...] = (
    MOSAIC_GPU,
    TRITON,
    xla.BACKEND,
)


def by_name(name: str) -> Backend:
    """The backend of that name, which a plan has."""
    return next(backend for backend in BACKENDS if backend.name == name)


def with_kernels(device: Device, op: Literal["attention", "matmul", "layer"]) -> Backend | None:
    """The first backend with kernels of an op for the device; None where XLA is all there is."""
    return next(
        (b for b in BACKENDS if device.arch in b.architectures and getattr(b, op) is not None),
        None,
    )


def no_kernel(device: Device, op: str = "matmul") -> str:
    """What is said of an op that no backend has kernels for on a device."""
    what = "fused layer" if op == "layer" else "kernel"
    return f"no {what} for {device.arch if device.is_gpu else device.kind}"
