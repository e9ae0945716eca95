"""A primitive whose plan is made when it is lowered: for the platform of the lowering, and for a shard's shape.

A `Function` is what the primitive computes. Derivatives are those of its plain form, in XLA alone: they stay functions
of this primitive, so that a gradient, too, is planned for the platform that it is lowered for.
"""

import dataclasses
import functools
import os
import warnings
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec as P

from fdpp_jax.plans import device as devices
from fdpp_jax.plans.calls import lower_without_mesh, type_like
from fdpp_jax.plans.device import Device

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# Folders of the frames between a caller and what is lowered: JAX's, and the package's.
_BETWEEN = tuple(os.path.join(folder, "") for folder in (*jax.__path__, os.path.dirname(os.path.dirname(__file__))))


class Function(Hashable, Protocol):
    """What is computed: hashable static facts."""

    def __call__(self, device: Device | None, *operands: jax.Array) -> list[jax.Array]:
        """The results, by the plan for a device; without one in plain XLA."""

    def types(self, *operands: Any) -> list[tuple[tuple[int, ...], Any]]:
        """Shapes and dtypes of the results, from operands that have them."""


@dataclasses.dataclass(frozen=True)
class Tangent:
    """The tangent of a function's results, linear in the tangents of the operands `moved`, which come last."""

    function: "Differentiable"
    moved: tuple[int, ...]

    def __call__(self, device: Device | None, *operands: jax.Array) -> list[jax.Array]:
        del device
        fixed, tangents = operands[: -len(self.moved)], operands[-len(self.moved) :]
        primals = tuple(fixed[i] for i in self.moved)
        return jax.jvp(functools.partial(_plain, self.function, self.moved, fixed), primals, tangents)[1]

    def types(self, *operands: Any) -> list[tuple[tuple[int, ...], Any]]:
        return self.function.types(*operands[: -len(self.moved)])


@dataclasses.dataclass(frozen=True)
class Cotangent:
    """Gradients of the operands `moved`, from the operands and the gradients of the results, which come last."""

    function: "Differentiable"
    moved: tuple[int, ...]
    num_results: int

    def __call__(self, device: Device | None, *operands: jax.Array) -> list[jax.Array]:
        fixed, grads = operands[: -self.num_results], operands[-self.num_results :]
        if device is not None:
            if (own := self.function.gradients(device, self.moved, fixed, grads)) is not None:
                return own
            # Else XLA computes scores before the results' gradients are there, and keeps those of all layers.
            fixed, grads = jax.lax.optimization_barrier((fixed, grads))
        plain = functools.partial(_plain, self.function, self.moved, fixed)
        return list(jax.vjp(plain, *(fixed[i] for i in self.moved))[1](list(grads)))

    def types(self, *operands: Any) -> list[tuple[tuple[int, ...], Any]]:
        return [(operands[i].shape, operands[i].dtype) for i in self.moved]


class Differentiable(Function, Protocol):
    """A function with derivatives, which are those of its plain form."""

    def gradients(
        self, device: Device, moved: tuple[int, ...], operands: Sequence[jax.Array], grads: Sequence[jax.Array]
    ) -> list[jax.Array] | None:
        """As `Cotangent`, where the plan for a device has gradients of its own; else None."""

    def bind(self, function: Function, device: Device, *operands: jax.Array) -> list[jax.Array]:
        """`bind` of the function itself, or of its `Cotangent`, with the rule by which it is partitioned."""

    def saving(self) -> "Differentiable":
        """The function where its gradient follows."""

    def times(self, copies: int) -> "Differentiable":
        """The function where vmap computes so many derivatives of it at once."""


@dataclasses.dataclass(frozen=True)
class Mapped:
    """A function under vmap."""

    function: Function
    axes: tuple[int | None, ...]

    def __call__(self, device: Device | None, *operands: jax.Array) -> list[jax.Array]:
        return jax.vmap(functools.partial(self.function, device), self.axes)(*operands)

    def partial(self) -> "Mapped":
        """Of a share of a summed axis."""
        return dataclasses.replace(self, function=self.function.partial())  # type: ignore[attr-defined]

    def types(self, *operands: Any) -> list[tuple[tuple[int, ...], Any]]:
        size = next(x.shape[axis] for x, axis in zip(operands, self.axes, strict=True) if axis is not None)
        one = [
            x if axis is None else jax.ShapeDtypeStruct(x.shape[:axis] + x.shape[axis + 1 :], x.dtype)
            for x, axis in zip(operands, self.axes, strict=True)
        ]
        return [((size, *shape), dtype) for shape, dtype in self.function.types(*one)]


def _plain(
    function: Function, moved: Sequence[int], operands: Sequence[jax.Array], *values: jax.Array
) -> list[jax.Array]:
    """The plain form of a function, with values in the place of the operands `moved`."""
    given = list(operands)
    for i, x in zip(moved, values, strict=True):
        given[i] = x
    return function(None, *given)


def warn_caller(message: str) -> None:
    """Warns at the line outside of this package and of JAX that called, however deep within a lowering this is."""
    warnings.warn(message, skip_file_prefixes=_BETWEEN)


_planned_p = Primitive("planned")
_planned_p.multiple_results = True


def bind(function: Function, device: Device, *operands: jax.Array) -> list[jax.Array]:
    """The function's results, planned when they are lowered.

    Args:
      function: What is computed.
      device: For which it is planned where it is lowered for the device's platform.
      *operands: That vary over the same manual axes (`plans.calls.alike`).
    """
    return _planned_p.bind(*operands, function=function, device=device)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def differentiable(function: Differentiable, device: Device, *operands: jax.Array) -> list[jax.Array]:
    """As `bind`, with derivatives in both modes."""
    return function.bind(function, device, *operands)


@functools.partial(differentiable.defjvp, symbolic_zeros=True)
def _differentiable_jvp(
    function: Differentiable, device: Device, operands: tuple[jax.Array, ...], tangents: tuple[Any, ...]
) -> tuple[list[jax.Array], list[jax.Array]]:
    moved = tuple(
        i for i, x in enumerate(tangents) if not isinstance(x, jax.custom_derivatives.SymbolicZero) and _is_float(x)
    )
    # Not bound at once: a second derivative may follow.
    outs = differentiable(function.saving() if moved else function, device, *operands)
    if not moved:
        return outs, [jnp.zeros_like(x) for x in outs]
    return outs, bind(Tangent(function, moved), device, *operands, *(tangents[i] for i in moved))


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


@_planned_p.def_impl
def _planned_impl(*operands: Any, function: Function, device: Device) -> list[jax.Array]:
    arrays = [jnp.asarray(x) for x in operands]
    platform = next(iter(arrays[0].devices())).platform  # reached without jit, under jax.disable_jit
    return function(devices.lowered_for(device.platform if platform == "gpu" else platform, device), *arrays)


@_planned_p.def_abstract_eval
def _planned_types(*avals: Any, function: Function, device: Device) -> list[Any]:
    del device
    return [type_like(avals[0], *found) for found in function.types(*avals)]


def _planned_lowering(platform: str | None, context: Any, *operands: Any, function: Function, device: Device) -> Any:
    planned = None if platform is None else devices.lowered_for(platform, device)
    if planned is None and platform in ("cuda", "rocm"):
        warn_caller(
            f"fdpp_jax runs plain XLA where it is lowered for {platform} and no such device is known; name one: "
            'with fdpp_jax.target("H100"): ...'
        )
    return lower_without_mesh(functools.partial(function, planned), context, operands)


for _platform in _PLATFORMS:
    mlir.register_lowering(_planned_p, functools.partial(_planned_lowering, _platform), platform=_platform)
mlir.register_lowering(_planned_p, functools.partial(_planned_lowering, None))


def _planned_batching(
    operands: Sequence[Any], axes: Sequence[int | None], *, function: Function, device: Device
) -> tuple[list[jax.Array], list[int]]:
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    outs = bind(Mapped(_times(function, size), tuple(axes)), device, *operands)
    return outs, [0] * len(outs)


def _times(function: Function, copies: int) -> Function:
    """A function which vmap computes so often; a derivative knows it, for it may have to hold less."""
    match function:
        case Tangent() | Cotangent():
            return dataclasses.replace(function, function=function.function.times(copies))
        case Mapped():
            return dataclasses.replace(function, function=_times(function.function, copies))
    return function


batching.primitive_batchers[_planned_p] = _planned_batching


def _planned_jvp(
    operands: Sequence[jax.Array], tangents: Sequence[Any], *, function: Function, device: Device
) -> tuple[list[jax.Array], list[Any]]:
    """Of derivatives: the derivative of their plain form."""
    outs = bind(function, device, *operands)
    moved = [i for i, x in enumerate(tangents) if not isinstance(x, ad.Zero) and _is_float(x)]
    plain = functools.partial(_plain, function, moved, operands)
    return outs, jax.jvp(plain, tuple(operands[i] for i in moved), tuple(tangents[i] for i in moved))[1]


ad.primitive_jvps[_planned_p] = _planned_jvp


def _as_the_mesh_is(x: jax.Array) -> jax.Array:
    """x without explicit axes where the mesh has none: what a shard_map saves for its gradient has them again."""
    is_explicit = jax.typeof(x).sharding.mesh.explicit_axes and not jax.sharding.get_abstract_mesh().explicit_axes
    return jax.sharding.reshard(x, P()) if is_explicit else x


def _planned_transpose(grads: Sequence[Any], *operands: Any, function: Function, device: Device) -> list[Any]:
    """Of a tangent, which is linear in its last operands, mapped or not; of anything else by its plain form."""
    linear = [i for i, x in enumerate(operands) if ad.is_undefined_primal(x)]
    if all(isinstance(grad, ad.Zero) for grad in grads):
        return [ad.Zero(x.aval) if ad.is_undefined_primal(x) else None for x in operands]
    grads = [_as_the_mesh_is(ad.instantiate_zeros(grad)) for grad in grads]
    operands = tuple(x if ad.is_undefined_primal(x) else _as_the_mesh_is(x) for x in operands)
    maps: list[Mapped] = []  # outermost first
    tangent = function
    while isinstance(tangent, Mapped):
        maps.append(tangent)
        tangent = tangent.function
    if isinstance(tangent, Tangent) and len(linear) == len(tangent.moved):
        gradient = Cotangent(tangent.function, tangent.moved, len(grads))
        fixed = operands[: -len(linear)]
        if maps:
            found = _mapped_gradient(gradient, maps, device, fixed, grads)
        else:
            found = tangent.function.bind(gradient, device, *fixed, *grads)
    else:
        zeros = [ad.instantiate_zeros(ad.Zero(operands[i].aval)) for i in linear]
        found = jax.vjp(functools.partial(_plain, function, linear, operands), *zeros)[1](grads)
    by_index = dict(zip(linear, found, strict=True))
    return [by_index.get(i) for i in range(len(operands))]


def _mapped_gradient(
    gradient: Cotangent, maps: Sequence[Mapped], device: Device, fixed: Sequence[jax.Array], grads: Sequence[jax.Array]
) -> list[jax.Array]:
    """Gradients for the tangents of a mapped tangent, whose maps come outermost first."""
    function: Function = gradient
    for mapped in reversed(maps):
        function = Mapped(function, (*mapped.axes[: len(fixed)], *[0] * len(grads)))
    found = bind(function, device, *fixed, *grads)
    for depth, mapped in reversed(list(enumerate(maps))):
        axes = mapped.axes[len(fixed) :]
        found = [
            x.sum(depth) if axis is None else jnp.moveaxis(x, depth, depth + axis)
            for x, axis in zip(found, axes, strict=True)
        ]
    return found


ad.primitive_transposes[_planned_p] = _planned_transpose
