"""x @ w by a matmul kernel, against float64: interpreted where there is no GPU."""

import functools

import jax
import numpy as np
import oracle
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.plans.shapes import in_order

ON_GPU = jax.default_backend() == "gpu"
in_both_orders = pytest.mark.parametrize("w_order", ["kn", "nk"])
# k, n of weights of models
WEIGHTS = [(4096, 12288), (11008, 4096), (4096, 32000), (8192, 28672), (4096, 50272)]


def operands(m, k, n, dtype):
    x_key, w_key = jax.random.split(jax.random.key(m + k + n))
    return jax.random.normal(x_key, (m, k)).astype(dtype), jax.random.normal(w_key, (k, n)).astype(dtype)


def run(kernel, x, w, w_order, config, out_dtype, detect_races=False):
    """x @ w, with w [K, N] stored in that order."""
    interpret = None if ON_GPU else plgpu.InterpretGPUParams(detect_races=detect_races)
    call = functools.partial(kernel, config=config, out_dtype=out_dtype, w_order=w_order, interpret=interpret)
    return jax.jit(call)(x, w if w_order == "kn" else w.T)


def check(kernel, m, k, n, dtype, w_order, config, out_dtype="float32", of_sum=1e-6):
    """That x @ w is right: float32 up to `of_sum`, other dtypes up to their rounding."""
    x, w = operands(m, k, n, dtype)
    out = run(kernel, x, w, w_order, config, out_dtype)
    assert out.shape == (m, n)
    assert out.dtype == out_dtype
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    # Products of 16-bit numbers are exact in float32; what remains is the rounding of the sum and of the result.
    tolerance = of_sum if out_dtype == "float32" else oracle.TOLERANCE[out_dtype]
    assert oracle.relative_error(out, expected) < tolerance


def check_races(kernel, config, w_order):
    """That the interpreter finds no race, and the result is right."""
    x, w = operands(1, 640, 128, "bfloat16")
    out = run(kernel, x, w, w_order, config, "float32", detect_races=True)
    jax.block_until_ready(out)
    assert not gpu_callbacks.get_races().races_found
    assert oracle.relative_error(out, np.asarray(x, np.float64) @ np.asarray(w, np.float64)) < 1e-6


def check_lowers_for_cuda(kernel, m, k, n, w_order, config):
    call = functools.partial(kernel, config=config, out_dtype="bfloat16", w_order=w_order)
    shapes = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((m, k), in_order(w_order, k, n))]
    assert "mosaic_gpu" in jax.jit(call).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
