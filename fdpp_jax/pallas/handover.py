"""One CTA hands its sums to another through global memory: no counter to zero, so no second launch.

The giver stores them and raises its flag; the taker waits for the flags of all, and reads.

A flag is four words of scratch memory whose earlier content may be anything. It counts as raised when all 128 bits
equal a pattern, and the CTA that waits for it lowers it again: so a flag of an earlier launch is never found raised,
and other data passes for one with a chance of 2^-128.

A CTA may wait only for CTAs of lower index, which the GPU starts before it, and which must not wait for it.
"""

from typing import Any

import jax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

WORDS = 4
MAX_GIVERS = 128  # threads of a CTA
_PATTERN = (0x5F3759DF, 0x2545F491, 0x6C078965, 0x41C64E6D)

# Thread 0, after what all threads stored: the release makes it seen first.
_RAISE = f"""{{
  .reg .pred is_first;
  .reg .b32 thread;
  .reg .b32 w<4>;
  mov.u32 thread, %tid.x;
  setp.eq.u32 is_first, thread, 0;
  mov.b32 w0, {_PATTERN[0]:#x};
  mov.b32 w1, {_PATTERN[1]:#x};
  mov.b32 w2, {_PATTERN[2]:#x};
  mov.b32 w3, {_PATTERN[3]:#x};
  @is_first st.release.gpu.global.v4.b32 [$0], {{w0, w1, w2, w3}};
}}"""

# Thread i polls flag i, so that all are waited for at once.
_AWAIT = f"""{{
  .reg .pred is_idle, is_low;
  .reg .b32 thread, zero;
  .reg .b32 w<4>;
  .reg .b64 flag;
  mov.u32 thread, %tid.x;
  mov.b32 zero, 0;
  mad.wide.u32 flag, thread, {4 * WORDS}, $0;
  setp.ge.u32 is_idle, thread, $1;
  @is_idle bra DONE;
POLL:
  ld.acquire.gpu.global.v4.b32 {{w0, w1, w2, w3}}, [flag];
  setp.ne.b32 is_low, w0, {_PATTERN[0]:#x};
  @is_low bra POLL;
  setp.ne.b32 is_low, w1, {_PATTERN[1]:#x};
  @is_low bra POLL;
  setp.ne.b32 is_low, w2, {_PATTERN[2]:#x};
  @is_low bra POLL;
  setp.ne.b32 is_low, w3, {_PATTERN[3]:#x};
  @is_low bra POLL;
  st.relaxed.gpu.global.v4.b32 [flag], {{zero, zero, zero, zero}};
DONE:
}}"""


def store(value: jax.Array, ref_gmem: Any) -> None:
    """ref_gmem[...] = value straight from registers: JAX 0.12 wants such a layout to pass through shared memory."""
    layout = plgpu.Layout.WGMMA if value.ndim == 2 else plgpu.Layout.WGMMA.reduce(0)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
    def emit(_: Any, ref: Any, value: Any) -> None:
        value.store_untiled(ref, optimized=False)

    emit(ref_gmem, value)


def raise_flag(flag_gmem: Any) -> None:
    """Raises the flag flag_gmem [WORDS]: whoever finds it raised sees what this CTA stored before."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def emit(_: Any, flag: Any) -> None:
        mgpu.utils.warpgroup_barrier()  # thread 0 speaks for all
        mgpu.utils.inline_ptx(_RAISE, mgpu.utils.memref_ptr(flag), has_side_effects=True)

    emit(flag_gmem)


def await_flags(flag_gmem: Any, num: jax.Array) -> None:
    """Waits until `num` flags (at most MAX_GIVERS) from flag_gmem [WORDS] on are raised, and lowers them."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))
    def emit(_: Any, flag: Any, num: Any) -> None:
        arguments = mgpu.utils.memref_ptr(flag), num.registers.item()
        mgpu.utils.inline_ptx(_AWAIT, *arguments, has_side_effects=True, convergent=True)
        mgpu.utils.warpgroup_barrier()

    emit(flag_gmem, num)
