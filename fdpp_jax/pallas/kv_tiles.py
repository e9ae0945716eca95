"""A KV tile's way into the tensor cores: TMA from a contiguous or a paged cache, and 8-bit keys and values to 16 bits.

`gmem` and `smem` hold the kernel's refs by name, as `decode_attention` sets them up.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.config import DecodeAttentionConfig
from fdpp_jax.pallas import ring

# A thread converts 8 neighbours at a time: 8 lanes take 64 columns of a row, 4 rows a warp, 16 rows the four warps.
_CONVERT = plgpu.Layout.TILED(
    plgpu.Tiling(((16, 64), (4, 64), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
_SCALE_HEADS = 8  # heads of per-token scales that are loaded together: the columns of a WGMMA tile


def scratch(
    key: jax.Array, config: DecodeAttentionConfig, padded_dim: int, dtype: Any, *, paged: bool, token_scales: bool
) -> dict[str, Any]:
    """The ring of `num_stages` tiles of keys and values, and what 8-bit ones need besides.

    Args:
      key: The cache or the pool of pages.
      config: Tiles and stages.
      padded_dim: Head dim rounded up to whole WGMMA tiles.
      dtype: The query's.
      paged: Whether a tile may be several pages.
      token_scales: Whether every token has scales of its own.
    """
    head_dim, block_kv, num_stages = key.shape[3], config.block_kv, config.num_stages
    tile = plgpu.SMEM(
        (num_stages, block_kv, padded_dim), key.dtype, transforms=ring.tile_transforms(head_dim, key.dtype)
    )
    copies = block_kv // min(block_kv, key.shape[1]) if paged else 1
    ready = plgpu.Barrier(num_arrivals=copies * (1 + token_scales), num_barriers=num_stages)
    refs = dict(k=tile, v=tile, k_ready=ready, v_ready=ready)
    if key.dtype.itemsize == 1:
        refs["v_wide"] = plgpu.SMEM((block_kv, padded_dim), dtype, transforms=ring.tile_transforms(head_dim, dtype))
    if token_scales:
        factors = plgpu.SMEM((num_stages, block_kv, _SCALE_HEADS), jnp.float32)
        refs |= dict(k_factors=factors, v_factors=factors)
    return refs


def fetch(gmem: Any, smem: Any, batch: jax.Array, kv_head: jax.Array, tile: jax.Array, slot: jax.Array | int) -> None:
    """Starts the loads of one tile of keys and values into a slot of the ring."""
    zero = batch * 0  # a traced start lets a box reach beyond the axis: TMA fills with zeros
    _, block_kv, padded_dim = smem.k.shape
    dims = pl.ds(zero, padded_dim)
    scale_heads = pl.ds(kv_head - lax.rem(kv_head, jnp.int32(_SCALE_HEADS)), _SCALE_HEADS)

    def copy(name: str, page: jax.Array, start: jax.Array, size: int, rows: Any) -> None:
        ready = getattr(smem, f"{name}_ready").at[slot]
        source = getattr(gmem, name).at[page, pl.ds(start, size), kv_head, dims]
        plgpu.copy_gmem_to_smem(source, getattr(smem, name).at[slot, rows], ready)
        if hasattr(smem, f"{name}_factors"):
            factors = getattr(gmem, f"{name}_scale").at[page, pl.ds(start, size), scale_heads]
            plgpu.copy_gmem_to_smem(factors, getattr(smem, f"{name}_factors").at[slot, rows], ready)

    if not hasattr(gmem, "pages"):
        for name in ("k", "v"):
            copy(name, batch, tile * block_kv, block_kv, pl.ds(0, block_kv))
        return
    num_pages, page_size = gmem.k.shape[:2]
    size = min(page_size, block_kv)
    for part in range(block_kv // size):
        position = tile * block_kv + part * size
        # Pages beyond the length are read like others, and masked: any page of the pool will do.
        entry = jnp.minimum(lax.div(position, jnp.int32(page_size)), gmem.pages.shape[1] - 1)
        page = jnp.clip(gmem.pages[batch, entry], 0, num_pages - 1)
        for name in ("k", "v"):
            copy(name, page, lax.rem(position, jnp.int32(page_size)), size, pl.ds(part * size, size))


def is_narrow(smem: Any) -> bool:
    """Whether keys and values have 8 bits."""
    return hasattr(smem, "v_wide")


def wide_keys(smem: Any, slot: jax.Array) -> jax.Array:
    """An 8-bit tile of keys in the query's dtype, in registers, from where wgmma takes it."""
    return plgpu.layout_cast(_load_wide(smem, smem.k.at[slot], plgpu.Layout.WGMMA_UPCAST_2X), plgpu.Layout.WGMMA)


def wide_values(smem: Any, slot: jax.Array) -> Any:
    """An 8-bit tile of values in the query's dtype, in shared memory, where wgmma transposes it."""
    smem.v_wide[...] = _load_wide(smem, smem.v.at[slot], _CONVERT)
    plgpu.commit_smem()
    return smem.v_wide


def _load_wide(smem: Any, tile: Any, layout: Any) -> jax.Array:
    narrow = plgpu.load(tile, layout=layout, optimized=False)
    if narrow.dtype != jnp.int8:
        narrow = narrow.astype(jnp.float16).astype(jnp.float32)  # the only way out of float8_e4m3fn
    return narrow.astype(smem.v_wide.dtype)


def factors(smem: Any, name: str, slot: jax.Array, kv_head: jax.Array) -> jax.Array:
    """Per-token scales of a tile, [block_kv]."""
    loaded = plgpu.load(getattr(smem, f"{name}_factors").at[slot], layout=plgpu.Layout.WGMMA, optimized=False)
    head = plgpu.broadcasted_iota(jnp.int32, loaded.shape, 1, layout=plgpu.Layout.WGMMA)
    mine = head == lax.rem(kv_head, jnp.int32(_SCALE_HEADS))
    return jnp.where(mine, loaded, 0.0).sum(axis=1)


def clear_rows(tile: Any, first: jax.Array, last: jax.Array) -> None:
    """Zeroes the rows of a 16-bit tile outside [first, last): 0 * NaN would be NaN."""
    values = plgpu.load(tile, layout=plgpu.Layout.WGMMA)
    row = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=plgpu.Layout.WGMMA)
    tile[...] = jnp.where((row >= first) & (row < last), values, jnp.zeros_like(values))
