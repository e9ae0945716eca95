"""How fast one matmul is, beside XLA's dot and the read floor of its weight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from fdpp_jax import heuristics, ops
from fdpp_jax.bench.clock import Candidate, matmul_buffers, time_kernels
from fdpp_jax.bench.report import BenchReport, begin, kernel_report
from fdpp_jax.plans import backends, device, hopper, hopper_matmul
from fdpp_jax.plans.device import Device
from fdpp_jax.plans.hopper import with_stages_that_fit
from fdpp_jax.plans.hopper_matmul import FlatMatmulConfig
from fdpp_jax.plans.shapes import MatmulImplementation, MatmulShape, WeightOrder, cdiv


def bench_matmul(shape: MatmulShape, *, implementation: str | None = None) -> BenchReport:
    """Times x [m, k] @ w in its order: each kernel of ours that takes the shape, XLA's dot, and the read floor of w.

    Hopper's flat kernel is also timed without each thing that the paper adds to it: see `matmul_candidates`.

    Args:
      shape: The static facts of the call.
      implementation: The backend whose kernels are timed; None: the first that has some for the device.

    Raises:
      ValueError: A size is not positive.
      NotImplementedError: The backend refuses the shape.
      MemoryError: The device has too little memory.
    """
    if min(shape.m, shape.k, shape.n) < 1:
        raise ValueError(f"expected sizes of at least 1, got m={shape.m}, k={shape.k} and n={shape.n}")
    running = backends.only(implementation, device.current())
    heuristics.plan_matmul(shape, running, implementation)  # raises where it refuses
    plan = heuristics.plan_matmul(shape, running)
    num_elements = shape.m * shape.k + shape.k * shape.n + shape.m * shape.n
    begin(running, "x, w and their product", num_elements * jnp.dtype(shape.dtype).itemsize)
    x, sets, weight_bytes = matmul_buffers(shape)
    candidates = matmul_candidates(shape, running)
    title = (
        f"Matmul on {running.kind}: [{shape.m}, {shape.k}] @ [{shape.k}, {shape.n}], stored {list(shape.w_shape)}, "
        f"{shape.dtype}, {weight_bytes / 1e6:.1f} MB of weights; {plan.backend} {plan.algorithm}: {plan.reason}"
    )
    with device.target(running):
        timings = time_kernels(candidates, x, sets, weight_bytes)
    what = {
        "matmul": dataclasses.asdict(shape) | {"implementation": implementation},
        "plan": dataclasses.asdict(plan) | {"implementation": plan.implementation},
    }
    return kernel_report(title, candidates, timings, weight_bytes, what)


def matmul_candidates(shape: MatmulShape, running: Device) -> dict[str, Candidate]:
    """What `bench_matmul` times, by label: our kernels, ablations of Hopper's flat one, `jnp.dot`.

    Our kernels are those of the device where it is the target. The ablations have the planned tiles, and change one
    thing each: rows are padded to 64 instead of 8, two stages (one tile is loaded while another is multiplied), one CTA
    per column block, so that K is not split.
    """
    plan = heuristics.plan_matmul(shape, running)
    planned = plan.implementation
    candidates: dict[str, Candidate] = {}
    backend = backends.with_kernels(running, "matmul") if plan.backend == "xla" else backends.by_name(plan.backend)
    op = None if backend is None else backend.matmul
    kernels: tuple[MatmulImplementation, ...] = ("gemv", "flat")
    for name in kernels:
        if op is not None and name in op.configs and op.refuse(shape, running, name) is None:
            label = f"ours, {name}" + (" (planned)" if name == planned else "")
            candidates[label] = Candidate(
                functools.partial(ops.flat_matmul, w_order=shape.w_order, implementation=name)
            )
    is_hopper = backend is not None and backend.name == hopper.NAME
    if is_hopper and hopper_matmul.refuse(shape, running, "flat") is None:
        config = heuristics.plan_matmul(shape, running, "flat").config
        padded = dataclasses.replace(shape, m=64)
        unsplit = dataclasses.replace(config, num_ctas=cdiv(shape.n, config.block_n))
        variants = {
            "flat, rows padded to 64": (with_stages_that_fit(config, padded, running.smem_bytes), 64),
            "flat, two stages": (dataclasses.replace(config, num_stages=2), shape.m),
            "flat, K unsplit": (unsplit, shape.m),
        }
        for label, (variant, rows) in variants.items():
            candidates[label] = Candidate(functools.partial(_flat, config=variant, rows=rows, w_order=shape.w_order))
    dot = functools.partial(jnp.einsum, f"mk,{shape.w_order}->mn")
    candidates["jnp.dot" + (" (planned)" if planned == "xla" else "")] = Candidate(dot, is_peer=True)
    return candidates


def _flat(x: jax.Array, w: jax.Array, *, config: FlatMatmulConfig, rows: int, w_order: WeightOrder) -> jax.Array:
    """The kernel on x padded to `rows` rows."""
    from fdpp_jax.pallas.flat_matmul import flat_matmul

    padded = jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))
    return flat_matmul(padded, w, config=config, out_dtype=x.dtype, w_order=w_order)[: x.shape[0]]
