"""x @ w for 1 to 64 rows on Hopper's tensor cores (Mosaic GPU): rows padded to 8, not 64.

wgmma's large operand has 64 rows and its small one any multiple of 8. The weights, of which there are many,
take the 64, and x takes the 8:

    out^T [block_n, rows] += w^T [block_n, block_k] @ x^T [block_k, rows]

wgmma transposes 16-bit operands as it reads them, so w may be stored [K, N] or [N, K] alike.

A CTA takes one column block and one share of K, and streams w and x through a ring of TMA stages, so that
loads run ahead of the products. TMA fills what lies beyond a ragged K or N with zeros. The split-K partial
sums leave in float32 and are added by XLA, which fuses that into whatever consumes the result.

Source: FlashDecoding++ (arXiv 2311.01282), section 4 (flat GEMM with double buffering).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.config import FlatMatmulConfig, WeightOrder, in_order, round_up
from fdpp_jax.pallas import ring


# Jitted so that a model's layers share one trace and one lowering: a kernel takes some 0.3 s to lower.
@functools.partial(jax.jit, static_argnames=("config", "out_dtype", "w_order", "interpret"))
def flat_matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    config: FlatMatmulConfig,
    out_dtype: jax.typing.DTypeLike,
    w_order: WeightOrder = "kn",
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """x @ w, accumulated in float32.

    Args:
      x: [M, K] bfloat16 or float16, M <= 64; K a multiple of 16.
      w: [K, N] or [N, K], same dtype; N a multiple of 16.
      config: Tiles, splits and stages.
      out_dtype: dtype of the result.
      w_order: "kn" or "nk", the order of w's axes.
      interpret: Runs the kernel interpreted on the CPU.

    Returns:
      [M, N].
    """
    num_rows, depth = x.shape
    width = w.shape[w_order.index("n")]
    rows = round_up(num_rows, 8)
    if dead_rows := ring.loadable_rows(num_rows) - num_rows:
        x = jnp.pad(x, ((0, dead_rows), (0, 0)))
    transforms = ring.tile_transforms(math.gcd(depth, w.shape[1]))  # wgmma wants one swizzle for both operands
    w_tile = in_order(w_order, config.block_k, config.block_n)
    partial = plgpu.kernel(
        functools.partial(_body, config=config, w_order=w_order),
        out_type=jax.ShapeDtypeStruct((config.split_k, width, rows), jnp.float32),
        scratch_types=dict(
            x_smem=plgpu.SMEM((config.num_stages, rows, config.block_k), x.dtype, transforms=transforms),
            w_smem=plgpu.SMEM((config.num_stages, *w_tile), w.dtype, transforms=transforms),
            out_smem=plgpu.SMEM((config.block_n, rows), jnp.float32),
            ready=plgpu.Barrier(num_arrivals=2, num_barriers=config.num_stages),
        ),
        grid=(pl.cdiv(width, config.block_n), config.split_k),
        grid_names=("block_n", "split_k"),
        interpret=interpret,
        kernel_name="flat_matmul",
    )(x, w)
    out = functools.reduce(jnp.add, list(partial))  # [N, rows]; adds, since XLA fuses them where a sum would stop
    return out[:, :num_rows].T.astype(out_dtype)


def _body(x_gmem, w_gmem, out_gmem, *, x_smem, w_smem, out_smem, ready, config, w_order):
    """One CTA: one block of columns and one share of K."""
    block_n, block_k, num_stages = config.block_n, config.block_k, config.num_stages
    column = pl.ds(lax.axis_index("block_n") * block_n, block_n)
    split = lax.axis_index("split_k")
    first, last = ring.share(split, config.split_k, pl.cdiv(x_gmem.shape[1], block_k))

    def fetch(block, slot):
        depth = pl.ds(block * block_k, block_k)
        plgpu.copy_gmem_to_smem(w_gmem.at[in_order(w_order, depth, column)], w_smem.at[slot], ready.at[slot])
        # A traced start lets the box reach beyond the rows, too: TMA fills with zeros.
        plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(split * 0, x_smem.shape[1]), depth], x_smem.at[slot], ready.at[slot])

    ring.fill(fetch, first, last, num_stages)

    def accumulate(acc_ref):
        def step(block, _):
            slot = lax.rem(block - first, jnp.int32(num_stages))
            plgpu.barrier_wait(ready.at[slot])
            w_t = w_smem.at[slot].transpose((1, 0)) if w_order == "kn" else w_smem.at[slot]  # [block_n, block_k]
            plgpu.wgmma(acc_ref, w_t, x_smem.at[slot].transpose((1, 0)))
            plgpu.wgmma_wait(1)  # the product of the last block is done: its slot is free
            refill = block + num_stages - 1
            free = lax.rem(refill - first, jnp.int32(num_stages))
            pl.when((block > first) & (refill < last))(functools.partial(fetch, refill, free))

        lax.fori_loop(first, last, step, None)
        return acc_ref[...]

    out_smem[...] = pl.run_scoped(accumulate, plgpu.ACC((block_n, out_smem.shape[1]), jnp.float32))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[split, column])
    plgpu.wait_smem_to_gmem(0)
