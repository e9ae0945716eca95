"""LLaMA models in Flax NNX: configs and presets, KV cache, checkpoint loading, tokenizer."""

from fdpp_jax.models.cache import KVCache
from fdpp_jax.models.config import PRESETS, LlamaConfig, RopeScaling
from fdpp_jax.models.llama import LlamaForCausalLM
from fdpp_jax.models.loading import bundled_path, load, random_model, resolve
from fdpp_jax.models.plans import model_plans
from fdpp_jax.models.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "PRESETS",
    "KVCache",
    "LlamaConfig",
    "LlamaForCausalLM",
    "RopeScaling",
    "Tokenizer",
    "bundled_path",
    "load",
    "load_tokenizer",
    "model_plans",
    "random_model",
    "resolve",
]
