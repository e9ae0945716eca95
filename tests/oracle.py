"""An independent float64 oracle in numpy, and random attention inputs with poison behind the lengths."""

import jax
import jax.numpy as jnp
import numpy as np


def attention(query, key, value, lengths=None, scale=None, **options):
    """softmax(scale * q k^T) v in float64, row by row as the definitions say.

    query [B, T, N, H], or [B, N, H] for T = 1; key and value [B, S, K, H], or pools [P, page_size, K, H] with
    page_table [B, pages]; scales [K] or as key without H.
    """
    return attention_and_log_sum(query, key, value, lengths, scale, **options)[0]


def attention_and_log_sum(
    query,
    key,
    value,
    lengths=None,
    scale=None,
    *,
    query_offset=None,
    is_causal=False,
    local_window_size=None,
    logits_soft_cap=None,
    sinks=None,
    page_table=None,
    key_scale=None,
    value_scale=None,
    bias=None,
    mask=None,
    starts=None,
):
    """attention, and ln sum e^s of its rows [B, T, N] (T = 1 for [B, N]), with sinks; without keys the sink."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    has_time = query.ndim == 4
    if not has_time:
        query = query[:, None]
    if key_scale is not None:
        key = key * np.asarray(key_scale, np.float64)[..., None]
        value = value * np.asarray(value_scale, np.float64)[..., None]
    batch, query_length, num_heads, head_dim = query.shape
    page_size, num_kv_heads = key.shape[1:3]
    capacity = page_size if page_table is None else page_size * np.shape(page_table)[1]
    scale = head_dim**-0.5 if scale is None else scale
    by_score = batch, num_heads, query_length, capacity
    bias = np.broadcast_to(0.0 if bias is None else np.asarray(bias, np.float64), by_score)
    mask = np.broadcast_to(True if mask is None else np.asarray(mask), by_score)
    sinks = np.full(num_heads, -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    out, log_sum = np.zeros(query.shape), np.broadcast_to(sinks, query.shape[:3]).copy()
    for b in range(batch):
        length = capacity if lengths is None else int(lengths[b])
        offset = 0 if query_offset is None else int(query_offset[b])
        if page_table is None:
            keys, values = key[b, :length], value[b, :length]
        else:
            pages = np.clip(page_table[b], 0, len(key) - 1)[: -(-length // page_size)]
            keys, values = (x[pages].reshape(-1, *x.shape[2:])[:length] for x in (key, value))
        keys, values = keys.transpose(1, 0, 2), values.transpose(1, 0, 2)  # [K, S, H]
        for t in range(query_length):
            position = offset + t
            first, last = (0 if starts is None else int(starts[b])), length - 1
            if is_causal:
                last = min(last, position)
            if local_window_size is not None:
                first, last = max(first, position - local_window_size[0]), min(last, position + local_window_size[1])
            if first > last:
                continue
            grouped = query[b, t].reshape(num_kv_heads, -1, head_dim)  # [K, G, H]
            scores = grouped @ keys[:, first : last + 1].transpose(0, 2, 1) * scale
            if logits_soft_cap is not None:
                scores = logits_soft_cap * np.tanh(scores / logits_soft_cap)
            by_group = num_kv_heads, num_heads // num_kv_heads, last - first + 1
            scores = scores + bias[b, :, t, first : last + 1].reshape(by_group)
            scores[~mask[b, :, t, first : last + 1].reshape(by_group)] = -np.inf
            is_hidden = np.isneginf(scores)
            seen = np.where(is_hidden.all(axis=1)[..., None], 0.0, values[:, first : last + 1])
            is_blind = is_hidden.all(axis=2)
            top = np.maximum(scores.max(axis=2), sinks.reshape(num_kv_heads, -1))
            top = np.where(np.isneginf(top), 0.0, top)
            weights = np.exp(scores - top[..., None])
            total = np.where(is_blind, 1.0, weights.sum(axis=2) + np.exp(sinks.reshape(top.shape) - top))
            out[b, t] = (weights @ seen / total[..., None]).reshape(num_heads, head_dim)
            log_sum[b, t] = np.where(is_blind, sinks.reshape(top.shape), np.log(total) + top).reshape(num_heads)
    return (out if has_time else out[:, 0]), log_sum


def attention_inputs(
    seed,
    *,
    batch,
    capacity,
    num_heads,
    num_kv_heads,
    head_dim,
    dtype,
    lengths=None,
    query_scale=1.0,
    query_length=None,
):
    """Random query [B, T, N, H] ([B, N, H] without query_length), key and value [B, S, K, H].

    NaN in every key and value at or beyond its length.
    """
    keys = jax.random.split(jax.random.key(seed), 3)
    lead = (batch,) if query_length is None else (batch, query_length)
    query = query_scale * jax.random.normal(keys[0], (*lead, num_heads, head_dim))
    key = jax.random.normal(keys[1], (batch, capacity, num_kv_heads, head_dim))
    value = jax.random.normal(keys[2], (batch, capacity, num_kv_heads, head_dim))
    if lengths is not None:
        dead = (jnp.arange(capacity) >= jnp.asarray(lengths)[:, None])[:, :, None, None]
        key, value = jnp.where(dead, jnp.nan, key), jnp.where(dead, jnp.nan, value)
    return tuple(x.astype(dtype) for x in (query, key, value))


def paged(seed, arrays, lengths, page_size, starts=0):
    """Each of arrays [B, S, K, ...] as a pool [P, page_size, K, ...] of shuffled pages, and the page table [B, pages].

    Entries of pages without live keys point at page 0, which is poison (NaN, or 127 of int8), or at no page.
    """
    batch, capacity = arrays[0].shape[:2]
    num_pages = -(-capacity // page_size)
    rng = np.random.default_rng(seed)
    order = 1 + rng.permutation(batch * num_pages).reshape(batch, num_pages)
    pools = []
    for x in arrays:
        x = np.asarray(x)
        poison = 127 if x.dtype == np.int8 else np.nan
        pad = [(0, 0), (0, num_pages * page_size - capacity)] + [(0, 0)] * (x.ndim - 2)
        pages = np.pad(x, pad, constant_values=poison).reshape(-1, page_size, *x.shape[2:])
        pool = np.full((1 + batch * num_pages, *pages.shape[1:]), poison, x.dtype)
        pool[order.reshape(-1)] = pages
        pools.append(jnp.asarray(pool))
    first = np.arange(num_pages) * page_size
    is_dead = first >= np.asarray(lengths)[:, None]
    is_dead |= first + page_size <= np.broadcast_to(starts, np.shape(lengths))[:, None]
    garbage = rng.choice(np.array([0, -1, -(2**31), 2**31 - 1]), order.shape)
    return *pools, jnp.asarray(np.where(is_dead, garbage, order), jnp.int32)


def quantised(x, dtype, scales):
    """x [B, S, K, H] as (integers or float8, scale): scale [K] ("head") or [B, S, K] ("token") float32.

    NaN stays NaN, in the scales of tokens too, but is 99 of int8.
    """
    top = np.abs(np.asarray(x, np.float64)).max(axis=3)  # [B, S, K]
    top = np.nanmax(top, axis=(0, 1), initial=1e-6) if scales == "head" else top  # all may be NaN
    dtype = jnp.dtype(dtype)
    scale = top / (127 if dtype == jnp.int8 else 448)
    units = np.asarray(x, np.float64) / scale[..., None]
    if dtype == jnp.int8:
        units = np.rint(np.nan_to_num(units, nan=99.0))
    return jnp.asarray(units.astype(np.float32).astype(dtype)), jnp.asarray(scale, jnp.float32)


def relative_error(out, expected):
    """Norm of the difference over the norm of the expected; NaN anywhere in out gives NaN."""
    out, expected = np.asarray(out, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(out - expected) / max(np.linalg.norm(expected), 1e-30)


# Rounding p and the output to 16 bits: measured errors are about half of these.
TOLERANCE = {"bfloat16": 8e-3, "float16": 1e-3, "float32": 2e-6}
