"""x @ w for few rows: the public op, its plan, its gradient, and what it does under vmap."""

import functools
import math
from typing import Any, get_args

import jax
import jax.numpy as jnp

from fdpp_jax import heuristics
from fdpp_jax.ops import reference
from fdpp_jax.ops.checks import check_name
from fdpp_jax.ops.running import module_of
from fdpp_jax.plans import device
from fdpp_jax.plans.shapes import MatmulImplementation, MatmulShape, WeightOrder


def flat_matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    w_order: WeightOrder = "kn",
    out_dtype: jax.typing.DTypeLike | None = None,
    implementation: MatmulImplementation | None = None,
) -> jax.Array:
    """x @ w for few rows, accumulated in float32.

    Args:
      x: [..., K]; the product of the leading sizes is the number of rows M.
      w: [K, N], same dtype as x; or [N, K] with w_order="nk".
      w_order: "kn", or "nk" for a weight as PyTorch and Hugging Face store it. Neither is transposed.
      out_dtype: dtype of the result; x's by default.
      implementation: "gemv" (CUDA cores, M == 1), "flat" (tensor cores, M padded to a multiple of 8) or
        "xla": the paper's ImplA, ImplB and ImplC. None lets the heuristics choose.

    Returns:
      [..., N].

    Raises:
      ValueError: Shapes or dtypes do not fit together.
      NotImplementedError: The named implementation refuses this call; the message says why.

    Source: FlashDecoding++ (arXiv 2311.01282), sections 4 and 5.
    """
    if w_order not in get_args(WeightOrder):
        raise ValueError(f"w_order must be one of {', '.join(get_args(WeightOrder))}; got {w_order!r}")
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[w_order.index("k")]:
        axes = ", ".join(w_order).upper()
        raise ValueError(f"expected x [..., K] and w [{axes}]; got {x.shape=} and {w.shape=} with {w_order=}")
    if x.dtype != w.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expected x and w of one floating-point dtype; got {x.dtype=} and {w.dtype=}")
    check_name("implementation", implementation, MatmulImplementation)
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    return _matmul(implementation, out_dtype, w_order, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _matmul(
    implementation: MatmulImplementation | None,
    out_dtype: jnp.dtype,
    w_order: WeightOrder,
    x: jax.Array,
    w: jax.Array,
) -> jax.Array:
    """The op after its checks; gradients are XLA's."""

    @jax.custom_batching.custom_vmap
    def call(x: jax.Array, w: jax.Array) -> jax.Array:
        return _run(implementation, out_dtype, w_order, x, w)

    @call.def_vmap
    def fold_into_rows(axis_size: int, in_batched: Any, x: jax.Array, w: jax.Array) -> tuple[jax.Array, bool]:
        del axis_size
        if not in_batched[1]:
            return call(x, w), True  # the mapped axis is one more leading axis of x
        matmul = functools.partial(reference.matmul, out_dtype=out_dtype, w_order=w_order)
        return jax.vmap(matmul, (0 if in_batched[0] else None, 0))(x, w), True

    return call(x, w)


def _run(
    implementation: MatmulImplementation | None,
    out_dtype: jnp.dtype,
    w_order: WeightOrder,
    x: jax.Array,
    w: jax.Array,
) -> jax.Array:
    shape = MatmulShape(math.prod(x.shape[:-1]), x.shape[-1], w.shape[w_order.index("n")], x.dtype.name, w_order)
    plan = heuristics.plan_matmul(shape, device.current(), implementation)
    out: jax.Array = module_of(plan).matmul(x, w, plan, out_dtype=out_dtype, w_order=w_order)
    return out


def _matmul_fwd(
    implementation: MatmulImplementation | None,
    out_dtype: jnp.dtype,
    w_order: WeightOrder,
    x: jax.Array,
    w: jax.Array,
) -> tuple[jax.Array, Any]:
    return _matmul(implementation, out_dtype, w_order, x, w), (x, w)


def _matmul_bwd(
    implementation: MatmulImplementation | None,
    out_dtype: jnp.dtype,
    w_order: WeightOrder,
    saved: Any,
    grad: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    del implementation
    return jax.vjp(functools.partial(reference.matmul, out_dtype=out_dtype, w_order=w_order), *saved)[1](grad)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)
