"""x @ w for one row on CUDA cores (Triton): a program per column block and share of K.

Source: FlashDecoding++ (arXiv 2311.01282), section 5 (ImplA, FastGEMV).
"""

import functools

import jax
import triton
import triton.language as tl

from fdpp_jax.plans.shapes import WeightOrder
from fdpp_jax.plans.triton_matmul import GemvConfig
from fdpp_jax.triton.parts import products, splits


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
    first, last = splits.tiles((DEPTH + BLOCK_K - 1) // BLOCK_K, SPLIT_K)
    column = tl.program_id(0) * BLOCK_N
    acc = products.of_row(
        x_ptr, w_ptr + column.to(tl.int64) * (DEPTH if IS_NK else 1), WIDTH - column, first, last, IS_NK, DEPTH, WIDTH,
        BLOCK_N, BLOCK_K, NUM_STAGES,
    )  # fmt: skip
    columns = column + tl.arange(0, BLOCK_N)
    sums = tl.sum(acc, 1 if IS_NK else 0)
    splits.finish(sums, out_ptr, parts_ptr, arrived_ptr, columns, columns < WIDTH, WIDTH, SPLIT_K, ADDS_UP)
