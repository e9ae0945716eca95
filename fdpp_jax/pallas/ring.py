"""The ring of TMA stages that every kernel streams through: how a tile lies in it, whose share, what to load first."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.config import round_up


def tile_transforms(
    minor_size: int, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """How tiles of an array lie in shared memory: the widest swizzle whose width divides the array's last axis.

    TMA reads whole swizzle widths, so a last axis of 32 * odd bytes, such as OPT's vocabulary, gets a narrower one.
    """
    itemsize = jnp.dtype(dtype).itemsize
    for swizzle_bytes in (128, 64, 32):
        if minor_size * itemsize % swizzle_bytes == 0:
            return plgpu.TilingTransform((8, swizzle_bytes // itemsize)), plgpu.SwizzleTransform(swizzle_bytes)
    raise NotImplementedError(f"tiles need a last axis that is a multiple of {32 // itemsize}; got {minor_size}")


def loadable_rows(num_rows: int) -> int:
    """Rows that num_rows are padded to for TMA, whose boxes of 8 rows may reach beyond an array of 5, not of 12."""
    return num_rows if num_rows < 8 else round_up(num_rows, 8)


def share(index: jax.Array, num_shares: jax.Array | int, num_tiles: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """First tile of share `index` and of the next one: even shares of `num_tiles`, known at run time or before."""
    first = lax.div(index * num_tiles, jnp.int32(num_shares))
    return first, lax.div((index + 1) * num_tiles, jnp.int32(num_shares))


def fill(fetch: Callable[..., None], first: jax.Array, last: jax.Array, num_stages: int) -> None:
    """Starts the loads fetch(tile, slot) of the first `num_stages` tiles of [first, last)."""
    for slot in range(num_stages):
        pl.when(first + slot < last)(functools.partial(fetch, first + slot, slot))


def drain(free: Any, done: jax.Array, num_stages: int) -> None:
    """Waits until all `done` tiles have been read: a barrier may not go while an arrival is on its way."""
    for i in range(num_stages):
        item = done - num_stages + i
        slot = lax.rem(item, jnp.int32(num_stages))
        pl.when(item >= 0)(functools.partial(plgpu.barrier_wait, free.at[slot]))
