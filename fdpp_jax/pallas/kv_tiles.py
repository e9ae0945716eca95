"""A KV tile's way into the tensor cores: TMA from a contiguous or a paged cache, and 8-bit keys and values to 16 bits.

`gmem` and `smem` hold the kernel's refs by name, as `decode_attention` sets them up.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from fdpp_jax.config import DecodeAttentionConfig
from fdpp_jax.pallas import handover, ring
from fdpp_jax.pallas.kv_shares import Live, Place, Share

# Values, a thread 8 neighbours at a time: 8 lanes take 64 columns of a row, the others rows at a distance of 4, whose
# swizzles differ, so that they meet in no bank.
_VALUES = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 64), (16, 64), (4, 64), (8,))), warp_dims=(-7,), lane_dims=(-5, -2), vector_dim=-1
)
# Keys, a thread 4 neighbours at a time: of 16 columns it holds 4 t .. 4 t + 3, where wgmma wants 2 t, 2 t + 1, 2 t + 8
# and 2 t + 9. A dot product does not mind the order of its columns, if the query's is the same.
_KEYS = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 16), (16, 16), (8, 16), (4,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)
_QUERY = plgpu.Layout.TILED(plgpu.Tiling(((8, 64), (8, 16), (4,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)
_PERMUTED_QUERY = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 64), (8, 16), (8,), (2,))), warp_dims=(-5,), lane_dims=(-4, -2), vector_dim=-1
)
_SCALE_HEADS = 4  # heads of per-token scales that are loaded together: the 16 bytes that TMA takes at least


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
        refs["v_wide"] = plgpu.SMEM((1, block_kv, padded_dim), dtype, transforms=ring.tile_transforms(head_dim, dtype))
    if token_scales:
        factors = plgpu.SMEM((num_stages, block_kv, _SCALE_HEADS), jnp.float32)
        refs |= dict(k_factors=factors, v_factors=factors)
    return refs


def fetch(
    gmem: Any,
    smem: Any,
    batch: jax.Array,
    kv_head: jax.Array,
    tile: jax.Array,
    slot: jax.Array | int,
    names: tuple[str, ...] = ("k", "v"),
) -> None:
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
        for name in names:
            copy(name, batch, tile * block_kv, block_kv, pl.ds(0, block_kv))
        return
    num_pages, page_size = gmem.k.shape[:2]
    size = min(page_size, block_kv)
    for part in range(block_kv // size):
        position = tile * block_kv + part * size
        # Pages beyond the length are read like others, and masked: any page of the pool will do.
        entry = jnp.minimum(lax.div(position, jnp.int32(page_size)), gmem.pages.shape[1] - 1)
        page = jnp.clip(gmem.pages[batch, entry], 0, num_pages - 1)
        for name in names:
            copy(name, page, lax.rem(position, jnp.int32(page_size)), size, pl.ds(part * size, size))


class Stream:
    """A CTA's tiles through the ring, without a stop between one sequence and the next."""

    def __init__(self, gmem: Any, smem: Any, share: Share):
        self.gmem, self.smem, self.share = gmem, smem, share
        self.num_stages = share.facts.config.num_stages

    def fill(
        self, position: jax.Array, place: Place, *, since: jax.Array | None = None, until: jax.Array | None = None
    ) -> None:
        """Starts the loads of `position` and those after it, of these from `since` and before `until` on.

        `place` is not behind position.
        """
        last = self.share.end if until is None else jnp.minimum(self.share.end, until)
        for stage in range(self.num_stages):
            is_wanted = position + stage < last
            if since is not None:
                is_wanted &= position + stage >= since
            pl.when(is_wanted)(functools.partial(self._fetch, position + stage, place))

    def refill(
        self,
        slot: jax.Array,
        tile: jax.Array,
        last: jax.Array,
        place: Place,
        live: Live,
        batch: jax.Array,
        *,
        is_alone: bool,
    ) -> None:
        """Starts the load that follows in the slot of a tile of the sequence at `place`.

        Its own next ones are before `last`; the next sequences' follow unless `is_alone`.
        """
        tile += self.num_stages
        pl.when(tile < last)(functools.partial(fetch, self.gmem, self.smem, batch, self.share.kv_head, tile, slot))
        if self.share.facts.chunk > 1 and not is_alone:
            position = place[1] + tile - live.first
            has_next = (position >= place[1] + live.count) & (position < self.share.end)
            pl.when(has_next)(lambda: self._fetch(position, place))

    def _slot(self, position: jax.Array) -> jax.Array:
        return lax.rem(position - self.share.begin, jnp.int32(self.num_stages))

    def _fetch(self, position: jax.Array, place: Place) -> None:
        i, start = self.share.locate(position, place)
        tile = self.share.live(i).first + position - start
        fetch(self.gmem, self.smem, self.share.sequence(i), self.share.kv_head, tile, self._slot(position))


def is_narrow(smem: Any) -> bool:
    """Whether keys and values have 8 bits."""
    return hasattr(smem, "v_wide")


def wide_keys(smem: Any, slot: jax.Array) -> jax.Array:
    """An 8-bit tile of keys in the query's dtype, in registers, for wgmma with a permuted query."""
    return _permuted(_load_wide(smem, smem.k.at[slot], _KEYS), _KEYS, plgpu.Layout.WGMMA)


def permute_query(query: Any) -> None:
    """Puts the columns of a query [rows, H] where wide_keys() has them."""
    permuted = _permuted(plgpu.load(query, layout=_QUERY, optimized=False), _QUERY, _PERMUTED_QUERY)
    handover.sync()
    query[...] = permuted
    plgpu.commit_smem()


def _permuted(x: jax.Array, layout: Any, to: Any) -> jax.Array:
    """The registers of x, each of 4 neighbours, as those of a layout with 2 and 2, which are 8 columns apart."""
    returned = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=to)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=returned)
    def emit(_: Any, x: Any) -> Any:
        to_layout = to.to_mgpu()
        halves = np.empty((*x.registers.shape, 2), object)
        for index, register in np.ndenumerate(x.registers):
            for half in range(2):
                halves[*index, half] = mgpu.utils.vector_slice(register, slice(2 * half, 2 * half + 2))
        if to == plgpu.Layout.WGMMA:  # registers are by tiles of columns there, and by rows 8 apart then
            halves = np.moveaxis(halves, -1, 2)
        return mgpu.FragmentedArray(
            _registers=halves.reshape(to_layout.registers_shape(x.shape)), _layout=to_layout, _is_signed=x.is_signed
        )

    return emit(x)


def widen_values(smem: Any, slot: jax.Array) -> None:
    """An 8-bit tile of values into v_wide, in the query's dtype: wgmma transposes 16 bits only, in shared memory."""
    smem.v_wide[0] = _load_wide(smem, smem.v.at[slot], _VALUES)


def opaque_zero() -> jax.Array:
    """0, from assembly that the compiler leaves where it is, and so what is computed from it.

    Else the descriptors of wgmma's operands are computed once, before the loop, and take up to 64 registers in it.
    """
    returned = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=plgpu.Layout.WG_SPLAT(()))

    @plgpu.inline_mgpu(return_type=returned)
    def emit(_: Any) -> Any:
        zero = mgpu.utils.inline_ptx(
            "mov.b32 $0, 0;", result_types=ir.IntegerType.get_signless(32), has_side_effects=True
        )
        return mgpu.FragmentedArray.splat(zero, (), is_signed=True)

    return emit()


def _load_wide(smem: Any, tile: Any, layout: Any) -> jax.Array:
    narrow = plgpu.load(tile, layout=layout, optimized=False)
    if narrow.dtype != jnp.int8:
        narrow = narrow.astype(jnp.float16).astype(jnp.float32)  # the only way out of float8_e4m3fn
    return narrow.astype(smem.v_wide.dtype)


def factors(smem: Any, name: str, slot: jax.Array, kv_head: jax.Array, *, is_interpreted: bool) -> jax.Array:
    """Per-token scales of a tile, [block_kv]: a thread loads those of its rows and of this head only."""
    ref, head = getattr(smem, f"{name}_factors"), lax.rem(kv_head, jnp.int32(_SCALE_HEADS))
    if is_interpreted:
        return ref[slot, :, head]
    layout: Any = plgpu.Layout.WGMMA.reduce(1)
    returned = plgpu.ShapeDtypeStruct(ref.shape[1:2], ref.dtype, layout=layout)

    # plgpu.load() takes no column of a ref.
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())), return_type=returned)
    def emit(_: Any, tile: Any, head: Any) -> Any:
        index = arith.index_cast(ir.IndexType.get(), head.registers.item())
        column = mgpu.utils.memref_slice(tile, (slice(None), index))
        return mgpu.FragmentedArray.load_untiled(column, layout=layout.to_mgpu(), optimized=False)

    return emit(ref.at[slot], head)


def clear_rows(tile: Any, first: jax.Array, last: jax.Array) -> None:
    """Zeroes the rows of a 16-bit tile outside [first, last): 0 * NaN would be NaN."""
    values = plgpu.load(tile, layout=plgpu.Layout.WGMMA)
    row = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=plgpu.Layout.WGMMA)
    tile[...] = jnp.where((row >= first) & (row < last), values, jnp.zeros_like(values))
