"""Which kernel computes a call, and why: from static shapes and a device to a plan. The paper's decision tree.

Measured tables are asked first (matmuls: docs/tuning.md), then the backends in the order of `plans.backends`: the first
that does not refuse plans by its own rule. Everything is pure Python without arrays, so that a plan can be had for any
named device on any machine.

Source: FlashDecoding++ (arXiv 2311.01282), sections 4 and 5.
"""

import dataclasses
import functools
import numbers
from typing import Any

from fdpp_jax.plans import backends, tables
from fdpp_jax.plans import device as devices
from fdpp_jax.plans.backend import AttentionPlan, Backend, LayerOp, LayerPlan, MatmulPlan, Op
from fdpp_jax.plans.device import Device
from fdpp_jax.plans.shapes import AttentionShape, LayerShape, MatmulShape

_NAMED = "named by the caller"
# The least that each size can be. An array may be empty, but a head or a group of heads may not.
_LEAST_ATTENTION = dict(batch=0, query_length=0, capacity=0, num_query_heads=0, num_kv_heads=1, head_dim=1, page_size=1)
_LEAST_MATMUL = dict(m=0, k=0, n=0)
_LEAST_LAYER = dict(
    batch=0, hidden_size=1, intermediate_size=1, num_query_heads=1, num_kv_heads=1, head_dim=1, vocab_size=0
)


@functools.cache
def plan_attention(shape: AttentionShape, device: Device | str, implementation: str | None = None) -> AttentionPlan:
    """How `dot_product_attention` computes `shape` on `device`.

    Args:
      shape: The static facts of the call.
      device: A Device, or the name of a known one.
      implementation: The name of a backend or algorithm that it must be; None: the best.

    Returns:
      Backend, algorithm and config, and the reason in one line.

    Raises:
      ValueError: The device or the implementation is unknown, or no call has these sizes.
      NotImplementedError: The named implementation refuses; the message says why.
    """
    _check_sizes(shape, _LEAST_ATTENTION)
    device = devices.resolve(device)
    planned: AttentionPlan = _first_plan("attention", shape, device)
    if implementation in (None, planned.implementation):
        return planned
    backend, op, algorithm = _named("attention", shape, device, implementation)
    if implementation == backend:
        plan: AttentionPlan = op.plan(shape, device, _NAMED)
        return plan
    config = op.config(shape, device, algorithm)
    return AttentionPlan(backend, algorithm, config, _NAMED, recompute=op.recomputes[0])


def plan_matmul(shape: MatmulShape, device: Device | str, implementation: str | None = None) -> MatmulPlan:
    """How `flat_matmul` computes x [m, k] @ w, [k, n] or [n, k], on `device`.

    The order of w's axes does not change the kernel, and of a config only the tiles of Triton's rule.

    Args:
      shape: The static facts of the call.
      device: A Device, or the name of a known one.
      implementation: The name of a backend or algorithm that it must be; None: the fastest.

    Returns:
      Backend, algorithm and config, and the reason in one line: "tuned on ...: exact", "tuned on ...: nearest ...",
      "rule: ...", or why no kernel runs.

    Raises:
      ValueError: The device or the implementation is unknown, a size is negative, or a table of the device's
        measurements is malformed.
      NotImplementedError: The named implementation refuses; the message says why.
    """
    _check_sizes(shape, _LEAST_MATMUL)
    # Not cached: tables may change under a running process. `tables` caches them until they do.
    device = devices.resolve(device)
    if implementation is None:
        return _tuned_plan(shape, device) or _first_plan("matmul", shape, device)
    backend, op, algorithm = _named("matmul", shape, device, implementation)
    if op.configs[algorithm] is None:
        return MatmulPlan(backend, algorithm, None, _NAMED)
    own = backends.only(backend, device)  # whose table has the backend's configs
    if implementation == backend:
        planned: MatmulPlan = _tuned_plan(shape, own) or _first_plan("matmul", shape, own)
        if planned.backend == backend:
            return dataclasses.replace(planned, reason=_NAMED)
    tuned = _tuned_plan(shape, own, algorithm)
    if tuned is not None:
        return dataclasses.replace(tuned, reason=_NAMED)
    return MatmulPlan(backend, algorithm, op.config(shape, device, algorithm), _NAMED)


def plan_layer(shape: LayerShape, device: Device | str) -> LayerPlan:
    """Whether all between one attention and the next runs as a backend's fused layer on `device`.

    Args:
      shape: The static facts of the layer.
      device: A Device, or the name of a known one.

    Returns:
      Backend, algorithm ("fused" or "unfused") and config, and the reason in one line.

    Raises:
      ValueError: The device is unknown, no layer has these sizes, or a table of the device's measurements is malformed.
    """
    _check_sizes(shape, _LEAST_LAYER)
    device = devices.resolve(device)
    plan: LayerPlan = _first_plan("layer", shape, device)
    op = backends.by_name(plan.backend).layer
    if not isinstance(op, LayerOp):
        return plan
    tuned = {name: _tuned_tiles(product, device) for name, product in op.products(shape).items()}
    return op.with_tiles(shape, plan, {name: config for name, config in tuned.items() if config is not None})


def _tuned_tiles(shape: MatmulShape, device: Device) -> Any:
    """The measured config of the plan's kernel or, where XLA was faster, of the kernel that the rule means.

    None where no table has one that fits.
    """
    plan = _tuned_plan(shape, device)
    if plan is not None and plan.config is None:
        backend = backends.with_kernels(device, "matmul")
        assert backend is not None
        assert backend.matmul is not None
        plan = _tuned_plan(shape, device, backend.matmul.algorithm(shape, device))
    return None if plan is None else plan.config


def _check_sizes(shape: AttentionShape | MatmulShape | LayerShape, least: dict[str, int]) -> None:
    """Raises ValueError unless the sizes of a shape, as far as they are numbers, are those of a call."""
    sizes = {name: size for name in least if isinstance(size := getattr(shape, name), numbers.Integral)}
    for name, size in sizes.items():
        if size < least[name]:
            raise ValueError(f"{name} must be at least {least[name]}, got {size}")
    num_heads, num_kv_heads = sizes.get("num_query_heads"), sizes.get("num_kv_heads")
    if num_heads is not None and num_kv_heads is not None and num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_query_heads, got {num_kv_heads} and {num_heads}")


def _ops(name: str, device: Device) -> list[tuple[Backend, Op[Any, Any]]]:
    """The backends that are asked for an op on a device, and how they compute it."""
    asked = [backend for backend in backends.BACKENDS if backend.is_asked(device)]
    return [(backend, op) for backend in asked if (op := getattr(backend, name)) is not None]


def _first_plan(name: str, shape: Any, device: Device) -> Any:
    """The plan of the first backend of the device that does not refuse."""
    refused: list[str] = []
    for backend, op in _ops(name, device):
        if not backend.runs_on(device):
            continue
        refusal = op.refuse(shape, device, None)
        if refusal is None:
            return op.plan(shape, device, "; ".join(dict.fromkeys(refused)) or backends.no_kernel(device, name))
        refused.append(refusal)
    raise AssertionError(f"no backend computes {shape} on {device.kind}: {refused}")


def _named(name: str, shape: Any, device: Device, implementation: str) -> tuple[str, Any, str]:
    """The backend, how it computes the op, and the algorithm that a caller's name stands for.

    For a backend's name that is the one that its rule means for the shape.

    Raises:
      ValueError: No backend and no algorithm has the name.
      NotImplementedError: They refuse.
    """
    refused: list[str] = []
    names: list[str] = []
    for backend, op in _ops(name, device):
        names += [backend.name, *op.configs]
        algorithm = op.algorithm(shape, device) if implementation == backend.name else implementation
        if algorithm not in op.configs:
            continue
        refusal = op.refuse(shape, device, algorithm)
        if refusal is None:
            return backend.name, op, algorithm
        refused.append(refusal)
    if implementation not in names:
        raise ValueError(f"implementation must be one of {', '.join(dict.fromkeys(names))}; got {implementation!r}")
    raise NotImplementedError(f"{implementation=} cannot run this call: {'; '.join(dict.fromkeys(refused))}")


def _tuned_plan(shape: MatmulShape, device: Device, algorithm: str | None = None) -> MatmulPlan | None:
    """The measured plan, or that of the named algorithm; None where no table has one that fits."""
    backend = backends.with_kernels(device, "matmul")
    if backend is None or backend.matmul is None or shape.m < 1:
        return None
    op, row = backend.matmul, dataclasses.replace(shape, m=1)
    if all(op.refuse(row, device, name) for name in op.configs):  # no kernel takes the weight
        return None
    match = tables.lookup(shape, device)
    if match is None:
        return None
    chosen = algorithm or match.entry.implementation
    if chosen == "xla":
        return MatmulPlan("xla", "dot", None, match.reason)
    config = match.entry.configs.get(chosen)
    if config is None:
        return None
    refusal = op.refuse_config(shape, device, chosen, config)
    if refusal is None:
        return MatmulPlan(backend.name, chosen, config, match.reason)
    if match.is_exact:
        raise ValueError(f"{match.entry.where}.configs.{chosen} cannot run: {refusal}")
    return None
