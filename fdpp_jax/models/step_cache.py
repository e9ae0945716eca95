"""The KV cache while it grows layer by layer: by the token of a decode step, or by a piece of a prefill."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fdpp_jax import ops, unified_max
from fdpp_jax.models.cache import KVCache, write_piece, write_token
from fdpp_jax.models.config import DecoderConfig
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions
from fdpp_jax.unified_max import UnifiedMax


class StepCache:
    """A cache in one decode step: a layer's new keys and values are put there, then its queries attend.

    Attributes:
      slots: [B] int32 where the new tokens go, which are their positions, too.
      implementation: Of everything in the step, None for the planned ones.
      can_overflow: Whether a row that left the safe window in a layer that attended is NaN there, and not redone.
    """

    def __init__(
        self, config: DecoderConfig, cache: KVCache, softmax: UnifiedMax | None, implementation: Literal["xla"] | None
    ):
        self._config, self._softmax = config, softmax
        self._keys, self._values, self._norms = list(cache.keys), list(cache.values), list(cache.key_max_norms)
        self.slots, self._lengths = cache.lengths, cache.lengths + 1
        self.implementation = implementation
        self.can_overflow = False
        self._has_redone = False  # whether a layer has counted
        self._redone: jax.Array | None = None  # [B, K] int32
        if softmax is not None:
            self._redone = jnp.zeros((cache.keys[0].shape[0], cache.keys[0].shape[2]), jnp.int32)

    def append(self, layer: int, key: jax.Array, value: jax.Array) -> None:
        """Puts key and value [B, 1, K, H] there."""
        keys, values = self.arrays(layer)
        keys, values = write_token(keys, key, self.slots), write_token(values, value, self.slots)
        self._take(layer, keys, values, key.astype(keys.dtype))

    def arrays(self, layer: int) -> tuple[jax.Array, jax.Array]:
        """A layer's keys and values [B, S, K, H], for who puts the new ones there itself."""
        return self._keys[layer], self._values[layer]

    def replace(self, layer: int, keys: jax.Array, values: jax.Array) -> None:
        """Takes arrays() with the new keys and values in them."""
        self._take(layer, keys, values, keys[jnp.arange(keys.shape[0]), self.slots][:, None])

    def _take(self, layer: int, keys: jax.Array, values: jax.Array, key: jax.Array) -> None:
        self._keys[layer], self._values[layer] = keys, values
        if self._norms:
            self._norms[layer] = jnp.maximum(self._norms[layer], unified_max.max_norm(key))

    def settle(self, x: jax.Array) -> jax.Array:
        """x, once all is there that the first layer's attention reads and that the launch before it does not write."""
        x, self._lengths, self._redone = jax.lax.optimization_barrier((x, self._lengths, self._redone))
        return x

    def attend(self, layer: int, query: jax.Array, *, starts_early: bool = False) -> jax.Array:
        """Attention of query [B, 1, N, H] over all keys, the new ones included.

        starts_early: whether attention may start before the launch before it has ended. Of the cache that launch may
        write only the new keys and values.
        """
        softmax, num_layers = self._softmax, self._config.num_hidden_layers
        scale = 1.0 / math.sqrt(self._config.head_dim)
        arguments: dict[str, Any] = dict(scale=scale) | dict(self._config.attention_options(layer))
        out, redone = ops.unchecked_decode_attention(
            AttentionArrays(
                query, self._keys[layer], self._values[layer], lengths=self._lengths, query_offset=self.slots
            ),
            AttentionOptions(**arguments),
            key_max_norm=self._norms[layer] if self._norms else None,
            softmax=None if softmax is None else softmax.for_layer(layer, num_layers),
            redone=self._redone,
            starts_early=starts_early,
            implementation=self.implementation,
        )
        if redone is not None:
            self._redone, self._has_redone = redone, True
        elif softmax is not None:
            self.can_overflow = True
        return out

    def redone(self, logits: jax.Array) -> tuple[jax.Array | bool, jax.Array]:
        """[] bool: whether the kernel redid a row in any layer; False: it cannot have. And the step's logits again."""
        if not self._has_redone:
            return False, logits
        # Looked at after the logits: before the last fused layer it would come between that and its attention.
        redone, logits = jax.lax.optimization_barrier((self._redone, logits))
        # Not any(): it compares with zeros, which XLA takes to be those that the layers write into, and copies.
        return redone.max() > 0, logits

    def grown(self) -> KVCache:
        """The cache one token longer."""
        return KVCache(tuple(self._keys), tuple(self._values), self._lengths, tuple(self._norms))


class PieceCache:
    """A cache in a piece of a prefill: a layer's new keys and values are put there, then its queries attend.

    Attributes:
      starts: [B] int32 where the new tokens go.
    """

    def __init__(self, config: DecoderConfig, cache: KVCache, lengths: jax.Array, softmax: UnifiedMax | None):
        self._config, self._softmax = config, softmax
        self._keys, self._values, self._norms = list(cache.keys), list(cache.values), list(cache.key_max_norms)
        self.starts, self._new_lengths, self._lengths = cache.lengths, lengths, cache.lengths + lengths

    def attend(self, layer: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """Puts key and value [B, T, K, H] there; attention of query [B, T, N, H] over all keys up to its own."""
        keys = write_piece(self._keys[layer], key, self.starts, self._new_lengths)
        values = write_piece(self._values[layer], value, self.starts, self._new_lengths)
        self._keys[layer], self._values[layer] = keys, values
        if self._norms:
            new = unified_max.max_norm(key.astype(keys.dtype), self._new_lengths)
            self._norms[layer] = jnp.maximum(self._norms[layer], new)
        softmax = self._softmax
        return ops.dot_product_attention(
            query,
            keys,
            values,
            is_causal=True,
            query_offset=self.starts,
            key_value_seq_lengths=self._lengths,
            key_max_norm=self._norms[layer] if self._norms else None,
            softmax=None if softmax is None else softmax.for_layer(layer, self._config.num_hidden_layers),
            **self._config.prefill_options(layer, keys.shape[1]),
        )

    def grown(self) -> KVCache:
        """The cache with the new tokens."""
        return KVCache(tuple(self._keys), tuple(self._values), self._lengths, tuple(self._norms))
