"""A KV tile's way to the tensor cores: TMA from a contiguous or a paged cache, and 8-bit keys and values to 16 bits."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from fdpp_jax.pallas.decode_attention.refs import GlobalRefs, SharedRefs
from fdpp_jax.pallas.decode_attention.shares import LiveKeys, Place, Share
from fdpp_jax.pallas.parts import cache_tiles, handover, ring
from fdpp_jax.pallas.parts.registers import load
from fdpp_jax.plans.calls import AttentionArrays
from fdpp_jax.plans.hopper_attention import DecodeAttentionConfig

# Keys: a thread loads 4 neighbours at a time. Of 16 columns thread t holds 4 t .. 4 t + 3, where wgmma wants 2 t,
# 2 t + 1, 2 t + 8 and 2 t + 9. A dot product does not depend on the order of columns if keys and query share it.
_KEYS = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 16), (16, 16), (8, 16), (4,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)
_QUERY = plgpu.Layout.TILED(plgpu.Tiling(((8, 64), (8, 16), (4,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)
_PERMUTED_QUERY = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 64), (8, 16), (8,), (2,))), warp_dims=(-5,), lane_dims=(-4, -2), vector_dim=-1
)


def scratch(arrays: AttentionArrays, config: DecodeAttentionConfig, padded_dim: int) -> dict[str, Any]:
    """Scratch for the ring of `num_stages` tiles of keys and values, and for the widening of 8-bit tiles.

    Args:
      arrays: The call's.
      config: Tiles and stages.
      padded_dim: Head dim, rounded up to whole swizzle tiles.
    """
    key, dtype = arrays.key, arrays.query.dtype
    _, page_size, _, head_dim = key.shape
    block_kv, num_stages = config.block_kv, config.num_stages
    token_scales = arrays.key_scale is not None and arrays.key_scale.ndim == 3
    tile = plgpu.SMEM(
        (num_stages, block_kv, padded_dim), key.dtype, transforms=ring.tile_transforms(head_dim, key.dtype)
    )
    copies = cache_tiles.num_boxes(None if arrays.page_table is None else page_size, block_kv)  # per tile
    ready = plgpu.Barrier(num_arrivals=copies * (1 + token_scales), num_barriers=num_stages)
    refs: dict[str, Any] = dict(k=tile, v=tile, k_ready=ready, v_ready=ready)
    if key.dtype.itemsize == 1:
        refs["v_wide"] = plgpu.SMEM((1, block_kv, padded_dim), dtype, transforms=ring.tile_transforms(head_dim, dtype))
    if token_scales:
        factors = plgpu.SMEM((num_stages, block_kv, cache_tiles.SCALE_HEADS), jnp.float32)
        refs |= dict(k_factors=factors, v_factors=factors)
    return refs


class _Route(NamedTuple):
    """The way of keys, or of values, from the cache to the ring; scales and factors where each token has scales."""

    cache: jax.Ref
    scales: jax.Ref | None
    ring: jax.Ref
    factors: jax.Ref | None
    ready: jax.Ref


def fetch(
    gmem: GlobalRefs,
    smem: SharedRefs,
    batch: jax.Array,
    kv_head: jax.Array,
    tile: jax.Array,
    slot: jax.Array | int,
    *,
    keys_only: bool = False,
) -> None:
    """Starts the loads of one tile of keys and values into a slot of the ring."""
    zero = batch * 0  # a traced start lets a box reach beyond the axis: TMA fills with zeros
    _, block_kv, padded_dim = smem.k.shape
    dims = pl.ds(zero, padded_dim)
    scale_heads = cache_tiles.scale_heads(kv_head)
    routes = [_Route(gmem.k, gmem.k_scale, smem.k, smem.k_factors, smem.k_ready)]
    if not keys_only:
        routes.append(_Route(gmem.v, gmem.v_scale, smem.v, smem.v_factors, smem.v_ready))

    def copy(route: _Route, box: cache_tiles.Box) -> None:
        ready, keys = route.ready.at[slot], pl.ds(box.start, box.size)
        source = route.cache.at[box.page, keys, kv_head, dims]
        plgpu.copy_gmem_to_smem(source, route.ring.at[slot, box.rows], ready)
        if route.scales is not None and route.factors is not None:
            factors = route.scales.at[box.page, keys, scale_heads]
            plgpu.copy_gmem_to_smem(factors, route.factors.at[slot, box.rows], ready)

    for box in cache_tiles.boxes(gmem.k, gmem.pages, batch, tile, block_kv):
        for route in routes:
            copy(route, box)


class Stream:
    """A CTA's tiles through the ring, without a pause between sequences."""

    def __init__(self, gmem: GlobalRefs, smem: SharedRefs, share: Share) -> None:
        self.gmem, self.smem, self.share = gmem, smem, share
        self.num_stages = share.facts.config.num_stages

    def fill(
        self, position: jax.Array, place: Place, *, since: jax.Array | None = None, until: jax.Array | None = None
    ) -> None:
        """Starts the loads of the first `num_stages` positions from `position` on that lie in [since, until).

        `place` is that of the sequence that holds `position`, or of an earlier one.
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
        live: LiveKeys,
        batch: jax.Array,
        *,
        is_alone: bool,
    ) -> None:
        """Starts the load that follows `tile` in its slot.

        The sequence at `place` has tiles before `last`. Tiles of the next sequences follow, unless `is_alone`.
        """
        tile += self.num_stages
        pl.when(tile < last)(functools.partial(fetch, self.gmem, self.smem, batch, self.share.kv_head, tile, slot))
        if self.share.facts.chunk > 1 and not is_alone:
            position = place.start + tile - live.first
            has_next = (position >= place.start + live.count) & (position < self.share.end)
            pl.when(has_next)(lambda: self._fetch(position, place))

    def _slot(self, position: jax.Array) -> jax.Array:
        return lax.rem(position - self.share.begin, jnp.int32(self.num_stages))

    def _fetch(self, position: jax.Array, place: Place) -> None:
        i, start = self.share.locate(position, place)
        tile = self.share.live(i).first + position - start
        fetch(self.gmem, self.smem, self.share.sequence(i), self.share.kv_head, tile, self._slot(position))


def wide_keys(smem: SharedRefs, slot: jax.Array) -> jax.Array:
    """An 8-bit tile of keys in the query's dtype, in registers, for wgmma with a permuted query."""
    return _permuted(cache_tiles.load_wide(smem.k.at[slot], _KEYS, smem.q.dtype), _KEYS, plgpu.Layout.WGMMA)


def permute_query(query_smem: jax.Ref) -> None:
    """Puts the columns of a query [rows, H] in the order of wide_keys()."""
    permuted = _permuted(load(query_smem, _QUERY, optimized=False), _QUERY, _PERMUTED_QUERY)
    handover.sync()
    query_smem[...] = permuted
    plgpu.commit_smem()


def _permuted(x: jax.Array, layout: Any, to: Any) -> jax.Array:
    """Registers of 4 neighbours each, in the layout `to`, whose registers are 2 and 2 neighbours, 8 columns apart."""
    returned = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=to)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=returned)
    def emit(_: Any, x: Any) -> Any:
        to_layout = to.to_mgpu()
        halves = np.empty((*x.registers.shape, 2), object)
        for index, register in np.ndenumerate(x.registers):
            for half in range(2):
                halves[*index, half] = mgpu.utils.vector_slice(register, slice(2 * half, 2 * half + 2))
        if to == plgpu.Layout.WGMMA:  # the axes of its registers: tiles of columns, then rows that are 8 apart
            halves = np.moveaxis(halves, -1, 2)
        return mgpu.FragmentedArray(
            _registers=halves.reshape(to_layout.registers_shape(x.shape)), _layout=to_layout, _is_signed=x.is_signed
        )

    return emit(x)


def widen_values(v_smem: jax.Ref, wide_smem: jax.Ref) -> None:
    """Copies an 8-bit tile of values [block_kv, H] to 16 bits: wgmma transposes only these, in shared memory."""
    wide_smem[...] = cache_tiles.load_wide(v_smem, cache_tiles.WIDENING, wide_smem.dtype)


def opaque_zero() -> jax.Array:
    """0, from assembly that the compiler does not move.

    Descriptors of wgmma's operands that depend on it are computed where they are used. Otherwise the compiler computes
    them before the loop, and they take up to 64 registers in the loop.
    """
    returned = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=plgpu.Layout.WG_SPLAT(()))

    @plgpu.inline_mgpu(return_type=returned)
    def emit(_: Any) -> Any:
        zero = mgpu.utils.inline_ptx(
            "mov.b32 $0, 0;", result_types=ir.IntegerType.get_signless(32), has_side_effects=True
        )
        return mgpu.FragmentedArray.splat(zero, (), is_signed=True)

    return emit()


def clear_rows(tile_smem: jax.Ref, first: jax.Array, last: jax.Array) -> None:
    """Zeroes the rows of a 16-bit tile outside [first, last): 0 * NaN would be NaN."""
    values = load(tile_smem, plgpu.Layout.WGMMA)
    row = plgpu.broadcasted_iota(jnp.int32, tile_smem.shape, 0, layout=plgpu.Layout.WGMMA)
    tile_smem[...] = jnp.where((row >= first) & (row < last), values, jnp.zeros_like(values))
