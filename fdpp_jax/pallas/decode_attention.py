"""Split-KV decode attention with a unified max, for Hopper (Mosaic GPU).

One query token a sequence. A CTA takes one key/value head of one sequence and one share of its live KV
tiles. K and V come through a ring of TMA stages; both products run on the tensor cores with the tile as the
64-row operand and the query rows (the G heads of the group, padded to 8) as the narrow one:

    s [block_kv, rows] = K [block_kv, H] @ q^T [H, rows]
    o [H, rows]       += V^T [H, block_kv] @ p [block_kv, rows],   p = e^(s - phi)

With phi fixed in advance no split keeps a running max, so o and sum(p) of the splits only add up. With
phi=None the same kernel keeps the running max of each split (online softmax); the splits are rescaled when
they are added.

Source: FlashDecoding++ (arXiv 2311.01282), sections 3 and 4.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax import unified_max
from fdpp_jax.config import DecodeAttentionConfig, round_up
from fdpp_jax.pallas import ring

_LOG2E = math.log2(math.e)
# Lower than any finite score, yet finite, so that max - max of a split without keys is not a NaN.
_LOWEST = -1e30

_TRANSFORMS = ring.tile_transforms(64)  # head dims and tiles are multiples of 64
_ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(0)  # one value a query row


# Jitted so that a model's layers share one trace and one lowering: a kernel takes some 0.3 s to lower.
@functools.partial(jax.jit, static_argnames=("scale", "config", "interpret"))
def decode_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    phi: jax.Array | None,
    *,
    scale: float,
    config: DecodeAttentionConfig,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """softmax(scale * q k^T) v for one query token a sequence.

    Args:
      query: [B, N, H] bfloat16 or float16; H is 64, 128 or 256.
      key: [B, S, K, H]; K divides N.
      value: [B, S, K, H].
      lengths: [B] int32 live keys, 0..S. What lies beyond is not used, NaN included.
      phi: [B, N] float32 in natural-log units, or None for online softmax.
      scale: Factor on the scores.
      config: Tiles, splits and stages.
      interpret: Runs the kernel interpreted on the CPU.

    Returns:
      [B, N, H] in the query's dtype. Rows whose denominator left the safe window are NaN and must be
      recomputed with phi=None.
    """
    batch, num_heads, head_dim = query.shape
    _, capacity, num_kv_heads, _ = key.shape
    group = num_heads // num_kv_heads
    rows = round_up(group, 8)
    dtype = query.dtype
    online = phi is None

    def by_group(x: jax.Array) -> jax.Array:  # [B, N, ...] -> [B, K, rows, ...]
        x = x.reshape(batch, num_kv_heads, group, *x.shape[2:])
        return jnp.pad(x, [(0, 0), (0, 0), (0, rows - group)] + [(0, 0)] * (x.ndim - 3))

    if dead_rows := -capacity % 8:  # TMA reads tiles of 8 rows; a capacity that is a multiple of 8 saves this copy
        key, value = (jnp.pad(x, ((0, 0), (0, dead_rows), (0, 0), (0, 0))) for x in (key, value))
    operands = [by_group(query), key, value, lengths.astype(jnp.int32)]
    if phi is not None:
        operands.append(by_group(phi * _LOG2E))
    partial = (batch, num_kv_heads, config.num_splits)
    stats = [jax.ShapeDtypeStruct((*partial, rows), jnp.float32)] * (2 if online else 1)  # den and max, or den
    num, den, *row_max = plgpu.kernel(
        functools.partial(_body, online=online, scale=scale, config=config),
        out_type=[jax.ShapeDtypeStruct((*partial, head_dim, rows), jnp.float32), *stats],
        scratch_types=dict(
            q_smem=plgpu.SMEM((rows, head_dim), dtype, transforms=_TRANSFORMS),
            k_smem=plgpu.SMEM((config.num_stages, config.block_kv, head_dim), dtype, transforms=_TRANSFORMS),
            v_smem=plgpu.SMEM((config.num_stages, config.block_kv, head_dim), dtype, transforms=_TRANSFORMS),
            p_smem=plgpu.SMEM((rows, config.block_kv), dtype, transforms=_TRANSFORMS),
            num_smem=plgpu.SMEM((head_dim, rows), jnp.float32),
            den_smem=plgpu.SMEM((rows,), jnp.float32),
            max_smem=plgpu.SMEM((rows,), jnp.float32),
            q_ready=plgpu.Barrier(),
            k_ready=plgpu.Barrier(num_barriers=config.num_stages),
            v_ready=plgpu.Barrier(num_barriers=config.num_stages),
        ),
        grid=(batch, num_kv_heads, config.num_splits),
        grid_names=("batch", "kv_head", "split"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name=f"decode_attention_{'online' if online else 'unified'}",
    )(*operands)  # [B, K, splits, H, rows], [B, K, splits, rows], and the max [B, K, splits, rows]

    if online:
        weight = jnp.exp2(row_max[0] - row_max[0].max(axis=2, keepdims=True))  # [B, K, splits, rows]
        num, den = num * weight[..., None, :], den * weight
    num, den = num.sum(axis=2)[..., :group], den.sum(axis=2)[..., :group]  # [B, K, H, G], [B, K, G]
    out = num.swapaxes(-1, -2) / den[..., None]  # [B, K, G, H]
    if not online:
        out = jnp.where(unified_max.leaves_window(den, capacity, dtype)[..., None], jnp.nan, out)
    out = jnp.where((lengths > 0)[:, None, None, None], out, 0.0)
    return out.reshape(query.shape).astype(dtype)


def _body(
    q_gmem,
    k_gmem,
    v_gmem,
    lengths_gmem,
    *refs,
    q_smem,
    k_smem,
    v_smem,
    p_smem,
    num_smem,
    den_smem,
    max_smem,
    q_ready,
    k_ready,
    v_ready,
    online,
    scale,
    config,
):
    """One CTA: its share of the live tiles of one sequence and one key/value head."""
    if online:
        num_gmem, den_gmem, max_gmem = refs
    else:
        phi_gmem, num_gmem, den_gmem = refs
    rows, head_dim = q_smem.shape
    block_kv, num_stages, dtype = config.block_kv, config.num_stages, k_smem.dtype
    batch, kv_head, split = (lax.axis_index(name) for name in ("batch", "kv_head", "split"))
    length = lengths_gmem[batch]
    num_tiles = lax.div(length + (block_kv - 1), jnp.int32(block_kv))
    # Shares of the live tiles: the cost follows the length, not the capacity.
    first, last = ring.share(split, config.num_splits, num_tiles)

    def fetch(tile, slot):
        tile_slice = pl.ds(tile * block_kv, block_kv)
        plgpu.copy_gmem_to_smem(k_gmem.at[batch, tile_slice, kv_head], k_smem.at[slot], k_ready.at[slot])
        plgpu.copy_gmem_to_smem(v_gmem.at[batch, tile_slice, kv_head], v_smem.at[slot], v_ready.at[slot])

    plgpu.copy_gmem_to_smem(q_gmem.at[batch, kv_head], q_smem, q_ready)
    ring.fill(fetch, first, last, num_stages)
    if not online:
        phi = plgpu.load(phi_gmem.at[batch, kv_head], layout=_ROW_LAYOUT, optimized=False)  # [rows], base 2
    plgpu.barrier_wait(q_ready)

    def step(tile, carry):
        slot = lax.rem(tile - first, jnp.int32(num_stages))
        plgpu.barrier_wait(k_ready.at[slot])

        def scores(acc_ref):
            plgpu.wgmma(acc_ref, k_smem.at[slot], q_smem.transpose((1, 0)))
            return acc_ref[...]

        s = pl.run_scoped(scores, plgpu.ACC((block_kv, rows), jnp.float32)) * (scale * _LOG2E)
        position = plgpu.broadcasted_iota(jnp.int32, (block_kv, rows), 0, layout=plgpu.Layout.WGMMA)
        live = position < length - tile * block_kv
        num, den, *row_max = carry
        if online:
            shift = jnp.maximum(row_max[0], jnp.where(live, s, _LOWEST).max(axis=0))
            alpha = jnp.exp2(row_max[0] - shift)
            num *= lax.broadcast_in_dim(alpha, num.shape, [1])
            den *= lax.broadcast_in_dim(alpha, den.shape, [1])
            row_max = [shift]
        else:
            shift = phi
        p = jnp.where(live, jnp.exp2(s - lax.broadcast_in_dim(shift, s.shape, [1])), 0.0).astype(dtype)
        # The sum of the weights as rounded: a rounding error common to numerator and denominator cancels. Summed
        # over the keys once, after the last tile.
        den += p.astype(jnp.float32)
        p_smem.transpose((1, 0))[...] = p
        plgpu.barrier_wait(v_ready.at[slot])

        @pl.when((tile + 1) * block_kv > length)
        def _clear_dead_values():  # 0 * NaN would be NaN
            v = plgpu.load(v_smem.at[slot], layout=plgpu.Layout.WGMMA)
            row = plgpu.broadcasted_iota(jnp.int32, (block_kv, head_dim), 0, layout=plgpu.Layout.WGMMA)
            v_smem[slot] = jnp.where(row < length - tile * block_kv, v, jnp.zeros_like(v))

        plgpu.commit_smem()

        def weighted_values(acc_ref):
            plgpu.wgmma(acc_ref, v_smem.at[slot].transpose((1, 0)), p_smem.transpose((1, 0)))
            return acc_ref[...]

        num += pl.run_scoped(weighted_values, plgpu.ACC((head_dim, rows), jnp.float32))
        pl.when(tile + num_stages < last)(functools.partial(fetch, tile + num_stages, slot))
        return num, den, *row_max

    def full(shape, fill, layout):
        return plgpu.layout_cast(jnp.full(shape, fill, jnp.float32), layout)

    carry = [full((head_dim, rows), 0, plgpu.Layout.WGMMA), full((block_kv, rows), 0, plgpu.Layout.WGMMA)]
    if online:
        carry.append(full((rows,), _LOWEST, _ROW_LAYOUT))
    num, den, *row_max = lax.fori_loop(first, last, step, tuple(carry))
    num_smem[...] = num
    den_smem[...] = den.sum(axis=0)
    if online:
        max_smem[...] = row_max[0]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(num_smem, num_gmem.at[batch, kv_head, split])
    plgpu.copy_smem_to_gmem(den_smem, den_gmem.at[batch, kv_head, split])
    if online:
        plgpu.copy_smem_to_gmem(max_smem, max_gmem.at[batch, kv_head, split])
    plgpu.wait_smem_to_gmem(0)
