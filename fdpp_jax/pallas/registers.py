"""Registers of an array in Layout.WGMMA, element by element, for PTX of our own."""

from typing import Any

import numpy as np
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
