"""What a call of an op must hold, whichever backend runs it: one clear error, before any work starts."""

import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions
from fdpp_jax.plans.shapes import PAGE_SIZES, QUANTISED_DTYPES, AttentionImplementation
from fdpp_jax.unified_max import UnifiedMax

# Positions are int32: with a wider window or a larger offset they would wrap around.
_FARTHEST = 2**30


def as_array(name: str, x: Any) -> Any:
    """x, or a numpy array of its numbers, which can be checked, since numpy's are not traced.

    Raises:
      ValueError: x are lists of unequal lengths.
    """
    if x is None or hasattr(x, "shape"):
        return x
    try:
        return np.asarray(x)
    except ValueError:
        raise ValueError(f"{name} must be an array, or lists of equal lengths; got {x!r:.200}") from None


def as_scale(name: str, x: Any) -> Any:
    """`as_array`, but numbers in lists are float32, since no one has named numpy's float64."""
    array = as_array(name, x)
    return array if array is x or array.dtype.kind not in "iuf" else array.astype(np.float32)


def check_array(name: str, x: Any, axes: str) -> None:
    """Raises ValueError unless x is an array; its axes, such as "[B, T]", are for the message alone."""
    if not isinstance(getattr(x, "dtype", None), np.dtype):
        raise ValueError(f"{name} must be an array {axes}; got {type(x).__name__}")


def checked_options(
    query: jax.Array,
    scale: float | jax.Array | None,
    is_causal: bool,
    local_window_size: int | tuple[int, int] | None,
    logits_soft_cap: float | None,
    return_residual: bool = False,
) -> AttentionOptions:
    """The static arguments of a call.

    Raises:
      ValueError: Names the argument that no call can have.
    """
    for name, flag in (("is_causal", is_causal), ("return_residual", return_residual)):
        if not isinstance(flag, bool | np.bool_):
            raise ValueError(f"{name} must be True or False; got {flag!r}")
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else 1.0 if is_traced(scale) else _number("scale", scale)
    if logits_soft_cap is not None:
        logits_soft_cap = _number("logits_soft_cap", logits_soft_cap)
        if logits_soft_cap <= 0:
            raise ValueError(f"logits_soft_cap must be positive; got {logits_soft_cap}")
    return AttentionOptions(scale, bool(is_causal), _window(local_window_size), logits_soft_cap, bool(return_residual))


def is_traced(x: Any) -> bool:
    """Whether x is an array whose numbers are not known."""
    return isinstance(x, jax.core.Tracer)


def _number(name: str, number: Any) -> float:
    try:
        found = float(number)
    except (TypeError, ValueError, jax.errors.ConcretizationTypeError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{name} must be a finite number, known before the call is traced; got {number!r}")
    return found


def _window(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    both = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(both) != 2 or any(not isinstance(x, int | np.integer) or isinstance(x, bool) or x < 0 for x in both):
        raise ValueError(f"local_window_size must be an integer w >= 0 or (left, right) of such; got {size!r}")
    return min(int(both[0]), _FARTHEST), min(int(both[1]), _FARTHEST)


def operand_axes(is_paged: bool) -> dict[str, str]:
    """The axes of query, key and value, for messages."""
    cache = "[P, page_size, K, H]" if is_paged else "[B, S, K, H]"
    return {"query": "[B, T, N, H]", "key": cache, "value": cache}


def check_cache(arrays: AttentionArrays) -> None:
    """Raises unless query, key, value, their scales and the page table fit together."""
    query, key, value, table = arrays.query, arrays.key, arrays.value, arrays.page_table
    axes = operand_axes(table is not None)
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 4:
            raise ValueError(f"{name} must have 4 axes {axes[name]}; got shape {array.shape}")
    batch, _, num_heads, head_dim = query.shape
    if not head_dim or (table is not None and not key.shape[0]):
        raise ValueError(f"expected a head dim, and pages in a pool, of at least 1; got {query.shape=}, {key.shape=}")
    if key.shape != value.shape or key.dtype != value.dtype:
        raise ValueError(
            f"key and value must have one shape {axes['key']} and dtype; got {key.dtype} of {key.shape} and "
            f"{value.dtype} of {value.shape}"
        )
    quantised = " or ".join(QUANTISED_DTYPES)
    takes_query = jnp.issubdtype(query.dtype, jnp.floating) and query.dtype.itemsize > 1
    if not takes_query or key.dtype.name not in (query.dtype.name, *QUANTISED_DTYPES):
        raise ValueError(
            f"query, key and value must share one floating-point dtype, or key and value be {quantised}; "
            f"got {query.dtype=}, {key.dtype=}"
        )
    check_width("query", query.dtype)
    if table is not None:
        if table.ndim != 2 or table.shape[0] != batch or not jnp.issubdtype(table.dtype, jnp.integer):
            raise ValueError(f"page_table must be [B={batch}, pages] integers; got {table.shape} of {table.dtype}")
        if key.shape[1] not in PAGE_SIZES:
            raise ValueError(f"pages must hold {', '.join(map(str, PAGE_SIZES))} keys; got {key.shape=}")
    if key.shape[3] != head_dim or (table is None and key.shape[0] != batch):
        expected = f"[B={batch}, S, K, H={head_dim}]" if table is None else f"[P, page_size, K, H={head_dim}]"
        raise ValueError(f"key must be {expected} as the query says; got {key.shape=}")
    if not key.shape[2] or num_heads % key.shape[2]:
        raise ValueError(f"key has {key.shape[2]} heads, which must divide the query's {num_heads}")
    forms = [None if x is None else (x.shape, x.dtype.name) for x in (arrays.key_scale, arrays.value_scale)]
    expected_forms: list[Any] = [(key.shape[2:3], "float32"), (key.shape[:3], "float32")]
    expected = f"float32 {key.shape[2:3]} or {key.shape[:3]}, both alike, for a cache of {key.dtype.name}"
    if key.dtype.name not in QUANTISED_DTYPES:
        expected_forms, expected = [None], f"None for a cache of {key.dtype.name}, which is not {quantised}"
    if forms[0] not in expected_forms or forms[1] != forms[0]:
        raise ValueError(f"key_scale and value_scale must be {expected}; got {forms[0]} and {forms[1]}")


def check_width(name: str, dtype: Any) -> None:
    """Raises where a dtype promises more digits than float32, in which everything is added up."""
    if jnp.dtype(dtype) == jnp.float64:
        raise NotImplementedError(f"{name} must be float32 or narrower, since sums are float32; got float64")


def check_names(softmax: UnifiedMax | None, implementation: AttentionImplementation | None) -> None:
    """Raises unless the policy and the implementation are known ones."""
    if softmax is not None and not isinstance(softmax, UnifiedMax):
        raise ValueError(f"softmax must be None or a UnifiedMax; got {softmax!r}")
    check_name("implementation", implementation, AttentionImplementation)


def with_all_axes(x: Any) -> Any:
    """A bias or a mask with the axes [B, N, T, S]: those that lack in front have size 1, as in jax.nn."""
    return x if x is None or x.ndim >= 4 else x.reshape((1,) * (4 - x.ndim) + x.shape)


def check_bias_and_mask(arrays: AttentionArrays) -> None:
    """Raises unless bias and mask broadcast to the scores, and are numbers and bool."""
    batch, query_length, num_heads, _ = arrays.query.shape
    scores = batch, num_heads, query_length, arrays.capacity
    for name, array in (("bias", arrays.bias), ("mask", arrays.mask)):
        if array is None:
            continue
        if array.ndim != 4 or any(size not in (1, whole) for size, whole in zip(array.shape, scores, strict=True)):
            raise ValueError(f"{name} must broadcast to [B, N, T, S] = {list(scores)}; got shape {array.shape}")
    if arrays.bias is not None and not any(jnp.issubdtype(arrays.bias.dtype, x) for x in (jnp.floating, jnp.integer)):
        raise ValueError(f"bias must be real numbers; got {arrays.bias.dtype}")
    if arrays.mask is not None and arrays.mask.dtype != jnp.bool_:
        raise ValueError(f"mask must be bool, True for keys that are seen (bias adds numbers); got {arrays.mask.dtype}")


def check_integers(arrays: AttentionArrays, query_seq_lengths: jax.Array | None) -> None:
    """Raises unless lengths, starts and offsets are integers [B], and those known now lie within their axes."""
    batch, query_length = arrays.query.shape[:2]
    for name, integers, limit in (
        ("query_seq_lengths", query_seq_lengths, query_length),
        ("key_value_seq_lengths", arrays.lengths, arrays.capacity),
        ("key_value_seq_starts", arrays.starts, arrays.capacity),
        ("query_offset", arrays.query_offset, _FARTHEST),
    ):
        if integers is None:
            continue
        if integers.shape != (batch,) or not jnp.issubdtype(integers.dtype, jnp.integer):
            raise ValueError(f"{name} must be [B={batch}] integers; got {integers.shape} of {integers.dtype}")
        if not is_traced(integers) and integers.size:
            least = -limit if name == "query_offset" else 0
            low, high = np.asarray(integers).min(), np.asarray(integers).max()  # jnp would trace it inside jit
            if low < least or high > limit:
                raise ValueError(f"{name} must lie in {least}..{limit}; got {low}..{high}")


def check_pages(arrays: AttentionArrays) -> None:
    """Raises if a page that holds live keys is not in the pool, as far as table, lengths and starts are known."""
    table, lengths, starts = arrays.page_table, arrays.lengths, arrays.starts
    if table is None or any(is_traced(x) for x in (table, lengths, starts)):
        return
    pages = np.asarray(table)
    live = arrays.capacity if lengths is None else np.asarray(lengths)[:, None]
    wrong = (pages < 0) | (pages >= arrays.key.shape[0])
    wrong &= np.arange(pages.shape[1]) * arrays.key.shape[1] < live
    if starts is not None:
        wrong &= (np.arange(pages.shape[1]) + 1) * arrays.key.shape[1] > np.asarray(starts)[:, None]
    if wrong.any():
        sequence, page = np.argwhere(wrong)[0]
        raise ValueError(
            f"page_table must name pages 0..{arrays.key.shape[0] - 1} for live keys; got {pages[sequence, page]} as "
            f"page {page} of sequence {sequence}"
        )


def check_floats(arrays: AttentionArrays, key_max_norm: jax.Array | None) -> None:
    """Raises unless sinks and norms are floating point with one number per head."""
    batch, _, num_heads, _ = arrays.query.shape
    num_kv_heads = arrays.key.shape[2]
    for name, floats, axes, shape in (
        ("sinks", arrays.sinks, f"[N={num_heads}]", (num_heads,)),
        ("key_max_norm", key_max_norm, f"[B={batch}, K={num_kv_heads}]", (batch, num_kv_heads)),
    ):
        if floats is not None and (floats.shape != shape or not jnp.issubdtype(floats.dtype, jnp.floating)):
            raise ValueError(f"{name} must be {axes} of floating point; got {floats.dtype} of {floats.shape}")


def check_name(argument: str, name: str | None, choices: Any) -> None:
    """Raises unless the name is one of a Literal's, or None."""
    if name is not None and name not in get_args(choices):
        raise ValueError(f"{argument} must be one of {', '.join(get_args(choices))}; got {name!r}")
