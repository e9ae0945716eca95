"""What Hopper GPUs would run, on CPU devices: plans, shards, transformations and control flow are theirs.

Kernels are interpreted, or where that would only take time plain XLA stands in for a kernel's launch.
"""

import contextlib
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fdpp_jax.ops import reference
from fdpp_jax.pallas import run as pallas_run
from fdpp_jax.plans import device

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


class Calls(list):
    """Shapes of the operands of all kernels that were traced, in their order.

    Attributes:
      interprets: Whether kernels are interpreted.
    """

    interprets = False


@contextlib.contextmanager
def hopper_on_cpu(name, monkeypatch):
    """Within it calls are planned for a GPU of two SMs, which no other test has, and run on the CPU.

    Yields:
      Calls.
    """
    calls = Calls()

    def attention(kernel):
        def run(arrays, options, config, **keywords):
            calls.append((arrays.query.shape, arrays.key.shape))
            if calls.interprets:
                return kernel(arrays, options, config, interpret=plgpu.InterpretGPUParams(), **_without(keywords))
            assert keywords.get("redone") is None
            recompute = keywords.get("recompute") or keywords.get("prior") is not None
            stand_in = _no_derivative(lambda arrays: reference.attention(arrays, options))
            return stand_in(arrays._replace(phi=None) if recompute else arrays)

        return run

    def matmul(kernel):
        def run(x, w, *, out_dtype, w_order, **keywords):
            calls.append((x.shape, w.shape))
            if calls.interprets:
                keywords["interpret"] = plgpu.InterpretGPUParams()
                return kernel(x, w, out_dtype=out_dtype, w_order=w_order, **keywords)
            return _no_derivative(lambda x, w: reference.matmul(x, w, out_dtype, w_order))(x, w)

        return run

    kernels = dict(attend=attention, prefill_attention=attention, flat_matmul=matmul, gemv=matmul)
    for name_of_kernel, stand_in in kernels.items():
        monkeypatch.setattr(pallas_run, name_of_kernel, stand_in(getattr(pallas_run, name_of_kernel)))
    monkeypatch.setattr(device, "lowered_for", lambda platform, planned: planned)
    hopper = dataclasses.replace(device.by_name("H200"), kind=name, num_sms=2, why_no_triton="Mosaic GPU alone")
    with device.target(hopper):
        yield calls


def _without(keywords):
    return {name: x for name, x in keywords.items() if name != "interpret"}


def _no_derivative(function):
    """As kernels are, without a derivative of its own."""
    kernel = jax.custom_jvp(function)

    @kernel.defjvp
    def _none(*_):
        raise AssertionError("a kernel has no derivative")

    return kernel


def mesh(kind=AxisType.Auto, sizes=(2, 4)):
    """A mesh of axes "a" and "b"; skips the test where there are fewer devices."""
    if jax.device_count() < math.prod(sizes):
        pytest.skip(f"needs {math.prod(sizes)} devices, got {jax.device_count()}")
    return jax.make_mesh(sizes, ("a", "b"), axis_types=(kind,) * 2)


def put(mesh, x, *spec):
    """x, sharded."""
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


def collectives(compiled):
    """How often each collective is in a program; only those that are."""
    text = compiled.as_text()
    counts = {name: text.count(f" {name}(") + text.count(f" {name}-start(") for name in COLLECTIVES}
    return {name: count for name, count in counts.items() if count}


def bf16(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), jnp.bfloat16)


def attention_arrays(batch=4, capacity=32, num_heads=8, num_kv_heads=4, head_dim=64):
    """query, key, value, lengths."""
    cache = batch, capacity, num_kv_heads, head_dim
    lengths = jnp.arange(batch) * 3 + 3
    return bf16(0, batch, 1, num_heads, head_dim), bf16(1, *cache), bf16(2, *cache), lengths
