"""CTAs of one launch wait for each other's results: a counter in global memory per piece of a result.

Used by `fused_layer`.

A CTA stores a part of the result and counts it. A CTA that needs a piece polls its counter until all parts are counted.
This needs all CTAs of the launch to run at once, so a launch may have no more CTAs than the GPU holds.

Counters start at zero. A CTA that knows that a row of counters is no longer awaited clears the row. The next launch
clears the last rows.
"""

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from fdpp_jax.pallas.parts.registers import THREAD, WARPGROUP_SIZE
from fdpp_jax.plans.hopper_layer import MAX_COUNTERS

_WORDS = 8  # per counter: a sector of 32 bytes

# Whoever sees the count sees what the warpgroup stored before, by the barrier before and the release.
_COUNT = f"""{{{THREAD}
  .reg .pred is_mine;
  setp.eq.u32 is_mine, thread, 0;
  @is_mine red.release.gpu.global.add.u32 [$0], 1;
}}"""
_AWAIT = f"""{{{THREAD}
  .reg .pred is_mine;
  .reg .b32 count;
  setp.ne.u32 is_mine, thread, 0;
  @is_mine bra DONE;
POLL:
  ld.acquire.gpu.global.u32 count, [$0];
  setp.lt.u32 is_mine, count, $1;
  @is_mine bra POLL;
DONE:
}}"""
# Thread i waits until counter i reaches its share of the parts: a whole piece, or what is left for the last piece.
_AWAIT_ROW = f"""{{{THREAD}
  .reg .pred is_mine;
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
# Lane i of the first warp polls piece $2 + i until piece $2 is complete. The result is the end of the pieces that are
# complete without a gap.
_AWAIT_AHEAD = f"""{{{THREAD}
  .reg .pred is_mine, is_there;
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
_CLEAR = f"""{{{THREAD}
  .reg .pred is_mine;
  .reg .b64 address;
  mad.wide.u32 address, thread, {4 * _WORDS}, $0;
CLEAR:
  setp.lt.u32 is_mine, thread, $1;
  @is_mine st.relaxed.gpu.global.u32 [address], 0;
  add.u32 thread, thread, {WARPGROUP_SIZE};
  add.u64 address, address, {WARPGROUP_SIZE * 4 * _WORDS};
  @is_mine bra CLEAR;
}}"""
# TMA reads through the async proxy, so a fence must stand between a store and its load by TMA. The fence stands at the
# load: at the store it would wait for all loads of weights under way.
_PROXY_FENCE = "fence.proxy.async.global;"


def counters(num_rows: int, num_counters: int) -> jax.Array:
    """Counters at zero: [num_rows, num_counters, words]."""
    return jnp.zeros((num_rows, num_counters, _WORDS), jnp.int32)


def count(counter_gmem: jax.Ref) -> None:
    """Counts a part that this warpgroup has stored to global memory."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def emit(_: mgpu.LaunchContext, counter: ir.Value) -> None:
        mgpu.utils.warpgroup_barrier()
        mgpu.utils.inline_ptx(_COUNT, mgpu.utils.memref_ptr(counter), has_side_effects=True)

    emit(counter_gmem)


def await_count(counter_gmem: jax.Ref, num_parts: jax.Array) -> None:
    """Waits until num_parts [] int32 parts are counted. This warpgroup and its TMA loads then see the parts."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))
    def emit(_: mgpu.LaunchContext, counter: ir.Value, num_parts: mgpu.FragmentedArray) -> None:
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


def await_ahead(
    row_gmem: jax.Ref, first: jax.Array, num_parts: int, parts_per_counter: int, seen_smem: jax.Ref
) -> jax.Array:
    """Waits until a piece is complete, and tells how many pieces after it are complete already.

    Polling a counter takes about as long as a tile, so a caller should not poll pieces that this call has seen.

    Args:
      row_gmem: [num_counters, words], the counters of a result.
      first: [] int32, the piece.
      num_parts: Parts of the whole result.
      parts_per_counter: Parts of a whole piece.
      seen_smem: [1] int32, for this warpgroup alone.

    Returns:
      [] int32, end of the pieces from `first` on that are complete. This warpgroup and its TMA loads see these pieces.
    """
    returned = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=plgpu.Layout.WG_SPLAT(()))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT(())), return_type=returned)
    def emit(_: mgpu.LaunchContext, row: ir.Value, seen: ir.Value, first: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        i32 = ir.IntegerType.get_signless(32)
        place = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(seen))
        text = _AWAIT_AHEAD.replace("ALL_PARTS", str(num_parts)).replace("PER_COUNTER", str(parts_per_counter))
        arguments = mgpu.utils.memref_ptr(row), place, first.registers.item()
        mgpu.utils.inline_ptx(text, *arguments, has_side_effects=True, convergent=True)
        mgpu.utils.warpgroup_barrier()
        end = mgpu.utils.inline_ptx("ld.shared.u32 $0, [$1];", place, result_types=i32, has_side_effects=True)
        mgpu.utils.warpgroup_barrier()  # all threads have read `seen` before the next call writes it
        mgpu.utils.inline_ptx(_PROXY_FENCE, has_side_effects=True)
        return mgpu.FragmentedArray.splat(end, (), is_signed=True)

    return emit(row_gmem, seen_smem, first)


def await_row(row_gmem: jax.Ref, num_parts: int, parts_per_counter: int) -> None:
    """Waits until all num_parts parts of a result are counted, parts_per_counter per counter of the row."""
    if num_parts > MAX_COUNTERS * parts_per_counter:
        raise ValueError(f"expected at most {MAX_COUNTERS} counters in a row, got {num_parts / parts_per_counter}")

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def emit(_: mgpu.LaunchContext, row: ir.Value) -> None:
        text = _AWAIT_ROW.replace("$1", str(num_parts)).replace("$2", str(parts_per_counter))
        mgpu.utils.inline_ptx(text, mgpu.utils.memref_ptr(row), has_side_effects=True, convergent=True)
        mgpu.utils.warpgroup_barrier()

    emit(row_gmem)


def clear(row_gmem: jax.Ref) -> None:
    """Sets a row of counters [num_counters, words], which no CTA awaits, to zero."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def emit(_: mgpu.LaunchContext, row: ir.Value) -> None:
        text = _CLEAR.replace("$1", str(row_gmem.shape[0]))
        mgpu.utils.inline_ptx(text, mgpu.utils.memref_ptr(row), has_side_effects=True)
        mgpu.utils.warpgroup_barrier()

    emit(row_gmem)
