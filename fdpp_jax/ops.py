"""The public ops: their contracts and checks. `attention` and `matmul` plan and run what passed."""

import dataclasses
import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from fdpp_jax import attention, matmul
from fdpp_jax.config import (
    PAGE_SIZES,
    QUANTISED_DTYPES,
    AttentionImplementation,
    DecodeAttentionConfig,
    MatmulImplementation,
    WeightOrder,
    XlaAttentionConfig,
)
from fdpp_jax.unified_max import UnifiedMax

# Positions are int32: a wider window would wrap around.
_WIDEST_WINDOW = 2**30


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    query_offset: jax.Array | None = None,
    sinks: jax.Array | None = None,
    page_table: jax.Array | None = None,
    key_scale: jax.Array | None = None,
    value_scale: jax.Array | None = None,
    key_max_norm: jax.Array | None = None,
    softmax: UnifiedMax | None = None,
    implementation: AttentionImplementation | None = None,
) -> jax.Array:
    """softmax(scale * query key^T) value: jax.nn.dot_product_attention with kernels for decoding.

    A row that sees no key gives zeros.

    Args:
      query: [B, T, N, H]; T == 1 is decoding, longer T works too. bfloat16, float16 or float32.
      key: [B, S, K, H]; K divides N (MHA, GQA, MQA). S is the capacity of the cache. The query's dtype, or int8 or
        float8_e4m3fn with key_scale and value_scale. With page_table a pool [P, page_size, K, H], where page_size
        is 16, 32, 64, 128 or 256.
      value: As key.
      scale: Factor on the scores; 1 / sqrt(H) by default.
      is_causal: A query sees the keys up to its position, which is t for query t, as in jax.nn.
      query_seq_lengths: [B] int32, live queries of each sequence; the others give zeros.
      key_value_seq_lengths: [B] int32, live keys of each sequence, at most S. Keys beyond them are never
        seen, NaN included; length 0 gives zeros. A kernel's cost follows the lengths, not S.
      local_window_size: (left, right) keys around its position that a query sees; an int w means (w, w).
      logits_soft_cap: Scores become cap * tanh(scores / cap).
      query_offset: [B] int32, moves query t to position query_offset + t. For the last T of the live keys, as in
        speculative decoding: lengths - T.
      sinks: [N] floating point, one more score of each query head, which takes part in the denominator alone.
        Neither scaled nor capped.
      page_table: [B, pages] int32: page p of a sequence holds its keys from p * page_size on, and S is
        pages * page_size. Entries of pages beyond the lengths may be anything.
      key_scale: float32 factor on a quantised key, [K] (by head) or like key without H (by token and head).
      value_scale: As key_scale, of the same form.
      key_max_norm: [B, K] float32, max |k| over the live keys (dequantised), for UnifiedMax.bound(). Computed from
        all of key if missing.
      softmax: None computes exact online softmax. UnifiedMax(...) computes decoding with a max fixed in
        advance and recomputes with online softmax where a row leaves the safe window: same answer.
      implementation: None lets the heuristics choose; a name means that one or an error.

    Returns:
      [B, T, N, H] in the query's dtype.

    Raises:
      ValueError: Shapes, dtypes or lengths do not fit together.
      NotImplementedError: The named implementation refuses this call; the message says why.

    Source: FlashDecoding++ (arXiv 2311.01282), section 3.
    """
    arrays = attention.Arrays(
        _array(query),
        _array(key),
        _array(value),
        lengths=_array(key_value_seq_lengths),
        query_offset=_array(query_offset),
        sinks=_array(sinks),
        page_table=_array(page_table),
        key_scale=_array(key_scale),
        value_scale=_array(value_scale),
    )
    query_seq_lengths, key_max_norm = _array(query_seq_lengths), _array(key_max_norm)
    _check_cache(arrays)
    options = _options(arrays.query, scale, is_causal, local_window_size, logits_soft_cap)
    _check_names(softmax, implementation)
    _check_integers(arrays, query_seq_lengths)
    _check_pages(arrays)
    _check_floats(arrays, key_max_norm)
    if query_seq_lengths is None:
        return attention.run(arrays, options, softmax=softmax, key_max_norm=key_max_norm, implementation=implementation)
    live = jnp.arange(arrays.query.shape[1]) < query_seq_lengths[:, None]  # [B, T]
    live = live[:, :, None, None]
    # Zero queries fit any window: what stands beyond the lengths causes no recompute.
    arrays = arrays._replace(query=jnp.where(live, arrays.query, 0))
    out = attention.run(arrays, options, softmax=softmax, key_max_norm=key_max_norm, implementation=implementation)
    return jnp.where(live, out, 0)


def unchecked_decode_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None = None,
    key_value_seq_lengths: jax.Array,
    local_window_size: tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    query_offset: jax.Array | None = None,
    key_max_norm: jax.Array | None = None,
    softmax: UnifiedMax | None = None,
    redone: jax.Array | None = None,
    is_appended: bool = False,
    implementation: AttentionImplementation | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Decode attention that never takes a branch: for a model that redoes the whole step once where one is needed.

    Where the kernel redoes rows that left the safe window, it marks them in `redone`. Elsewhere they are NaN, which
    runs through the rest of the model into every logit of the sequence, so that one look at the logits tells whether
    any layer overflowed.

    Args:
      query: [B, 1, N, H].
      key: [B, S, K, H], finite also beyond the lengths.
      value: [B, S, K, H], finite also beyond the lengths.
      scale: Factor on the scores; 1 / sqrt(H) by default.
      key_value_seq_lengths: [B] int32 live keys.
      local_window_size: As in `dot_product_attention`, both sides.
      logits_soft_cap: As in `dot_product_attention`.
      query_offset: As in `dot_product_attention`; counts with a window only.
      key_max_norm: As in `dot_product_attention`.
      softmax: As in `dot_product_attention`.
      redone: [B, K] int32, of earlier layers. None: leave all failed rows NaN.
      is_appended: Whether, of keys, values, lengths and offsets, the launch before this one wrote at most each
        sequence's last key and value: the kernel loads the others before that launch has ended.
      implementation: As in `dot_product_attention`.

    Returns:
      [B, 1, N, H], and redone with 1 for every sequence and head of which a row was redone. None in its place: rows
      that must be recomputed with softmax=None are NaN.
    """
    if local_window_size is None:
        query_offset = None  # the lengths alone say what the last token sees
    arrays = attention.Arrays(query, key, value, lengths=key_value_seq_lengths, query_offset=query_offset)
    _check_cache(arrays)
    if query.shape[1] != 1:
        raise ValueError(f"query must hold one token a sequence, [B, 1, N, H]; got {query.shape=}")
    options = _options(query, scale, False, local_window_size, logits_soft_cap)
    _check_names(softmax, implementation)
    _check_integers(arrays, None)
    _check_floats(arrays, key_max_norm)
    # A finite cache has no NaN for cuDNN's padding mask to let through: plan as if there were no lengths.
    shape = attention.shape_of(arrays._replace(lengths=None), options, softmax)
    planned = attention.plan(dataclasses.replace(shape, is_appended=is_appended), implementation)
    config, recompute = planned.config, attention.place_of_recompute(planned, softmax)
    if softmax is None and config == XlaAttentionConfig("cudnn"):
        return attention.run_cudnn(arrays, options), None
    in_kernel = isinstance(config, DecodeAttentionConfig)
    arrays = attention.with_phi(arrays, options, softmax, key_max_norm, in_kernel=in_kernel)
    if not isinstance(config, DecodeAttentionConfig):
        return attention.run_reference(arrays, options), None
    if softmax is None or redone is None or recompute == "cond":
        return attention.run_kernel(arrays, options, config, is_appended=is_appended), None
    return attention.run_recomputing_kernel(arrays, options, config, recompute, redone, is_appended=is_appended)


def flat_matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    w_order: WeightOrder = "kn",
    out_dtype: jax.typing.DTypeLike | None = None,
    implementation: MatmulImplementation | None = None,
) -> jax.Array:
    """x @ w for few rows, accumulated in float32.

    Args:
      x: [..., K]; the product of the leading sizes is the number of rows M.
      w: [K, N], same dtype as x; or [N, K] with w_order="nk".
      w_order: "kn", or "nk" for a weight as PyTorch and Hugging Face store it. Neither is transposed.
      out_dtype: dtype of the result; x's by default.
      implementation: "gemv" (CUDA cores, M == 1), "flat" (tensor cores, M padded to a multiple of 8) or
        "xla": the paper's ImplA, ImplB and ImplC. None lets the heuristics choose.

    Returns:
      [..., N].

    Raises:
      ValueError: Shapes or dtypes do not fit together.
      NotImplementedError: The named implementation refuses this call; the message says why.

    Source: FlashDecoding++ (arXiv 2311.01282), sections 4 and 5.
    """
    if w_order not in get_args(WeightOrder):
        raise ValueError(f"w_order must be one of {', '.join(get_args(WeightOrder))}; got {w_order!r}")
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[w_order.index("k")]:
        axes = ", ".join(w_order).upper()
        raise ValueError(f"expected x [..., K] and w [{axes}]; got {x.shape=} and {w.shape=} with {w_order=}")
    if x.dtype != w.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expected x and w of one floating-point dtype; got {x.dtype=} and {w.dtype=}")
    _check_name("implementation", implementation, MatmulImplementation)
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    return matmul.run(implementation, out_dtype, w_order, x, w)


def _array(x: Any) -> Any:
    """x, or an array of its numbers; not a traced one, so that they can be checked."""
    return x if x is None or hasattr(x, "shape") else np.asarray(x)


def _options(
    query: jax.Array,
    scale: float | None,
    is_causal: bool,
    local_window_size: int | tuple[int, int] | None,
    logits_soft_cap: float | None,
) -> attention.Options:
    """The static arguments of a call, or an error that says which of them none can have."""
    if not isinstance(is_causal, bool | np.bool_):
        raise ValueError(f"is_causal must be True or False; got {is_causal!r}")
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else _number("scale", scale)
    if logits_soft_cap is not None:
        logits_soft_cap = _number("logits_soft_cap", logits_soft_cap)
        if logits_soft_cap <= 0:
            raise ValueError(f"logits_soft_cap must be positive; got {logits_soft_cap}")
    return attention.Options(scale, bool(is_causal), _window(local_window_size), logits_soft_cap)


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
    return min(int(both[0]), _WIDEST_WINDOW), min(int(both[1]), _WIDEST_WINDOW)


def _check_cache(arrays: attention.Arrays) -> None:
    """Raises unless query, key, value, their scales and the page table fit together."""
    query, key, value, table = arrays.query, arrays.key, arrays.value, arrays.page_table
    axes = {"query": "[B, T, N, H]", "key": "[B, S, K, H]", "value": "[B, S, K, H]"}
    if table is not None:
        axes["key"] = axes["value"] = "[P, page_size, K, H]"
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


def _check_names(softmax: UnifiedMax | None, implementation: AttentionImplementation | None) -> None:
    if softmax is not None and not isinstance(softmax, UnifiedMax):
        raise ValueError(f"softmax must be None or a UnifiedMax; got {softmax!r}")
    _check_name("implementation", implementation, AttentionImplementation)


def _check_integers(arrays: attention.Arrays, query_seq_lengths: jax.Array | None) -> None:
    """Raises unless lengths and offsets are integers [B], and lengths known now lie within their axes."""
    batch, query_length = arrays.query.shape[:2]
    for name, integers, limit in (
        ("query_seq_lengths", query_seq_lengths, query_length),
        ("key_value_seq_lengths", arrays.lengths, arrays.capacity),
        ("query_offset", arrays.query_offset, None),
    ):
        if integers is None:
            continue
        if integers.shape != (batch,) or not jnp.issubdtype(integers.dtype, jnp.integer):
            raise ValueError(f"{name} must be [B={batch}] integers; got {integers.shape} of {integers.dtype}")
        if limit is not None and _is_known(integers) and integers.size:
            low, high = np.asarray(integers).min(), np.asarray(integers).max()  # jnp would trace it inside jit
            if low < 0 or high > limit:
                raise ValueError(f"{name} must lie in 0..{limit}; got {low}..{high}")


def _check_pages(arrays: attention.Arrays) -> None:
    """Raises if a page that holds live keys is not in the pool, as far as table and lengths are known."""
    table, lengths = arrays.page_table, arrays.lengths
    if table is None or not _is_known(table) or not (lengths is None or _is_known(lengths)):
        return
    pages = np.asarray(table)
    live = arrays.capacity if lengths is None else np.asarray(lengths)[:, None]
    wrong = (pages < 0) | (pages >= arrays.key.shape[0])
    wrong &= np.arange(pages.shape[1]) * arrays.key.shape[1] < live
    if wrong.any():
        sequence, page = np.argwhere(wrong)[0]
        raise ValueError(
            f"page_table must name pages 0..{arrays.key.shape[0] - 1} for live keys; got {pages[sequence, page]} as "
            f"page {page} of sequence {sequence}"
        )


def _is_known(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer)


def _check_floats(arrays: attention.Arrays, key_max_norm: jax.Array | None) -> None:
    batch, _, num_heads, _ = arrays.query.shape
    num_kv_heads = arrays.key.shape[2]
    for name, floats, axes, shape in (
        ("sinks", arrays.sinks, f"[N={num_heads}]", (num_heads,)),
        ("key_max_norm", key_max_norm, f"[B={batch}, K={num_kv_heads}]", (batch, num_kv_heads)),
    ):
        if floats is not None and (floats.shape != shape or not jnp.issubdtype(floats.dtype, jnp.floating)):
            raise ValueError(f"{name} must be {axes} of floating point; got {floats.dtype} of {floats.shape}")


def _check_name(argument: str, name: str | None, choices: Any) -> None:
    if name is not None and name not in get_args(choices):
        raise ValueError(f"{argument} must be one of {', '.join(get_args(choices))}; got {name!r}")
