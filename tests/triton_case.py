"""Triton kernels without a GPU: interpreted by numpy, and compiled for GPUs that are not there.

Triton decides when a kernel is decorated whether it is interpreted: set TRITON_INTERPRET=1 before anything imports it.
The interpreter's products of bfloat16 are wrong: interpret float16.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.lib import gpu_triton

from fdpp_jax.plans import installed

# What kernels are compiled for, and the shared memory of a block there.
SHARED_BYTES = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx90a": 64 * 1024,
    "gfx942": 64 * 1024,
}
ARCHITECTURES = tuple(SHARED_BYTES)
_MAX_SPILLED_BYTES = 0 if installed.version("triton") >= (3, 7) else 4  # Triton 3.6: one register, on sm_86
# Of tests that lower whole programs.
needs_plugin = pytest.mark.skipif(
    not hasattr(gpu_triton, "TritonKernel"), reason="needs JAX's plugin for GPUs: .ci/run installs it"
)


def skip_unless_compiled_for(arch):
    """Skips, with the reason, what the Triton that is here does not compile, and is refused on a GPU."""
    if (refusal := installed.refuse_triton(arch)) is not None:
        pytest.skip(refusal)


class HostTensor:
    """What the interpreter needs of a tensor of PyTorch, over an array of numpy."""

    device = "cpu"

    def __init__(self, array):
        self.array = array
        self.dtype = str(array.dtype)

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def copy_(self, other):
        assert other is self or other.array is self.array

    def new_empty(self, *_, **__):
        return HostTensor(self.array)

    def set_(self, storage, *_):
        self.array = storage.array

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return self.array.strides


def _guarded(array, guard=1024):
    """A copy of an array between bytes that are NaN, or large numbers: a read beyond it shows."""
    flat = np.frombuffer(np.full(array.nbytes + 2 * guard, 0x7F, np.uint8), array.dtype)
    inside = flat[guard // array.itemsize :][: array.size].reshape(array.shape)
    inside[...] = array
    return inside


def call(kernel, *arrays, results, grid, arch, num_warps, num_stages, zeroed=(), updated=(), **constants):
    """As `bridge.call`, interpreted. Results that are not zeroed start as NaN, or large numbers."""
    del arch, num_warps, num_stages
    after = [jax.ShapeDtypeStruct(arrays[i].shape, arrays[i].dtype) for i in updated]
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}

    def run(*operands):
        outs = [
            np.zeros(r.shape, r.dtype)
            if i in zeroed
            else np.full(r.shape, np.nan if jnp.issubdtype(r.dtype, jnp.inexact) else 1 << 6, r.dtype)
            for i, r in enumerate(results)
        ]
        tensors = [HostTensor(_guarded(np.asarray(x))) for x in (*operands, *outs)]
        kernel[grid](*tensors, **constants)
        return [t.array for t in (*tensors[len(operands) :], *(tensors[i] for i in updated))]

    return list(jax.pure_callback(run, [*results, *after], *arrays))


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a kernel: the arguments of `bridge.call`, arrays as their shapes and dtypes."""

    kernel: object
    arrays: tuple
    results: tuple
    grid: tuple
    arch: str
    num_warps: int
    num_stages: int
    zeroed: tuple
    updated: tuple
    constants: dict


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel as a GPU would run it."""

    name: str
    arch: str
    assembly: str  # PTX, or AMD's
    shared_bytes: int
    spilled_bytes: int
    num_registers: int  # of a thread

    @property
    def has_matrix_products(self):
        """Whether the tensor cores, or AMD's matrix cores, multiply."""
        return re.search(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma", self.assembly) is not None

    @property
    def has_async_copies(self):
        """Whether tiles are copied into shared memory while others are computed with."""
        return re.search(r"cp\.async|buffer_load.* lds", self.assembly) is not None

    def check_fits(self):
        """Fails unless the GPU can run the kernel without spills."""
        assert self.shared_bytes <= SHARED_BYTES[self.arch], f"{self.name} on {self.arch}: {self.shared_bytes} B shared"
        assert self.spilled_bytes <= _MAX_SPILLED_BYTES, f"{self.name} on {self.arch}: {self.spilled_bytes} B spilled"


def calls_of(function, *operands):
    """The calls of kernels that a function makes, traced with operands that have a shape and a dtype: no GPU is needed.

    Of a host function that takes more than arrays, trace `functools.partial` of it.
    """
    from fdpp_jax.triton import bridge

    found = []

    def record(kernel, *arrays, results, grid, arch, num_warps, num_stages, zeroed=(), updated=(), **constants):
        avals = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
        lists = map(tuple, (zeroed, updated))
        found.append(Call(kernel, avals, tuple(results), tuple(grid), arch, num_warps, num_stages, *lists, constants))
        return [jnp.zeros(x.shape, x.dtype) for x in (*results, *(avals[i] for i in updated))]

    original, bridge.call = bridge.call, record
    try:
        jax.clear_caches()  # a function that is jitted within would not be traced again
        jax.eval_shape(function, *operands)
    finally:
        bridge.call = original
        jax.clear_caches()
    return found


def compiled(call):
    """The kernel of a call, compiled for the call's arch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    pointers = [jnp.dtype(x.dtype).name for x in (*call.arrays, *call.results)]
    names = call.kernel.arg_names
    signature = {name: f"*{_TRITON_TYPES[dtype]}" for name, dtype in zip(names, pointers, strict=False)}
    constants = {(names.index(name),): value for name, value in call.constants.items()}
    signature |= {names[i]: "constexpr" for (i,) in constants}
    assert list(signature) == [name for name in names if name in signature], "pointers come first, then constants"
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
    source = triton.compiler.ASTSource(call.kernel, signature, constants, aligned)
    is_amd = call.arch.startswith("gfx")
    target = GPUTarget("hip", call.arch, 64) if is_amd else GPUTarget("cuda", int(call.arch.removeprefix("sm_")), 32)
    options = dict(num_warps=call.num_warps, num_stages=call.num_stages, enable_fp_fusion=True)
    # PTX is assembled once, below, where the assembler says what it needs.
    assembled = contextlib.nullcontext() if is_amd else mock.patch.object(CUDABackend, "make_cubin", return_value=b"")
    with _caches_nothing(triton), assembled:
        binary = triton.compile(source, target=target, options=options)
    assembly = binary.asm["amdgcn" if is_amd else "ptx"]
    spilled, registers = _of_amd(assembly) if is_amd else _of_ptxas(assembly, call.arch)
    return Compiled(call.kernel.__name__, call.arch, assembly, binary.metadata.shared, spilled, registers)


_TRITON_TYPES = dict(
    bfloat16="bf16", float16="fp16", float32="fp32", int8="i8", int32="i32", bool="i1", float8_e4m3fn="fp8e4nv"
)


@contextlib.contextmanager
def _caches_nothing(triton):
    """What is compiled is not kept for the user."""
    before = triton.knobs.cache.dir
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        try:
            yield
        finally:
            triton.knobs.cache.dir = before


@functools.cache
def _of_ptxas(ptx, arch):
    """Bytes spilled and registers, by the assembler that comes with Triton."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target (sm_\w+)", ptx)[1]
    assert target.rstrip("a") == arch
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.ptx")
        pathlib.Path(path).write_text(ptx, encoding="utf-8")
        command = [get_ptxas(int(arch.removeprefix("sm_"))).path, "-v", f"-arch={target}", path, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    return max(map(int, spills.groups())), int(re.search(r"Used (\d+) registers", done.stderr)[1])


def _of_amd(assembly):
    """Bytes spilled and vector registers, from a kernel's metadata."""
    spills = re.findall(r"\.[sv]gpr_spill_count: *(\d+)", assembly)
    scratch = re.search(r"\.private_segment_fixed_size: *(\d+)", assembly)
    return max(int(scratch[1]), 4 * sum(map(int, spills))), int(re.search(r"\.vgpr_count: *(\d+)", assembly)[1])
