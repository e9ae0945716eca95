"""CTAs of one launch wait for each other's results: counters in global memory, one for each piece of a result.

A CTA stores a part of the result and counts it; whoever needs the piece polls until all parts of it are counted. That
is sound only if all CTAs of the launch run at once, so there may be no more of them than the GPU holds.

Counters start at zero. Whoever knows that a row of them is no longer waited for clears it; the last row of a launch is
cleared by the next one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from fdpp_jax.config import MAX_COUNTERS

_WORDS = 8  # from one counter to the next: a 32-byte sector each

_THREAD = """
  .reg .pred is_mine;
  .reg .b32 thread;
  mov.u32 thread, %tid.x;
  and.b32 thread, thread, 127;
"""
# What this warpgroup stored is visible to whoever sees the count.
_COUNT = f"""{{{_THREAD}
  setp.eq.u32 is_mine, thread, 0;
  @is_mine red.release.gpu.global.add.u32 [$0], 1;
}}"""
_AWAIT = f"""{{{_THREAD}
  .reg .b32 count;
  setp.ne.u32 is_mine, thread, 0;
  @is_mine bra DONE;
POLL:
  ld.acquire.gpu.global.u32 count, [$0];
  setp.lt.u32 is_mine, count, $1;
  @is_mine bra POLL;
DONE:
}}"""
# The thread of a counter waits for the parts that are left to it of all, at most those of a whole piece.
_AWAIT_ROW = f"""{{{_THREAD}
  .reg .b32 wanted, count;
  .reg .b64 address;
  mad.wide.u32 address, thread, {4 * _WORDS}, $0;
  mul.lo.u32 wanted, thread, $2;
  sub.s32 wanted, $1, wanted;
  min.s32 wanted, wanted, $2;
  setp.le.s32 is_mine, wanted, 0;
  @is_mine bra DONE;
POLL:
  ld.acquire.gpu.global.u32 count, [address];
  setp.lt.u32 is_mine, count, wanted;
  @is_mine bra POLL;
DONE:
}}"""
# Of the warp's 32 threads each polls a piece, from the first one on, until that is done; how many are in a row.
_AWAIT_AHEAD = f"""{{{_THREAD}
  .reg .pred is_there;
  .reg .b32 piece, wanted, count, pending;
  .reg .b64 address;
  setp.ge.u32 is_mine, thread, 32;
  @is_mine bra DONE;
  add.u32 piece, thread, $2;
  mul.lo.u32 wanted, piece, PER_COUNTER;
  sub.s32 wanted, ALL_PARTS, wanted;
  setp.gt.s32 is_there, wanted, 0;
  min.s32 wanted, wanted, PER_COUNTER;
  mad.wide.u32 address, piece, {4 * _WORDS}, $0;
  mov.b32 count, 0;
POLL:
  @is_there ld.acquire.gpu.global.u32 count, [address];
  setp.ge.and.u32 is_mine, count, wanted, is_there;
  vote.sync.ballot.b32 pending, is_mine, 0xffffffff;
  not.b32 pending, pending;
  brev.b32 pending, pending;
  clz.b32 pending, pending;
  setp.eq.u32 is_mine, pending, 0;
  @is_mine bra POLL;
  add.u32 pending, pending, $2;
  setp.eq.u32 is_mine, thread, 0;
  @is_mine st.shared.u32 [$1], pending;
DONE:
}}"""
_CLEAR = f"""{{{_THREAD}
  .reg .b64 address;
  mad.wide.u32 address, thread, {4 * _WORDS}, $0;
CLEAR:
  setp.lt.u32 is_mine, thread, $1;
  @is_mine st.relaxed.gpu.global.u32 [address], 0;
  add.u32 thread, thread, 128;
  add.u64 address, address, {128 * 4 * _WORDS};
  @is_mine bra CLEAR;
}}"""
# TMA reads by a way of its own (the async proxy). One fence between a store and its load by TMA does: where it loads,
# since where it was stored the fence would wait behind all loads of weights that are under way.
_PROXY_FENCE = "fence.proxy.async.global;"


def counters(num_rows: int, num_counters: int) -> jax.Array:
    """Counters at zero: [num_rows, num_counters, words]."""
    return jnp.zeros((num_rows, num_counters, _WORDS), jnp.int32)


def count(counter_gmem: Any) -> None:
    """Counts what this warpgroup has stored to global memory, for all who await the counter."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def emit(_: Any, counter: Any) -> None:
        mgpu.utils.warpgroup_barrier()
        mgpu.utils.inline_ptx(_COUNT, mgpu.utils.memref_ptr(counter), has_side_effects=True)

    emit(counter_gmem)


def await_count(counter_gmem: Any, num_parts: jax.Array) -> None:
    """Waits until num_parts [] int32 parts are counted; this warpgroup and its TMA loads see them then."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))
    def emit(_: Any, counter: Any, num_parts: Any) -> None:
        mgpu.utils.inline_ptx(
            _AWAIT,
            mgpu.utils.memref_ptr(counter),
            num_parts.registers.item(),
            has_side_effects=True,
            convergent=True,
        )
        mgpu.utils.warpgroup_barrier()
        mgpu.utils.inline_ptx(_PROXY_FENCE, has_side_effects=True)

    emit(counter_gmem, num_parts)


def await_ahead(row_gmem: Any, first: jax.Array, num_parts: int, parts_per_counter: int, seen_smem: Any) -> jax.Array:
    """Waits until a piece is done, and sees how many after it are, too: a look at a counter takes as long as a tile.

    Args:
      row_gmem: Counters [num_counters, words] of all num_parts parts of a result, parts_per_counter in each.
      first: [] int32, the piece.
      num_parts: In all.
      parts_per_counter: Of a whole piece.
      seen_smem: [1] int32, of this warpgroup alone.

    Returns:
      [] int32: all pieces from `first` up to this one are done; this warpgroup and its TMA loads see them.
    """
    returned = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=plgpu.Layout.WG_SPLAT(()))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT(())), return_type=returned)
    def emit(_: Any, row: Any, seen: Any, first: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        place = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(seen))
        text = _AWAIT_AHEAD.replace("ALL_PARTS", str(num_parts)).replace("PER_COUNTER", str(parts_per_counter))
        arguments = mgpu.utils.memref_ptr(row), place, first.registers.item()
        mgpu.utils.inline_ptx(text, *arguments, has_side_effects=True, convergent=True)
        mgpu.utils.warpgroup_barrier()
        end = mgpu.utils.inline_ptx("ld.shared.u32 $0, [$1];", place, result_types=i32, has_side_effects=True)
        mgpu.utils.warpgroup_barrier()  # all have read it before the next one is stored
        mgpu.utils.inline_ptx(_PROXY_FENCE, has_side_effects=True)
        return mgpu.FragmentedArray.splat(end, (), is_signed=True)

    return emit(row_gmem, seen_smem, first)


def await_row(row_gmem: Any, num_parts: int, parts_per_counter: int) -> None:
    """Waits until all num_parts parts of a result are counted, parts_per_counter in each counter of the row."""
    if num_parts > MAX_COUNTERS * parts_per_counter:
        raise ValueError(f"expected at most {MAX_COUNTERS} counters in a row, got {num_parts / parts_per_counter}")

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def emit(_: Any, row: Any) -> None:
        text = _AWAIT_ROW.replace("$1", str(num_parts)).replace("$2", str(parts_per_counter))
        mgpu.utils.inline_ptx(text, mgpu.utils.memref_ptr(row), has_side_effects=True, convergent=True)
        mgpu.utils.warpgroup_barrier()

    emit(row_gmem)


def clear(row_gmem: Any) -> None:
    """Sets a row of counters [num_counters, words] to zero; nobody may be waiting for one."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def emit(_: Any, row: Any) -> None:
        text = _CLEAR.replace("$1", str(row_gmem.shape[0]))
        mgpu.utils.inline_ptx(text, mgpu.utils.memref_ptr(row), has_side_effects=True)
        mgpu.utils.warpgroup_barrier()

    emit(row_gmem)
