"""x @ w for 1 to 64 rows on tensor cores (Triton): a program per column block and share of K.

A weight [N, K] is the large operand, as it is stored, and x the small one, whose rows are padded to 8:

    out^T [block_n, rows] += w [block_n, block_k] @ x^T [block_k, rows]

A weight [K, N] would lose its asynchronous copies so: it is the second operand, and rows are padded to 16. A tile's K
may be shared among groups of warps (`k_groups`), since a narrow column block has no work for more than one warp.

Source: FlashDecoding++ (arXiv 2311.01282), section 4 (flat GEMM with double buffering).
"""

import functools

import jax
import triton
import triton.language as tl

from fdpp_jax.plans.shapes import WeightOrder
from fdpp_jax.plans.triton_matmul import FlatMatmulConfig, padded_rows
from fdpp_jax.triton.parts import splits


# Jitted so that all layers of a model share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("config", "out_dtype", "w_order"))
def flat_matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    config: FlatMatmulConfig,
    out_dtype: jax.typing.DTypeLike,
    w_order: WeightOrder = "kn",
) -> jax.Array:
    """x @ w, accumulated in float32.

    Args:
      x: [M, K] bfloat16 or float16, M <= 64.
      w: [K, N] or [N, K], same dtype.
      config: Tiles, splits, warps and stages.
      out_dtype: dtype of the result.
      w_order: "kn" or "nk", the order of w's axes.

    Returns:
      [M, N].
    """
    (num_rows, depth), width = x.shape, w.shape[w_order.index("n")]
    return splits.launch(
        flat_kernel,
        x,
        w,
        width=width,
        out_dtype=out_dtype,
        config=config,
        IS_NK=w_order == "nk",
        NUM_ROWS=num_rows,
        PADDED_ROWS=padded_rows(num_rows, w_order, config.arch),
        DEPTH=depth,
        WIDTH=width,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        K_GROUPS=config.k_groups,
    )


@triton.jit
def flat_kernel(
    x_ptr,  # [NUM_ROWS, DEPTH]
    w_ptr,  # [DEPTH, WIDTH] or [WIDTH, DEPTH]
    out_ptr,  # [NUM_ROWS, WIDTH]
    parts_ptr,  # [SPLIT_K, NUM_ROWS, WIDTH] float32
    arrived_ptr,  # [column blocks] int32
    IS_NK: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_GROUPS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    ADDS_UP: tl.constexpr,
):
    """One column block and one share of K."""
    FULL_TILES: tl.constexpr = DEPTH // BLOCK_K
    NUM_TILES: tl.constexpr = (DEPTH + BLOCK_K - 1) // BLOCK_K
    first, last = splits.tiles(NUM_TILES, SPLIT_K)
    column = tl.program_id(0) * BLOCK_N
    w_ptr += column.to(tl.int64) * (DEPTH if IS_NK else 1)
    rows, columns = tl.arange(0, PADDED_ROWS), tl.arange(0, BLOCK_N)
    if K_GROUPS == 1:
        acc = tl.zeros((BLOCK_N, PADDED_ROWS) if IS_NK else (PADDED_ROWS, BLOCK_N), tl.float32)
    else:
        acc = tl.zeros((K_GROUPS, BLOCK_N, PADDED_ROWS) if IS_NK else (K_GROUPS, PADDED_ROWS, BLOCK_N), tl.float32)
    for tile in tl.range(first, tl.minimum(last, FULL_TILES), num_stages=NUM_STAGES):
        acc = _multiply(
            acc, x_ptr, w_ptr, tile, WIDTH - column, False, IS_NK, NUM_ROWS, PADDED_ROWS, DEPTH, WIDTH, BLOCK_N,
            BLOCK_K, K_GROUPS,
        )  # fmt: skip
    if FULL_TILES < NUM_TILES:
        if last == NUM_TILES:
            acc = _multiply(
                acc, x_ptr, w_ptr, FULL_TILES, WIDTH - column, True, IS_NK, NUM_ROWS, PADDED_ROWS, DEPTH, WIDTH,
                BLOCK_N, BLOCK_K, K_GROUPS,
            )  # fmt: skip
    if K_GROUPS > 1:
        acc = tl.sum(acc, 0)
    columns += column
    if IS_NK:
        offsets = rows[None, :] * WIDTH + columns[:, None]
        is_live = (rows < NUM_ROWS)[None, :] & (columns < WIDTH)[:, None]
    else:
        offsets = rows[:, None] * WIDTH + columns[None, :]
        is_live = (rows < NUM_ROWS)[:, None] & (columns < WIDTH)[None, :]
    splits.finish(acc, out_ptr, parts_ptr, arrived_ptr, offsets, is_live, NUM_ROWS * WIDTH, SPLIT_K, ADDS_UP)


@triton.jit
def _multiply(
    acc,
    x_ptr,
    w_ptr,
    tile,
    num_columns,
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
    rows, columns = tl.arange(0, PADDED_ROWS), tl.arange(0, BLOCK_N)
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
