"""Attention over a union of keys, from the attention over its parts."""

import jax
import jax.numpy as jnp
from jax import lax

from fdpp_jax.ops.checks import check_array


def merge_attention_states(
    out_a: jax.Array, lse_a: jax.Array, out_b: jax.Array, lse_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention over the keys of a and b together, from that over a's keys and that over b's.

    Both are results of `dot_product_attention(..., return_residual=True)` for the same queries, over keys that have
    none in common: the shards of a cache, or a shared prefix and what follows it. A sink goes into one part only, since
    it is part of that part's log-sum-exp. Merging is associative, so any number of parts can be merged in turn.

    Args:
      out_a: [..., H] floating point, attention over a's keys, as [B, T, N, H].
      lse_a: [...] floating point, ln sum e^s of the rows over a's keys; where a row sees none, its sink or -inf.
      out_b: As out_a.
      lse_b: As lse_a.

    Returns:
      [..., H] in the dtype of the outs, and [...] float32: of a row with neither key nor sink zeros and -inf.

    Raises:
      ValueError: Shapes or dtypes do not fit together.
    """
    operands = (("out_a", out_a), ("out_b", out_b), ("lse_a", lse_a), ("lse_b", lse_b))
    for name, x in operands:
        check_array(name, x, "[..., H]" if name.startswith("out") else "[...]")
    if out_a.dtype != out_b.dtype:
        raise ValueError(f"out_a and out_b must have one dtype, got {out_a.dtype} and {out_b.dtype}")
    for name, x in operands:
        is_out = name.startswith("out")
        if x.shape != (out_a.shape if is_out else out_a.shape[:-1]) or not jnp.issubdtype(x.dtype, jnp.floating):
            expected = "[..., H] as out_a's" if is_out else "[...], out_a's without H"
            raise ValueError(f"{name} must be floating point {expected}, {out_a.shape=}; got {x.dtype} of {x.shape}")
    lse_a, lse_b = lse_a.astype(jnp.float32), lse_b.astype(jnp.float32)
    shift = jnp.maximum(lse_a, lse_b)
    shift = lax.stop_gradient(jnp.where(jnp.isneginf(shift), 0.0, shift))
    num, den = jnp.zeros(out_a.shape, jnp.float32), jnp.zeros(out_a.shape[:-1], jnp.float32)
    for out, lse in ((out_a, lse_a), (out_b, lse_b)):
        weight = jnp.exp(lse - shift)
        num += weight[..., None] * jnp.where(jnp.isneginf(lse)[..., None], 0.0, out.astype(jnp.float32))
        den += weight
    sees_key = den > 0
    den = jnp.where(sees_key, den, 1.0)
    lse = jnp.where(sees_key, jnp.log(den) + shift, -jnp.inf)
    return (num / den[..., None]).astype(out_a.dtype), lse
