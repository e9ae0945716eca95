"""Attention and matmul in plain XLA: the oracle of the kernels, and the path where there is no kernel.

Scores, softmax and sums are float32 whatever the inputs are. Masked keys weigh exactly zero, values that no query of
their sequence sees may be NaN, and a row without any key gives zeros.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdpp_jax import unified_max
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions
from fdpp_jax.plans.shapes import WeightOrder


def attention(arrays: AttentionArrays, options: AttentionOptions) -> Any:
    """softmax(scale * q k^T) v, with the row's own max, or with phi in its place.

    Args:
      arrays: The arrays of the call. With phi, rows whose denominator left the safe window of `unified_max`, or whose
        sum of values is not finite, are NaN, and must be recomputed without phi.
      options: Its static facts.

    Returns:
      [B, T, N, H] in the query's dtype; with return_residual the pair of this and the rows' log-sum-exp [B, T, N]
      float32.
    """
    query, phi, sinks = arrays.query, arrays.phi, arrays.sinks
    batch, query_length, num_heads, head_dim = query.shape
    key, value = dense_cache(arrays)
    _, capacity, num_kv_heads, _ = key.shape
    by_head = (num_kv_heads, num_heads // num_kv_heads)
    mask = sees(arrays, options, jnp.arange(query_length), jnp.arange(capacity))[:, None, None]  # [B or 1, 1, 1, T, S]
    live_key = mask.any(axis=(1, 2, 3))[:, :, None, None]  # [B or 1, S, 1, 1]
    if arrays.mask is not None:
        mask &= by_group(arrays.mask, by_head)  # [B or 1, K or 1, G or 1, T, S]
        live_key = mask.any(axis=(2, 3)).swapaxes(1, 2)[..., None]  # [B or 1, S, K or 1, 1]
    # 0 * NaN would be NaN: of the values here, of the keys in the gradient.
    key, value = (jnp.where(live_key, x, 0) for x in (key, value))
    scores = jnp.einsum(
        "btkgh,bskh->bkgts",
        query.reshape(batch, query_length, *by_head, head_dim),
        key,
        precision=precision(key.dtype),
        preferred_element_type=jnp.float32,
    )  # [B, K, G, T, S]
    scores *= options.scale if arrays.scale is None else arrays.scale
    if (cap := options.logits_soft_cap) is not None:
        scores = cap * jnp.tanh(scores / cap)
    if arrays.bias is not None:
        scores += by_group(arrays.bias.astype(jnp.float32), by_head)
    scores = jnp.where(mask, scores, -jnp.inf)
    sink = None if sinks is None else sinks.astype(jnp.float32).reshape(1, *by_head, 1, 1)
    if phi is None:
        shift = scores.max(axis=-1, keepdims=True, initial=-jnp.inf)
        if sink is not None:
            shift = jnp.maximum(shift, sink)
        shift = lax.stop_gradient(jnp.where(jnp.isneginf(shift), 0.0, shift))  # a row without keys
    else:
        shift = jnp.broadcast_to(phi, (batch, num_heads)).reshape(batch, *by_head, 1, 1)
    weights = jnp.where(mask, jnp.exp(scores - shift), 0.0)
    den = weights.sum(axis=-1)  # [B, K, G, T]
    if sink is not None:
        den += jnp.exp(sink - shift)[..., 0]
    num = jnp.einsum(
        "bkgts,bskh->btkgh", weights, value.astype(jnp.float32), precision=lax.Precision.HIGHEST
    )  # [B, T, K, G, H]
    if phi is not None:
        # The weights are float32 here whatever the inputs are, so float32's window applies.
        failed = unified_max.leaves_window(den, capacity, jnp.float32)
        failed |= ~jnp.isfinite(num).all(axis=-1).transpose(0, 2, 3, 1)  # values as large as 1e18 overflow a safe row
        den = jnp.where(failed, jnp.nan, den)
    sees_key = mask.any(axis=-1)
    if arrays.bias is not None:  # -inf hides a key, too
        sees_key &= ~jnp.isneginf(scores).all(axis=-1)
    den = jnp.where(sees_key, den, 1.0)  # a row without keys: 0 / 1
    out = (num / den.transpose(0, 3, 1, 2)[..., None]).reshape(query.shape).astype(query.dtype)
    if not options.return_residual:
        return out
    nothing = -jnp.inf if sink is None else sink[..., 0]
    log_sum = jnp.where(sees_key, jnp.log(den) + shift[..., 0], nothing)  # [B, K, G, T]
    return out, log_sum.transpose(0, 3, 1, 2).reshape(query.shape[:3])


def sees(arrays: AttentionArrays, options: AttentionOptions, queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Which of some queries [T] sees which of some keys [S], by index and but for arrays.mask: [B or 1, T, S] bool.

    Query t stands at position query_offset + t.
    """
    query_pos = queries[None, :, None]  # [1, T, 1]
    if arrays.query_offset is not None:
        query_pos += arrays.query_offset[:, None, None]  # [B, T, 1]
    key_pos = keys[None, None, :]  # [1, 1, S]
    mask = jnp.ones((1, queries.size, keys.size), bool)
    if options.is_causal:
        mask &= key_pos <= query_pos
    if options.local_window_size is not None:
        left, right = options.local_window_size
        mask &= (key_pos >= query_pos - left) & (key_pos <= query_pos + right)
    if arrays.lengths is not None:
        mask &= key_pos < arrays.lengths[:, None, None]
    if arrays.starts is not None:
        mask &= key_pos >= arrays.starts[:, None, None]
    return mask


def by_group(x: jax.Array, by_head: tuple[int, int]) -> jax.Array:
    """[..., N or 1, T, S] -> [..., K or 1, G or 1, T, S]."""
    heads = (1, 1) if x.shape[-3] == 1 else by_head
    return x.reshape(*x.shape[:-3], *heads, *x.shape[-2:])


def _gather(pool: jax.Array, page_table: jax.Array) -> jax.Array:
    """[P, page_size, K, ...] -> [B, S, K, ...]."""
    pages = jnp.take(pool, page_table, axis=0, mode="clip")  # [B, pages, page_size, K, ...]
    return pages.reshape(pages.shape[0], pages.shape[1] * pages.shape[2], *pages.shape[3:])


def dense_cache(arrays: AttentionArrays) -> tuple[jax.Array, jax.Array]:
    """Keys and values as [B, S, K, H]; of a quantised cache in float32."""
    key = _contiguous(arrays.key, arrays.key_scale, arrays.page_table)
    return key, _contiguous(arrays.value, arrays.value_scale, arrays.page_table)


def _contiguous(cache: jax.Array, scale: jax.Array | None, page_table: jax.Array | None) -> jax.Array:
    """The keys or the values as [B, S, K, H]; a quantised cache in float32."""
    if page_table is not None:
        cache = _gather(cache, page_table)
        scale = scale if scale is None or scale.ndim == 1 else _gather(scale, page_table)
    return cache if scale is None else cache.astype(jnp.float32) * scale[..., None]


def matmul(x: jax.Array, w: jax.Array, out_dtype: jax.typing.DTypeLike, w_order: WeightOrder = "kn") -> jax.Array:
    """x [..., K] @ w [K, N], or [N, K], by XLA, accumulated in float32; w is contracted where it lies."""
    # The order's name is also einsum's of the axes.
    out = jnp.einsum(f"...k,{w_order}->...n", x, w, precision=precision(x.dtype), preferred_element_type=jnp.float32)
    return out.astype(out_dtype)


def precision(dtype: jax.typing.DTypeLike) -> lax.Precision | None:
    """XLA multiplies float32 in TF32 on GPUs unless asked not to."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
