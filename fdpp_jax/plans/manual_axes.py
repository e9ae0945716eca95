"""Kernels within `jax.shard_map`: what their results vary over, which `check_vma=True` checks.

Neither Pallas nor jax-triton says what results vary over, and Pallas takes no varying refs. So a wrapper whose arrays
vary over a mesh axis becomes a primitive, which says it, and which is traced again without mesh axes where it is
lowered.

Used by all kernels: those of Triton through their bridge.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from fdpp_jax.plans.calls import alike, lower_without_mesh, type_like


def vary_as_operands[**P, R](wrapper: Callable[P, R]) -> Callable[P, R]:
    """The host wrapper of a kernel, whose results vary over every mesh axis that one of its arrays varies over."""

    @functools.wraps(wrapper)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        leaves, tree = jax.tree.flatten((args, kwargs))
        indices = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]
        arrays = alike([leaves[i] for i in indices])
        if not arrays or not jax.typeof(arrays[0]).mat.varying:
            return wrapper(*args, **kwargs)

        def of_arrays(*arrays: jax.Array) -> R:
            given = list(leaves)
            for i, x in zip(indices, arrays, strict=True):
                given[i] = x
            args, kwargs = jax.tree.unflatten(tree, given)
            return wrapper(*args, **kwargs)

        types, out_tree = jax.tree.flatten(
            jax.eval_shape(of_arrays, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays))
        )
        results = _kernel_p.bind(*arrays, call=of_arrays, types=tuple((x.shape, x.dtype) for x in types))
        found: R = jax.tree.unflatten(out_tree, results)
        return found

    return call


_kernel_p = Primitive("kernel")
_kernel_p.multiple_results = True


@_kernel_p.def_abstract_eval
def _types(first: Any, *_: Any, call: Callable[..., Any], types: Sequence[Any]) -> list[Any]:
    del call
    return [type_like(first, *found) for found in types]


def _lowering(context: Any, *operands: Any, call: Callable[..., Any], types: Sequence[Any]) -> Any:
    del types
    return lower_without_mesh(lambda *arrays: jax.tree.leaves(call(*arrays)), context, operands)


mlir.register_lowering(_kernel_p, _lowering)
