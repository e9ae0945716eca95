"""A kernel in a few lines, for tests of what calls, interprets and compiles kernels: a product that counts programs."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from fdpp_jax.triton import bridge


@triton.jit
def toy_product(x_ptr, w_ptr, out_ptr, count_ptr, K: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """out [16, N] = x [16, K] @ w [K, N], a block of columns in each program; count is how many there were."""
    rows, block = tl.arange(0, 16), tl.arange(0, BLOCK)
    columns = tl.program_id(0) * BLOCK + block
    acc = tl.zeros((16, BLOCK), tl.float32)
    for start in tl.range(0, K, BLOCK):
        depth = start + block
        x = tl.load(x_ptr + rows[:, None] * K + depth)
        acc = tl.dot(x, tl.load(w_ptr + depth[:, None] * N + columns), acc)
    tl.store(out_ptr + rows[:, None] * N + columns, acc.to(out_ptr.dtype.element_ty))
    tl.atomic_add(count_ptr, 1)


def product(x, w, *, arch, block=64, num_warps=4, num_stages=3):
    """x [16, K] @ w [K, N], and the number of programs [1]."""
    (_, k), n = x.shape, w.shape[1]
    results = jax.ShapeDtypeStruct((16, n), x.dtype), jax.ShapeDtypeStruct((1,), jnp.int32)
    return bridge.call(
        toy_product,
        x,
        w,
        results=results,
        grid=(n // block,),
        arch=arch,
        num_warps=num_warps,
        num_stages=num_stages,
        zeroed=(1,),
        K=k,
        N=n,
        BLOCK=block,
    )


@triton.jit
def toy_update(x_ptr, kept_ptr, out_ptr, N: tl.constexpr):
    """Row 1 of kept [3, N] becomes x [N]; out [N] is what it was."""
    columns = tl.arange(0, N)
    tl.store(out_ptr + columns, tl.load(kept_ptr + N + columns))
    tl.debug_barrier()
    tl.store(kept_ptr + N + columns, tl.load(x_ptr + columns))


def update(x, kept, *, arch):
    """Row 1 of kept [3, N] as it was, and kept with x [N] there."""
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    settings = dict(grid=(1,), arch=arch, num_warps=1, num_stages=1)
    return bridge.call(toy_update, x, kept, results=[out], updated=[1], N=x.size, **settings)
