"""From logits to the next token: greedy, temperature, top-k, top-p.

Whether a filter is on is static and shapes the program; its strength is traced, so a new temperature or
top_p compiles nothing. top_k is the exception, since it is the size of an array.
"""

import dataclasses
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fdpp_jax.plans.shapes import cdiv

# Beyond these, float32 has no temperature or no reciprocal of it, and 0 / 0 or -inf * 0 would be drawn from. At either
# end the draw is that of the limit: the best token, ties shared, or all tokens alike.
_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 2.0**-126, 2.0**126

_DIGIT_BITS = 4  # of a score, found in one pass over the logits: fewer are more launches, more are more sums a pass


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
    scores, tokens = candidates(scores, sampling)
    choice = jax.random.categorical(key, scores).astype(jnp.int32)  # [B]
    return choice if tokens is None else jnp.take_along_axis(tokens, choice[:, None], axis=1)[:, 0]


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


def candidates(scores: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array | None]:
    """What top-k and top-p leave.

    Args:
      scores: [B, V] float32 logits over temperature, minus the row's maximum.
      sampling: The policy.

    Returns:
      (scores [B, n], with -inf for those that are dropped; tokens [B, n] int32, best first, None for all in order).
    """
    if sampling.top_k is None:
        return scores if sampling.top_p is None else _nucleus(scores, sampling.top_p), None
    best, tokens = _best_tokens(scores, sampling.top_k)
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(best, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of the better ones
        first = jnp.arange(sampling.top_k) == 0
        best = jnp.where((before < sampling.top_p) | first, best, -jnp.inf)
    return best, tokens


def _best_tokens(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """(The k best scores [B, k], best first, and among equals the lower token; their tokens [B, k] int32).

    The k best tokens are in the k groups of tokens with the best maxima. So two short rows are sorted instead of one of
    the vocabulary: the groups' maxima, and the tokens of the k groups.
    """
    vocab_size = scores.shape[-1]
    num_groups = math.isqrt(k * vocab_size)  # as many maxima as tokens in k groups
    if 2 * num_groups > vocab_size:
        return jax.lax.top_k(scores, k)
    groups = _in_groups(scores, num_groups)  # [B, G, W]
    _, chosen = jax.lax.top_k(groups.max(axis=-1), k)
    chosen = jnp.sort(chosen, axis=-1)[:, :, None]  # [B, k, 1], lower tokens first
    inside = jnp.take_along_axis(groups, chosen, axis=1)  # [B, k, W]
    tokens = chosen * groups.shape[-1] + jnp.arange(groups.shape[-1], dtype=chosen.dtype)
    best, places = jax.lax.top_k(inside.reshape(len(scores), -1), k)
    return best, jnp.take_along_axis(tokens.reshape(len(scores), -1), places, axis=1)


def _nucleus(scores: jax.Array, top_p: jax.Array) -> jax.Array:
    """The scores [B, V], at most 0, with -inf for the tokens that top-p drops.

    A token stays if the better ones have less than top_p of the row's sum of e^score. The least score that stays is
    found digit by digit, from the highest, without a sort: as the bits of a float32, which has the order of its size.
    """
    batch, vocab_size = scores.shape
    groups = _in_groups(scores, math.isqrt(vocab_size))  # [B, G, W]
    depths, masses = _depths(groups), jnp.exp(groups)
    target = top_p * masses.sum(axis=-1).sum(axis=-1)  # [B]
    bound, below = jnp.zeros((batch,), jnp.uint32), jnp.zeros((batch,), jnp.float32)  # less than target is below bound
    for shift in reversed(range(0, 31, _DIGIT_BITS)):
        steps = jnp.arange(1, 2 ** min(_DIGIT_BITS, 31 - shift), dtype=jnp.uint32) << shift
        sums = _masses_below(depths, masses, bound + steps[:, None])  # [C, B]
        is_short = sums < target
        bound += is_short.sum(axis=0, dtype=jnp.uint32) << shift
        below = jnp.maximum(below, jnp.where(is_short, sums, 0.0).max(axis=0))

    # Of the tokens at the bound, which are equal, the lowest ones stay: as many as the target takes, at least one.
    mass = jnp.exp(-jax.lax.bitcast_convert_type(bound, jnp.float32))
    num_ties = jnp.where(mass > 0, jnp.clip(jnp.ceil((target - below) / mass), 1, vocab_size), vocab_size)
    last = _place_of(depths == bound[:, None, None], num_ties.astype(jnp.int32))
    depths, bound, tokens = _depths(scores), bound[:, None], jnp.arange(vocab_size, dtype=jnp.int32)
    return jnp.where((depths < bound) | ((depths == bound) & (tokens <= last[:, None])), scores, -jnp.inf)


def _depths(scores: jax.Array) -> jax.Array:
    """The bits of -score, of scores that are at most 0: uint32, the better the smaller."""
    return jax.lax.bitcast_convert_type(jnp.abs(scores), jnp.uint32)


def _masses_below(depths: jax.Array, masses: jax.Array, bounds: jax.Array) -> jax.Array:
    """Of each of the bounds [C, B]: the sum of the masses [B, G, W] whose depth is below it."""
    # C reductions at once read their operands once.
    parts = tuple(jnp.where(depths < bound[:, None, None], masses, 0.0) for bound in bounds)
    zeros = (jnp.zeros((), masses.dtype),) * len(parts)
    parts = jax.lax.reduce(parts, zeros, lambda x, y: tuple(map(jax.lax.add, x, y)), (2,))
    return jnp.stack(parts).sum(axis=-1)


def _place_of(marks: jax.Array, num: jax.Array) -> jax.Array:
    """Where in a row of G W the num-th of the marks [B, G, W] is, or a later place if there are fewer: [B] int32."""
    counts = marks.sum(axis=-1, dtype=jnp.int32)
    before = _running_sum(counts) - counts  # [B, G]
    group = (before < num[:, None]).sum(axis=-1, dtype=jnp.int32) - 1
    ranks = _running_sum(jnp.take_along_axis(marks, group[:, None, None], axis=1)[:, 0].astype(jnp.int32))  # [B, W]
    ranks += jnp.take_along_axis(before, group[:, None], axis=1)
    place = (ranks < num[:, None]).sum(axis=-1, dtype=jnp.int32)
    return group * marks.shape[-1] + place


def _running_sum(x: jax.Array) -> jax.Array:
    """The cumulative sum of short rows [B, n] as one reduction, which is one launch."""
    places = jnp.arange(x.shape[-1])
    return jnp.where(places <= places[:, None], x[:, None, :], 0).sum(axis=-1, dtype=x.dtype)


def _in_groups(scores: jax.Array, num_groups: int) -> jax.Array:
    """Scores [B, V] as [B, num_groups, W], filled up with -inf."""
    batch, vocab_size = scores.shape
    width = cdiv(vocab_size, num_groups)
    filled = jnp.pad(scores, ((0, 0), (0, num_groups * width - vocab_size)), constant_values=-jnp.inf)
    return filled.reshape(batch, num_groups, width)
