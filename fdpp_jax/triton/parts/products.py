"""Sums of products x @ w over a range of tiles of K, for some columns of w, in float32.

Used by `flat_matmul`, `gemv` and `fused_layer`. On tensor cores (`of_rows`) the columns may be any, so that a program
can have those that its epilogue needs together. A weight [K, N] is the second operand there, else it would lose its
asynchronous copies; a tile's K may be shared among groups of warps (`K_GROUPS`), since a narrow column block has no
work for more than one warp. On CUDA cores (`of_row`, `of_row_in_two`) columns follow each other in one block, or in two
that are apart: pointers to any columns would take registers, and fewer programs would fit an SM. Each lane loads 16
bytes of weights at a time, as they are stored, and multiplies them by the x of their K. Of a weight [N, K] it adds up
its eight products first, so that few sums take registers. The sum over K follows once, after the last tile.
"""

import triton
import triton.language as tl

LANE_DEPTH = tl.constexpr(8)  # of K, whose 16 bytes a lane loads at once


@triton.jit
def of_row(
    x_ptr,  # [1, DEPTH]
    w_ptr,  # [DEPTH, WIDTH] or [WIDTH, DEPTH], from the first column on
    num_columns,  # from w_ptr on
    first,
    last,
    IS_NK: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """The sums of BLOCK_N columns over the tiles from first to last, exclusive, in parts: a lane has added up its own.

    [BLOCK_N, parts] or, of a weight [K, N], [parts, BLOCK_N]. Columns beyond num_columns are 0.
    """
    FULL_TILES: tl.constexpr = DEPTH // BLOCK_K
    NUM_TILES: tl.constexpr = (DEPTH + BLOCK_K - 1) // BLOCK_K
    acc = tl.zeros((BLOCK_N, BLOCK_K // LANE_DEPTH) if IS_NK else (BLOCK_K, BLOCK_N), tl.float32)
    for tile in tl.range(first, tl.minimum(last, FULL_TILES), num_stages=NUM_STAGES):
        acc += _row_tile(x_ptr, w_ptr, num_columns, tile, False, IS_NK, DEPTH, WIDTH, BLOCK_N, BLOCK_K)
    if FULL_TILES < NUM_TILES:
        if last == NUM_TILES:
            acc += _row_tile(x_ptr, w_ptr, num_columns, FULL_TILES, True, IS_NK, DEPTH, WIDTH, BLOCK_N, BLOCK_K)
    return acc


@triton.jit
def of_row_in_two(
    x_ptr,  # [1, DEPTH]
    low_ptr,  # [WIDTH, DEPTH], from the first column on
    high_ptr,  # the same of the other block
    num_columns,  # from each pointer on
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """`of_row` over all K for two blocks of columns that are apart. The compiler loads x once for both."""
    FULL_TILES: tl.constexpr = DEPTH // BLOCK_K
    low = tl.zeros((BLOCK_N, BLOCK_K // LANE_DEPTH), tl.float32)
    high = tl.zeros((BLOCK_N, BLOCK_K // LANE_DEPTH), tl.float32)
    for tile in tl.range(0, FULL_TILES, num_stages=NUM_STAGES):
        low += _row_tile(x_ptr, low_ptr, num_columns, tile, False, True, DEPTH, WIDTH, BLOCK_N, BLOCK_K)
        high += _row_tile(x_ptr, high_ptr, num_columns, tile, False, True, DEPTH, WIDTH, BLOCK_N, BLOCK_K)
    if DEPTH % BLOCK_K:
        low += _row_tile(x_ptr, low_ptr, num_columns, FULL_TILES, True, True, DEPTH, WIDTH, BLOCK_N, BLOCK_K)
        high += _row_tile(x_ptr, high_ptr, num_columns, FULL_TILES, True, True, DEPTH, WIDTH, BLOCK_N, BLOCK_K)
    return low, high


@triton.jit
def _row_tile(
    x_ptr,
    w_ptr,
    num_columns,
    tile,
    IS_RAGGED: tl.constexpr,
    IS_NK: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What `of_row` adds for one tile; K is masked only where it is ragged."""
    start = tile * BLOCK_K
    x_ptr += start
    w_ptr += start if IS_NK else tl.cast(start, tl.int64) * WIDTH
    depth, columns = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    if IS_RAGGED:
        x = tl.load(x_ptr + depth, depth < DEPTH - start, other=0.0)
    else:
        x = tl.load(x_ptr + depth)
    if IS_NK:
        depth, x, columns = depth[None, :], x[None, :], columns[:, None]
    else:
        depth, x, columns = depth[:, None], x[:, None], columns[None, :]
    offsets = columns * DEPTH + depth if IS_NK else depth * WIDTH + columns
    if IS_RAGGED:
        w = tl.load(w_ptr + offsets, (columns < num_columns) & (depth < DEPTH - start), other=0.0)
    elif WIDTH % BLOCK_N:
        w = tl.load(w_ptr + offsets, columns < num_columns, other=0.0)
    else:
        w = tl.load(w_ptr + offsets)
    y = w.to(tl.float32) * x.to(tl.float32)
    if IS_NK:
        y = tl.sum(y.reshape(BLOCK_N, BLOCK_K // LANE_DEPTH, LANE_DEPTH), 2)
    return y


@triton.jit
def of_rows(
    x_ptr,  # [NUM_ROWS, DEPTH]
    w_ptr,  # [DEPTH, WIDTH] or [WIDTH, DEPTH]
    columns,  # [BLOCK_N], from w_ptr on
    num_columns,  # from w_ptr on
    first,
    last,
    IS_NK: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_GROUPS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """[BLOCK_N, PADDED_ROWS] of a weight [N, K], else [PADDED_ROWS, BLOCK_N], over the tiles of `of_row`.

    Columns beyond num_columns are 0, and so are rows of padding.
    """
    FULL_TILES: tl.constexpr = DEPTH // BLOCK_K
    NUM_TILES: tl.constexpr = (DEPTH + BLOCK_K - 1) // BLOCK_K
    if K_GROUPS == 1:
        acc = tl.zeros((BLOCK_N, PADDED_ROWS) if IS_NK else (PADDED_ROWS, BLOCK_N), tl.float32)
    else:
        acc = tl.zeros((K_GROUPS, BLOCK_N, PADDED_ROWS) if IS_NK else (K_GROUPS, PADDED_ROWS, BLOCK_N), tl.float32)
    for tile in tl.range(first, tl.minimum(last, FULL_TILES), num_stages=NUM_STAGES):
        acc = _rows_tile(
            acc, x_ptr, w_ptr, columns, num_columns, tile, False, IS_NK, NUM_ROWS, PADDED_ROWS, DEPTH, WIDTH, BLOCK_N,
            BLOCK_K, K_GROUPS,
        )  # fmt: skip
    if FULL_TILES < NUM_TILES:
        if last == NUM_TILES:
            acc = _rows_tile(
                acc, x_ptr, w_ptr, columns, num_columns, FULL_TILES, True, IS_NK, NUM_ROWS, PADDED_ROWS, DEPTH, WIDTH,
                BLOCK_N, BLOCK_K, K_GROUPS,
            )  # fmt: skip
    if K_GROUPS > 1:
        acc = tl.sum(acc, 0)
    return acc


@triton.jit
def _rows_tile(
    acc,
    x_ptr,
    w_ptr,
    columns,
    num_columns,
    tile,
    IS_RAGGED: tl.constexpr,
    IS_NK: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_GROUPS: tl.constexpr,
):
    """The sums and the product of one more tile, of which K is masked only where it is ragged."""
    start = tile * BLOCK_K
    x_ptr += start
    w_ptr += start if IS_NK else tl.cast(start, tl.int64) * WIDTH
    rows = tl.arange(0, PADDED_ROWS)
    depth = tl.arange(0, BLOCK_K // K_GROUPS)
    if K_GROUPS > 1:
        depth = tl.arange(0, K_GROUPS)[:, None, None] * (BLOCK_K // K_GROUPS) + depth[None, None, :]  # [groups, 1, K]
        if IS_NK:
            rows, columns, x_depth, w_depth = rows[None, None, :], columns[None, :, None], depth.trans(0, 2, 1), depth
        else:
            rows, columns, x_depth, w_depth = rows[None, :, None], columns[None, None, :], depth, depth.trans(0, 2, 1)
    else:
        if IS_NK:
            rows, columns, x_depth, w_depth = rows[None, :], columns[:, None], depth[:, None], depth[None, :]
        else:
            rows, columns, x_depth, w_depth = rows[:, None], columns[None, :], depth[None, :], depth[:, None]
    x_mask, w_mask = rows < NUM_ROWS, columns < num_columns
    if IS_RAGGED:
        x_mask, w_mask = x_mask & (x_depth < DEPTH - start), w_mask & (w_depth < DEPTH - start)
    elif WIDTH % BLOCK_N == 0:
        w_mask = None
    x = tl.load(x_ptr + (rows * DEPTH + x_depth), x_mask, other=0.0)
    w_offsets = columns * DEPTH + w_depth if IS_NK else w_depth * WIDTH + columns
    if w_mask is None:
        w = tl.load(w_ptr + w_offsets)
    else:
        w = tl.load(w_ptr + w_offsets, w_mask, other=0.0)
    return tl.dot(w, x, acc) if IS_NK else tl.dot(x, w, acc)
