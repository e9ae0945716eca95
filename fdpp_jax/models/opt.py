"""OPT in Flax NNX: learned positions, layer norms, biases everywhere and a ReLU MLP. q, k, v are fused."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from fdpp_jax.models.config import DecoderConfig, activation_problems, common_problems, refuse
from fdpp_jax.models.decoder import CausalLM, Implied, Layer, LayerAttend
from fdpp_jax.models.layers import Embedding, LayerNorm, Linear
from fdpp_jax.plans.calls import LayerWeights
from fdpp_jax.plans.shapes import LayerSpec, MatmulImplementation, Norm
from fdpp_jax.unified_max import UnifiedMax

_SIZES = ("vocab_size", "hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads")
# Rows of the position table before the one of position 0.
_POSITION_OFFSET = 2
# Fixed in every OPT, so config.json does not have it.
_LAYER_NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class OPTConfig(DecoderConfig):
    """An OPT's shapes; field names as in Hugging Face's config.json, but for intermediate_size, its ffn_dim.

    Raises:
      ValueError: A size is not positive, or the head counts do not divide.
    """

    has_learned_positions: ClassVar[bool] = True

    tie_word_embeddings: bool = True

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "OPTConfig":
        """Reads the contents of a Hugging Face config.json, of transformers 4 or 5.

        Raises:
          ValueError: Not an OPT, a required key is missing, or the checkpoint asks for something this model does
            not compute, as opt-350m does. All problems are listed at once.
        """
        problems = common_problems(hf, "opt", "OPTForCausalLM", sizes=_SIZES)
        refuse(problems or _problems(hf))
        heads = hf["num_attention_heads"]
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["ffn_dim"],
            num_hidden_layers=hf["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=hf["hidden_size"] // heads,
            max_position_embeddings=hf.get("max_position_embeddings", 2048),
        )

    @property
    def mlp_in_size(self) -> int:
        """Outputs of the MLP's first projection, which has no gate."""
        return self.intermediate_size

    @property
    def layer_spec(self) -> LayerSpec:
        return LayerSpec(
            norm=Norm("layer", _LAYER_NORM_EPS),
            activation="relu",
            is_gated=False,
            has_qkv_bias=True,
            has_o_bias=True,
            has_mlp_bias=True,
            rotation=None,
        )

    def uncalibrated_softmax(self, dtype: str) -> tuple[UnifiedMax | None, str]:
        del dtype
        return None, "OPT's scores are known to spread too far for one phi (OPT-6.7B: -496.8 .. 363.5)"


def _problems(hf: Mapping[str, Any]) -> list[str]:
    """Why a config.json of an OPT cannot be run."""
    size, heads = hf["hidden_size"], hf["num_attention_heads"]
    problems = activation_problems(hf, "activation_function", "relu")
    if size % heads:
        problems.append(f"expected num_attention_heads to divide hidden_size={size}, got {heads}")
    if (got := hf.get("word_embed_proj_dim") or size) != size:
        problems.append(f"expected word_embed_proj_dim to be hidden_size={size}, got {got}")
    for key, expected in (
        ("do_layer_norm_before", True),
        ("_remove_final_layer_norm", False),
        ("layer_norm_elementwise_affine", True),
        ("enable_bias", True),
        ("tie_word_embeddings", True),
    ):
        if (got := hf.get(key, expected)) != expected:
            problems.append(f"expected {key} {expected}, got {got}")
    return problems


class Attention(nnx.Module):
    """The projections around attention; attention itself is the caller's `attend`."""

    def __init__(self, config: OPTConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.config = config
        size = config.hidden_size
        parts = ("q_proj", size), ("k_proj", size), ("v_proj", size)
        self.qkv_proj = Linear(size, config.qkv_size, use_bias=True, parts=parts, dtype=dtype, rngs=rngs)
        self.out_proj = Linear(size, size, use_bias=True, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        attend: LayerAttend,
        implementation: MatmulImplementation | None,
    ) -> jax.Array:
        qkv = self.qkv_proj(x, implementation=implementation)  # [B, T, 3 D]
        qkv = qkv.reshape(*x.shape[:2], -1, self.config.head_dim)  # [B, T, 3 N, H]
        out = attend(*jnp.split(qkv, 3, axis=2))  # [B, T, N, H]
        return self.out_proj(out.reshape(x.shape), implementation=implementation)


class OPTLayer(nnx.Module):
    """One transformer layer: attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: OPTConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        size, inner = config.hidden_size, config.intermediate_size
        norm = functools.partial(LayerNorm, size, eps=_LAYER_NORM_EPS, dtype=dtype)
        self.self_attn_layer_norm = norm()
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.final_layer_norm = norm()
        self.fc1 = Linear(size, inner, use_bias=True, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(inner, size, use_bias=True, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        context: None,
        attend: LayerAttend,
        implementation: MatmulImplementation | None,
    ) -> jax.Array:
        del context  # positions are in x
        x += self.self_attn(self.self_attn_layer_norm(x), attend, implementation)
        y = jax.nn.relu(self.fc1(self.final_layer_norm(x), implementation=implementation))
        return x + self.fc2(y, implementation=implementation)

    @property
    def input_norm(self) -> LayerNorm:
        return self.self_attn_layer_norm

    @property
    def weights(self) -> LayerWeights:
        attention = self.self_attn
        return LayerWeights(
            input_norm=self.self_attn_layer_norm.weight[...],
            input_norm_bias=self.self_attn_layer_norm.bias[...],
            qkv=attention.qkv_proj.weight[...],
            qkv_bias=attention.qkv_proj.bias_array,
            o=attention.out_proj.weight[...],
            o_bias=attention.out_proj.bias_array,
            mlp_norm=self.final_layer_norm.weight[...],
            mlp_norm_bias=self.final_layer_norm.bias[...],
            mlp_in=self.fc1.weight[...],
            mlp_in_bias=self.fc1.bias_array,
            mlp_out=self.fc2.weight[...],
            mlp_out_bias=self.fc2.bias_array,
        )


class Decoder(nnx.Module):
    """Embeddings, layers and the final norm."""

    def __init__(self, config: OPTConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        size, rows = config.hidden_size, config.max_position_embeddings + _POSITION_OFFSET
        self.embed_tokens = Embedding(config.vocab_size, size, dtype=dtype, rngs=rngs)
        self.embed_positions = Embedding(rows, size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(OPTLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = LayerNorm(size, eps=_LAYER_NORM_EPS, dtype=dtype)


class OPTModel(nnx.Module):
    """The decoder, one level down as in the checkpoint's names."""

    def __init__(self, config: OPTConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)


class OPTForCausalLM(CausalLM):
    """An OPT with its head, which is tied.

    Args:
      config: Shapes and constants.
      dtype: dtype of weights, activations and KV cache.
      rngs: Source of the random initial weights.
    """

    config: OPTConfig

    def __init__(self, config: OPTConfig, *, dtype: jax.typing.DTypeLike = jnp.bfloat16, rngs: nnx.Rngs):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.model = OPTModel(config, dtype=dtype, rngs=rngs)

    @property
    def implied_tensors(self) -> Mapping[str, Implied]:
        return {"lm_head.weight": self.embedding}

    @property
    def embedding(self) -> Embedding:
        return self.model.decoder.embed_tokens

    @property
    def layers(self) -> Sequence[Layer]:
        return self.model.decoder.layers

    @property
    def final_norm(self) -> LayerNorm:
        return self.model.decoder.final_layer_norm

    def embed(self, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any]:
        limit = self.config.max_position_embeddings
        if tokens.shape[1] > limit:  # a lookup past the table would repeat its last row
            raise ValueError(f"expected at most max_position_embeddings={limit} tokens a row, got {tokens.shape[1]}")
        decoder = self.model.decoder
        return decoder.embed_tokens(tokens) + decoder.embed_positions(positions + _POSITION_OFFSET), None


def _preset(hidden_size: int, layers: int, heads: int) -> OPTConfig:
    return OPTConfig(
        vocab_size=50272,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden_size // heads,
        max_position_embeddings=2048,
    )


# Shapes as published, for plans and benches that need no checkpoint.
PRESETS: dict[str, OPTConfig] = {
    "opt-125m": _preset(768, layers=12, heads=12),
    "opt-1.3b": _preset(2048, layers=24, heads=32),
    "opt-6.7b": _preset(4096, layers=32, heads=32),
    "opt-13b": _preset(5120, layers=40, heads=40),
}
