"""ChatGLM2 and ChatGLM3 in Flax NNX: a LLaMA with few key/value heads that turns half of the head dim.

Loading permutes the rows of queries and keys, so that pairs which turn lie as LLaMA's do.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdpp_jax.models.config import DecoderConfig, common_problems, refuse
from fdpp_jax.models.decoder import CausalLM, Implied, Layer, LayerAttend
from fdpp_jax.models.layers import Embedding, Linear, RMSNorm
from fdpp_jax.models.rotary import RopeScaling, rotate, rotation_at, stored_frequencies
from fdpp_jax.plans.calls import LayerWeights
from fdpp_jax.plans.shapes import LayerSpec, MatmulImplementation, Norm, Rotation

_SIZES = (
    "padded_vocab_size",
    "hidden_size",
    "ffn_hidden_size",
    "num_layers",
    "num_attention_heads",
    "multi_query_group_num",
    "kv_channels",
)
# What save_pretrained writes; the authors' own config.json names the class inside it.
_SAVED_ARCHITECTURE = "ChatGLMForConditionalGeneration"


@dataclasses.dataclass(frozen=True)
class ChatGLMConfig(DecoderConfig):
    """A ChatGLM's shapes and constants; the field names of DecoderConfig stand for ChatGLM's own.

    Raises:
      ValueError: A size is not positive, the head counts do not divide, or half of head_dim has no pairs.
    """

    layernorm_epsilon: float = 1e-5
    add_qkv_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim % 4:
            raise ValueError(f"head_dim must be divisible by 4, half of it is turned in pairs; got {self.head_dim}")

    @property
    def layer_spec(self) -> LayerSpec:
        return LayerSpec(
            norm=Norm("rms", self.layernorm_epsilon),
            has_qkv_bias=self.add_qkv_bias,
            rotation=Rotation(share=0.5),
        )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ChatGLMConfig":
        """Reads a config.json of ChatGLM2 or ChatGLM3.

        Raises:
          ValueError: Not a ChatGLM, a required key is missing, or the checkpoint asks for something this model does
            not compute, as the quantized and the long-context ones do. All problems are listed at once.
        """
        saved = hf.get("architectures") == [_SAVED_ARCHITECTURE]
        architecture = _SAVED_ARCHITECTURE if saved else "ChatGLMModel"
        problems = common_problems(hf, "chatglm", architecture, sizes=_SIZES)
        refuse(problems or _problems(hf))
        return cls(
            vocab_size=hf["padded_vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["ffn_hidden_size"],
            num_hidden_layers=hf["num_layers"],
            num_attention_heads=hf["num_attention_heads"],
            num_key_value_heads=hf["multi_query_group_num"],
            head_dim=hf["kv_channels"],
            max_position_embeddings=hf.get("seq_length", 2048),
            layernorm_epsilon=hf.get("layernorm_epsilon", 1e-5),
            add_qkv_bias=bool(hf.get("add_qkv_bias")),
        )


def _problems(hf: Mapping[str, Any]) -> list[str]:
    """Why a config.json of a ChatGLM cannot be run."""
    problems = []
    # What the authors' code takes a missing key for, where it has a default, and what is computed here.
    for key, default, expected in (
        ("rmsnorm", True, True),
        ("post_layer_norm", True, True),
        ("apply_residual_connection_post_layernorm", False, False),
        ("fp32_residual_connection", False, False),
        ("add_bias_linear", False, False),
        ("multi_query_attention", False, True),
        ("original_rope", True, True),
        ("rope_ratio", 1, 1),
        ("rope_theta", 10000, 10000),
        ("rope_scaling", None, None),
        ("rope_parameters", None, None),
        ("tie_word_embeddings", False, False),
        ("quantization_bit", 0, 0),
        ("pre_seq_len", None, None),
    ):
        if (got := hf.get(key, default)) != expected:
            problems.append(f"expected {key} {expected}, got {got}")
    return problems


@dataclasses.dataclass(frozen=True)
class _Rotary:
    """The part of the head dim that is turned."""

    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the first half of x [B, T, N, H] by the rotary angles."""
    turned, kept = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([rotate(turned, cos, sin), kept], axis=-1)


class QueryKeyValue(Linear):
    """The projections to queries, keys and values, in which a pair that turns is (i, i + H / 4) of a head.

    In the checkpoint it is (2i, 2i + 1). Queries and keys change alike, so their scores stay.
    """

    def __init__(self, config: ChatGLMConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        super().__init__(config.hidden_size, config.qkv_size, use_bias=config.add_qkv_bias, dtype=dtype, rngs=rngs)
        self.config = config

    def in_our_order(self, rows: jax.Array) -> jax.Array:
        head_dim = self.config.head_dim
        num_turned = (self.config.num_attention_heads + self.config.num_key_value_heads) * head_dim
        turned, values = rows[:num_turned], rows[num_turned:]
        places = np.arange(head_dim)
        places[: head_dim // 2] = places[: head_dim // 2].reshape(-1, 2).T.reshape(-1)  # even rows, then odd ones
        heads = turned.reshape(-1, head_dim, *rows.shape[1:])[:, places]
        return jnp.concatenate([heads.reshape(turned.shape), values])


class SelfAttention(nnx.Module):
    """The projections around attention; attention itself is the caller's `attend`."""

    def __init__(self, config: ChatGLMConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.config = config
        hidden, linear = config.hidden_size, functools.partial(Linear, dtype=dtype, rngs=rngs)
        self.query_key_value = QueryKeyValue(config, dtype=dtype, rngs=rngs)
        self.dense = linear(config.query_size, hidden)

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        attend: LayerAttend,
        implementation: MatmulImplementation | None,
    ) -> jax.Array:
        config = self.config
        qkv = self.query_key_value(x, implementation=implementation)  # [B, T, (N + 2 K) H]
        qkv = qkv.reshape(*x.shape[:2], -1, config.head_dim)  # [B, T, N + 2 K, H]
        query_key, value = jnp.split(qkv, [config.num_attention_heads + config.num_key_value_heads], axis=2)
        query, key = jnp.split(_rotate(query_key, *rotation), [config.num_attention_heads], axis=2)
        out = attend(query, key, value)  # [B, T, N, H]
        return self.dense(out.reshape(*x.shape[:2], -1), implementation=implementation)


class MLP(nnx.Module):
    """SwiGLU: (silu(x @ gate) * (x @ up)) @ down, with gate and up in one matrix."""

    def __init__(self, config: ChatGLMConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.dense_h_to_4h = Linear(config.hidden_size, config.mlp_in_size, dtype=dtype, rngs=rngs)
        self.dense_4h_to_h = Linear(config.intermediate_size, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, implementation: MatmulImplementation | None) -> jax.Array:
        gate, up = jnp.split(self.dense_h_to_4h(x, implementation=implementation), 2, axis=-1)
        return self.dense_4h_to_h(jax.nn.silu(gate) * up, implementation=implementation)


class ChatGLMLayer(nnx.Module):
    """One transformer layer: attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ChatGLMConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        norm = functools.partial(RMSNorm, config.hidden_size, eps=config.layernorm_epsilon, dtype=dtype)
        self.input_layernorm = norm()
        self.self_attention = SelfAttention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        attend: LayerAttend,
        implementation: MatmulImplementation | None,
    ) -> jax.Array:
        x += self.self_attention(self.input_layernorm(x), rotation, attend, implementation)
        return x + self.mlp(self.post_attention_layernorm(x), implementation)

    @property
    def input_norm(self) -> RMSNorm:
        return self.input_layernorm

    @property
    def weights(self) -> LayerWeights:
        qkv = self.self_attention.query_key_value
        return LayerWeights(
            input_norm=self.input_layernorm.weight[...],
            qkv=qkv.weight[...],
            o=self.self_attention.dense.weight[...],
            mlp_norm=self.post_attention_layernorm.weight[...],
            mlp_in=self.mlp.dense_h_to_4h.weight[...],
            mlp_out=self.mlp.dense_4h_to_h.weight[...],
            qkv_bias=qkv.bias_array,
        )


class WordEmbedding(nnx.Module):
    """The rows of the tokens, under the checkpoint's name."""

    def __init__(self, config: ChatGLMConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)


class Encoder(nnx.Module):
    """Layers and the final norm."""

    def __init__(self, config: ChatGLMConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.layers = nnx.List(ChatGLMLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, eps=config.layernorm_epsilon, dtype=dtype)


class ChatGLMModel(nnx.Module):
    """Embedding, layers and head."""

    def __init__(self, config: ChatGLMConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.embedding = WordEmbedding(config, dtype=dtype, rngs=rngs)
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.output_layer = Linear(config.hidden_size, config.vocab_size, dtype=dtype, rngs=rngs)


class ChatGLMForConditionalGeneration(CausalLM):
    """A ChatGLM with its head; causal, in spite of its name.

    Args:
      config: Shapes and constants.
      dtype: dtype of weights, activations and KV cache.
      rngs: Source of the random initial weights.
    """

    config: ChatGLMConfig

    def __init__(self, config: ChatGLMConfig, *, dtype: jax.typing.DTypeLike = jnp.bfloat16, rngs: nnx.Rngs):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.transformer = ChatGLMModel(config, dtype=dtype, rngs=rngs)

    @property
    def implied_tensors(self) -> Mapping[str, Implied]:
        return {"rotary_pos_emb.inv_freq": stored_frequencies(_Rotary(self.config.head_dim // 2))}

    @property
    def embedding(self) -> Embedding:
        return self.transformer.embedding.word_embeddings

    @property
    def layers(self) -> Sequence[Layer]:
        return self.transformer.encoder.layers

    @property
    def final_norm(self) -> RMSNorm:
        return self.transformer.encoder.final_layernorm

    @property
    def head_weight(self) -> jax.Array:
        return self.transformer.output_layer.weight[...]

    def embed(self, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any]:
        rotation = rotation_at(_Rotary(self.config.head_dim // 2), positions)  # [B, T, 1, H / 4]
        return self.embedding(tokens), rotation

    def head(self, hidden: jax.Array, implementation: MatmulImplementation | None = None) -> jax.Array:
        return self.transformer.output_layer(hidden, out_dtype=jnp.float32, implementation=implementation)


_CHATGLM2_6B = ChatGLMConfig(
    vocab_size=65024,
    hidden_size=4096,
    intermediate_size=13696,
    num_hidden_layers=28,
    num_attention_heads=32,
    num_key_value_heads=2,
    head_dim=128,
    max_position_embeddings=32768,
)

# Shapes as published, for plans and benches that need no checkpoint.
PRESETS: dict[str, ChatGLMConfig] = {
    "chatglm2-6b": _CHATGLM2_6B,
    "chatglm3-6b": dataclasses.replace(_CHATGLM2_6B, max_position_embeddings=8192),
}
