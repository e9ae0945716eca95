"""The unified-max softmax policy and its safe test, shared by every backend.

softmax(s) = e^(s - phi) / sum e^(s - phi) holds for any phi. With phi fixed before the first score is
seen, KV splits carry no running max and simply add up. What can go wrong is range, and the row's
denominator alone shows it: see `window`.

Source: FlashDecoding++ (arXiv 2311.01282), section 3. The safe test differs from the paper's: the paper
tests each score, which fires on small scores that do no harm; we test the row's denominator.
"""

import dataclasses

import jax
import jax.numpy as jnp

# 2^+-64 leaves more than 2^60 of float32's range on either side for |v| and for the terms of the sum.
_DEN_MIN = 2.0**-64
_DEN_MAX = 2.0**64
# float16 holds p up to 65504; den >= p for every p of the row, so den bounds them all.
_FLOAT16_DEN_MAX = 2.0**15
# float16 rounds p to within 2^-25 once p is subnormal. Over S keys that is S * 2^-25 of error in the sum,
# which must stay below float16's own 2^-11 of the denominator.
_FLOAT16_DEN_MIN_PER_KEY = 2.0**-14


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UnifiedMax:
    """Softmax with a max that is fixed in advance, the same for every KV split.

    It never changes the answer: rows that leave the safe window are recomputed with exact online softmax.

    Args:
      phi: The constant subtracted from the scaled scores, in natural-log units: a float or an array that
        broadcasts to [B, N]. It is a traced value; changing it compiles nothing anew. None means a bound
        for each row, see `bound`.

    Source: FlashDecoding++ (arXiv 2311.01282), section 3.
    """

    phi: jax.typing.ArrayLike | None = 6.0

    @classmethod
    def bound(cls) -> "UnifiedMax":
        """phi per row from Cauchy-Schwarz, s <= scale * |q| * max|k|: no overflow, no calibration."""
        return cls(phi=None)


def window(dtype: jax.typing.DTypeLike, num_keys: int) -> tuple[float, float]:
    """Safe range [den_min, den_max] of a row's denominator sum e^(s - phi).

    Args:
      dtype: dtype of the values, in which p = e^(s - phi) meets them in the matrix unit.
      num_keys: Number of keys a row can have at most, S.
    """
    if jnp.dtype(dtype) == jnp.float16:
        return num_keys * _FLOAT16_DEN_MIN_PER_KEY, _FLOAT16_DEN_MAX
    return _DEN_MIN, _DEN_MAX


def leaves_window(den: jax.Array, num_keys: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """True where a row's denominator is outside the safe window, or not a number.

    Args:
      den: [...] float32 denominators, after all splits are added.
      num_keys: Number of keys a row can have at most, S.
      dtype: dtype of the values.

    Returns:
      [...] bool. A row without any key must be excluded by the caller.
    """
    den_min, den_max = window(dtype, num_keys)
    return ~((den >= den_min) & (den <= den_max))


def row_phi(
    softmax: UnifiedMax, query: jax.Array, key: jax.Array, scale: float, lengths: jax.Array | None
) -> jax.Array:
    """phi for every row of a decode step, [B, N] float32.

    Args:
      softmax: The policy.
      query: [B, T, N, H].
      key: [B, S, K, H].
      scale: Factor on the scores.
      lengths: [B] int32 live keys, or None for all S. Keys beyond them do not count.
    """
    batch, _, num_heads, _ = query.shape
    if softmax.phi is not None:
        return jnp.broadcast_to(jnp.asarray(softmax.phi, jnp.float32), (batch, num_heads))
    key_norm = jnp.linalg.norm(key.astype(jnp.float32), axis=-1)  # [B, S, K]
    if lengths is not None:
        live = jnp.arange(key.shape[1]) < lengths[:, None]  # [B, S]
        key_norm = jnp.where(live[:, :, None], key_norm, 0.0)
    key_max_norm = key_norm.max(axis=1)  # [B, K]
    query_norm = jnp.linalg.norm(query.astype(jnp.float32), axis=-1).max(axis=1)  # [B, N]
    group = num_heads // key.shape[2]
    return abs(scale) * query_norm * jnp.repeat(key_max_norm, group, axis=1)
