"""Partial sums from one CTA to another: through global memory, or in a cluster through the owner's shared memory.

Used by `decode_attention`, and by `flat_matmul` for its flags.

A helper stores its partial sums and raises its flag. The owner waits for the flags of all its helpers, then loads their
sums. Of sums [H, rows] only the live rows are stored. Flags need no initial value, so there is no second launch.

A flag is four words of scratch memory, which may hold anything at first. A flag is raised if all 128 bits equal a
pattern. The owner lowers a flag that it has awaited, so no flag of an earlier launch is found raised. Other data equals
the pattern with a chance of 2^-128.

An owner waits for CTAs of lower index only: the GPU starts them first, and they must not wait for the owner. CTAs of a
cluster start together, and the cluster's barrier replaces the flags: helpers arrive, and the owner waits.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm

from fdpp_jax.pallas.parts.registers import (
    THREAD,
    WARPGROUP_SIZE,
    extracted,
    from_elements,
    kept_in_l2,
    ptx_block,
)
from fdpp_jax.plans.shapes import cdiv

WORDS = 4
MAX_HELPERS = WARPGROUP_SIZE  # a thread polls each flag
# The cluster's barrier: a thread that has waited sees everything that the others stored before they arrived.
_ARRIVE = "barrier.cluster.arrive.release.aligned;"
_AWAIT_CLUSTER = "barrier.cluster.wait.acquire.aligned;"
_PATTERN = (0x5F3759DF, 0x2545F491, 0x6C078965, 0x41C64E6D)

# Thread 0 raises the flag. Whoever sees the flag sees all earlier stores, by the release.
_RAISE = f"""{{{THREAD}
  .reg .pred is_first;
  .reg .b32 w<4>;
  setp.eq.u32 is_first, thread, 0;
  mov.b32 w0, {_PATTERN[0]:#x};
  mov.b32 w1, {_PATTERN[1]:#x};
  mov.b32 w2, {_PATTERN[2]:#x};
  mov.b32 w3, {_PATTERN[3]:#x};
  @is_first st.release.gpu.global.v4.b32 [$0], {{w0, w1, w2, w3}};
}}"""

# Thread i polls flag i, so that all flags are awaited at once.
_AWAIT = f"""{{{THREAD}
  .reg .pred is_idle, is_low;
  .reg .b32 zero;
  .reg .b32 w<4>;
  .reg .b64 flag;
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


# Address of a thread's sums in memory. wgmma leaves sums [H, rows] in registers so that a thread (warp w, lane 4 g + t)
# holds the elements h = 64 m + 16 w + 8 r + g of rows 8 n + 2 t + e, with r and e in 0..1. In memory, which is
# [pairs of live rows, 2 H], the four elements (r, e) are neighbours, and the eight g follow each other. So accesses of
# 16 bytes per thread fill whole sectors of 32 bytes. The address is of m = 0 for one n; the next m is 512 bytes on.
_LOCATE = """
  .reg .pred condition;
  .reg .b32 pair, place;
  .reg .b64 address;
  and.b32 pair, thread, 3;
  shr.u32 place, thread, 2;
  add.u32 pair, pair, {first_pair};
  {choose}
  mad.lo.u32 place, pair, {pair_words}, place;
  mad.wide.u32 address, place, 16, {base};
"""


def num_pairs(live_rows: int) -> int:
    """Pairs of rows in memory."""
    return cdiv(live_rows, 2)


def packed(num: jax.Array, live_rows: int) -> jax.Array:
    """num [H, rows] as store() writes it: [pairs, 2 H]."""
    head_dim, pairs = num.shape[0], num_pairs(live_rows)
    num = num.T[: 2 * pairs].reshape(pairs, 2, head_dim // 64, 4, 2, 8)  # pair, e, m, w, r, g
    return num.transpose(0, 2, 3, 5, 4, 1).reshape(pairs, 2 * head_dim)


def unpacked(num: jax.Array) -> jax.Array:
    """[..., pairs, 2 H] from memory as [..., 2 pairs, H]. With an odd number of live rows the last one is padding."""
    *batch, pairs, width = num.shape
    num = num.reshape(*batch, pairs, width // 128, 4, 8, 2, 2)  # pair, m, w, g, r, e
    last = tuple(len(batch) + axis for axis in (0, 5, 1, 2, 4, 3))
    return num.transpose(*range(len(batch)), *last).reshape(*batch, 2 * pairs, width // 2)


def store(value: jax.Array, place: jax.Ref, owner: jax.Array | None = None) -> None:
    """Stores straight from registers, where Pallas of JAX 0.12 would go through shared memory.

    Args:
      value: [rows], or [H, rows], whose live rows are stored packed.
      place: [rows], or [pairs, 2 H]. In global memory; with an owner, in shared memory, and the owner's is written.
      owner: The owner's index in the cluster, which has one axis.
    """
    layout = plgpu.Layout.WGMMA if value.ndim == 2 else plgpu.Layout.WGMMA.reduce(0)
    owners = () if owner is None else (owner,)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, *(plgpu.Layout.WG_SPLAT(()) for _ in owners)))
    def emit(_: mgpu.LaunchContext, ref: ir.Value, value: mgpu.FragmentedArray, *owners: mgpu.FragmentedArray) -> None:
        for owner in owners:
            index = arith.index_cast(ir.IndexType.get(), owner.registers.item())
            ref = mgpu.utils.get_cluster_ref(ref, gpu.Dimension.x, index)
        if len(value.shape) == 1:
            value.store_untiled(ref, optimized=False)
            return
        pairs, space = place.shape[0], "" if owners else ".global"
        declared, kept, policy = kept_in_l2(not owners)
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

    emit(place, value, *owners)


def load(place: jax.Ref, num_rows: int, is_there: jax.Array, *, in_smem: bool = False) -> jax.Array:
    """[H, num_rows] float32 from place [pairs, 2 H]; zeros unless is_there. Rows that are not live may be anything.

    The loads of several calls overlap.
    """
    pairs, head_dim, space = place.shape[0], place.shape[1] // 2, "" if in_smem else ".global"
    shape = head_dim, num_rows
    returned = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.float32), layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())), return_type=returned)
    def emit(_: mgpu.LaunchContext, ref: ir.Value, is_there: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        address = mgpu.utils.memref_ptr(ref)
        if in_smem:
            address = llvm.addrspacecast(llvm.PointerType.get(), address)
        found = np.empty((head_dim // 64, num_rows // 8, 2, 2), object)  # m, n, r, e
        num_elements = 4 * len(found)
        for n in range(num_rows // 8):
            # Beyond the last pair, threads load the last pair again, which takes no more sectors.
            where = _locate(f"min.u32 pair, pair, {pairs - 1};", n, head_dim, f"${num_elements}")
            loads = [f"setp.ne.u32 condition, ${num_elements + 1}, 0;"]
            loads += [f"mov.f32 ${i}, 0f00000000;" for i in range(num_elements)]
            loads += [
                f"@condition ld{space}.v4.f32 {_operands(4 * m)}, [address + {512 * m}];" for m in range(len(found))
            ]
            # Loads have no side effects, but marked so they stay behind await_flags().
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
    return THREAD + _LOCATE.format(choose=choose, first_pair=4 * n, pair_words=head_dim // 2, base=base)


def _operands(first: int) -> str:
    return "{" + ", ".join(f"${first + i}" for i in range(4)) + "}"


def sync() -> None:
    """A barrier of all threads of the warpgroup."""

    @plgpu.inline_mgpu()
    def emit(_: mgpu.LaunchContext) -> None:
        mgpu.utils.warpgroup_barrier()

    emit()


def raise_flag(flag_gmem: jax.Ref) -> None:
    """Raises the flag flag_gmem [WORDS]. The owner that finds it raised sees what this warpgroup stored before."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def emit(_: mgpu.LaunchContext, flag: ir.Value) -> None:
        mgpu.utils.warpgroup_barrier()  # all threads have stored before thread 0 raises the flag
        mgpu.utils.inline_ptx(_RAISE, mgpu.utils.memref_ptr(flag), has_side_effects=True)

    emit(flag_gmem)


def await_flags(flag_gmem: jax.Ref, num: jax.Array) -> None:
    """Waits until `num` flags, at most MAX_HELPERS, from flag_gmem [WORDS] on are raised, then lowers them."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))
    def emit(_: mgpu.LaunchContext, flag: ir.Value, num: mgpu.FragmentedArray) -> None:
        arguments = mgpu.utils.memref_ptr(flag), num.registers.item()
        mgpu.utils.inline_ptx(_AWAIT, *arguments, has_side_effects=True, convergent=True)
        mgpu.utils.warpgroup_barrier()

    emit(flag_gmem, num)


def arrive() -> None:
    """Tells the cluster that this CTA has stored its sums, without waiting for the others."""
    _emit(_ARRIVE)


def await_cluster() -> None:
    """Arrives, and waits until all CTAs of the cluster have arrived or ended."""
    _emit(_ARRIVE)
    _emit(_AWAIT_CLUSTER)


def _emit(ptx: str) -> None:
    @plgpu.inline_mgpu()
    def emit(_: mgpu.LaunchContext) -> None:
        mgpu.utils.inline_ptx(ptx, has_side_effects=True, convergent=True)

    emit()
