"""From logits to the next token: greedy, temperature, top-k, top-p.

Whether a filter is on is static and shapes the program; its strength is traced, so a new temperature or
top_p compiles nothing. top_k is the exception, since it is the size of an array.
"""

import dataclasses
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Beyond these, float32 has no temperature or no reciprocal of it, and 0 / 0 or -inf * 0 would be drawn from. At either
# end the draw is that of the limit: the best token, ties shared, or all tokens alike.
_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 2.0**-126, 2.0**126


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn: `temperature` None is greedy, `top_k` and `top_p` None are off."""

    temperature: jax.Array | None = None
    top_p: jax.Array | None = None
    top_k: int | None = dataclasses.field(default=None, metadata={"static": True})


def make_sampling(
    temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, *, vocab_size: int
) -> Sampling:
    """Checks the arguments of `generate` and returns the policy.

    Args:
      temperature: Divides the logits; 0 takes the best token and ignores `top_k` and `top_p`. However small, it leaves
        only the best ones.
      top_k: Keep the k best tokens; among equal logits the lower token comes first.
      top_p: Keep the fewest best tokens whose probabilities reach top_p, after `top_k`; always at least one.
      vocab_size: Number of tokens there are.

    Raises:
      ValueError: An argument is out of its range.
    """
    temperature = as_number("temperature", temperature)
    if top_k is not None:
        try:
            top_k = operator.index(top_k)
        except TypeError:
            raise ValueError(f"top_k must be an integer or None, got {top_k!r}") from None
    if top_p is not None:
        top_p = as_number("top_p", top_p)
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number of at least 0, got {temperature}")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k must be within 1..{vocab_size} (the vocabulary), got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if temperature == 0.0:
        return Sampling()
    temperature = min(max(temperature, _LEAST_TEMPERATURE), _MOST_TEMPERATURE)
    return Sampling(
        temperature=jnp.float32(temperature), top_p=None if top_p is None else jnp.float32(top_p), top_k=top_k
    )


def as_number(name: str, value: object) -> float:
    """The argument of that name, a number or an array of one.

    Raises:
      ValueError: It is none.
    """
    if isinstance(value, int | float):
        return value
    if isinstance(value, np.number | np.ndarray | jax.Array) and np.size(value) == 1 and np.isrealobj(value):
        return float(np.asarray(value).item())
    raise ValueError(f"{name} must be a number, got {value!r}")


def checked_eos(eos_ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """The tokens that end a row.

    Raises:
      ValueError: They are no token ids of the vocabulary.
    """
    ids = np.asarray(eos_ids)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"eos_ids must be a sequence of token ids, got {eos_ids!r}")
    bad_ids = ids[(ids < 0) | (ids >= vocab_size)].tolist()
    if bad_ids:
        raise ValueError(f"eos_ids must be within 0..{vocab_size - 1}, got {bad_ids}")
    return tuple(ids.tolist())


def checked_key(key: jax.Array | None) -> jax.Array:
    """The PRNG key of the sampling, of the new kind; None: that of seed 0.

    Raises:
      ValueError: It is no key.
    """
    if key is None:
        return jax.random.key(0)
    if isinstance(key, jax.Array) and key.shape == () and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    default = jax.eval_shape(jax.random.PRNGKey, 0)
    if isinstance(key, jax.Array) and (key.shape, key.dtype) == (default.shape, default.dtype):
        return jax.random.wrap_key_data(key)
    got = f"{key.dtype} of shape {key.shape}" if isinstance(key, jax.Array | np.ndarray) else repr(key)
    raise ValueError(f"key must be a PRNG key such as jax.random.key(7), got {got}")


def sample(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token a row.

    Args:
      logits: [B, V] float32.
      key: PRNG key, unused when greedy.
      sampling: The policy.

    Returns:
      [B] int32.
    """
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # From the row's maximum, so that a tiny temperature cannot overflow: the best stays 0.
    scores = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return jax.random.categorical(key, scores).astype(jnp.int32)
    scores, tokens = best_tokens(scores, sampling)
    choice = jax.random.categorical(key, scores)  # [B]
    return jnp.take_along_axis(tokens, choice[:, None], axis=1)[:, 0].astype(jnp.int32)


def rows_are_finite(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Whether each row's largest logit is a finite number: [B] bool. Else what `sample` draws means nothing.

    It asks for what `sample` computes anyway, which XLA computes once: a step has nothing more to read.

    Args:
      logits: [B, V] float32.
      sampling: The policy of `sample`.
    """
    if sampling.temperature is None:
        best = jnp.argmax(logits, axis=-1)  # the first NaN, where there is one
        return jnp.isfinite(jnp.take_along_axis(logits, best[:, None], axis=-1)[:, 0])
    return jnp.isfinite(logits.max(axis=-1))


def best_tokens(scores: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """The candidates that top-k and top-p leave, best first.

    Args:
      scores: [B, V] logits over temperature.
      sampling: The policy.

    Returns:
      (scores [B, k], with -inf for those that top-p drops; tokens [B, k]), with k = V where top-k is off.
    """
    num_candidates = scores.shape[-1] if sampling.top_k is None else sampling.top_k
    best, tokens = jax.lax.top_k(scores, num_candidates)  # [B, k], descending
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(best, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of the better ones
        first = jnp.arange(num_candidates) == 0
        best = jnp.where((before < sampling.top_p) | first, best, -jnp.inf)
    return best, tokens
