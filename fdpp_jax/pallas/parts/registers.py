"""Arrays as registers: loads with a layout, and inline PTX, element by element.

Used by both attention kernels and `fused_layer`, and by the parts `handover`, `accumulators` and `grid_sync`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

WARPGROUP_SIZE = 128  # threads
# PTX: declares `thread`, a thread's index in its warpgroup. %tid.x is the index in the CTA, which starts warpgroups at
# multiples of WARPGROUP_SIZE.
THREAD = f"""
  .reg .b32 thread;
  mov.u32 thread, %tid.x;
  and.b32 thread, thread, {WARPGROUP_SIZE - 1};
"""


def load(ref: jax.Ref, layout: Any, *, optimized: bool = True) -> jax.Array:
    """plgpu.load of a ref with a layout.

    Args:
      ref: In global or shared memory.
      layout: Of the registers.
      optimized: Refuse a load that has bank conflicts.
    """
    return plgpu.load(ref, layout=layout, optimized=optimized)  # type: ignore[arg-type]  # the annotation lacks jax.Ref


def extracted(registers: np.ndarray) -> list[ir.Value]:
    """The elements of registers, two per register."""
    return [vector.extract(register, [], [e]) for register in registers.flat for e in range(2)]


def from_elements(elements: Sequence[ir.Value], shape: tuple[int, ...]) -> mgpu.FragmentedArray:
    """The float32 array with these elements, two per register, in the registers' order."""
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
    """PTX for stores to global memory that stay in the L2, since another CTA or the next kernel reads them soon.

    Otherwise the L2 writes them back, which slows the reads of weights: docs/experiments/matmul.md#what-stays-in-the-l2

    Returns:
      Declarations for the block of PTX, the suffix of `st.global`, and its last operand; all empty unless is_kept.
    """
    if not is_kept:
        return "", "", ""
    policy = ".reg .b64 policy;\ncreatepolicy.fractional.L2::evict_last.b64 policy, 1.0;"
    return policy, ".L2::cache_hint", ", policy"


def rounded_product(x: jax.Array, factor: jax.typing.ArrayLike, *, is_interpreted: bool) -> jax.Array:
    """x * factor, rounded to float32. The compiler would fuse the product with a subtraction that follows.

    Args:
      x: float32, in Layout.WGMMA.
      factor: float32 scalar.
      is_interpreted: Whether the interpreter runs the kernel.
    """
    if is_interpreted:
        return lax.optimization_barrier(x * factor)
    returned = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT(())), return_type=returned)
    def emit(_: mgpu.LaunchContext, x: mgpu.FragmentedArray, factor: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        f32, multiplier = ir.F32Type.get(), factor.registers.item()
        products = [
            mgpu.utils.inline_ptx("mul.rn.f32 $0, $1, $2;", element, multiplier, result_types=f32)
            for element in extracted(x.registers)
        ]
        return from_elements(products, x.shape)

    return emit(x, jnp.asarray(factor, jnp.float32))


def any_nonzero(x: jax.Array, layout: Any, *, is_interpreted: bool) -> jax.Array:
    """1 where a number of x is not 0, else 0: the same int32 for all threads of the warpgroup, which meet here.

    Args:
      x: float32 [n].
      layout: Its layout.
      is_interpreted: Whether the interpreter runs the kernel.
    """
    if is_interpreted:
        return (x != 0).any().astype(jnp.int32)
    returned = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=plgpu.Layout.WG_SPLAT(()))

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=returned)
    def emit(_: mgpu.LaunchContext, x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        f32, i1, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(1), ir.IntegerType.get_signless(32)
        zero, is_set = mgpu.utils.c(0.0, f32), mgpu.utils.c(0, i1)
        for register in x.registers.flat:
            element = vector.extract(register, [], [0]) if isinstance(register.type, ir.VectorType) else register
            is_set = arith.ori(is_set, arith.cmpf(arith.CmpFPredicate.UNE, element, zero))
        barrier = mgpu.utils.warpgroup_barrier_idx(sync=False)
        reduce = f"bar.red.or.pred $0, $1, {WARPGROUP_SIZE}, $2;"
        found = mgpu.utils.inline_ptx(reduce, barrier, is_set, result_types=i1, has_side_effects=True)
        return mgpu.FragmentedArray.splat(arith.extui(i32, found), (), is_signed=True)

    return emit(plgpu.layout_cast(x, layout))
