"""Gemma 2 in Flax NNX: soft caps, sliding windows in every other layer, a norm before and after attention and MLP."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdpp_jax.models.config import (
    AttentionArguments,
    LlamaConfig,
    activation_problems,
    common_problems,
    refuse,
    window_problems,
)
from fdpp_jax.models.decoder import CausalLM, Implied, Layer, LayerAttend
from fdpp_jax.models.layers import Embedding, RMSNorm
from fdpp_jax.models.llama import MLP, Attention
from fdpp_jax.models.rotary import rope_problems, rotation_at, stored_frequencies
from fdpp_jax.plans.calls import LayerWeights
from fdpp_jax.plans.shapes import LayerSpec, MatmulImplementation, Norm
from fdpp_jax.unified_max import UnifiedMax, window

# What transformers assumes where config.json is silent.
_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


@dataclasses.dataclass(frozen=True)
class Gemma2Config(LlamaConfig):
    """A Gemma 2's shapes and constants; field names as in Hugging Face's config.json.

    The cap makes half of the safe window provable. With |s| <= cap and den <= S e^(cap - phi), no row of bfloat16
    overflows where phi >= cap + log(S) - 44.3: phi = 15 for the published cap of 50 and S = 8192, uncalibrated. A row
    whose best score lies below phi - 44.3 may still underflow and is recomputed: 2 * cap + log(S) nats are more than
    the window's 88.7. float16's window has 20.1 - log(S) nats, so there the cap proves nothing.

    Attributes:
      query_pre_attn_scalar: Scores are divided by its square root.
      attn_logit_softcapping: Cap of the scores, None for none.
      final_logit_softcapping: Cap of the logits, None for none.

    Raises:
      ValueError: A size is not positive, or the head counts do not divide.
    """

    query_pre_attn_scalar: float = 256.0
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Gemma2Config":
        """Reads the contents of a Hugging Face config.json, of transformers 4 or 5.

        Raises:
          ValueError: Not a Gemma 2, a required key is missing, or the checkpoint asks for something this model
            does not compute. All problems are listed at once.
        """
        refuse(common_problems(hf, "gemma2", "Gemma2ForCausalLM"))
        types = hf.get("layer_types") or _alternating(hf["num_hidden_layers"])
        hf = {**_DEFAULTS, **hf, "layer_types": types}
        refuse(_problems(hf))
        bias = bool(hf.get("attention_bias"))
        return cls.of(
            hf,
            qkv_bias=bias,
            o_bias=bias,
            sliding_window=hf["sliding_window"],
            layer_types=tuple(hf["layer_types"]),
            query_pre_attn_scalar=hf["query_pre_attn_scalar"],
            attn_logit_softcapping=hf["attn_logit_softcapping"],
            final_logit_softcapping=hf["final_logit_softcapping"],
        )

    @property
    def layer_spec(self) -> LayerSpec:
        return dataclasses.replace(
            super().layer_spec,
            norm=Norm("rms", self.rms_norm_eps, gain_offset=1.0),
            norms_products=True,
            activation="gelu_tanh",
            logits_soft_cap=self.final_logit_softcapping,
        )

    def uncalibrated_softmax(self, dtype: str) -> tuple[UnifiedMax | None, str]:
        cap, keys = self.attn_logit_softcapping, self.max_position_embeddings
        if cap is None or dtype == "float16":
            return super().uncalibrated_softmax(dtype)
        phi = float(math.ceil(cap + math.log(keys) - math.log(window(dtype, keys)[1])))
        return UnifiedMax(phi), f"with scores capped at {cap:g} no row of {keys} keys exceeds the window"

    def attention_options(self, layer: int) -> AttentionArguments:
        options = super().attention_options(layer)
        options["scale"] = self.query_pre_attn_scalar**-0.5
        if self.attn_logit_softcapping is not None:
            options["logits_soft_cap"] = self.attn_logit_softcapping
        return options


def _alternating(num_layers: int) -> tuple[str, ...]:
    return tuple("full_attention" if layer % 2 else "sliding_attention" for layer in range(num_layers))


def _problems(hf: Mapping[str, Any]) -> list[str]:
    """Why a Gemma 2's config.json, with defaults, cannot be run."""
    problems = activation_problems(hf, "hidden_activation", "gelu_pytorch_tanh") + rope_problems(hf)
    problems += window_problems(hf)
    if not (got := hf["query_pre_attn_scalar"]) > 0:
        problems.append(f"expected query_pre_attn_scalar to be positive, got {got}")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (got := hf[key]) is not None and not got > 0:
            problems.append(f"expected {key} to be positive or null, got {got}")
    if hf.get("use_bidirectional_attention"):
        problems.append("expected use_bidirectional_attention False, got True")
    if not hf["tie_word_embeddings"]:
        problems.append("expected tie_word_embeddings True, got False")
    return problems


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


class Gemma2Layer(nnx.Module):
    """One transformer layer: attention and MLP, each between two norms and added to the residual stream."""

    def __init__(self, config: Gemma2Config, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        norm = functools.partial(RMSNorm, config.hidden_size, eps=config.rms_norm_eps, offset=1.0, dtype=dtype)
        self.input_layernorm = norm()
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.mlp = MLP(config, activation=_gelu, dtype=dtype, rngs=rngs)
        self.post_feedforward_layernorm = norm()

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        attend: LayerAttend,
        implementation: MatmulImplementation | None,
    ) -> jax.Array:
        y = self.self_attn(self.input_layernorm(x), rotation, attend, implementation)
        x += self.post_attention_layernorm(y)
        y = self.mlp(self.pre_feedforward_layernorm(x), implementation)
        return x + self.post_feedforward_layernorm(y)

    @property
    def input_norm(self) -> RMSNorm:
        return self.input_layernorm

    @property
    def weights(self) -> LayerWeights:
        return LayerWeights(
            input_norm=self.input_layernorm.weight[...],
            mlp_norm=self.pre_feedforward_layernorm.weight[...],
            o_norm=self.post_attention_layernorm.weight[...],
            mlp_out_norm=self.post_feedforward_layernorm.weight[...],
            **self.self_attn.weights,
            **self.mlp.weights,
        )


class Gemma2Model(nnx.Module):
    """Embedding, layers and the final norm."""

    def __init__(self, config: Gemma2Config, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(Gemma2Layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, offset=1.0, dtype=dtype)


class Gemma2ForCausalLM(CausalLM):
    """A Gemma 2 with its head, which is tied.

    Args:
      config: Shapes and constants.
      dtype: dtype of weights, activations and KV cache.
      rngs: Source of the random initial weights.
    """

    config: Gemma2Config

    def __init__(self, config: Gemma2Config, *, dtype: jax.typing.DTypeLike = jnp.bfloat16, rngs: nnx.Rngs):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.model = Gemma2Model(config, dtype=dtype, rngs=rngs)

    @property
    def implied_tensors(self) -> Mapping[str, Implied]:
        return {"rotary_emb.inv_freq": stored_frequencies(self.config), "lm_head.weight": self.embedding}

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
        x = self.model.embed_tokens(tokens)  # [B, T, D]
        x *= jnp.asarray(math.sqrt(self.config.hidden_size), x.dtype)  # rounded, as the model was trained
        return x, rotation_at(self.config, positions)

    def head(self, hidden: jax.Array, implementation: MatmulImplementation | None = None) -> jax.Array:
        logits = super().head(hidden, implementation)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def _preset(
    hidden_size: int, intermediate_size: int, layers: int, heads: int, head_dim: int, query_pre_attn_scalar: float
) -> Gemma2Config:
    return Gemma2Config(
        vocab_size=256000,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=head_dim,
        max_position_embeddings=8192,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        sliding_window=4096,
        layer_types=_alternating(layers),
        query_pre_attn_scalar=query_pre_attn_scalar,
    )


# Shapes as published, for plans and benches that need no checkpoint.
PRESETS: dict[str, Gemma2Config] = {
    "gemma-2-2b": _preset(2304, 9216, layers=26, heads=8, head_dim=256, query_pre_attn_scalar=256),
    "gemma-2-9b": _preset(3584, 14336, layers=42, heads=16, head_dim=256, query_pre_attn_scalar=256),
    "gemma-2-27b": _preset(4608, 36864, layers=46, heads=32, head_dim=128, query_pre_attn_scalar=144),
}
