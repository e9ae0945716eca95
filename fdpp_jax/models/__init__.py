"""Models in Flax NNX: families, configs and presets, KV cache, checkpoint loading, tokenizer."""

from fdpp_jax.models.cache import KVCache
from fdpp_jax.models.chat import SamplingDefaults, chat_text, sampling_defaults
from fdpp_jax.models.config import DecoderConfig, LlamaConfig
from fdpp_jax.models.decoder import CausalLM
from fdpp_jax.models.families import FAMILIES, PRESETS, causal_lm, config_from_hf
from fdpp_jax.models.llama import LlamaForCausalLM
from fdpp_jax.models.loading import bundled_path, load, random_model, resolve
from fdpp_jax.models.plans import model_plans, prefill_plans
from fdpp_jax.models.rotary import RopeScaling
from fdpp_jax.models.text_stream import TextStream
from fdpp_jax.models.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "FAMILIES",
    "PRESETS",
    "CausalLM",
    "DecoderConfig",
    "KVCache",
    "LlamaConfig",
    "LlamaForCausalLM",
    "RopeScaling",
    "SamplingDefaults",
    "TextStream",
    "Tokenizer",
    "bundled_path",
    "causal_lm",
    "chat_text",
    "config_from_hf",
    "load",
    "load_tokenizer",
    "model_plans",
    "prefill_plans",
    "random_model",
    "resolve",
    "sampling_defaults",
]
