"""Rotary position embeddings: angles by position, as a checkpoint scales them, and the turn itself. All in float32."""

import functools
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fdpp_jax.models.config import RopeScaling


class Rotary(Protocol):
    """What a config says of its rotary embeddings."""

    def __hash__(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def rope_theta(self) -> float: ...

    @property
    def rope_scaling(self) -> RopeScaling | None: ...


def rotation_at(config: Rotary, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, 1, H / 2] float32 of the rotary angles at positions [B, T]."""
    angles = positions[:, :, None, None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (x[i], x[i + H / 2]) of x [B, T, N, H] by the rotary angles, in float32."""
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


def stored_frequencies(config: Rotary) -> tuple[np.ndarray, ...]:
    """The inverse frequencies that a checkpoint may store: after its scaling, or before."""
    return inverse_frequencies(config), _plain_frequencies(config.head_dim, config.rope_theta)


def _plain_frequencies(head_dim: int, rope_theta: float) -> np.ndarray:
    """Rotary angle per position of each pair, [H / 2] float32, before a scaling."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1.0) / np.float32(rope_theta) ** exponents


@functools.cache
def inverse_frequencies(config: Rotary) -> np.ndarray:
    """Rotary angle per position of each pair, [H / 2] float32, after the checkpoint's scaling."""
    frequencies = _plain_frequencies(config.head_dim, config.rope_theta)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / np.float32(scaling.factor)
    # How often each pair turns within the original context decides: 1 keeps the frequency, 0 divides it.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((keep + (1 - keep) / scaling.factor) * frequencies).astype(np.float32)
