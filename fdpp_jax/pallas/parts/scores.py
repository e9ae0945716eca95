"""Scores in base 2, that is multiplied by log2(e), and their cap.

Used by `decode_attention` and `prefill_attention`.
"""

import jax
import jax.numpy as jnp

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
# No score is lower. It is finite, so max - max is not NaN where there are no keys.
LOWEST = float(jnp.finfo(jnp.float32).min)


def capped(s: jax.Array, scale: jax.Array | float, cap: float) -> jax.Array:
    """cap * tanh(scale * s / cap) in base 2. tanh is from exp2, since the hardware's tanh is good to 11 bits only."""
    s = 1.0 - 2.0 / (jnp.exp2(s * (scale * (2 * LOG2E / cap))) + 1.0)
    return s * (cap * LOG2E)
