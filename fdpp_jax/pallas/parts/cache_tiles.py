"""A tile of keys or values from a contiguous or a paged cache: its TMA boxes, its scales, and 8 bits made 16.

Used by `decode_attention` and `prefill_attention`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from fdpp_jax.pallas.parts.registers import load

SCALE_HEADS = 4  # heads whose scales per token are loaded together: TMA takes 16 bytes at least
# A thread loads 8 neighbours of an 8-bit tile at a time. 8 lanes take 64 columns of a row. The other lanes take rows at
# a distance of 4: their swizzles differ, so no two lanes meet in a bank.
WIDENING = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 64), (16, 64), (4, 64), (8,))), warp_dims=(-7,), lane_dims=(-5, -2), vector_dim=-1
)


class Box(NamedTuple):
    """Keys that lie together in the cache: [start, start + size) of its `page`, which are `rows` of the tile."""

    page: jax.Array  # of a contiguous cache the sequence
    start: jax.Array
    size: int
    rows: pl.Slice


def num_boxes(page_size: int | None, block_kv: int) -> int:
    """Boxes per tile."""
    return 1 if page_size is None else block_kv // min(block_kv, page_size)


def boxes(cache: jax.Ref, pages: jax.Ref | None, batch: jax.Array, tile: jax.Array, block_kv: int) -> Iterator[Box]:
    """The boxes of the tile of `block_kv` keys with this number.

    Args:
      cache: [B, S, K, H], or pages [P, page_size, K, H].
      pages: [B, pages per sequence] int32; None: the cache is contiguous.
      batch: The sequence.
      tile: Its tile.
      block_kv: Keys per tile.
    """
    if pages is None:
        yield Box(batch, tile * block_kv, block_kv, pl.ds(0, block_kv))
        return
    num_pages, page_size = cache.shape[:2]
    size = min(page_size, block_kv)
    for part in range(num_boxes(page_size, block_kv)):
        position = tile * block_kv + part * size
        # Keys of pages beyond the length are masked, so any page of the pool will do for them.
        entry = jnp.minimum(lax.div(position, jnp.int32(page_size)), pages.shape[1] - 1)
        page = jnp.clip(pages[batch, entry], 0, num_pages - 1)
        yield Box(page, lax.rem(position, jnp.int32(page_size)), size, pl.ds(part * size, size))


def scale_heads(kv_head: jax.Array) -> pl.Slice:
    """The heads whose scales are loaded together with those of `kv_head`."""
    return pl.ds(kv_head - lax.rem(kv_head, jnp.int32(SCALE_HEADS)), SCALE_HEADS)


def load_wide(tile_smem: jax.Ref, layout: Any, dtype: np.dtype) -> jax.Array:
    """An 8-bit tile in registers, in a type of 16 bits, which holds all 8-bit numbers."""
    narrow = load(tile_smem, layout, optimized=False)
    if narrow.dtype != jnp.int8:
        narrow = narrow.astype(jnp.float16).astype(jnp.float32)  # the only way out of float8_e4m3fn
    return narrow.astype(dtype)


def factors(factors_smem: jax.Ref, slot: jax.Array | int, kv_head: jax.Array, *, is_interpreted: bool) -> jax.Array:
    """Scales per token of the tile in `slot`, [block_kv]: a thread loads those of its rows, and of this head only."""
    head = lax.rem(kv_head, jnp.int32(SCALE_HEADS))
    if is_interpreted:
        return factors_smem[slot, :, head]
    layout: Any = plgpu.Layout.WGMMA.reduce(1)
    returned = plgpu.ShapeDtypeStruct(factors_smem.shape[1:2], factors_smem.dtype, layout=layout)

    # plgpu.load() takes no column of a ref.
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())), return_type=returned)
    def emit(_: Any, tile: Any, head: Any) -> Any:
        index = arith.index_cast(ir.IndexType.get(), head.registers.item())
        column = mgpu.utils.memref_slice(tile, (slice(None), index))
        return mgpu.FragmentedArray.load_untiled(column, layout=layout.to_mgpu(), optimized=False)

    return emit(factors_smem.at[slot], head)
