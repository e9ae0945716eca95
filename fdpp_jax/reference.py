"""Attention and matmul in plain XLA: the oracle of the kernels, and the path where there is no kernel.

Scores, softmax and sums are float32 whatever the inputs are. Masked keys contribute exactly zero, also
where the cache holds NaN behind a row's length, and a row without any key gives zeros.
"""

import jax
import jax.numpy as jnp
from jax import lax

from fdpp_jax import unified_max


def attention_mask(
    query_length: int,
    capacity: int,
    *,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: tuple[int, int] | None = None,
) -> jax.Array:
    """Which query sees which key, [B or 1, T, S] bool. Query t stands at position t, as in jax.nn."""
    query_pos = jnp.arange(query_length)[None, :, None]  # [1, T, 1]
    key_pos = jnp.arange(capacity)[None, None, :]  # [1, 1, S]
    mask = jnp.ones((1, query_length, capacity), bool)
    if is_causal:
        mask &= key_pos <= query_pos
    if local_window_size is not None:
        left, right = local_window_size
        mask &= (key_pos >= query_pos - left) & (key_pos <= query_pos + right)
    if query_seq_lengths is not None:
        mask &= query_pos < query_seq_lengths[:, None, None]
    if key_value_seq_lengths is not None:
        mask &= key_pos < key_value_seq_lengths[:, None, None]
    return mask


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    mask: jax.Array,
    logits_soft_cap: float | None = None,
    phi: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale * q k^T) v, with the row's own max, or with phi in its place.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H], K divides N.
      value: [B, S, K, H].
      scale: Factor on the scores.
      mask: [B or 1, T, S] bool, see `attention_mask`.
      logits_soft_cap: The scores become cap * tanh(scores / cap).
      phi: [B, N] float32, natural-log units, or None for the exact max of each row.

    Returns:
      [B, T, N, H] in the query's dtype. With phi, rows whose denominator left the safe window of
      `unified_max` are NaN and must be recomputed without it.
    """
    batch, query_length, num_heads, head_dim = query.shape
    _, capacity, num_kv_heads, _ = key.shape
    grouped = query.reshape(batch, query_length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    precision = _precision(query.dtype)
    scores = jnp.einsum(
        "btkgh,bskh->bkgts", grouped, key, precision=precision, preferred_element_type=jnp.float32
    )  # [B, K, G, T, S]
    scores *= scale
    if logits_soft_cap is not None:
        scores = logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
    mask = mask[:, None, None]  # [B or 1, 1, 1, T, S]
    scores = jnp.where(mask, scores, -jnp.inf)
    if phi is None:
        row_max = lax.stop_gradient(scores.max(axis=-1, keepdims=True))
        shift = jnp.where(jnp.isneginf(row_max), 0.0, row_max)  # a row without keys
    else:
        shift = phi.reshape(batch, num_kv_heads, num_heads // num_kv_heads, 1, 1)
    weights = jnp.where(mask, jnp.exp(scores - shift), 0.0)
    den = weights.sum(axis=-1)  # [B, K, G, T]
    live_key = mask.any(axis=(1, 2, 3))  # [B or 1, S]
    value = jnp.where(live_key[:, :, None, None], value, 0)  # 0 * NaN would be NaN
    num = jnp.einsum(
        "bkgts,bskh->btkgh", weights, value.astype(jnp.float32), precision=lax.Precision.HIGHEST
    )  # [B, T, K, G, H]
    if phi is not None:
        # The weights are float32 here whatever the inputs are, so float32's window applies.
        den = jnp.where(unified_max.leaves_window(den, capacity, jnp.float32), jnp.nan, den)
    den = jnp.where(mask.any(axis=-1), den, 1.0)  # a row without keys: 0 / 1
    return (num / den.transpose(0, 3, 1, 2)[..., None]).reshape(query.shape).astype(query.dtype)


def matmul(x: jax.Array, w: jax.Array, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    """x [..., K] @ w [K, N] by XLA, accumulated in float32."""
    out = jnp.dot(x, w, precision=_precision(x.dtype), preferred_element_type=jnp.float32)
    return out.astype(out_dtype)


def _precision(dtype: jax.typing.DTypeLike) -> lax.Precision | None:
    """XLA multiplies float32 in TF32 on GPUs unless asked not to."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
