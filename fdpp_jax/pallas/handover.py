"""One CTA hands its sums to another, through global memory or, in a cluster, through the taker's shared memory.

The giver stores them and raises its flag; the taker waits for the flags of all, and loads them. Of sums [H, rows] only
the live rows pass through memory. No counter has to be zeroed, so there is no second launch.

A flag is four words of scratch memory whose earlier content may be anything. It counts as raised when all 128 bits
equal a pattern, and the CTA that waits for it lowers it again: so a flag of an earlier launch is never found raised,
and other data passes for one with a chance of 2^-128.

A CTA may wait only for CTAs of lower index, which the GPU starts before it, and which must not wait for it. Those of a
cluster start together, and its barrier takes the place of the flags: the givers arrive, and the taker waits.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm

from fdpp_jax.pallas.registers import extracted, from_elements, kept_in_l2, ptx_block

WORDS = 4
MAX_GIVERS = 128  # threads of a CTA
# Of a cluster: what this thread stored before it arrived is seen by those that have waited for all to arrive.
_ARRIVE = "barrier.cluster.arrive.release.aligned;"
_AWAIT_CLUSTER = "barrier.cluster.wait.acquire.aligned;"
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


# How sums [H, rows] lie in memory, [pairs of live rows, 2 H]: a thread (warp w, lane 4 g + t) holds 2 x 2 of every
# 16 x 8 of them, h = 64 m + 16 w + 8 r + g of rows 8 n + 2 t + e, in registers as wgmma left them. The four of r and e
# are neighbours, and those of the eight g follow upon each other: whole sectors of 32 bytes, in loads of 16 bytes. This
# locates the four of m = 0 for one n; the next m lies 512 bytes on.
_LOCATE = """
  .reg .pred condition;
  .reg .b32 pair, place;
  .reg .b64 address;
  mov.u32 place, %tid.x;
  and.b32 pair, place, 3;
  shr.u32 place, place, 2;
  add.u32 pair, pair, {first_pair};
  {choose}
  mad.lo.u32 place, pair, {pair_words}, place;
  mad.wide.u32 address, place, 16, {base};
"""


def num_pairs(live_rows: int) -> int:
    """Pairs of rows in memory."""
    return -(-live_rows // 2)


def packed(num: jax.Array, live_rows: int) -> jax.Array:
    """num [H, rows] as store() leaves it in memory: [pairs, 2 H]."""
    head_dim, pairs = num.shape[0], num_pairs(live_rows)
    num = num.T[: 2 * pairs].reshape(pairs, 2, head_dim // 64, 4, 2, 8)  # pair, e, m, w, r, g
    return num.transpose(0, 2, 3, 5, 4, 1).reshape(pairs, 2 * head_dim)


def unpacked(num: jax.Array) -> jax.Array:
    """[..., pairs, 2 H] from memory as [..., 2 pairs, H]; of an odd number of live rows the last one is no row."""
    *batch, pairs, width = num.shape
    num = num.reshape(*batch, pairs, width // 128, 4, 8, 2, 2)  # pair, m, w, g, r, e
    last = tuple(len(batch) + axis for axis in (0, 5, 1, 2, 4, 3))
    return num.transpose(*range(len(batch)), *last).reshape(*batch, 2 * pairs, width // 2)


def store(value: jax.Array, place: Any, taker: jax.Array | None = None) -> None:
    """Stores straight from registers: JAX 0.12 wants such layouts to pass through shared memory.

    Args:
      value: [rows], or [H, rows], of which the live rows are stored packed.
      place: [rows], or [pairs, 2 H], in global memory, or with a taker in shared memory, of which it means the taker's.
      taker: Index in the cluster, which has one axis.
    """
    layout = plgpu.Layout.WGMMA if value.ndim == 2 else plgpu.Layout.WGMMA.reduce(0)
    takers = () if taker is None else (taker,)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, *(plgpu.Layout.WG_SPLAT(()) for _ in takers)))
    def emit(_: Any, ref: Any, value: Any, *takers: Any) -> None:
        for taker in takers:
            index = arith.index_cast(ir.IndexType.get(), taker.registers.item())
            ref = mgpu.utils.get_cluster_ref(ref, gpu.Dimension.x, index)
        if len(value.shape) == 1:
            value.store_untiled(ref, optimized=False)
            return
        pairs, space = place.shape[0], "" if takers else ".global"
        declared, kept, policy = kept_in_l2(not takers)
        for n in range(value.shape[1] // 8):
            registers = value.registers.reshape(-1, value.shape[1] // 8, 2)[:, n]  # m, r
            elements = extracted(registers)
            stores = [
                f"@condition st{space}{kept}.v4.f32 [address + {512 * m}], {_operands(1 + 4 * m)}{policy};"
                for m in range(len(registers))
            ]
            where = _locate(f"setp.lt.u32 condition, pair, {pairs};", n, value.shape[0], "$0")
            mgpu.utils.inline_ptx(
                ptx_block(declared, where, *stores), mgpu.utils.memref_ptr(ref), *elements, has_side_effects=True
            )

    emit(place, value, *takers)


def load(place: Any, num_rows: int, is_there: jax.Array, *, in_smem: bool = False) -> jax.Array:
    """[H, num_rows] float32 from place [pairs, 2 H], with anything in rows that are not live; zeros if not is_there.

    Its loads need not be over before the next call's begin.
    """
    pairs, head_dim, space = place.shape[0], place.shape[1] // 2, "" if in_smem else ".global"
    shape = head_dim, num_rows
    returned = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.float32), layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())), return_type=returned)
    def emit(_: Any, ref: Any, is_there: Any) -> Any:
        address = mgpu.utils.memref_ptr(ref)
        if in_smem:
            address = llvm.addrspacecast(llvm.PointerType.get(), address)
        found = np.empty((head_dim // 64, num_rows // 8, 2, 2), object)  # m, n, r, e
        num_elements = 4 * len(found)
        for n in range(num_rows // 8):
            # A pair that is not there is read as the last one: such a load takes no more sectors.
            where = _locate(f"min.u32 pair, pair, {pairs - 1};", n, head_dim, f"${num_elements}")
            loads = [f"setp.ne.u32 condition, ${num_elements + 1}, 0;"]
            loads += [f"mov.f32 ${i}, 0f00000000;" for i in range(num_elements)]
            loads += [
                f"@condition ld{space}.v4.f32 {_operands(4 * m)}, [address + {512 * m}];" for m in range(len(found))
            ]
            # The side effects that it does not have keep it behind await_flags().
            elements = mgpu.utils.inline_ptx(
                ptx_block(where, *loads),
                address,
                is_there.registers.item(),
                result_types=[ir.F32Type.get()] * num_elements,
                has_side_effects=True,
            )
            for (m, r, e), element in zip(np.ndindex(len(found), 2, 2), elements, strict=True):
                found[m, n, r, e] = element
        return from_elements(list(found.flat), shape)

    return emit(place, is_there.astype(jnp.int32))


def _locate(choose: str, n: int, head_dim: int, base: str) -> str:
    return _LOCATE.format(choose=choose, first_pair=4 * n, pair_words=head_dim // 2, base=base)


def _operands(first: int) -> str:
    return "{" + ", ".join(f"${first + i}" for i in range(4)) + "}"


def sync() -> None:
    """All threads of the CTA get here before any goes on."""

    @plgpu.inline_mgpu()
    def emit(_: Any) -> None:
        mgpu.utils.warpgroup_barrier()

    emit()


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


def arrive() -> None:
    """This CTA has stored what others of its cluster take; it need not wait for them."""
    _emit(_ARRIVE)


def await_cluster() -> None:
    """Waits until all CTAs of the cluster have arrived or ended; this one arrives, too."""
    _emit(_ARRIVE)
    _emit(_AWAIT_CLUSTER)


def _emit(ptx: str) -> None:
    @plgpu.inline_mgpu()
    def emit(_: Any) -> None:
        mgpu.utils.inline_ptx(ptx, has_side_effects=True, convergent=True)

    emit()
