"""x @ w for one row on CUDA cores (Triton): a program per column block and share of K.

Each lane loads 16 bytes of weights at a time, as they are stored, multiplies them by the x of their K, and adds the
products in float32, in place. The sum over K follows once, after the last tile.

Source: FlashDecoding++ (arXiv 2311.01282), section 5 (ImplA, FastGEMV).
"""

import functools

import jax
import triton
import triton.language as tl

from fdpp_jax.plans.shapes import WeightOrder
from fdpp_jax.plans.triton_matmul import GemvConfig
from fdpp_jax.triton.parts import splits


# Jitted so that all layers of a model share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("config", "out_dtype", "w_order"))
def gemv(
    x: jax.Array,
    w: jax.Array,
    *,
    config: GemvConfig,
    out_dtype: jax.typing.DTypeLike,
    w_order: WeightOrder = "kn",
) -> jax.Array:
    """x @ w, accumulated in float32.

    Args:
      x: [1, K] bfloat16 or float16.
      w: [K, N] or [N, K], same dtype.
      config: Tiles, splits, warps and stages.
      out_dtype: dtype of the result.
      w_order: "kn" or "nk", the order of w's axes.

    Returns:
      [1, N].
    """
    width = w.shape[w_order.index("n")]
    return splits.launch(
        gemv_kernel,
        x,
        w,
        width=width,
        out_dtype=out_dtype,
        config=config,
        IS_NK=w_order == "nk",
        DEPTH=x.shape[1],
        WIDTH=width,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )


@triton.jit
def gemv_kernel(
    x_ptr,  # [1, DEPTH]
    w_ptr,  # [DEPTH, WIDTH] or [WIDTH, DEPTH]
    out_ptr,  # [1, WIDTH]
    parts_ptr,  # [SPLIT_K, 1, WIDTH] float32
    arrived_ptr,  # [column blocks] int32
    IS_NK: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
    acc = tl.zeros((BLOCK_N, BLOCK_K) if IS_NK else (BLOCK_K, BLOCK_N), tl.float32)
    for tile in tl.range(first, tl.minimum(last, FULL_TILES), num_stages=NUM_STAGES):
        acc += _products(x_ptr, w_ptr, tile, WIDTH - column, False, IS_NK, DEPTH, WIDTH, BLOCK_N, BLOCK_K)
    if FULL_TILES < NUM_TILES:
        if last == NUM_TILES:
            acc += _products(x_ptr, w_ptr, FULL_TILES, WIDTH - column, True, IS_NK, DEPTH, WIDTH, BLOCK_N, BLOCK_K)
    columns = column + tl.arange(0, BLOCK_N)
    sums = tl.sum(acc, 1 if IS_NK else 0)
    splits.finish(sums, out_ptr, parts_ptr, arrived_ptr, columns, columns < WIDTH, WIDTH, SPLIT_K, ADDS_UP)


@triton.jit
def _products(
    x_ptr,
    w_ptr,
    tile,
    num_columns,
    IS_RAGGED: tl.constexpr,
    IS_NK: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of one tile, as it is stored; K is masked only where it is ragged."""
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
    return w.to(tl.float32) * x.to(tl.float32)
