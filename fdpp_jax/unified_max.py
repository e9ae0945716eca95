"""The unified-max softmax policy and its safe test, shared by every backend.

softmax(s) = e^(s - phi) / sum e^(s - phi) holds for any phi. With phi fixed before the first score is
seen, KV splits carry no running max and simply add up. What can go wrong is range, and the row's
denominator alone shows it: see `window`.

Source: FlashDecoding++ (arXiv 2311.01282), section 3. The safe test differs from the paper's: the paper
tests each score, which fires on small scores that do no harm; we test the row's denominator.
"""

import dataclasses
import json
from typing import Literal, get_args

import jax
import jax.export
import jax.numpy as jnp

# Where a row that left the safe window is redone: in the kernel, by the CTA that merges its partial sums; by a second
# launch, which exits early where no row failed; or by a second call under lax.cond.
Recompute = Literal["kernel", "launch", "cond"]

_MAX_PHI = float(jnp.finfo(jnp.float32).max)
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
        for each row, see `bound`. A model also takes one a layer, [L, B or 1, N or 1].
      recompute: Where a row that left the window is redone: "kernel" (by the CTA that adds it up), "launch" (by a
        second kernel, which exits early where no row failed) or "cond" (by a second call under `lax.cond`).
        None lets the heuristics choose. Without a kernel it is always "cond".

    Raises:
      ValueError: recompute is none of these, or phi a number that is not finite.

    Source: FlashDecoding++ (arXiv 2311.01282), section 3.
    """

    phi: jax.typing.ArrayLike | None = 6.0
    recompute: Recompute | None = dataclasses.field(default=None, metadata=dict(static=True))

    def __post_init__(self) -> None:
        if self.recompute not in (None, *get_args(Recompute)):
            raise ValueError(f"recompute must be None, {', '.join(get_args(Recompute))}; got {self.recompute!r}")
        if isinstance(self.phi, int | float) and not abs(self.phi) <= _MAX_PHI:
            raise ValueError(f"phi must be finite in float32, got {self.phi}")

    @classmethod
    def bound(cls, recompute: Recompute | None = None) -> "UnifiedMax":
        """phi per row from Cauchy-Schwarz, s <= scale * |q| * max|k|: no overflow, no calibration."""
        return cls(None, recompute)

    @property
    def is_bound(self) -> bool:
        """Whether phi is a bound, which wants the norms of the keys."""
        return self.phi is None

    def for_layer(self, layer: int, num_layers: int) -> "UnifiedMax":
        """The policy of one layer of a model: itself, unless phi has an axis of layers.

        Raises:
          ValueError: That axis is not num_layers long.
        """
        if self.phi is None or jnp.ndim(self.phi) < 3:
            return self
        if jnp.shape(self.phi)[0] != num_layers:
            raise ValueError(f"phi of each layer must be [{num_layers}, B, N], got shape {jnp.shape(self.phi)}")
        return dataclasses.replace(self, phi=jnp.asarray(self.phi)[layer])


jax.export.register_pytree_node_serialization(
    UnifiedMax,
    serialized_name="fdpp_jax.UnifiedMax",
    serialize_auxdata=lambda recompute: json.dumps(recompute).encode(),
    deserialize_auxdata=lambda text: tuple(json.loads(text)),
)


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


def max_norm(
    key: jax.Array,
    lengths: jax.Array | None = None,
    page_table: jax.Array | None = None,
    key_scale: jax.Array | None = None,
    starts: jax.Array | None = None,
) -> jax.Array:
    """max |k| over the live keys, [B, K] float32.

    Args:
      key: [B, S, K, H], or with page_table a pool [P, page_size, K, H].
      lengths: [B] int32 live keys; None: all.
      page_table: [B, pages] int32.
      key_scale: float32 factor on a quantised key, [K] or like key without H.
      starts: [B] int32, the first live key; None: 0.
    """
    norm = jnp.linalg.norm(key.astype(jnp.float32), axis=-1)  # [B, S, K] or [P, page_size, K]
    if key_scale is not None:
        norm *= jnp.abs(key_scale)
    if page_table is not None:
        norm = jnp.take(norm, page_table, axis=0, mode="clip")  # [B, pages, page_size, K]
        norm = norm.reshape(norm.shape[0], norm.shape[1] * norm.shape[2], norm.shape[3])  # [B, S, K]
    if lengths is not None:
        live = jnp.arange(norm.shape[1])[None] < lengths[:, None]  # [B, S]
        norm = jnp.where(live[:, :, None], norm, 0.0)
    if starts is not None:
        live = jnp.arange(norm.shape[1])[None] >= starts[:, None]  # [B, S]
        norm = jnp.where(live[:, :, None], norm, 0.0)
    return norm.max(axis=1, initial=0.0)
