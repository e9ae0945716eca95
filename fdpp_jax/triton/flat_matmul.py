"""x @ w for 1 to 64 rows on tensor cores (Triton): a program per column block and share of K.

A weight [N, K] is the large operand, as it is stored, and x the small one, whose rows are padded to 8:

    out^T [block_n, rows] += w [block_n, block_k] @ x^T [block_k, rows]

A weight [K, N] is the second operand, and rows are padded to 16 (`parts.products`).

Source: FlashDecoding++ (arXiv 2311.01282), section 4 (flat GEMM with double buffering).
"""

import functools

import jax
import triton
import triton.language as tl

from fdpp_jax.plans.shapes import WeightOrder
from fdpp_jax.plans.triton_matmul import FlatMatmulConfig, padded_rows
from fdpp_jax.triton.parts import products, splits


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
    first, last = splits.tiles((DEPTH + BLOCK_K - 1) // BLOCK_K, SPLIT_K)
    column = tl.program_id(0) * BLOCK_N
    rows, block = tl.arange(0, PADDED_ROWS), tl.arange(0, BLOCK_N)
    acc = products.of_rows(
        x_ptr, w_ptr + column.to(tl.int64) * (DEPTH if IS_NK else 1), block, WIDTH - column, first, last, IS_NK,
        NUM_ROWS, PADDED_ROWS, DEPTH, WIDTH, BLOCK_N, BLOCK_K, K_GROUPS, NUM_STAGES,
    )  # fmt: skip
    columns = column + block
    if IS_NK:
        offsets = rows[None, :] * WIDTH + columns[:, None]
        is_live = (rows < NUM_ROWS)[None, :] & (columns < WIDTH)[:, None]
    else:
        offsets = rows[:, None] * WIDTH + columns[None, :]
        is_live = (rows < NUM_ROWS)[:, None] & (columns < WIDTH)[None, :]
    splits.finish(acc, out_ptr, parts_ptr, arrived_ptr, offsets, is_live, NUM_ROWS * WIDTH, SPLIT_K, ADDS_UP)
