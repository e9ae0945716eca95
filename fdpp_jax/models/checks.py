"""What a call of a model must hold: one clear error, before any work starts. Traced numbers are not checked."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdpp_jax.ops import checks
from fdpp_jax.unified_max import UnifiedMax


def positive_int(name: str, value: Any) -> int:
    """The argument of that name, an integer of at least 1.

    Raises:
      ValueError: It is none.
    """
    if jax.export.is_symbolic_dim(value):  # of an exported program, in which every axis has at least 1
        return value  # type: ignore[return-value]
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def integers(name: str, given: Any, axes: str) -> Any:
    """What is given, an array or nested lists, as an array of integers with axes such as "[B, T]".

    Raises:
      ValueError: It is none.
    """
    try:
        array = np.asarray(None) if given is None else checks.as_array(name, given)
    except ValueError:  # lists of unequal lengths
        raise ValueError(f"expected integer {name} {axes}, got {given!r:.200}") from None
    if array.ndim != 1 + axes.count(",") or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"expected integer {name} {axes}, got {array.dtype} of shape {array.shape}")
    return array


def tokens_like(given: Any, axes: str) -> Any:
    """`integers` of which there is at least one."""
    tokens = integers("tokens", given, axes)
    if 0 in tokens.shape:
        raise ValueError(f"expected at least one token, got tokens of shape {tokens.shape}")
    return tokens


def check_context(context: int, limit: int | None) -> None:
    """Raises ValueError where a context is longer than the positions that a model has (`position_limit`)."""
    if limit is not None and context > limit:
        raise ValueError(f"expected a context of at most the model's {limit}, got {context}")


def check_rows(name: str, array: Any, batch: int) -> None:
    """Raises ValueError unless the array has a row for each of a cache's."""
    if array.shape[0] != batch:
        raise ValueError(f"{name} of shape {array.shape} do not match a cache of {batch} rows")


def check_lengths(lengths: Any, least: int, width: int) -> None:
    """Raises ValueError unless lengths [B] are within least..width, the width of tokens [B, T]."""
    known = _known(lengths)
    if known is not None and (known.min() < least or known.max() > width):
        raise ValueError(f"lengths must be within {least}..{width} (the width of tokens), got {known.tolist()}")


def check_live_tokens(tokens: Any, lengths: Any, vocab_size: int) -> None:
    """Raises ValueError unless the first lengths[b], or lengths, of tokens [B, T] are within the vocabulary."""
    known, counts = _known(tokens), _known(lengths)
    if known is None or counts is None:
        return
    unknown = known[(np.arange(known.shape[1]) < counts.reshape(-1, 1)) & ((known < 0) | (known >= vocab_size))]
    if unknown.size:
        raise ValueError(f"tokens must be within 0..{vocab_size - 1}, got {unknown[0]}")


def check_room(cached: Any, new: Any, capacity: int, max_positions: int | None) -> None:
    """Raises ValueError unless the new tokens of each row fit behind those that a cache holds.

    Args:
      cached: [B] lengths of the cache, or one for all rows.
      new: [B] lengths of what goes behind them, or one for all rows.
      capacity: Slots per row.
      max_positions: Positions that the model has; None: any number.
    """
    before, more = _known(cached), _known(new)
    if before is None or more is None:
        return
    before, more = np.broadcast_arrays(before, more)
    if before.min() < 0 or before.max() > capacity:
        raise ValueError(f"lengths of a cache must be within 0..{capacity} (its capacity), got {before.tolist()}")
    for limit, what in (
        (capacity, f"a cache of capacity {capacity} has no room"),
        (max_positions, f"max_position_embeddings={max_positions} leaves no position"),
    ):
        rows = () if limit is None else np.flatnonzero((more > 0) & (before + more > limit))
        for row in rows:
            raise ValueError(f"{what} for {before[row]} cached and {more[row]} new tokens in row {row}")


def check_softmax(softmax: Any) -> None:
    """Raises ValueError unless softmax is a policy, or None."""
    if softmax is not None and not isinstance(softmax, UnifiedMax):
        raise ValueError(f'softmax must be None or a UnifiedMax ("auto" is generate\'s alone), got {softmax!r}')


def _known(array: Any) -> np.ndarray | None:
    """The numbers of an array of integers, in 64 bits; None where it is traced."""
    return None if checks.is_traced(array) else np.asarray(array).astype(np.int64)
