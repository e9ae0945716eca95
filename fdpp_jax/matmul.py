"""flat_matmul after its checks: plan and run; its gradient, and what it does under vmap."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from fdpp_jax import device, heuristics, limits, reference
from fdpp_jax.config import (
    FlatMatmulConfig,
    GemvConfig,
    MatmulImplementation,
    MatmulPlan,
    MatmulShape,
    WeightOrder,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def run(
    implementation: MatmulImplementation | None,
    out_dtype: jnp.dtype,
    w_order: WeightOrder,
    x: jax.Array,
    w: jax.Array,
) -> jax.Array:
    """flat_matmul after its checks; gradients are XLA's."""

    @jax.custom_batching.custom_vmap
    def call(x: jax.Array, w: jax.Array) -> jax.Array:
        return _run_matmul(implementation, out_dtype, w_order, x, w)

    @call.def_vmap
    def fold_into_rows(axis_size: int, in_batched: Any, x: jax.Array, w: jax.Array) -> tuple[jax.Array, bool]:
        del axis_size
        if not in_batched[1]:
            return call(x, w), True  # the mapped axis is one more leading axis of x
        matmul = functools.partial(reference.matmul, out_dtype=out_dtype, w_order=w_order)
        return jax.vmap(matmul, (0 if in_batched[0] else None, 0))(x, w), True

    return call(x, w)


def _run_matmul(
    implementation: MatmulImplementation | None,
    out_dtype: jnp.dtype,
    w_order: WeightOrder,
    x: jax.Array,
    w: jax.Array,
) -> jax.Array:
    shape = MatmulShape(math.prod(x.shape[:-1]), x.shape[-1], w.shape[w_order.index("n")], x.dtype.name, w_order)
    plan = _plan_matmul(shape, implementation)
    if plan.config is None:
        return reference.matmul(x, w, out_dtype, w_order)
    out = run_kernel(x.reshape(-1, x.shape[-1]), w, config=plan.config, out_dtype=out_dtype, w_order=w_order)
    return out.reshape(*x.shape[:-1], shape.n)


def run_kernel(
    x: jax.Array,
    w: jax.Array,
    *,
    config: FlatMatmulConfig | GemvConfig,
    out_dtype: jax.typing.DTypeLike,
    w_order: WeightOrder,
) -> jax.Array:
    """x [M, K] @ w by the kernel that the config is of."""
    if isinstance(config, GemvConfig):
        from fdpp_jax.pallas.gemv import gemv

        return gemv(x, w, config=config, out_dtype=out_dtype, w_order=w_order)
    from fdpp_jax.pallas.flat_matmul import flat_matmul

    return flat_matmul(x, w, config=config, out_dtype=out_dtype, w_order=w_order)


def _plan_matmul(shape: MatmulShape, implementation: MatmulImplementation | None) -> MatmulPlan:
    """The heuristics' plan, or the named implementation's, or NotImplementedError with its reason."""
    here = device.current()
    if implementation is None:
        return heuristics.plan_matmul(shape, here)
    if implementation == "xla":
        return MatmulPlan("xla", None, "named by the caller")
    refusal = limits.refuse_kernel_matmul(shape, here, implementation)
    if refusal is not None:
        raise NotImplementedError(f"{implementation=} cannot run this call: {refusal}")
    config = heuristics.gemv_config if implementation == "gemv" else heuristics.flat_matmul_config
    return MatmulPlan(implementation, config(shape, here), "named by the caller")


def _matmul_fwd(
    implementation: MatmulImplementation | None,
    out_dtype: jnp.dtype,
    w_order: WeightOrder,
    x: jax.Array,
    w: jax.Array,
) -> tuple[jax.Array, Any]:
    return run(implementation, out_dtype, w_order, x, w), (x, w)


def _matmul_bwd(
    implementation: MatmulImplementation | None,
    out_dtype: jnp.dtype,
    w_order: WeightOrder,
    saved: Any,
    grad: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    del implementation
    return jax.vjp(functools.partial(reference.matmul, out_dtype=out_dtype, w_order=w_order), *saved)[1](grad)


run.defvjp(_matmul_fwd, _matmul_bwd)
