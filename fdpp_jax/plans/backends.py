"""The table of backends, in the order in which they are asked. The last one refuses nothing."""

import dataclasses
from typing import Literal

from fdpp_jax.plans import (
    hopper,
    hopper_attention,
    hopper_layer,
    hopper_matmul,
    triton,
    triton_attention,
    triton_layer,
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
    layer=triton_layer.OP,
)

BACKENDS: tuple[Backend, ...] = (
    MOSAIC_GPU,
    TRITON,
    xla.BACKEND,
)


def by_name(name: str) -> Backend:
    """The backend of that name, which a plan has."""
    return next(backend for backend in BACKENDS if backend.name == name)


def only(name: str | None, device: Device) -> Device:
    """The device with the kernels of one backend alone, beside plain XLA; None: with those of all.

    Within `device.target` of the result, calls are planned so: for a bench of kernels that are no first choice.

    Raises:
      ValueError: No backend with kernels is called so.
      NotImplementedError: The backend has no kernels for the device.
    """
    if name is None:
        return device
    names = [backend.name for backend in BACKENDS if backend.architectures]
    if name not in names:
        raise ValueError(f"implementation must be one of {', '.join(names)}; got {name!r}")
    if device.arch not in by_name(name).architectures:
        raise NotImplementedError(f"implementation={name!r} cannot run here: it has {no_kernel(device)}")
    return dataclasses.replace(device, only_backend=name)


def with_kernels(device: Device, op: Literal["attention", "matmul", "layer"]) -> Backend | None:
    """The first backend with kernels of an op for the device; None where XLA is all there is."""
    return next(
        (b for b in BACKENDS if b.architectures and b.runs_on(device) and getattr(b, op) is not None),
        None,
    )


def no_kernel(device: Device, op: str = "matmul") -> str:
    """What is said of an op that no backend has kernels for on a device."""
    what = "fused layer" if op == "layer" else "kernel"
    if device.only_backend is not None:
        what += f" of {device.only_backend}"
    return f"no {what} for {device.arch if device.is_gpu else device.kind}"
