"""An independent float64 oracle in numpy, and random attention inputs with poison behind the lengths."""

import jax
import jax.numpy as jnp
import numpy as np


def attention(query, key, value, lengths=None, scale=None):
    """softmax(scale * q k^T) v for query [B, N, H] and key, value [B, S, K, H], in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, num_heads, head_dim = query.shape
    capacity, num_kv_heads = key.shape[1:3]
    lengths = [capacity] * batch if lengths is None else lengths
    scale = head_dim**-0.5 if scale is None else scale
    out = np.zeros(query.shape)
    for b in range(batch):
        for n in range(num_heads):
            live_key = key[b, : lengths[b], n // (num_heads // num_kv_heads)]
            live_value = value[b, : lengths[b], n // (num_heads // num_kv_heads)]
            if lengths[b]:
                scores = live_key @ query[b, n] * scale
                weights = np.exp(scores - scores.max())
                out[b, n] = weights @ live_value / weights.sum()
    return out


def attention_inputs(seed, *, batch, capacity, num_heads, num_kv_heads, head_dim, dtype, lengths=None, query_scale=1.0):
    """Random query [B, N, H], key and value [B, S, K, H]; NaN in every key and value at or beyond its length."""
    keys = jax.random.split(jax.random.key(seed), 3)
    query = query_scale * jax.random.normal(keys[0], (batch, num_heads, head_dim))
    key = jax.random.normal(keys[1], (batch, capacity, num_kv_heads, head_dim))
    value = jax.random.normal(keys[2], (batch, capacity, num_kv_heads, head_dim))
    if lengths is not None:
        dead = (jnp.arange(capacity) >= jnp.asarray(lengths)[:, None])[:, :, None, None]
        key, value = jnp.where(dead, jnp.nan, key), jnp.where(dead, jnp.nan, value)
    return tuple(x.astype(dtype) for x in (query, key, value))


def relative_error(out, expected):
    """Norm of the difference over the norm of the expected; NaN anywhere in out gives NaN."""
    out, expected = np.asarray(out, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(out - expected) / max(np.linalg.norm(expected), 1e-30)


# Rounding p and the output to 16 bits: measured errors are about half of these.
TOLERANCE = {"bfloat16": 8e-3, "float16": 1e-3, "float32": 2e-6}
