"""The table of backends, in the order in which they are asked. The last one refuses nothing."""

from typing import Literal

from fdpp_jax.plans import hopper, hopper_attention, hopper_layer, hopper_matmul, xla
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

BACKENDS: tuple[Backend, ...] = (
    MOSAIC_GPU,
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
