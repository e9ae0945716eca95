"""LLaMA in Flax NNX, and what differs little: Mistral, Qwen. q, k, v and gate, up are fused into one matmul each."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdpp_jax.models.config import LlamaConfig
from fdpp_jax.models.decoder import CausalLM, Implied, Layer, LayerAttend
from fdpp_jax.models.layers import Embedding, Linear, RMSNorm
from fdpp_jax.models.rotary import rotate, rotation_at, stored_frequencies
from fdpp_jax.plans.calls import LayerWeights
from fdpp_jax.plans.shapes import MatmulImplementation


class Attention(nnx.Module):
    """The projections around attention; attention itself is the caller's `attend`."""

    def __init__(self, config: LlamaConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.config = config
        hidden, linear = config.hidden_size, functools.partial(Linear, dtype=dtype, rngs=rngs)
        parts = ("q_proj", config.query_size), ("k_proj", config.kv_size), ("v_proj", config.kv_size)
        self.qkv_proj = linear(hidden, config.qkv_size, use_bias=config.qkv_bias, parts=parts)
        self.o_proj = linear(config.query_size, hidden, use_bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, dtype=dtype)

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        attend: LayerAttend,
        implementation: MatmulImplementation | None,
    ) -> jax.Array:
        out = attend(*self.project(x, rotation, implementation))  # [B, T, N, H]
        return self.o_proj(out.reshape(*x.shape[:2], -1), implementation=implementation)

    def project(
        self, x: jax.Array, rotation: tuple[jax.Array, jax.Array], implementation: MatmulImplementation | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Query [B, T, N, H], key and value [B, T, K, H] of x [B, T, D], rotated."""
        config = self.config
        qkv = self.qkv_proj(x, implementation=implementation)  # [B, T, (N + 2 K) H]
        qkv = qkv.reshape(*x.shape[:2], -1, config.head_dim)  # [B, T, N + 2 K, H]
        heads, turned = config.num_attention_heads, config.num_attention_heads + config.num_key_value_heads
        query_key, value = jnp.split(qkv, [turned], axis=2)
        if config.qk_norm:
            query, key = jnp.split(query_key, [heads], axis=2)
            query_key = jnp.concatenate([self.q_norm(query), self.k_norm(key)], axis=2)
        query, key = jnp.split(rotate(query_key, *rotation), [heads], axis=2)
        return query, key, value

    @property
    def weights(self) -> dict[str, Any]:
        """Its part of a layer's `LayerWeights`."""
        weights: dict[str, Any] = dict(qkv=self.qkv_proj.weight[...], qkv_bias=self.qkv_proj.bias_array)
        weights |= dict(o=self.o_proj.weight[...], o_bias=self.o_proj.bias_array)
        if self.config.qk_norm:
            weights |= dict(query_norm=self.q_norm.weight[...], key_norm=self.k_norm.weight[...])
        return weights


class MLP(nnx.Module):
    """SwiGLU: (silu(x @ gate) * (x @ up)) @ down, or with another activation."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
        dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        parts = ("gate_proj", inner), ("up_proj", inner)
        self.gate_up_proj = Linear(hidden, 2 * inner, use_bias=bias, parts=parts, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(inner, hidden, use_bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, implementation: MatmulImplementation | None) -> jax.Array:
        gate, up = jnp.split(self.gate_up_proj(x, implementation=implementation), 2, axis=-1)
        return self.down_proj(self.activation(gate) * up, implementation=implementation)

    @property
    def weights(self) -> dict[str, Any]:
        """Its part of a layer's `LayerWeights`."""
        return dict(
            mlp_in=self.gate_up_proj.weight[...],
            mlp_in_bias=self.gate_up_proj.bias_array,
            mlp_out=self.down_proj.weight[...],
            mlp_out_bias=self.down_proj.bias_array,
        )


class LlamaLayer(nnx.Module):
    """One transformer layer: attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        norm = functools.partial(RMSNorm, config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.input_layernorm = norm()
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        attend: LayerAttend,
        implementation: MatmulImplementation | None,
    ) -> jax.Array:
        x += self.self_attn(self.input_layernorm(x), rotation, attend, implementation)
        return x + self.mlp(self.post_attention_layernorm(x), implementation)

    @property
    def input_norm(self) -> RMSNorm:
        return self.input_layernorm

    @property
    def weights(self) -> LayerWeights:
        return LayerWeights(
            input_norm=self.input_layernorm.weight[...],
            mlp_norm=self.post_attention_layernorm.weight[...],
            **self.self_attn.weights,
            **self.mlp.weights,
        )


class LlamaModel(nnx.Module):
    """Embedding, layers and the final norm."""

    def __init__(self, config: LlamaConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(LlamaLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)


class LlamaForCausalLM(CausalLM):
    """A LLaMA, Mistral or Qwen with its head.

    Args:
      config: Shapes and constants.
      dtype: dtype of weights, activations and KV cache.
      rngs: Source of the random initial weights.
    """

    config: LlamaConfig

    def __init__(self, config: LlamaConfig, *, dtype: jax.typing.DTypeLike = jnp.bfloat16, rngs: nnx.Rngs):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.model = LlamaModel(config, dtype=dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=dtype, rngs=rngs)

    @property
    def implied_tensors(self) -> Mapping[str, Implied]:
        rotary: dict[str, Implied] = {"rotary_emb.inv_freq": stored_frequencies(self.config)}
        return rotary | {"lm_head.weight": self.embedding} if self.config.tie_word_embeddings else rotary

    @property
    def embedding(self) -> Embedding:
        return self.model.embed_tokens

    @property
    def layers(self) -> Sequence[Layer]:
        return self.model.layers

    @property
    def final_norm(self) -> RMSNorm:
        return self.model.norm

    def embed(self, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any]:
        return self.model.embed_tokens(tokens), rotation_at(self.config, positions)

    @property
    def head_weight(self) -> jax.Array:
        return super().head_weight if self.config.tie_word_embeddings else self.lm_head.weight[...]

    def head(self, hidden: jax.Array, implementation: MatmulImplementation | None = None) -> jax.Array:
        if self.config.tie_word_embeddings:
            return super().head(hidden, implementation)
        return self.lm_head(hidden, out_dtype=jnp.float32, implementation=implementation)
