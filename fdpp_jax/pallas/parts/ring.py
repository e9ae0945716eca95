"""The ring of TMA stages that a kernel streams through: layout of its tiles, shares of CTAs, first loads, the end.

Used by all kernels.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.plans.shapes import round_up

type Barrier = Any  # the ref of a barrier, whose type in JAX is private


def tile_transforms(
    minor_size: int, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Layout of an array's tiles in shared memory: the widest swizzle whose width divides the array's last axis.

    TMA reads whole swizzle widths, so a last axis of 32 * odd bytes, such as OPT's vocabulary, needs the narrowest.
    """
    itemsize = jnp.dtype(dtype).itemsize
    for swizzle_bytes in (128, 64, 32):
        if minor_size * itemsize % swizzle_bytes == 0:
            return plgpu.TilingTransform((8, swizzle_bytes // itemsize)), plgpu.SwizzleTransform(swizzle_bytes)
    raise NotImplementedError(f"tiles need a last axis that is a multiple of {32 // itemsize}; got {minor_size}")


def loadable_rows(num_rows: int) -> int:
    """num_rows, padded for TMA: a box of 8 rows may reach beyond an array of 5 rows, but not of 12."""
    return num_rows if num_rows < 8 else round_up(num_rows, 8)


def share(index: jax.Array, num_shares: jax.Array | int, num_tiles: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """The tiles [first, last) of share `index`, where num_tiles tiles are shared evenly."""
    first = lax.div(index * num_tiles, jnp.int32(num_shares))
    return first, lax.div((index + 1) * num_tiles, jnp.int32(num_shares))


def fill(fetch: Callable[..., None], first: jax.Array, last: jax.Array, num_stages: int) -> None:
    """Starts the loads fetch(tile, slot) of the first `num_stages` tiles of [first, last)."""
    for slot in range(num_stages):
        pl.when(first + slot < last)(functools.partial(fetch, first + slot, slot))


def drain(free: Barrier, done: jax.Array, num_stages: int) -> None:
    """Waits until all `done` tiles have been read. A CTA must not end while an arrival at its barriers is pending."""
    for i in range(num_stages):
        item = done - num_stages + i
        slot = lax.rem(item, jnp.int32(num_stages))
        pl.when(item >= 0)(functools.partial(plgpu.barrier_wait, free.at[slot]))
