"""x @ w for few rows: the public op, its plan, its gradient, and what it does under vmap."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, get_args

import jax
import jax.export
import jax.numpy as jnp

from fdpp_jax import heuristics
from fdpp_jax.ops import partition, planned, reference
from fdpp_jax.ops.checks import check_array, check_name, check_width
from fdpp_jax.ops.planned import Cotangent, Function
from fdpp_jax.ops.running import module_of
from fdpp_jax.plans import device as devices
from fdpp_jax.plans.calls import alike
from fdpp_jax.plans.device import Device
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

    Under vmap a mapped axis of x joins the rows. A mapped w is a batched product of XLA's: no kernel runs.

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
    axes = ", ".join(w_order).upper()
    check_array("x", x, "[..., K]")
    check_array("w", w, f"[{axes}]")
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[w_order.index("k")]:
        raise ValueError(f"expected x [..., K] and w [{axes}]; got {x.shape=} and {w.shape=} with {w_order=}")
    if x.dtype != w.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expected x and w of one floating-point dtype; got {x.dtype=} and {w.dtype=}")
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    check_width("x", x.dtype)
    check_width("out_dtype", out_dtype)
    check_name("implementation", implementation, MatmulImplementation)
    return _run(MatmulFunction(implementation, out_dtype, w_order), devices.planned(), x, w)


# Jitted so that an eager call is traced and compiled once.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(function: "MatmulFunction", device: Device, x: jax.Array, w: jax.Array) -> jax.Array:
    """The op after its checks, planned for a device where it is lowered for its platform."""

    def call(*operands: jax.Array) -> list[jax.Array]:
        return planned.differentiable(function, device, *operands)

    def specs(x: Sequence[Any], w: Sequence[Any]) -> Sequence[Sequence[Any]]:
        return [(*x[:-1], w[function.w_order.index("n")])]

    (out,) = partition.in_auto_axes(call, specs, alike((x, w)))
    return out


@dataclasses.dataclass(frozen=True)
class MatmulFunction:
    """Static facts of a call, of operands x and w."""

    implementation: MatmulImplementation | None
    out_dtype: jnp.dtype
    w_order: WeightOrder

    def types(self, *operands: Any) -> list[tuple[tuple[int, ...], Any]]:
        """[..., N]."""
        x, w = operands
        return [((*x.shape[:-1], w.shape[self.w_order.index("n")]), self.out_dtype)]

    def saving(self) -> "MatmulFunction":
        """The call itself: its gradient needs nothing of it."""
        return self

    def times(self, copies: int) -> "MatmulFunction":
        """The call itself: it holds nothing beside operands and results."""
        del copies
        return self

    def partial(self) -> "MatmulFunction":
        """The call for a share of K, whose results are added up."""
        return dataclasses.replace(self, out_dtype=jnp.dtype(jnp.float32))

    def __call__(self, device: Device | None, *operands: jax.Array) -> list[jax.Array]:
        """By the plan for a device."""
        x, w = operands
        if device is None:
            return [self._reference(x, w)]

        @jax.custom_batching.custom_vmap
        def call(x: jax.Array, w: jax.Array) -> list[jax.Array]:
            shape = self._shape(x, w)
            if not _is_known(shape):
                if self.implementation not in (None, "xla"):
                    raise NotImplementedError(f"implementation={self.implementation!r} takes no symbolic sizes")
                return [self._reference(x, w)]
            plan = heuristics.plan_matmul(shape, device, self.implementation)
            return [module_of(plan).matmul(x, w, plan, out_dtype=self.out_dtype, w_order=self.w_order)]

        @call.def_vmap
        def fold(axis_size: int, in_batched: Any, x: jax.Array, w: jax.Array) -> tuple[list[jax.Array], list[bool]]:
            del axis_size
            if not in_batched[1]:
                return call(x, w), [True]  # the mapped axis is one more leading axis of x
            return [jax.vmap(self._reference, (0 if in_batched[0] else None, 0))(x, w)], [True]

        outs: list[jax.Array] = call(*operands)
        return outs

    def _reference(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return reference.matmul(x, w, self.out_dtype, self.w_order)

    def _shape(self, x: jax.Array, w: jax.Array) -> MatmulShape:
        n = w.shape[self.w_order.index("n")]
        return MatmulShape(math.prod(x.shape[:-1]), x.shape[-1], n, x.dtype.name, self.w_order)

    def gradients(self, device: Device, *_: Any) -> None:
        """XLA's."""

    def bind(self, function: Function, device: Device, *operands: jax.Array) -> list[jax.Array]:
        """Partitioned by M, N and K where a kernel may run; XLA partitions its own operations."""
        if isinstance(function, Cotangent):
            return planned.bind(function, device, *operands)

        x, w = operands
        if not self._may_have_shards(self._shape(x, w), device):
            return planned.bind(function, device, x, w)
        return partition.bind(function, self._rule(x), device, x, w)

    def _may_have_shards(self, shape: MatmulShape, device: Device) -> bool:
        """Whether a kernel, which XLA cannot partition, may compute a shard of a call."""
        if not device.is_gpu or self.implementation == "xla" or not _is_known(shape):
            return False
        shards = (dataclasses.replace(shape, m=m, k=k, n=n) for m, k, n in partition.shares(shape.m, shape.k, shape.n))
        return any(heuristics.plan_matmul(one, device).backend != "xla" for one in shards)

    def _rule(self, x: jax.Array) -> partition.Rule:
        rows = " ".join(f"m{i}" for i in range(x.ndim - 1))
        return partition.Rule((f"{rows} k", " ".join(self.w_order)), (f"{rows} n",), summed="k")


def _is_known(shape: MatmulShape) -> bool:
    """Whether all sizes are numbers: kernels are planned for numbers, and XLA computes symbolic sizes."""
    return not any(jax.export.is_symbolic_dim(size) for size in (shape.m, shape.k, shape.n))
