"""phi of every row of a call, from the policy: the policy's constant, or a bound from Cauchy-Schwarz."""

import math

import jax
import jax.numpy as jnp

from fdpp_jax import unified_max
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions
from fdpp_jax.unified_max import UnifiedMax

# By so much rounding can lift a score above its bound: nats, and a share of the bound (products of float32 sums).
_BOUND_MARGIN = 1.0
_BOUND_SLACK = 2.0**-16


def row_phi(
    softmax: UnifiedMax,
    arrays: AttentionArrays,
    options: AttentionOptions,
    *,
    weights_dtype: jax.typing.DTypeLike,
    key_max_norm: jax.Array | None = None,
) -> jax.Array:
    """phi of every row of a decode step.

    A bound stands at the top of the window: with no score above the bound, den <= S e^(bound - phi), and phi is so
    far below the bound that this just fits. All of the window is then room for rows below their bound.

    Args:
      softmax: The policy.
      arrays: The arrays of the call. Keys that are not live do not count.
      options: Its static facts.
      weights_dtype: dtype of the weights e^(s - phi) as they meet the values, which decides the window.
      key_max_norm: [B, K] float32, max |k|; computed from the keys if missing.

    Returns:
      float32 [] where softmax.phi is a scalar, else [B, N].

    Raises:
      ValueError: softmax.phi does not broadcast to [B, N].
    """
    batch, _, num_heads, _ = arrays.query.shape
    if not softmax.is_bound:
        phi = jnp.asarray(softmax.phi, jnp.float32)
        if phi.ndim == 0:
            return phi
        if phi.ndim > 2 or any(n not in (1, row) for n, row in zip(phi.shape[::-1], (num_heads, batch), strict=False)):
            raise ValueError(f"phi must broadcast to [B, N] = {[batch, num_heads]}, got shape {phi.shape}")
        return jnp.broadcast_to(phi, (batch, num_heads))
    if key_max_norm is None:
        key_max_norm = unified_max.max_norm(
            arrays.key, arrays.lengths, arrays.page_table, arrays.key_scale, arrays.starts
        )
    query_norm = jnp.linalg.norm(arrays.query.astype(jnp.float32), axis=-1).max(axis=1, initial=0.0)  # [B, N]
    scale = options.scale if arrays.scale is None else arrays.scale
    bound = abs(scale) * query_norm * jnp.repeat(key_max_norm, num_heads // arrays.key.shape[2], axis=1)
    if options.logits_soft_cap is not None:
        bound = jnp.minimum(bound, options.logits_soft_cap)
    if arrays.bias is not None:
        most = arrays.bias.astype(jnp.float32).max(axis=(2, 3), initial=-jnp.inf)  # [B or 1, N or 1]
        bound += jnp.where(jnp.isfinite(most), most, 0.0)  # -inf hides all keys of a row
    if arrays.sinks is not None:
        bound = jnp.maximum(bound, arrays.sinks.astype(jnp.float32)[None])
    _, den_max = unified_max.window(weights_dtype, arrays.capacity)
    num_terms = max(arrays.capacity, 1) + (arrays.sinks is not None)
    room = math.log(den_max) - math.log(num_terms) - _BOUND_MARGIN
    return bound * (1 + _BOUND_SLACK) - room
