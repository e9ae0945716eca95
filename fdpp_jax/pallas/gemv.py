"""x @ w for one row on Hopper's CUDA cores (Mosaic GPU).

A CTA takes one block of N and one share of K, and streams w, as it is stored, and x through a ring of TMA stages. Each
lane multiplies its weights by the x of their K and adds the products in float32, in place. The sum over K follows once,
after the last block. TMA fills the rows and columns beyond a ragged K or N with zeros. XLA adds the partial sums of the
shares of K, and fuses that into the consumer of the result.

Source: FlashDecoding++ (arXiv 2311.01282), section 5 (ImplA, FastGEMV).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.pallas.parts import ring
from fdpp_jax.plans.hopper_matmul import GemvConfig
from fdpp_jax.plans.manual_axes import vary_as_operands
from fdpp_jax.plans.shapes import WeightOrder, cdiv, in_order

_CHUNK = 64  # K that the lanes hold at a time: the WGMMA register layout has a height of 64


# Jitted so that all layers of a model share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("config", "out_dtype", "w_order", "interpret"))
@vary_as_operands
def gemv(
    x: jax.Array,
    w: jax.Array,
    *,
    config: GemvConfig,
    out_dtype: jax.typing.DTypeLike,
    w_order: WeightOrder = "kn",
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """x @ w, accumulated in float32.

    Args:
      x: [1, K] bfloat16 or float16; K a multiple of 16.
      w: [K, N] or [N, K], same dtype; N a multiple of 16.
      config: Tiles, splits and stages.
      out_dtype: dtype of the result.
      w_order: "kn" or "nk", the order of w's axes.
      interpret: Runs the kernel interpreted on the CPU.

    Returns:
      [1, N].
    """
    width = w.shape[w_order.index("n")]
    w_tile = in_order(w_order, config.block_k, config.block_n)
    partial = plgpu.kernel(
        functools.partial(_body, config=config, w_order=w_order),
        out_type=jax.ShapeDtypeStruct((config.split_k, width), jnp.float32),
        scratch_types=dict(
            x_smem=plgpu.SMEM((config.num_stages, config.block_k), x.dtype),
            w_smem=plgpu.SMEM((config.num_stages, *w_tile), w.dtype, transforms=ring.tile_transforms(w.shape[1])),
            out_smem=plgpu.SMEM((config.block_n,), jnp.float32),
            ready=plgpu.Barrier(num_arrivals=2, num_barriers=config.num_stages),
        ),
        grid=(cdiv(width, config.block_n), config.split_k),
        grid_names=("block_n", "split_k"),
        interpret=interpret,
        kernel_name="gemv",
    )(x[0], w)
    return functools.reduce(jnp.add, list(partial))[None].astype(out_dtype)


def _body(
    x_gmem: jax.Ref,  # [K]
    w_gmem: jax.Ref,  # [K, N] or [N, K]
    out_gmem: jax.Ref,  # [split_k, N] float32
    *,
    x_smem: jax.Ref,  # [stages, block_k]
    w_smem: jax.Ref,  # [stages, block_k, block_n] or [stages, block_n, block_k]
    out_smem: jax.Ref,  # [block_n] float32
    ready: ring.Barrier,
    config: GemvConfig,
    w_order: WeightOrder,
) -> None:
    """One CTA: one block of columns and one share of K."""
    k_axis, n_axis = in_order(w_order, 0, 1)
    block_n, block_k, num_stages = config.block_n, config.block_k, config.num_stages
    column = pl.ds(lax.axis_index("block_n") * block_n, block_n)
    split = lax.axis_index("split_k")
    first, last = ring.share(split, config.split_k, cdiv(x_gmem.shape[0], block_k))

    def fetch(block: jax.Array, slot: jax.Array | int) -> None:
        depth = pl.ds(block * block_k, block_k)
        plgpu.copy_gmem_to_smem(w_gmem.at[in_order(w_order, depth, column)], w_smem.at[slot], ready.at[slot])
        plgpu.copy_gmem_to_smem(x_gmem.at[depth], x_smem.at[slot], ready.at[slot])

    ring.fill(fetch, first, last, num_stages)

    def step(block: jax.Array, acc: jax.Array) -> jax.Array:
        slot = lax.rem(block - first, jnp.int32(num_stages))
        plgpu.barrier_wait(ready.at[slot])
        for start in range(0, block_k, _CHUNK):
            chunk = pl.ds(start, _CHUNK)
            w_chunk = w_smem.at[slot, *in_order(w_order, chunk, slice(None))]
            w = plgpu.load(w_chunk, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            x = plgpu.load(x_smem.at[slot, chunk], layout=plgpu.Layout.WGMMA.reduce(n_axis), optimized=False)
            acc += w * lax.broadcast_in_dim(x.astype(jnp.float32), w.shape, [k_axis])
        plgpu.commit_smem()  # the copy engine overwrites the slot only after the reads above
        pl.when(block + num_stages < last)(functools.partial(fetch, block + num_stages, slot))
        return acc

    acc = plgpu.layout_cast(jnp.zeros(in_order(w_order, _CHUNK, block_n), jnp.float32), plgpu.Layout.WGMMA)
    out_smem[...] = lax.fori_loop(first, last, step, acc).sum(axis=k_axis)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[split, column])  # type: ignore[arg-type]  # the annotation lacks jax.Ref
    plgpu.wait_smem_to_gmem(0)
