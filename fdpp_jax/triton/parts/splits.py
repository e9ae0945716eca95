"""Shares of K: each program of a column block leaves its sums, and they are added in the order of the shares.

The last program of a block to arrive adds, so the result is the same each time. Where a barrier does not order the
stores of a whole program (AMD: it waits for its own wave's only), XLA adds instead.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from fdpp_jax.plans.shapes import cdiv
from fdpp_jax.plans.triton_matmul import FlatMatmulConfig, GemvConfig
from fdpp_jax.triton import bridge


def launch(
    kernel: Any,
    x: jax.Array,
    w: jax.Array,
    *,
    width: int,
    out_dtype: jax.typing.DTypeLike,
    config: FlatMatmulConfig | GemvConfig,
    **constants: Any,
) -> jax.Array:
    """x [M, K] @ w -> [M, width], by a kernel that calls `finish`: a program for each column block and share of K."""
    num_rows, num_blocks, split_k = x.shape[0], cdiv(width, config.block_n), config.split_k
    adds_up = split_k > 1 and config.arch.startswith("sm_")
    out = jax.ShapeDtypeStruct((num_rows, width) if split_k == 1 or adds_up else (1, 1), out_dtype)
    parts = jax.ShapeDtypeStruct((split_k, num_rows, width) if split_k > 1 else (1, 1, 1), jnp.float32)
    arrived = jax.ShapeDtypeStruct((num_blocks if adds_up else 1,), jnp.int32)
    whole, shares, _ = bridge.call(
        kernel,
        x,
        w,
        results=(out, parts, arrived),
        grid=(num_blocks, split_k),
        arch=config.arch,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        zeroed=(2,) if adds_up else (),
        **constants,
        SPLIT_K=split_k,
        NUM_STAGES=config.num_stages,
        ADDS_UP=adds_up,
    )
    if split_k == 1 or adds_up:
        return whole
    total = shares[0]
    for share in shares[1:]:
        total += share
    return total.astype(out_dtype)


@triton.jit
def finish(
    acc,
    out_ptr,
    parts_ptr,
    arrived_ptr,
    offsets,
    mask,
    SIZE: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ADDS_UP: tl.constexpr,
):
    """Stores a program's sums at offsets of the result of SIZE elements, or hands them over to the last one."""
    if SPLIT_K == 1:
        tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask)
    else:
        tl.store(parts_ptr + tl.program_id(1) * SIZE + offsets, acc, mask)
        if ADDS_UP:
            tl.debug_barrier()  # the arrival is one thread's, and releases the stores of all
            if tl.atomic_add(arrived_ptr + tl.program_id(0), 1, sem="acq_rel") == SPLIT_K - 1:
                total = tl.load(parts_ptr + offsets, mask, cache_modifier=".cg")
                for share in tl.static_range(1, SPLIT_K):
                    total += tl.load(parts_ptr + share * SIZE + offsets, mask, cache_modifier=".cg")
                tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def tiles(NUM_TILES: tl.constexpr, SPLIT_K: tl.constexpr):
    """First tile of this program's share of K, and the one after its last."""
    share = tl.program_id(1)
    return share * NUM_TILES // SPLIT_K, (share + 1) * NUM_TILES // SPLIT_K
