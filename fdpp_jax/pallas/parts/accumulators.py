"""A transposed product [64, rows] float32 in registers: to and from other warpgroups, and rows of global memory.

Used by `flat_matmul` and `fused_layer`.

wgmma leaves a product in Layout.WGMMA: a thread (warp w, lane 4 g + t) holds y[h, row] for h = 16 w + 8 r + g and
row = 8 n + 2 t + e, with r and e in 0..1. Arrays in memory are the transpose [rows, columns], so eight lanes hold
neighbours. In a fused layer the first WIDTH of the 64 columns are a unit's, and the others are their partner columns.
`left` gives them to the threads that hold the unit's columns.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from fdpp_jax.pallas.parts import registers
from fdpp_jax.plans.hopper_layer import UNIT_WIDTH

LAYOUT = plgpu.Layout.WGMMA
WIDTH = UNIT_WIDTH  # columns that warps 0 and 1 hold
HEIGHT = 2 * WIDTH

_SCALAR = plgpu.Layout.WG_SPLAT(())
_LINE_BYTES = 128  # of the L2; a product [64, rows] has no more lines than a warpgroup has threads
_PACKED = {"bfloat16": "cvt.rn.bf16x2.f32", "float16": "cvt.rn.f16x2.f32"}

# h for r = 0, t2 = 2 t, and whether h is among the first {height} columns.
_LOCATE = """
  .reg .pred live, inside;
  .reg .b16 half;
  .reg .b32 h, t2, row;
  .reg .b64 base, address;
  and.b32 t2, thread, 3;
  shl.b32 t2, t2, 1;
  shr.u32 h, thread, 2;
  and.b32 h, h, 7;
  shr.u32 row, thread, 5;
  mad.lo.u32 h, row, 16, h;
  setp.lt.u32 inside, h, {height};
"""
# h and g for a thread that stores four neighbours of row 8 n + g: h = 16 w + 8 (t % 2) + 4 (t / 2).
_TO_FOURS = """
  .reg .pred is_odd;
  .reg .b32 g, low, high, other;
  and.b32 g, h, 7;
  sub.u32 h, h, g;
  and.b32 low, t2, 2;
  setp.ne.u32 is_odd, low, 0;
  mad.lo.u32 h, low, 4, h;
  and.b32 low, t2, 4;
  add.u32 h, h, low;
"""


def leave(y: jax.Array, target: jax.Ref, *, is_interpreted: bool) -> None:
    """Stores a product [64, rows] float32 in target [64 * rows], in shared or global memory, for another warpgroup.

    The order is that of threads and their registers, in which `left` loads the product.
    """
    if is_interpreted:
        target[...] = y.reshape(-1)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LAYOUT))
    def emit(_: mgpu.LaunchContext, target: ir.Value, y: mgpu.FragmentedArray) -> None:
        elements = registers.extracted(y.registers)
        pairs = range(len(elements) // 2)
        space, address = _address(target)
        declared, kept, policy = registers.kept_in_l2(space == "global")
        stores = [
            f"st.{space}{kept}.v2.f32 [place + {1024 * i}], {{${1 + 2 * i}, ${2 + 2 * i}}}{policy};" for i in pairs
        ]
        text = registers.ptx_block(declared, *_place(space, 0), *stores)
        mgpu.utils.inline_ptx(text, address, *elements, has_side_effects=True)

    emit(target, y)


def left(
    source: jax.Ref,
    num_rows: int,
    *,
    is_partner: bool,
    first_row: int = 0,
    is_repeated: bool = False,
    is_interpreted: bool,
) -> jax.Array:
    """Rows of the product that `leave` stored in source: [64, num_rows].

    Args:
      source: [64 * rows of the product] float32.
      num_rows: Rows of the result, a multiple of 8. Those beyond the product's last row mean nothing.
      is_partner: Whether the two halves of the product's columns are swapped.
      first_row: Row of the product that is row 0 of the result.
      is_repeated: Whether all rows of the result are first_row.
      is_interpreted: Whether the interpreter runs the kernel.
    """
    shape, last_row = (HEIGHT, num_rows), source.shape[0] // HEIGHT - 1
    if is_interpreted:
        rows = np.minimum(first_row + np.arange(num_rows) * (not is_repeated), last_row)
        columns = jnp.roll(source[...].reshape(HEIGHT, -1), WIDTH if is_partner else 0, axis=0)
        return jnp.stack([columns[:, row] for row in rows], axis=1)
    returned = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.float32), layout=LAYOUT)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=returned)
    def emit(_: mgpu.LaunchContext, source: ir.Value) -> mgpu.FragmentedArray:
        count = num_rows // 2
        space, address = _address(source)
        how = "relaxed.gpu.global" if space == "global" else space
        if first_row == 0 and not is_repeated:
            loads = [f"ld.{how}.v2.f32 {{${2 * i}, ${2 * i + 1}}}, [place + {1024 * i}];" for i in range(count // 2)]
        else:
            places = _places(num_rows)
            rows = [f"{first_row}, 0" if is_repeated else f"t2, {first_row + 8 * n + e}" for n, _, e in places]
            loads = _elsewhere(space, how, places, rows, last_row)
        text = registers.ptx_block(*_place(space, count, other_half=is_partner), *loads)
        types = [ir.F32Type.get()] * count
        elements = mgpu.utils.inline_ptx(text, address, result_types=types, has_side_effects=True)
        return registers.from_elements(elements, shape)

    return emit(source)


def _elsewhere(space: str, how: str, places: list[tuple[int, int, int]], rows: list[str], last_row: int) -> list[str]:
    """PTX that loads elements of other rows than a thread's own, given `place`, where its own are.

    Args:
      space: State space of the addresses.
      how: That of the loads, with their qualifiers.
      places: (n, r, e) of each register.
      rows: PTX operands whose sum is the row of each register; t2 is 2 t.
      last_row: Row beyond which none is loaded.
    """
    bits = 64 if space == "global" else 32
    lines = [
        ".reg .b32 t2, row, part;",
        f".reg .b{bits} start, address;",
        "and.b32 t2, thread, 3;",
        # place - 8 t is that of the first of the four threads that share columns.
        f"mul.{'wide' if bits == 64 else 'lo'}.u32 start, t2, 8;",
        f"sub.u{bits} start, place, start;",
        "shl.b32 t2, t2, 1;",
    ]
    for i, ((_, r, _), row) in enumerate(zip(places, rows, strict=True)):
        lines += [
            f"add.u32 row, {row};",
            f"min.u32 row, row, {last_row};",
            # Row 8 n + 2 t + e is 2048 n + 8 t + 4 e bytes away, and 8 t + 4 e is 4 (row mod 8).
            "and.b32 part, row, 7;",
            "shl.b32 part, part, 2;",
            "shr.u32 row, row, 3;",
            "mad.lo.u32 part, row, 2048, part;",
            f"cvt.u{bits}.u32 address, part;",
            f"add.u{bits} address, address, start;",
            f"ld.{how}.f32 ${i}, [address + {1024 * r}];",
        ]
    return lines


def discard(source_gmem: jax.Ref, *, is_interpreted: bool) -> None:
    """Drops a product [64 * rows] that `left` has loaded from the L2, which would otherwise write it to memory.

    Writes slow the reads of weights: docs/experiments/matmul.md#what-stays-in-the-l2
    """
    if is_interpreted:
        return
    num_lines = source_gmem.shape[0] * 4 // _LINE_BYTES

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def emit(_: mgpu.LaunchContext, source: ir.Value) -> None:
        mgpu.utils.warpgroup_barrier()  # all threads have loaded their part
        lines = [
            registers.THREAD,
            ".reg .pred is_mine;",
            ".reg .b64 line;",
            f"setp.lt.u32 is_mine, thread, {num_lines};",
            f"mad.wide.u32 line, thread, {_LINE_BYTES}, $0;",
            f"@is_mine discard.global.L2 [line], {_LINE_BYTES};",
        ]
        mgpu.utils.inline_ptx(registers.ptx_block(*lines), mgpu.utils.memref_ptr(source), has_side_effects=True)

    emit(source_gmem)


def _locate(height: int) -> str:
    return registers.THREAD + _LOCATE.format(height=height)


def _place(space: str, argument: int, *, other_half: bool = False) -> list[str]:
    """PTX of the address of a thread's first registers, given the operand that is their array's address."""
    lines = [registers.THREAD]
    if other_half:  # warps 0 and 1 hold the first half, 2 and 3 the second
        lines.append("xor.b32 thread, thread, 64;")
    if space == "global":
        return [*lines, ".reg .b64 place;", f"mad.wide.u32 place, thread, 8, ${argument};"]
    return [*lines, ".reg .b32 place;", f"mad.lo.u32 place, thread, 8, ${argument};"]


def _address(ref: ir.Value) -> tuple[str, ir.Value]:
    """The PTX state space of an array, and its address there."""
    pointer = mgpu.utils.memref_ptr(ref)
    if mgpu.utils.is_smem_ref(ref):
        return "shared", llvm.ptrtoint(ir.IntegerType.get_signless(32), pointer)
    return "global", pointer


def load(source_gmem: jax.Ref, column: jax.Array, num_rows: int, *, is_interpreted: bool) -> jax.Array:
    """[64, num_rows] float32: columns [column, column + WIDTH) of source_gmem, zeros elsewhere.

    Args:
      source_gmem: [rows, columns] bfloat16 or float32; or [columns], which every row of the result gets.
      column: [] int32.
      num_rows: Rows of the result, a multiple of 8.
      is_interpreted: Whether the interpreter runs the kernel.
    """
    if is_interpreted:
        part = source_gmem[..., pl.ds(column, WIDTH)].astype(jnp.float32)
        part = jnp.broadcast_to(part, (num_rows, WIDTH)) if part.ndim == 1 else _padded(part, num_rows)
        return jnp.pad(part.T, ((0, HEIGHT - WIDTH), (0, 0)))
    is_wide = jnp.dtype(source_gmem.dtype).itemsize == 4
    itemsize = 4 if is_wide else 2
    shape = HEIGHT, num_rows
    returned = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.float32), layout=LAYOUT)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR), return_type=returned)
    def emit(_: mgpu.LaunchContext, source: ir.Value, column: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        num_elements = num_rows // 2
        lines = [
            f"add.u32 h, h, ${num_elements + 1};",
            f"mad.wide.u32 base, h, {itemsize}, ${num_elements};",
        ]
        for i, (n, r, e) in enumerate(_places(num_rows)):
            lines.append(f"mov.f32 ${i}, 0f00000000;")
            if len(source_gmem.shape) == 1:
                lines += ["mov.pred live, inside;", "mov.b64 address, base;"]
            else:
                stride = source_gmem.shape[1] * itemsize
                lines += [
                    f"add.u32 row, t2, {8 * n + e};",
                    f"setp.lt.and.u32 live, row, {source_gmem.shape[0]}, inside;",
                    f"mad.wide.u32 address, row, {stride}, base;",
                ]
            where = f"[address + {8 * r * itemsize}]"
            if is_wide:
                lines.append(f"@live ld.relaxed.gpu.global.f32 ${i}, {where};")
            else:
                lines += [f"@live ld.relaxed.gpu.global.b16 half, {where};", f"@live cvt.f32.bf16 ${i}, half;"]
        elements = mgpu.utils.inline_ptx(
            registers.ptx_block(_locate(WIDTH), *lines),
            mgpu.utils.memref_ptr(source),
            column.registers.item(),
            result_types=[ir.F32Type.get()] * num_elements,
            has_side_effects=True,
        )
        return registers.from_elements(elements, shape)

    return emit(source_gmem, column)


def store(
    y: jax.Array,
    target_gmem: jax.Ref,
    column: jax.Array,
    *,
    height: int = WIDTH,
    is_interpreted: bool,
    rows_gmem: jax.Ref | None = None,
) -> None:
    """target_gmem[row, column + h] = y[h, row] for the first `height` h. Columns beyond the target are dropped.

    Args:
      y: [64, num_rows] float32.
      target_gmem: [rows, columns] bfloat16, float16 or float32.
      column: [] int32.
      height: WIDTH or HEIGHT.
      is_interpreted: Whether the interpreter runs the kernel; all or no columns may lie beyond the target then.
      rows_gmem: [rows of y] int32, the row of the target that each row goes to; beyond the last row it is dropped.
    """
    if is_interpreted:
        part = y[:height].T.astype(target_gmem.dtype)
        if rows_gmem is None:

            @pl.when(column < target_gmem.shape[1])
            def _() -> None:
                target_gmem[:, pl.ds(column, height)] = part[: target_gmem.shape[0]]

            return
        for i in range(rows_gmem.shape[0]):

            def write(i: int = i) -> None:
                target_gmem[pl.ds(rows_gmem[i], 1), pl.ds(column, height)] = part[i : i + 1]

            pl.when(rows_gmem[i] < target_gmem.shape[0])(write)
        return
    num_rows, num_columns = target_gmem.shape
    dtype = jnp.dtype(target_gmem.dtype)
    itemsize = dtype.itemsize
    num_live = num_rows if rows_gmem is None else rows_gmem.shape[0]
    refs = (target_gmem,) if rows_gmem is None else (target_gmem, rows_gmem)
    first = len(refs) + 1  # of y's registers among the operands

    def locate(row: str) -> list[str]:
        """PTX of a row's address, and of whether this thread stores to it."""
        lines = [f"add.u32 row, {row};", f"setp.lt.and.u32 live, row, {num_live}, inside;"]
        if rows_gmem is not None:
            lines += [
                "mad.wide.u32 address, row, 4, $2;",
                "@live ld.global.b32 row, [address];",
                f"setp.lt.and.u32 live, row, {num_rows}, live;",
            ]
        return [*lines, f"mad.wide.u32 address, row, {num_columns * itemsize}, base;"]

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType() for _ in refs), _SCALAR, LAYOUT))
    def emit(_: mgpu.LaunchContext, target: ir.Value, *rest: Any) -> None:
        *rows, column, y = rest
        declared, kept, policy = registers.kept_in_l2(rows_gmem is None)  # new keys and values go to memory
        lines = [declared, _TO_FOURS if itemsize == 2 else ""]
        lines += ["add.u32 h, h, $1;", f"mad.wide.u32 base, h, {itemsize}, $0;"]
        if num_columns % HEIGHT:  # the last block is ragged, by multiples of 16
            lines.append(f"setp.lt.and.u32 inside, h, {num_columns}, inside;")
        if itemsize == 2:
            for n in range(y.shape[1] // 8):
                lines += [*locate(f"g, {8 * n}"), *_fours(_PACKED[dtype.name], first + 4 * n)]
                lines.append(f"@live st.global{kept}.v2.b32 [address], {{low, high}}{policy};")
        else:
            for i, (n, r, e) in enumerate(_places(y.shape[1])):
                lines += [
                    *locate(f"t2, {8 * n + e}"),
                    f"@live st.global{kept}.f32 [address + {8 * r * itemsize}], ${first + i}{policy};",
                ]
        mgpu.utils.inline_ptx(
            registers.ptx_block(_locate(height), *lines),
            mgpu.utils.memref_ptr(target),
            column.registers.item(),
            *(mgpu.utils.memref_ptr(ref) for ref in rows),
            *registers.extracted(y.registers),
            has_side_effects=True,
            convergent=True,
        )

    emit(*refs, column.astype(jnp.int32), y)


def _fours(pack: str, first: int) -> list[str]:
    """PTX that packs elements (r, e), from operand `first` on, in 16 bits; each thread gets four neighbours of a row.

    movmatrix transposes, which leaves each thread two neighbours for r = 0 and two for r = 1. An exchange with the next
    lane makes them four.
    """
    lines = []
    for r, half in enumerate(("low", "high")):
        lines += [
            f"{pack} {half}, ${first + 2 * r + 1}, ${first + 2 * r};",
            f"movmatrix.sync.aligned.m8n8.trans.b16 {half}, {half};",
        ]
    return [
        *lines,
        "selp.b32 other, low, high, is_odd;",
        "shfl.sync.bfly.b32 other, other, 1, 31, 0xffffffff;",
        "@is_odd mov.b32 low, other;",
        "@!is_odd mov.b32 high, other;",
    ]


def store_sums(y: jax.Array, sums_gmem: jax.Ref, *, is_interpreted: bool) -> None:
    """sums_gmem[w, row] = sum of y[h, row] over the h of warp w, for the two warps that hold the first WIDTH.

    Args:
      y: [64, rows] float32.
      sums_gmem: [2, rows] float32.
      is_interpreted: Whether the interpreter runs the kernel.
    """
    if is_interpreted:
        sums_gmem[...] = y[:WIDTH].reshape(2, WIDTH // 2, -1).sum(axis=1)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LAYOUT))
    def emit(_: mgpu.LaunchContext, sums: ir.Value, y: mgpu.FragmentedArray) -> None:
        num_rows = y.shape[1]
        by_place = dict(zip(_places(num_rows), registers.extracted(y.registers), strict=True))
        lines = [
            ".reg .f32 sum, other;",
            "and.b32 row, thread, 28;",
            "setp.eq.and.u32 live, row, 0, inside;",  # one of the eight lanes that share rows
            "shr.u32 row, thread, 5;",
            f"mad.lo.u32 row, row, {num_rows}, t2;",
            "mad.wide.u32 address, row, 4, $0;",
        ]
        elements: list[ir.Value] = []
        for n in range(num_rows // 8):
            for e in range(2):
                low, high = (f"${1 + len(elements) + r}" for r in range(2))
                elements += [by_place[n, r, e] for r in range(2)]
                lines.append(f"add.f32 sum, {low}, {high};")
                for lanes in (4, 8, 16):
                    lines += [
                        f"shfl.sync.bfly.b32 other, sum, {lanes}, 31, 0xffffffff;",
                        "add.f32 sum, sum, other;",
                    ]
                lines.append(f"@live st.global.f32 [address + {4 * (8 * n + e)}], sum;")
        text = registers.ptx_block(_locate(WIDTH), *lines)
        mgpu.utils.inline_ptx(text, mgpu.utils.memref_ptr(sums), *elements, has_side_effects=True, convergent=True)

    emit(sums_gmem, y)


def _places(num_rows: int) -> list[tuple[int, int, int]]:
    """(n, r, e) of each element of a thread, in the order of its registers."""
    return list(np.ndindex(num_rows // 8, 2, 2))


def _padded(rows: jax.Array, num_rows: int) -> jax.Array:
    return jnp.pad(rows, ((0, num_rows - rows.shape[0]), (0, 0)))
