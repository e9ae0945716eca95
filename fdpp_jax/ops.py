"""The two public ops: validate, plan, run, recompute.

Each call checks its arguments, builds the static shape, asks `heuristics` for a plan, imports that
backend and runs it. Where a row left the safe window, `lax.cond` redoes the call with online softmax.
"""

import functools
import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdpp_jax import device, heuristics, reference, unified_max
from fdpp_jax.config import (
    AttentionImplementation,
    AttentionPlan,
    AttentionShape,
    DecodeAttentionConfig,
    FlatMatmulConfig,
    GemvConfig,
    MatmulImplementation,
    MatmulPlan,
    MatmulShape,
    XlaAttentionConfig,
)
from fdpp_jax.unified_max import UnifiedMax


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
    softmax: UnifiedMax | None = None,
    implementation: AttentionImplementation | None = None,
) -> jax.Array:
    """softmax(scale * query key^T) value: jax.nn.dot_product_attention with kernels for decoding.

    Args:
      query: [B, T, N, H]; T == 1 is decoding, longer T works too. bfloat16, float16 or float32.
      key: [B, S, K, H], same dtype; K divides N (MHA, GQA, MQA). S is the capacity of the cache.
      value: [B, S, K, H], same dtype.
      scale: Factor on the scores; 1 / sqrt(H) by default.
      is_causal: Query t sees keys 0..t, as in jax.nn.
      query_seq_lengths: [B] int32, live queries of each sequence; the others give zeros.
      key_value_seq_lengths: [B] int32, live keys of each sequence, at most S. Keys beyond them are never
        seen, NaN included; length 0 gives zeros. A kernel's cost follows the lengths, not S.
      local_window_size: (left, right) keys around t that query t sees; an int w means (w, w).
      logits_soft_cap: Scores become cap * tanh(scores / cap).
      softmax: None computes exact online softmax. UnifiedMax(...) computes decoding with a max fixed in
        advance and recomputes with online softmax if any row leaves the safe window: same answer.
      implementation: None lets the heuristics choose; a name means that one or an error.

    Returns:
      [B, T, N, H] in the query's dtype.

    Raises:
      ValueError: Shapes, dtypes or lengths do not fit together.
      NotImplementedError: The named implementation refuses this call; the message says why.

    Source: FlashDecoding++ (arXiv 2311.01282), section 3.
    """
    scale, window = _validate_attention(
        query,
        key,
        value,
        scale,
        query_seq_lengths,
        key_value_seq_lengths,
        local_window_size,
        logits_soft_cap,
        softmax,
    )
    shape = _attention_shape(query, key, is_causal, key_value_seq_lengths is not None, window, logits_soft_cap)
    plan = _plan_attention(shape, implementation)
    if isinstance(plan.config, DecodeAttentionConfig):
        lengths = _all_lengths(key, key_value_seq_lengths)
        if query_seq_lengths is not None:  # T == 1: a sequence without a query gives zeros, as one without keys does
            lengths = jnp.where(query_seq_lengths > 0, lengths, 0)
        phi = None if softmax is None else unified_max.row_phi(softmax, query, key, scale, key_value_seq_lengths)
        return _decode_attention(scale, plan.config, query, key, value, lengths, phi)
    if plan.config == XlaAttentionConfig("cudnn") and query_seq_lengths is None:
        return jax.nn.dot_product_attention(query, key, value, scale=scale, is_causal=is_causal, implementation="cudnn")
    mask = reference.attention_mask(
        query.shape[1],
        key.shape[1],
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=window,
    )
    run = functools.partial(
        reference.dot_product_attention, query, key, value, scale=scale, mask=mask, logits_soft_cap=logits_soft_cap
    )
    if softmax is None or query.shape[1] > 1:
        return run()
    phi = unified_max.row_phi(softmax, query, key, scale, key_value_seq_lengths)
    out = run(phi=phi)
    return lax.cond(jnp.isnan(out).any(), run, lambda: out)


def unchecked_decode_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None = None,
    key_value_seq_lengths: jax.Array,
    softmax: UnifiedMax | None = None,
    implementation: AttentionImplementation | None = None,
) -> jax.Array:
    """Decode attention without its recompute: for a model that redoes the whole step once instead.

    A row that left the safe window is NaN. NaN runs through the rest of the model into every logit of its
    sequence, so that one look at the logits tells whether any layer overflowed.

    Args:
      query: [B, 1, N, H].
      key: [B, S, K, H], finite also beyond the lengths.
      value: [B, S, K, H], finite also beyond the lengths.
      scale: Factor on the scores; 1 / sqrt(H) by default.
      key_value_seq_lengths: [B] int32 live keys.
      softmax: As in `dot_product_attention`.
      implementation: As in `dot_product_attention`.

    Returns:
      [B, 1, N, H], NaN in rows that must be recomputed with softmax=None.
    """
    scale, _ = _validate_attention(query, key, value, scale, None, key_value_seq_lengths, None, None, softmax)
    if query.shape[1] != 1:
        raise ValueError(f"query must hold one token a sequence, [B, 1, N, H]; got {query.shape=}")
    # A finite cache has no NaN for cuDNN's padding mask to let through: plan as if there were no lengths.
    plan = _plan_attention(_attention_shape(query, key, False, False, None, None), implementation)
    phi = None if softmax is None else unified_max.row_phi(softmax, query, key, scale, key_value_seq_lengths)
    if isinstance(plan.config, DecodeAttentionConfig):
        return _run_mosaic(scale, plan.config, query, key, value, key_value_seq_lengths, phi)
    if phi is None and plan.config == XlaAttentionConfig("cudnn"):
        lengths = key_value_seq_lengths
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            scale=scale,
            query_seq_lengths=jnp.ones_like(lengths),
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )
    mask = reference.attention_mask(1, key.shape[1], key_value_seq_lengths=key_value_seq_lengths)
    return reference.dot_product_attention(query, key, value, scale=scale, mask=mask, phi=phi)


def flat_matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike | None = None,
    implementation: MatmulImplementation | None = None,
) -> jax.Array:
    """x @ w for few rows, accumulated in float32.

    Args:
      x: [..., K]; the product of the leading sizes is the number of rows M.
      w: [K, N], same dtype as x.
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
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"expected x [..., K] and w [K, N]; got {x.shape=} and {w.shape=}")
    if x.dtype != w.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expected x and w of one floating-point dtype; got {x.dtype=} and {w.dtype=}")
    _check_name("implementation", implementation, MatmulImplementation)
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    return _matmul(implementation, out_dtype, x, w)


# ---- attention: checks, dispatch, recompute


def _validate_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: float | None,
    query_seq_lengths: jax.Array | None,
    key_value_seq_lengths: jax.Array | None,
    local_window_size: int | tuple[int, int] | None,
    logits_soft_cap: float | None,
    softmax: UnifiedMax | None,
) -> tuple[float, tuple[int, int] | None]:
    """Raises on arguments that do not fit together; returns scale and window with defaults filled in."""
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 4:
            raise ValueError(f"{name} must have 4 axes [B, length, heads, H]; got shape {array.shape}")
        if array.dtype != query.dtype or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"query, key and value must share one floating-point dtype; got {query.dtype=}, {key.dtype=}, "
                f"{value.dtype=}"
            )
    batch, query_length, num_heads, head_dim = query.shape
    if key.shape != value.shape:
        raise ValueError(f"key and value must have one shape [B, S, K, H]; got {key.shape=}, {value.shape=}")
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(f"key must be [B={batch}, S, K, H={head_dim}] as the query says; got {key.shape=}")
    if num_heads % key.shape[2]:
        raise ValueError(f"key has {key.shape[2]} heads, which must divide the query's {num_heads}")
    for name, lengths, limit in (
        ("query_seq_lengths", query_seq_lengths, query_length),
        ("key_value_seq_lengths", key_value_seq_lengths, key.shape[1]),
    ):
        if lengths is None:
            continue
        if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise ValueError(f"{name} must be [B={batch}] integers; got {lengths.shape} of {lengths.dtype}")
        if not isinstance(lengths, jax.core.Tracer) and lengths.size:
            low, high = np.asarray(lengths).min(), np.asarray(lengths).max()  # jnp would trace it inside jit
            if low < 0 or high > limit:
                raise ValueError(f"{name} must lie in 0..{limit}; got {low}..{high}")
    if softmax is not None and not isinstance(softmax, UnifiedMax):
        raise ValueError(f"softmax must be None or a UnifiedMax; got {softmax!r}")
    if logits_soft_cap is not None and not logits_soft_cap > 0:
        raise ValueError(f"logits_soft_cap must be positive; got {logits_soft_cap}")
    if isinstance(local_window_size, int):
        local_window_size = (local_window_size, local_window_size)
    if local_window_size is not None and min(local_window_size) < 0:
        raise ValueError(f"local_window_size must not be negative; got {local_window_size}")
    return (1.0 / math.sqrt(head_dim) if scale is None else float(scale)), local_window_size


def _attention_shape(
    query: jax.Array,
    key: jax.Array,
    is_causal: bool,
    has_lengths: bool,
    local_window_size: tuple[int, int] | None,
    logits_soft_cap: float | None,
) -> AttentionShape:
    batch, query_length, num_heads, head_dim = query.shape
    return AttentionShape(
        batch=batch,
        query_length=query_length,
        capacity=key.shape[1],
        num_query_heads=num_heads,
        num_kv_heads=key.shape[2],
        head_dim=head_dim,
        dtype=query.dtype.name,
        is_causal=is_causal,
        has_lengths=has_lengths,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
    )


def _plan_attention(shape: AttentionShape, implementation: AttentionImplementation | None) -> AttentionPlan:
    """The heuristics' plan, or the named implementation's, or NotImplementedError with its reason."""
    _check_name("implementation", implementation, AttentionImplementation)
    here = device.current()
    plan = heuristics.plan_attention(shape, here)
    if implementation is None or implementation == plan.implementation:
        return plan
    if implementation == "xla":
        return heuristics.plan_xla_attention(shape, here, "named by the caller")
    refusal = heuristics.refuse_mosaic_attention(shape, here)
    if implementation == "triton":
        refusal = "there are no Triton kernels yet"
    raise NotImplementedError(f"{implementation=} cannot run this call: {refusal}")


def _all_lengths(key: jax.Array, lengths: jax.Array | None) -> jax.Array:
    return jnp.full((key.shape[0],), key.shape[1], jnp.int32) if lengths is None else lengths


def _run_mosaic(
    scale: float,
    config: DecodeAttentionConfig,
    query: jax.Array,  # [B, 1, N, H]
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    phi: jax.Array | None,
) -> jax.Array:
    from fdpp_jax.pallas import decode_attention

    return decode_attention.decode_attention(query[:, 0], key, value, lengths, phi, scale=scale, config=config)[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _decode_attention(
    scale: float,
    config: DecodeAttentionConfig,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    phi: jax.Array | None,
) -> jax.Array:
    """The decode kernel with its recompute; gradients are the reference's."""

    @jax.custom_batching.custom_vmap
    def call(query: Any, key: Any, value: Any, lengths: Any, phi: Any) -> jax.Array:
        out = _run_mosaic(scale, config, query, key, value, lengths, phi)
        if phi is None:
            return out
        return lax.cond(
            jnp.isnan(out).any(),
            lambda: _run_mosaic(scale, config, query, key, value, lengths, None),
            lambda: out,
        )

    @call.def_vmap
    def fold_into_batch(axis_size: int, in_batched: Any, *args: Any) -> tuple[jax.Array, bool]:
        # A mapped lax.cond would run both branches for every row: B takes the mapped axis instead.
        def fold(array: jax.Array, batched: bool) -> jax.Array:
            if not batched:
                array = jnp.broadcast_to(array, (axis_size, *array.shape))
            return array.reshape(-1, *array.shape[2:])

        folded = jax.tree.map(fold, args, tuple(in_batched))
        out = call(*folded)
        return out.reshape(axis_size, -1, *out.shape[1:]), True

    return call(query, key, value, lengths, phi)


def _decode_attention_fwd(scale: float, config: DecodeAttentionConfig, *args: Any) -> tuple[jax.Array, Any]:
    return _decode_attention(scale, config, *args), args


def _decode_attention_bwd(scale: float, config: DecodeAttentionConfig, saved: Any, grad: jax.Array) -> Any:
    del config
    query, key, value, lengths, phi = saved
    mask = reference.attention_mask(1, key.shape[1], key_value_seq_lengths=lengths)

    def forward(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return reference.dot_product_attention(query, key, value, scale=scale, mask=mask)

    grads = jax.vjp(forward, query, key, value)[1](grad)
    return *grads, None, None if phi is None else jnp.zeros_like(phi)  # the answer does not depend on phi


_decode_attention.defvjp(_decode_attention_fwd, _decode_attention_bwd)


# ---- matmul: dispatch


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(implementation: MatmulImplementation | None, out_dtype: jnp.dtype, x: jax.Array, w: jax.Array) -> jax.Array:
    """flat_matmul after its checks; gradients are XLA's."""

    @jax.custom_batching.custom_vmap
    def call(x: jax.Array, w: jax.Array) -> jax.Array:
        return _run_matmul(implementation, out_dtype, x, w)

    @call.def_vmap
    def fold_into_rows(axis_size: int, in_batched: Any, x: jax.Array, w: jax.Array) -> tuple[jax.Array, bool]:
        del axis_size
        if not in_batched[1]:
            return call(x, w), True  # the mapped axis is one more leading axis of x
        return jax.vmap(lambda x, w: reference.matmul(x, w, out_dtype), (0 if in_batched[0] else None, 0))(x, w), True

    return call(x, w)


def _run_matmul(
    implementation: MatmulImplementation | None, out_dtype: jnp.dtype, x: jax.Array, w: jax.Array
) -> jax.Array:
    shape = MatmulShape(m=math.prod(x.shape[:-1]), k=w.shape[0], n=w.shape[1], dtype=x.dtype.name)
    plan = _plan_matmul(shape, implementation)
    if plan.config is None:
        return reference.matmul(x, w, out_dtype)
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(plan.config, GemvConfig):
        from fdpp_jax.pallas import gemv

        out = gemv.gemv(rows, w, config=plan.config, out_dtype=out_dtype)
    else:
        assert isinstance(plan.config, FlatMatmulConfig)
        from fdpp_jax.pallas import flat_matmul as kernel

        out = kernel.flat_matmul(rows, w, config=plan.config, out_dtype=out_dtype)
    return out.reshape(*x.shape[:-1], w.shape[1])


def _plan_matmul(shape: MatmulShape, implementation: MatmulImplementation | None) -> MatmulPlan:
    """The heuristics' plan, or the named implementation's, or NotImplementedError with its reason."""
    here = device.current()
    if implementation is None:
        return heuristics.plan_matmul(shape, here)
    if implementation == "xla":
        return MatmulPlan("xla", None, "named by the caller")
    refusal = heuristics.refuse_kernel_matmul(shape, here, implementation)
    if refusal is not None:
        raise NotImplementedError(f"{implementation=} cannot run this call: {refusal}")
    config = heuristics.gemv_config if implementation == "gemv" else heuristics.flat_matmul_config
    return MatmulPlan(implementation, config(shape, here), "named by the caller")


def _matmul_fwd(
    implementation: MatmulImplementation | None, out_dtype: jnp.dtype, x: jax.Array, w: jax.Array
) -> tuple[jax.Array, Any]:
    return _matmul(implementation, out_dtype, x, w), (x, w)


def _matmul_bwd(
    implementation: MatmulImplementation | None, out_dtype: jnp.dtype, saved: Any, grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del implementation
    return jax.vjp(lambda x, w: reference.matmul(x, w, out_dtype), *saved)[1](grad)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _check_name(argument: str, name: str | None, choices: Any) -> None:
    if name is not None and name not in get_args(choices):
        raise ValueError(f"{argument} must be one of {', '.join(get_args(choices))}; got {name!r}")
