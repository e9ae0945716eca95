"""Registers of an array in Layout.WGMMA, element by element, for PTX of our own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector


def extracted(registers: np.ndarray) -> list[Any]:
    """Their elements, two of each register."""
    return [vector.extract(register, [], [e]) for register in registers.flat for e in range(2)]


def from_elements(elements: Any, shape: tuple[int, ...]) -> Any:
    """The float32 array whose registers hold two elements each, in their order."""
    layout, pair = plgpu.Layout.WGMMA.to_mgpu(), ir.VectorType.get((2,), ir.F32Type.get())
    registers = np.empty(len(elements) // 2, object)
    for i in range(len(registers)):
        registers[i] = vector.from_elements(pair, elements[2 * i : 2 * i + 2])
    registers = registers.reshape(layout.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def ptx_block(*lines: str) -> str:
    """PTX with registers of its own."""
    return "\n".join(["{", *lines, "}"])


def kept_in_l2(is_kept: bool) -> tuple[str, str, str]:
    """PTX for stores to global memory that stay in the L2, as another CTA or the next kernel reads them soon.

    Else the L2 writes them back among the reads of weights, which takes 1 us for each MB (H200).

    Returns:
      What a block of PTX declares before, the suffix of `st.global`, and its last operand; empty unless is_kept.
    """
    if not is_kept:
        return "", "", ""
    policy = ".reg .b64 policy;\ncreatepolicy.fractional.L2::evict_last.b64 policy, 1.0;"
    return policy, ".L2::cache_hint", ", policy"


def rounded_product(x: jax.Array, factor: Any, *, is_interpreted: bool) -> jax.Array:
    """x * factor, rounded to float32: the compiler would multiply and subtract in one step, and round only then.

    Args:
      x: float32, in Layout.WGMMA.
      factor: float32 scalar.
      is_interpreted: Whether there are registers.
    """
    if is_interpreted:
        return lax.optimization_barrier(x * factor)
    returned = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT(())), return_type=returned)
    def emit(_: Any, x: Any, factor: Any) -> Any:
        f32, factor = ir.F32Type.get(), factor.registers.item()
        products = [
            mgpu.utils.inline_ptx("mul.rn.f32 $0, $1, $2;", element, factor, result_types=f32)
            for element in extracted(x.registers)
        ]
        return from_elements(products, x.shape)

    return emit(x, jnp.asarray(factor, jnp.float32))
