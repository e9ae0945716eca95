"""What the suites of ops run: every backend that has an op, on the GPU that there is, else interpreted."""

import dataclasses

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.plans import device
from fdpp_jax.plans.backends import BACKENDS

ON_GPU = jax.default_backend() == "gpu"
# Of the GPU for which a backend plans; few, since interpreters run one CTA after the other.
_NUM_SMS = 3
# How kernels run where their devices are missing, by backend.
_INTERPRETED = {"mosaic_gpu": dict(interpret=plgpu.InterpretGPUParams())}


def device_of(backend):
    """The device that a backend's cases are planned for."""
    if ON_GPU:
        return device.current()
    known = (device.by_name(name) for name in device.names())
    gpu = next((one for one in known if one.arch in backend.architectures), None)
    return device.by_name("cpu") if gpu is None else dataclasses.replace(gpu, num_sms=_NUM_SMS)


def options_of(backend):
    """Arguments of the functions that run a backend's plans."""
    return {} if ON_GPU else _INTERPRETED.get(backend.name, {})


def has_suite(backend):
    """Whether the suites of ops run a backend here. Triton's kernels are interpreted in processes of their own."""
    if ON_GPU:
        return backend.runs_on(device.current())
    return backend.name in _INTERPRETED or not backend.architectures


def taken(op, shapes):
    """Parameters (backend, name of the case) of an op's suite: the cases that each backend does not refuse."""
    return [
        pytest.param(backend, name, id=f"{backend.name}, {name}", marks=pytest.mark.gpu if ON_GPU else ())
        for backend in BACKENDS
        if getattr(backend, op) is not None
        if has_suite(backend)
        for name, shape in shapes.items()
        if getattr(backend, op).refuse(shape, device_of(backend), None) is None
    ]
