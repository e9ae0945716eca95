"""LLaMA in Flax NNX: scoring, prefill and one decode step.

Attributes carry the checkpoint's names, so that loading needs no table; only q, k, v and gate, up are
fused into one matmul each. Weights are [in, out]. Norms, rotary embeddings and logits are float32.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdpp_jax import ops, unified_max
from fdpp_jax.config import MatmulImplementation
from fdpp_jax.models.cache import KVCache, write_prompt, write_token
from fdpp_jax.models.config import LlamaConfig
from fdpp_jax.unified_max import UnifiedMax

# attend(layer, query [B, T, N, H], key [B, T, K, H], value [B, T, K, H]) -> [B, T, N, H]
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]

_INIT_STDDEV = 0.02


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32, rounded once to x's dtype."""

    def __init__(self, size: int, *, eps: float, dtype: jax.typing.DTypeLike):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(size, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.weight[...].astype(jnp.float32)).astype(x.dtype)


class Linear(nnx.Module):
    """x [..., in] @ weight [in, out] (+ bias)."""

    def __init__(
        self, in_size: int, out_size: int, *, use_bias: bool = False, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs
    ):
        self.weight = nnx.Param(_normal(rngs, (in_size, out_size), dtype))
        self.bias = nnx.Param(jnp.zeros(out_size, dtype)) if use_bias else None

    def __call__(
        self,
        x: jax.Array,
        *,
        out_dtype: jax.typing.DTypeLike | None = None,
        implementation: MatmulImplementation | None = None,
    ) -> jax.Array:
        y = ops.flat_matmul(x, self.weight[...], out_dtype=out_dtype, implementation=implementation)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Embedding(nnx.Module):
    """weight [V, D]: rows by token, and logits by token when the head is tied."""

    def __init__(self, vocab_size: int, size: int, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.weight = nnx.Param(_normal(rngs, (vocab_size, size), dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.weight[...][tokens]

    def logits(self, x: jax.Array) -> jax.Array:
        """x [..., D] @ weight^T -> [..., V] float32, without a transposed copy of the weight."""
        # float32 means TF32 to a GPU unless the highest precision is asked for.
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        return jnp.einsum("...d,vd->...v", x, self.weight[...], precision=precision, preferred_element_type=jnp.float32)


class Attention(nnx.Module):
    """The projections around attention; attention itself is the caller's `attend`."""

    def __init__(self, config: LlamaConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.config = config
        bias = config.attention_bias
        self.qkv_proj = Linear(config.hidden_size, config.qkv_size, use_bias=bias, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(config.query_size, config.hidden_size, use_bias=bias, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        implementation: MatmulImplementation | None,
    ) -> jax.Array:
        config = self.config
        qkv = self.qkv_proj(x, implementation=implementation)  # [B, T, (N + 2 K) H]
        qkv = qkv.reshape(*x.shape[:2], -1, config.head_dim)  # [B, T, N + 2 K, H]
        turned = config.num_attention_heads + config.num_key_value_heads
        query_key = rotate(qkv[:, :, :turned], *rotation)
        query, key = jnp.split(query_key, [config.num_attention_heads], axis=2)
        out = attend(query, key, qkv[:, :, turned:])  # [B, T, N, H]
        return self.o_proj(out.reshape(*x.shape[:2], -1), implementation=implementation)


class MLP(nnx.Module):
    """SwiGLU: (silu(x @ gate) * (x @ up)) @ down."""

    def __init__(self, config: LlamaConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = Linear(hidden, 2 * inner, use_bias=bias, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(inner, hidden, use_bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, implementation: MatmulImplementation | None) -> jax.Array:
        gate, up = jnp.split(self.gate_up_proj(x, implementation=implementation), 2, axis=-1)
        return self.down_proj(jax.nn.silu(gate) * up, implementation=implementation)


class Layer(nnx.Module):
    """One transformer layer: attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        norm = functools.partial(RMSNorm, config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.input_layernorm = norm()
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)


class LlamaModel(nnx.Module):
    """Embedding, layers and the final norm."""

    def __init__(self, config: LlamaConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(Layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)


class LlamaForCausalLM(nnx.Module):
    """A LLaMA with its head.

    Inside `jax.jit` split it first: `graphdef, state = nnx.split(model)`, then `nnx.merge` in the traced function.

    Args:
      config: Shapes and constants.
      dtype: dtype of weights, activations and KV cache.
      rngs: Source of the random initial weights.
    """

    def __init__(self, config: LlamaConfig, *, dtype: jax.typing.DTypeLike = jnp.bfloat16, rngs: nnx.Rngs):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.model = LlamaModel(config, dtype=dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of every position, causal, without a cache: for scoring and training.

        Args:
          tokens: [B, T] integers.

        Returns:
          [B, T, V] float32; row t predicts token t + 1.
        """
        _check_tokens(tokens, ndim=2)
        return self._head(self.hidden_states(tokens, _positions(tokens), _causal_attend))

    def prefill(self, tokens: jax.Array, lengths: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Runs the prompts and fills the cache with them, from slot 0.

        Args:
          tokens: [B, T] integers, right-padded.
          lengths: [B] integers in 1..T, the live tokens of each row.
          cache: Of capacity T or more; donate it.

        Returns:
          Logits [B, V] float32 of each row's last live token, and the cache with these lengths.

        Raises:
          ValueError: T exceeds the capacity, or the batch sizes differ.
        """
        _check_tokens(tokens, ndim=2)
        _check_batch(cache, tokens=tokens, lengths=lengths)
        if tokens.shape[1] > cache.capacity:
            raise ValueError(f"a prompt of {tokens.shape[1]} tokens does not fit a cache of capacity {cache.capacity}")
        keys, values, norms = list(cache.keys), list(cache.values), list(cache.key_max_norms)

        def attend(layer: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            keys[layer] = write_prompt(keys[layer], key)
            values[layer] = write_prompt(values[layer], value)
            if norms:
                norms[layer] = unified_max.max_norm(key.astype(keys[layer].dtype), lengths)
            # Padding stands on the right, so the causal mask already hides it from every live query.
            return _causal_attend(layer, query, key, value)

        hidden = self.hidden_states(tokens, _positions(tokens), attend)  # [B, T, D]
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        hidden = jnp.take_along_axis(hidden, last, axis=1)[:, 0]  # [B, D]
        return self._head(hidden), KVCache(tuple(keys), tuple(values), lengths.astype(jnp.int32), tuple(norms))

    def decode(
        self,
        tokens: jax.Array,
        cache: KVCache,
        *,
        softmax: UnifiedMax | None = None,
        implementation: Literal["xla"] | None = None,
    ) -> tuple[jax.Array, KVCache, jax.Array]:
        """One decode step: appends a token to each row and predicts the next.

        Where `overflow` is true the logits, the new slots and the norms are not usable: call again with softmax=None
        on the returned keys and values, and the lengths and norms from before. That writes the same slots.

        Args:
          tokens: [B] integers.
          cache: With room for one more token in every row (not checked here, lengths are traced); donate it.
          softmax: None for exact online softmax, or the policy.
          implementation: None for the planned kernels, "xla" for plain XLA throughout.

        Returns:
          Logits [B, V] float32, the cache one token longer, and overflow [] bool: some row of some layer left
          the policy's safe window.

        Raises:
          ValueError: The batch sizes differ, or an unknown implementation.
        """
        _check_tokens(tokens, ndim=1)
        _check_batch(cache, tokens=tokens)
        if implementation not in (None, "xla"):
            raise ValueError(f"implementation of a decode step must be None or 'xla', got {implementation!r}")
        keys, values, norms = list(cache.keys), list(cache.values), list(cache.key_max_norms)
        lengths = cache.lengths + 1

        def attend(layer: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            keys[layer] = write_token(keys[layer], key, cache.lengths)
            values[layer] = write_token(values[layer], value, cache.lengths)
            if norms:
                norms[layer] = jnp.maximum(norms[layer], unified_max.max_norm(key.astype(keys[layer].dtype)))
            return ops.unchecked_decode_attention(
                query,
                keys[layer],
                values[layer],
                key_value_seq_lengths=lengths,
                key_max_norm=norms[layer] if norms else None,
                softmax=softmax,
                implementation=implementation,
            )

        hidden = self.hidden_states(tokens[:, None], cache.lengths[:, None], attend, implementation)  # [B, 1, D]
        logits = self._head(hidden[:, 0], implementation)  # [B, V]
        # A row that overflowed in any layer comes out as NaN and leaves no logit of its sequence finite.
        # A constant False lets XLA drop the caller's recompute branch altogether.
        overflow = jnp.zeros((), bool) if softmax is None else jnp.isnan(logits[:, 0]).any()
        return logits, KVCache(tuple(keys), tuple(values), lengths, tuple(norms)), overflow

    def hidden_states(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
        implementation: MatmulImplementation | None = None,
    ) -> jax.Array:
        """What the head reads, with attention left to the caller: a cache, a probe of the scores, ...

        Args:
          tokens: [B, T] integers.
          positions: [B, T] integers for the rotary embeddings; [1, T] serves all rows.
          attend: attend(layer, query [B, T, N, H], key, value [B, T, K, H]) -> [B, T, N, H]; query and key are rotated.
          implementation: Of the matmuls, None for the planned one.

        Returns:
          [B, T, D].
        """
        rotation = rotation_at(self.config, positions)
        x = self.model.embed_tokens(tokens)  # [B, T, D]
        for i, layer in enumerate(self.model.layers):
            x += layer.self_attn(layer.input_layernorm(x), rotation, functools.partial(attend, i), implementation)
            x += layer.mlp(layer.post_attention_layernorm(x), implementation)
        return self.model.norm(x)

    def _head(self, hidden: jax.Array, implementation: MatmulImplementation | None = None) -> jax.Array:
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.logits(hidden)
        return self.lm_head(hidden, out_dtype=jnp.float32, implementation=implementation)


def rotation_at(config: LlamaConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, 1, H / 2] float32 of the rotary angles at positions [B, T]."""
    angles = positions[:, :, None, None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (x[i], x[i + H / 2]) of x [B, T, N, H] by the rotary angles, in float32."""
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


@functools.cache
def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Rotary angle per position of each pair, [H / 2] float32, after the checkpoint's scaling."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1.0) / np.float32(config.rope_theta) ** exponents
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


def _causal_attend(layer: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    del layer
    return ops.dot_product_attention(query, key, value, is_causal=True)


def _positions(tokens: jax.Array) -> jax.Array:
    return jnp.arange(tokens.shape[1])[None]  # [1, T]


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    return jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(_INIT_STDDEV, dtype)


def _check_tokens(tokens: jax.Array, *, ndim: int) -> None:
    if tokens.ndim != ndim or not jnp.issubdtype(tokens.dtype, jnp.integer):
        expected = "[B, T]" if ndim == 2 else "[B]"
        raise ValueError(f"expected integer tokens {expected}, got {tokens.dtype} of shape {tokens.shape}")


def _check_batch(cache: KVCache, **arrays: jax.Array) -> None:
    for name, array in arrays.items():
        if array.shape[0] != cache.batch:
            raise ValueError(f"{name} of shape {array.shape} do not match a cache of {cache.batch} rows")
    if "lengths" in arrays and arrays["lengths"].ndim != 1:
        raise ValueError(f"expected lengths [B], got shape {arrays['lengths'].shape}")
