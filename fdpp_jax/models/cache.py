"""The KV cache: one key and one value array a layer, in the layout that the attention kernel reads."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fdpp_jax import unified_max
from fdpp_jax.models.checks import positive_int
from fdpp_jax.models.config import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far.

    Donate it to the jitted function that returns it; it is then updated in place.

    Attributes:
      keys: One [B, S, K, H] array a layer. Slots at and beyond the row's length hold anything.
      values: As keys.
      lengths: [B] int32 live tokens of each row.
      key_max_norms: One [B, K] float32 array a layer, max |k| over the live keys as stored, for UnifiedMax.bound();
        more than that where lengths were set back. Empty where no one asked for them.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array
    key_max_norms: tuple[jax.Array, ...] = ()

    @classmethod
    def create(
        cls,
        config: DecoderConfig,
        batch: int,
        capacity: int,
        dtype: jax.typing.DTypeLike,
        *,
        with_key_norms: bool = False,
    ) -> "KVCache":
        """An empty cache for `batch` rows of up to `capacity` tokens.

        `with_key_norms` spares a step with UnifiedMax.bound() a pass over all keys, and costs any other step a little.

        Raises:
          ValueError: batch or capacity is no positive integer.
        """
        batch, capacity = positive_int("batch", batch), positive_int("capacity", capacity)
        shape = (batch, capacity, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        return cls(
            keys=tuple(jnp.zeros(shape, dtype) for _ in layers),
            values=tuple(jnp.zeros(shape, dtype) for _ in layers),
            lengths=jnp.zeros(batch, jnp.int32),
            key_max_norms=tuple(jnp.zeros((batch, shape[2]), jnp.float32) for _ in layers if with_key_norms),
        )

    def resized(self, capacity: int, *, with_key_norms: bool = False) -> "KVCache":
        """A copy with another capacity; slots that are new hold zeros.

        Raises:
          ValueError: It has fewer slots than this one.
        """
        capacity = positive_int("capacity", capacity)
        if capacity < self.capacity:
            raise ValueError(f"expected a capacity of at least the cache's {self.capacity}, got {capacity}")

        def copied(x: jax.Array) -> jax.Array:
            return write_prompt(jnp.zeros((x.shape[0], capacity, *x.shape[2:]), x.dtype), x)

        norms = [unified_max.max_norm(keys, self.lengths) for keys in self.keys if with_key_norms]
        return KVCache(tuple(map(copied, self.keys)), tuple(map(copied, self.values)), self.lengths, tuple(norms))

    @property
    def batch(self) -> int:
        """Rows, B."""
        return self.keys[0].shape[0]

    @property
    def capacity(self) -> int:
        """Slots a row has, S."""
        return self.keys[0].shape[1]


def cache_bytes(config: DecoderConfig, batch: int, capacity: int, dtype: jax.typing.DTypeLike) -> int:
    """Bytes of the keys and values of a cache."""
    return 2 * config.num_hidden_layers * batch * capacity * config.kv_size * jnp.dtype(dtype).itemsize


def check_cache(cache: Any, config: DecoderConfig) -> None:
    """Raises ValueError unless the cache is one for a model of this config, whatever its rows, capacity and dtype."""
    heads = config.num_key_value_heads, config.head_dim
    if not isinstance(cache, KVCache):
        got = type(cache).__name__
    elif len(cache.keys) == config.num_hidden_layers and cache.keys[0].shape[2:] == heads:
        return
    else:
        got = f"{len(cache.keys)} layers" + (f" of {list(cache.keys[0].shape)}" if cache.keys else "")
    raise ValueError(
        f"cache must be a KVCache of this model, {config.num_hidden_layers} layers of "
        f"[B, S, K={heads[0]}, H={heads[1]}]; got {got}"
    )


def write_prompt(cache: jax.Array, fresh: jax.Array) -> jax.Array:
    """Writes fresh [B, T, K, H] to the first T slots of one layer's cache [B, S, K, H]."""
    return jax.lax.dynamic_update_slice(cache, fresh.astype(cache.dtype), (0, 0, 0, 0))


def write_piece(cache: jax.Array, fresh: jax.Array, starts: jax.Array, lengths: jax.Array) -> jax.Array:
    """Writes the first lengths[b] of fresh [B, T, K, H] to one layer's cache [B, S, K, H], from slot starts[b] on.

    All other slots stay as they are, whatever T is. The caller sees to starts[b] + lengths[b] <= S.
    """
    tokens = jnp.arange(fresh.shape[1], dtype=starts.dtype)
    # What is padding gets a slot beyond the last, each another one: dropped, and still unique and sorted.
    first = jnp.where(tokens < lengths[:, None], starts[:, None], cache.shape[1])
    rows = jnp.arange(cache.shape[0], dtype=starts.dtype)[:, None]
    return cache.at[rows, first + tokens].set(
        fresh.astype(cache.dtype), mode="drop", unique_indices=True, indices_are_sorted=True
    )


def write_token(cache: jax.Array, fresh: jax.Array, lengths: jax.Array) -> jax.Array:
    """Writes fresh [B, 1, K, H] to slot lengths[b] of every row b of one layer's cache [B, S, K, H].

    The caller sees to lengths[b] < S.
    """
    fresh = fresh.astype(cache.dtype)
    if cache.shape[0] == 1:
        zero = jnp.zeros_like(lengths[0])  # a Python 0 would be int64 with jax_enable_x64
        # One dynamic_update_slice fuses in place with what makes `fresh`; a scatter is a kernel of its own.
        return jax.lax.dynamic_update_slice(cache, fresh, (zero, lengths[0], zero, zero))
    rows = jnp.arange(cache.shape[0])
    return cache.at[rows, lengths].set(fresh[:, 0], mode="drop", unique_indices=True, indices_are_sorted=True)
