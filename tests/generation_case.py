"""A tiny random model, what it should generate, and how streams are read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdpp_jax.models import LlamaConfig, LlamaForCausalLM
from fdpp_jax.unified_max import UnifiedMax

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=48,
)
PROMPTS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 5))
SOFTMAXES = {"online": None, "unified": UnifiedMax(), "bound": UnifiedMax.bound()}


@functools.cache
def loud_model() -> LlamaForCausalLM:
    """Random weights eight times the usual, since the usual ones repeat one token for ever."""
    graphdef, weights = nnx.split(LlamaForCausalLM(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    return nnx.merge(graphdef, jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, weights))


@functools.cache
def _scores():
    graphdef, weights = nnx.split(loud_model())
    forward = jax.jit(lambda weights, tokens: nnx.merge(graphdef, weights)(tokens))
    return functools.partial(forward, weights)


def plain_loop(prompt, num_tokens: int) -> list[int]:
    """Greedy tokens of `loud_model`, each from the logits of the whole sequence so far."""
    tokens = np.zeros((1, CONFIG.max_position_embeddings), np.int32)
    tokens[0, : len(prompt)] = prompt
    for i in range(len(prompt), len(prompt) + num_tokens):
        tokens[0, i] = int(_scores()(tokens)[0, i - 1].argmax())
    return tokens[0, len(prompt) : len(prompt) + num_tokens].tolist()


def drain(chunks):
    """The chunks of a stream, and its result."""
    collected = []
    while True:
        try:
            collected.append(next(chunks))
        except StopIteration as stop:
            return collected, stop.value
