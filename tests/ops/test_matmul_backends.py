"""One suite for matmuls of few rows, which every backend that takes a case runs: against float64."""

import functools

import backend_case
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from fdpp_jax.ops.running import module_of
from fdpp_jax.plans.backend import MatmulPlan
from fdpp_jax.plans.shapes import MatmulShape

pytestmark = pytest.mark.usefixtures("fresh_interpreter")

SHAPES = {
    f"[{shape.m}, {shape.k}] x [{shape.k}, {shape.n}], {shape.w_order}, {shape.dtype}": shape
    for shape in (
        *(MatmulShape(m, 256, 128, "bfloat16", w_order) for m in (1, 7, 8, 9, 64) for w_order in ("kn", "nk")),
        MatmulShape(1, 336, 208, "float16", "nk"),
        MatmulShape(5, 336, 208, "float16", "kn"),
        MatmulShape(65, 128, 64),
        MatmulShape(3, 10, 6, "float32"),
    )
}


@pytest.mark.parametrize(
    ("backend", "name", "algorithm"),
    [
        pytest.param(*param.values, algorithm, id=f"{param.id}, {algorithm}", marks=param.marks)
        for param in backend_case.taken("matmul", SHAPES)
        for algorithm in param.values[0].matmul.configs
        if param.values[0].matmul.refuse(SHAPES[param.values[1]], backend_case.device_of(param.values[0]), algorithm)
        is None
    ],
)
def test_agrees_with_float64(backend, name, algorithm):
    """By each algorithm of a backend, with its tiles by rule."""
    shape = SHAPES[name]
    config = backend.matmul.config(shape, backend_case.device_of(backend), algorithm)
    plan = MatmulPlan(backend.name, algorithm, config, "a test")
    rng = np.random.default_rng(0)
    x, w = (
        jnp.asarray(rng.standard_normal(size, np.float32), shape.dtype) for size in ((shape.m, shape.k), shape.w_shape)
    )
    call = functools.partial(module_of(plan).matmul, plan=plan, w_order=shape.w_order, out_dtype=jnp.float32)
    out = jax.jit(functools.partial(call, **backend_case.options_of(backend)))(x, w)
    expected = np.asarray(x, np.float64) @ np.asarray(w if shape.w_order == "kn" else w.T, np.float64)
    assert out.shape == (shape.m, shape.n)
    assert oracle.relative_error(out, expected) < 2e-6
