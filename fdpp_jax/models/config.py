"""Shapes and constants of a model, as a checkpoint's config.json has them: what all families share, and LLaMA's."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, TypedDict

import jax
import jax.numpy as jnp

from fdpp_jax.json_fields import BOOL, INDEX, NUMBER, OBJECT, POSITIVE, SIZE, TEXTS, Kind, field_problems
from fdpp_jax.models.rotary import RopeScaling, rope_problems, rope_scaling, rope_theta
from fdpp_jax.plans.shapes import LayerShape, LayerSpec, Norm
from fdpp_jax.unified_max import UnifiedMax

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_LAYER_TYPES = ("sliding_attention", "full_attention")
# What a family may read beside its sizes. null: the default, or none; a null bool is false.
_KINDS: dict[str, Kind] = {
    "quantization_config": OBJECT.or_null,
    "rope_scaling": OBJECT.or_null,
    "rope_parameters": OBJECT.or_null,
    "per_layer_config": OBJECT.or_null,
    "layer_types": TEXTS.or_null,
    "num_key_value_heads": SIZE.or_null,
    "head_dim": SIZE.or_null,
    "max_position_embeddings": SIZE,
    "seq_length": SIZE,
    "max_window_layers": INDEX,
    "rms_norm_eps": POSITIVE,
    "layernorm_epsilon": POSITIVE,
    "query_pre_attn_scalar": NUMBER,
    "attn_logit_softcapping": NUMBER.or_null,
    "final_logit_softcapping": NUMBER.or_null,
    "attention_bias": BOOL.or_null,
    "mlp_bias": BOOL.or_null,
    "add_qkv_bias": BOOL.or_null,
    "tie_word_embeddings": BOOL.or_null,
    "use_sliding_window": BOOL.or_null,
    "is_causal": BOOL,
}


class AttentionArguments(TypedDict, total=False):
    """Arguments of `fdpp_jax.dot_product_attention` that a layer may set."""

    scale: float
    local_window_size: tuple[int, int]
    logits_soft_cap: float


@dataclasses.dataclass(frozen=True)
class DecoderConfig(abc.ABC):
    """What every decoder has; field names as in Hugging Face's config.json.

    Raises:
      ValueError: A size is not positive, or the head counts do not divide.
    """

    has_learned_positions: ClassVar[bool] = False  # so that there are none beyond max_position_embeddings

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and not SIZE.holds(value):
                raise ValueError(f"expected {field.name} to be {SIZE.text}, got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, rotary embeddings turn pairs; got {self.head_dim}")

    @property
    def query_size(self) -> int:
        """Outputs of q_proj, N * H."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Outputs of k_proj and of v_proj, K * H."""
        return self.num_key_value_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Outputs of the fused query, key and value projection, (N + 2 K) * H."""
        return self.query_size + 2 * self.kv_size

    @property
    def mlp_in_size(self) -> int:
        """Outputs of the MLP's first projection: gate and up."""
        return 2 * self.intermediate_size

    @property
    def position_limit(self) -> int | None:
        """Positions beyond which the model has none; None where it has them all."""
        return self.max_position_embeddings if self.has_learned_positions else None

    @property
    @abc.abstractmethod
    def layer_spec(self) -> LayerSpec:
        """What lies between two attentions."""

    def layer_shape(self, batch: int, dtype: jax.typing.DTypeLike) -> LayerShape:
        """The static shape of what lies between two attentions in a decode step of `batch` rows."""
        return LayerShape(
            batch=batch,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_query_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            dtype=jnp.dtype(dtype).name,
            spec=self.layer_spec,
            vocab_size=self.vocab_size,
        )

    def uncalibrated_softmax(self, dtype: str) -> tuple[UnifiedMax | None, str]:
        """What to decode with in dtype until scores are recorded, None for online softmax, and why."""
        if dtype == "float16":
            return None, "float16's window being narrow"
        return UnifiedMax(), "the default"

    def attention_options(self, layer: int) -> AttentionArguments:
        """How a layer's attention differs from the plain one."""
        del layer
        return {}

    def prefill_options(self, layer: int, num_keys: int) -> AttentionArguments:
        """`attention_options` of a prefill over num_keys keys, without a window that hides none of them."""
        options = self.attention_options(layer)
        window = options.get("local_window_size")
        if window is not None and window[0] >= num_keys - 1:
            del options["local_window_size"]  # cuDNN knows no windows
        return options


@dataclasses.dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """Shapes and constants of a LLaMA, Mistral or Qwen; field names as in Hugging Face's config.json where it has them.

    Attributes:
      qkv_bias: Whether q_proj, k_proj and v_proj have biases.
      o_bias: Whether o_proj has one.
      qk_norm: Whether queries and keys are normalised over the head dim before they are rotated.
      sliding_window: Keys that a windowed layer sees, the token's own included; None: no layer is windowed.
      layer_types: "sliding_attention" or "full_attention" for each layer; none given: all are windowed if there is
        a sliding_window.

    Raises:
      ValueError: A size is not positive, or the head counts do not divide.
    """

    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()

    @property
    def layer_spec(self) -> LayerSpec:
        return LayerSpec(
            norm=Norm("rms", self.rms_norm_eps),
            norms_queries_and_keys=self.qk_norm,
            has_qkv_bias=self.qkv_bias,
            has_o_bias=self.o_bias,
            has_mlp_bias=self.mlp_bias,
        )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "LlamaConfig":
        """Reads a LLaMA's config.json, of transformers 4 or 5.

        Raises:
          ValueError: Not a LLaMA, a required key is missing, or the checkpoint asks for something this model
            does not compute. All problems are listed at once.
        """
        problems = common_problems(hf, "llama", "LlamaForCausalLM")
        refuse(problems or activation_problems(hf, "hidden_act", "silu") + rope_problems(hf))
        hf = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, **hf}
        bias = bool(hf.get("attention_bias"))
        return cls.of(hf, qkv_bias=bias, o_bias=bias, mlp_bias=bool(hf.get("mlp_bias")))

    @classmethod
    def of(cls, hf: Mapping[str, Any], **fields: Any) -> Self:
        """What LLaMA, Mistral and Qwen say alike in a config.json that has no problems, and `fields` for the rest."""
        heads = hf["num_attention_heads"]
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_hidden_layers=hf["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            max_position_embeddings=hf["max_position_embeddings"],
            rms_norm_eps=hf["rms_norm_eps"],
            rope_theta=rope_theta(hf),
            rope_scaling=rope_scaling(hf),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings")),
            **fields,
        )

    def attention_options(self, layer: int) -> AttentionArguments:
        windowed = not self.layer_types or self.layer_types[layer] == "sliding_attention"
        if self.sliding_window is None or not windowed:
            return {}
        return {"local_window_size": (self.sliding_window - 1, 0)}


def common_problems(
    hf: Mapping[str, Any], model_type: str, architecture: str, *, sizes: Sequence[str] = _SIZES
) -> list[str]:
    """Why no family could run this config.json, each with expected and got; the architecture alone if that is wrong."""
    got, architectures = hf.get("model_type"), hf.get("architectures")
    # The second is a model without its head; a head that is missing shows at its tensors.
    accepted = {architecture, architecture.replace("ForCausalLM", "Model")}
    ours = not architectures or (isinstance(architectures, list) and not accepted.isdisjoint(map(str, architectures)))
    if got != model_type or not ours:
        return [
            f"expected model_type {model_type!r} and architectures ['{architecture}'], got {got!r} and {architectures}"
        ]
    problems = [f"{key} is missing" for key in sizes if key not in hf]
    problems += field_problems(hf, dict.fromkeys(sizes, SIZE) | _KINDS)
    quantization = hf.get("quantization_config")
    if isinstance(quantization, dict) and quantization:
        method = quantization.get("quant_method", "unknown")
        problems.append(f"expected unquantized weights, got a quantization_config (quant_method {method!r})")
    # transformers reads these of any model: a mask for every query, and fields that differ by layer.
    if hf.get("is_causal", True) is False:
        problems.append("expected is_causal True, got False")
    if hf.get("per_layer_config"):
        problems.append("expected layers of one shape, got a per_layer_config")
    return problems


def activation_problems(hf: Mapping[str, Any], key: str, expected: str) -> list[str]:
    """Whether config.json names another activation than `expected`."""
    got = hf.get(key, expected)
    return [] if got == expected else [f"expected {key} {expected!r}, got {got!r}"]


def window_problems(hf: Mapping[str, Any]) -> list[str]:
    """Why the sliding windows of sliding_window and layer_types cannot be run; kinds are `common_problems`' matter."""
    window, types, layers = hf.get("sliding_window"), hf.get("layer_types"), hf["num_hidden_layers"]
    problems = field_problems(hf, {"sliding_window": SIZE.or_null})
    if types and (len(types) != layers or not set(types) <= set(_LAYER_TYPES)):
        problems.append(f"expected layer_types of {layers} out of {', '.join(_LAYER_TYPES)}, got {types}")
    if types and "sliding_attention" in types and window is None:
        problems.append("layer_types has sliding_attention, but no sliding_window is in use")
    return problems


def refuse(problems: list[str]) -> None:
    """Raises what is wrong with a config.json, all at once.

    Raises:
      ValueError: There is a problem.
    """
    if problems:
        raise ValueError("config.json is not one this model can run:\n" + "\n".join(f"  - {p}" for p in problems))


def _llama_2(hidden_size: int, intermediate_size: int, layers: int, heads: int, kv_heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
    )


_LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    rope_theta=500000.0,
)
_LLAMA_31_8B = dataclasses.replace(
    _LLAMA_3_8B, max_position_embeddings=131072, rope_scaling=RopeScaling("llama3", factor=8.0)
)

# Shapes as published, for plans and benches that need no checkpoint.
PRESETS: dict[str, LlamaConfig] = {
    "llama-2-7b": _llama_2(4096, 11008, layers=32, heads=32, kv_heads=32),
    "llama-2-13b": _llama_2(5120, 13824, layers=40, heads=40, kv_heads=40),
    "llama-2-70b": _llama_2(8192, 28672, layers=80, heads=64, kv_heads=8),
    "llama-3-8b": _LLAMA_3_8B,
    "llama-3.1-8b": _LLAMA_31_8B,
    "llama-3.2-1b": dataclasses.replace(
        _LLAMA_31_8B,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        head_dim=64,
        rope_scaling=RopeScaling("llama3", factor=32.0),
        tie_word_embeddings=True,
    ),
    "llama-3.2-3b": dataclasses.replace(
        _LLAMA_31_8B,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        rope_scaling=RopeScaling("llama3", factor=32.0),
        tie_word_embeddings=True,
    ),
    "llama-3.1-70b": dataclasses.replace(
        _LLAMA_31_8B, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
    ),
}
