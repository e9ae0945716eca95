"""The one place that knows jax-triton: calls a Triton kernel within a JAX program.

jax-triton compiles a kernel when its call is lowered, for any GPU on any host. On NVIDIA GPUs the lowered program holds
the PTX. On AMD GPUs it names a file, which the process that lowered it owns: such a program cannot be exported.
"""

import copy
import functools
import os
import types
import warnings
from collections.abc import Sequence
from typing import Any

import jax
from jax._src.interpreters import partial_eval
from jax._src.lib import gpu_triton
from jax.interpreters import mlir
from jaxlib.mlir import ir

from fdpp_jax.plans import device, installed, triton
from fdpp_jax.plans.manual_axes import vary_as_operands

_HAS_PLUGIN = hasattr(gpu_triton, "TritonKernel")
_NO_PLUGIN = (
    "Triton kernels are lowered with JAX's plugin for GPUs, which is not here or not of jaxlib's version: "
    "pip install 'fdpp-jax[cuda13,triton]'"
)
if not _HAS_PLUGIN and installed.version("jax-triton") < (0, 4):  # which cannot even be imported
    raise ImportError(_NO_PLUGIN)

_CACHE_DIR = os.environ.get("TRITON_CACHE_DIR")

import jax_triton  # noqa: E402
from jax_triton import triton_lib  # noqa: E402
from triton.backends.amd.compiler import HIPBackend  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

# The import unsets the variable, or sets it to nothing: other users of Triton in the process would cache elsewhere.
if _CACHE_DIR is None:
    os.environ.pop("TRITON_CACHE_DIR", None)
else:
    os.environ["TRITON_CACHE_DIR"] = _CACHE_DIR

_IS_BEFORE_0_4 = jax_triton.__version_info__ < (0, 4)


def _arch_number(arch: str) -> int:
    """ "sm_80" -> 80, and "gfx90a" -> 0x90a: jax-triton hands on an integer."""
    return int(arch.removeprefix("sm_")) if arch.startswith("sm_") else int(arch.removeprefix("gfx"), 16)


def _hip_target(number: int, num_ctas: int) -> GPUTarget:
    """The target of the arch that has the number. jax-triton's own asks the GPU that runs, and needs one."""
    del num_ctas
    triton_lib._patch_hip_backend()
    return GPUTarget("hip", f"gfx{number:x}", 64)


def _hip_backend(device: int, number: int) -> HIPBackend:
    """As `_hip_target`, for jax-triton before 0.4."""
    del device
    return HIPBackend(_hip_target(number, 1))


def _compile_for_amd(compile_ttir: Any, ttir: Any, backend: HIPBackend, options: Any, *rest: Any) -> Any:
    """With the number of CTAs among the metadata, where Triton reads it from 3.7 on."""
    own = copy.copy(backend)
    own.make_llir = lambda source, metadata, options: backend.make_llir(  # type: ignore[method-assign]
        source, _with(metadata, num_ctas=options.num_ctas), options
    )
    return compile_ttir(ttir, own, options, *rest)


def _with(metadata: dict[str, Any], **more: Any) -> dict[str, Any]:
    metadata.update(more)
    return metadata


def _dce_rule(used: list[bool], *rest: Any) -> tuple[list[bool], Any]:
    """Keeps a kernel's call, whatever of its results is used."""
    equation = rest[-1]
    return [True] * len(equation.invars), equation


def _lower_as_ffi(make_target: Any, context: Any, *operands: Any, **parameters: Any) -> Any:
    """As jax-triton 0.4 lowers a call: XLA may record it into a CUDA graph, and what is updated has one pointer.

    The launch takes its parameters from the buffers in their order. Those of updated arrays as results come last.
    """
    updated = dict(parameters.pop("input_output_aliases"))
    others = context.replace(avals_out=context.avals_out[: len(context.avals_out) - len(updated)])
    call = triton_lib.triton_kernel_call_lowering(
        make_target, others, *operands, input_output_aliases=(), **parameters
    )[0].owner
    config = ir.StringAttr(call.attributes["backend_config"]).value_bytes
    call.erase()
    lower = jax.ffi.ffi_lowering("triton_kernel_call_ffi", operand_output_aliases=updated)
    return lower(context, *operands, opaque=config)


def _assembled_for(number: int) -> int:
    """The architecture for which XLA assembles PTX for a number: that of the GPU, where it runs code of older ones.

    Else the program would hold what is assembled for an older GPU alone.
    """
    gpu = device.lowered_for("cuda", device.planned())
    is_portable = 0 < number < triton.FIRST_FOR_ITSELF  # and not AMD's
    return max(number, gpu.compute_capability) if is_portable and gpu is not None else number


def _kernel_call(kernel: Any, *rest: Any) -> Any:
    """A call of what jax-triton keeps of a compiled kernel, which is the same whatever GPU it is assembled for."""
    number = _assembled_for(kernel[_NUMBER])
    return gpu_triton.TritonKernelCall(
        gpu_triton.TritonKernel(*kernel[:_NUMBER], number, *kernel[_NUMBER + 1 :]), *rest
    )


_NUMBER = 6  # of the arguments of TritonKernel
_call_p = triton_lib.triton_kernel_call_p
triton_lib.triton_kernel_call_lib = types.SimpleNamespace(
    **vars(gpu_triton) | dict(TritonKernel=lambda *arguments: arguments, TritonKernelCall=_kernel_call)
)
triton_lib.compile_ttir_to_hsaco_inplace = functools.partial(_compile_for_amd, triton_lib.compile_ttir_to_hsaco_inplace)
if _IS_BEFORE_0_4:
    for _platform, _make in (("cuda", triton_lib.get_cuda_backend), ("rocm", _hip_backend)):
        mlir.register_lowering(_call_p, functools.partial(_lower_as_ffi, _make), platform=_platform)
else:
    _lower = functools.partial(triton_lib.triton_kernel_call_lowering, _hip_target)
    mlir.register_lowering(_call_p, _lower, platform="rocm")
    partial_eval.dce_rules[_call_p] = _dce_rule  # its own takes two arguments, and JAX 0.12 passes three


@vary_as_operands
def call(
    kernel: Any,
    *arrays: jax.Array,
    results: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    arch: str,
    num_warps: int,
    num_stages: int,
    zeroed: Sequence[int] = (),
    updated: Sequence[int] = (),
    **constants: Any,
) -> list[jax.Array]:
    """Calls a kernel, whose parameters are pointers to arrays, pointers to results, then constants.

    Args:
      kernel: A `triton.jit` function.
      *arrays: Its operands, each row-major.
      results: Shapes and dtypes of its results; at least one.
      grid: Programs along up to three axes.
      arch: What it is compiled for: "sm_80", "gfx90a", ...
      num_warps: Of a program.
      num_stages: Of its pipelined loops.
      zeroed: Which results are zeros when the kernel starts; the others may hold anything.
      updated: Which arrays it writes into; donate them, or XLA copies them.
      **constants: Its `tl.constexpr` parameters.

    Returns:
      The results, and behind them the updated arrays.

    Raises:
      ImportError: JAX's plugin for GPUs is not here.
    """
    if not _HAS_PLUGIN:
        raise ImportError(_NO_PLUGIN)
    types = *results, *(jax.ShapeDtypeStruct(arrays[i].shape, arrays[i].dtype) for i in updated)
    if _IS_BEFORE_0_4:
        own: dict[str, Any] = dict(out_shape=types, enable_fp_fusion=True)
    else:
        # Where it is not said, Triton 3.9 warns that the default will change.
        own = dict(out_type=types, backend_options={"enable_fp_fusion": True})
    with warnings.catch_warnings():  # of zeroed and updated arrays, which jax-triton would rather see as references
        warnings.simplefilter("ignore", DeprecationWarning)
        found = jax_triton.triton_call(
            *arrays,
            kernel=kernel,
            grid=grid,
            compute_capability=_arch_number(arch),
            num_warps=num_warps,
            num_stages=num_stages,
            zeroed_outputs=tuple(zeroed),
            input_output_aliases={i: len(results) + position for position, i in enumerate(updated)},
            name=kernel.__name__,
            **own,
            **constants,
        )
    return list(found)
