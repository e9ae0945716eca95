"""Attention: the public op, and the op of a decode step. Checks, plan, run, recompute."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdpp_jax import heuristics
from fdpp_jax.ops import checks, kernel_call, reference
from fdpp_jax.ops.phi import row_phi
from fdpp_jax.ops.running import module_of
from fdpp_jax.plans import device as devices
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions, attention_shape
from fdpp_jax.plans.device import Device
from fdpp_jax.plans.shapes import AttentionImplementation
from fdpp_jax.unified_max import UnifiedMax


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    scale: float | jax.Array | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    key_value_seq_starts: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    query_offset: jax.Array | None = None,
    sinks: jax.Array | None = None,
    page_table: jax.Array | None = None,
    key_scale: jax.Array | None = None,
    value_scale: jax.Array | None = None,
    key_max_norm: jax.Array | None = None,
    softmax: UnifiedMax | None = None,
    return_residual: bool = False,
    implementation: AttentionImplementation | None = None,
) -> Any:
    """softmax(scale * query key^T) value: jax.nn.dot_product_attention with kernels for decoding.

    A row that sees no key gives zeros, whatever hides the keys (jax.nn takes the mean of all values there).

    Args:
      query: [B, T, N, H]; T == 1 is decoding, longer T works too. bfloat16, float16 or float32. [T, N, H] is one
        sequence, whose key and value are [S, K, H]; the other arrays may then leave B out, too.
      key: [B, S, K, H]; K divides N (MHA, GQA, MQA). S is the capacity of the cache. The query's dtype, or int8 or
        float8_e4m3fn with key_scale and value_scale. With page_table a pool [P, page_size, K, H], where page_size
        is 16, 32, 64, 128 or 256.
      value: As key.
      bias: Added to the scaled scores, behind the soft cap. Broadcasts to [B, N, T, S]. -inf hides a key.
      mask: bool, False hides a key from a query. Broadcasts to [B, N, T, S].
      scale: Factor on the scores; 1 / sqrt(H) by default. No kernel takes one that is traced.
      is_causal: A query sees the keys up to its position, which is t for query t, as in jax.nn. A value that a mask or
        a window hides from one query, and not from all of its sequence, must be finite: it is multiplied by 0.
      query_seq_lengths: [B] int32, live queries of each sequence; the others give zeros.
      key_value_seq_lengths: [B] int32, live keys of each sequence, at most S. Keys beyond them are never
        seen, NaN included; length 0 gives zeros. A kernel's cost follows the lengths, not S.
      key_value_seq_starts: [B] int32, the first live key of each sequence, 0 by default: of prompts padded on the left.
        Keys before it are never seen, NaN included, and cost a kernel nothing. Positions count from key 0 all the
        same. From the length on: no key is live.
      local_window_size: (left, right) keys around its position that a query sees; an int w means (w, w).
      logits_soft_cap: Scores become cap * tanh(scores / cap).
      query_offset: [B] int32, moves query t to position query_offset + t. For the last T of the live keys, as in
        speculative decoding: lengths - T.
      sinks: [N] floating point, one more score of each query head, which takes part in the denominator alone.
        Neither scaled nor capped.
      page_table: [B, pages] int32: page p of a sequence holds its keys from p * page_size on, and S is
        pages * page_size. Entries of pages without live keys may be anything.
      key_scale: float32 factor on a quantised key, [K] (by head) or like key without H (by token and head).
      value_scale: As key_scale, of the same form.
      key_max_norm: [B, K] float32, max |k| over the live keys (dequantised), for UnifiedMax.bound(). Computed from
        all of key if missing.
      softmax: None computes exact online softmax. UnifiedMax(...) computes decoding with a max fixed in
        advance and recomputes with online softmax where a row leaves the safe window: same answer.
      return_residual: Whether to return the log-sum-exp of the rows, too: for `merge_attention_states`.
      implementation: None lets the heuristics choose; a name means that one or an error.

    Returns:
      As query, in its dtype. With return_residual the pair of this and the rows' log-sum-exp, ln sum e^s, as query
      without H, in float32. The scores s are those that enter the softmax: scaled, capped, with the bias, and with the
      head's sink among them. Of a row that sees no key it is the sink, else -inf; beyond query_seq_lengths -inf. It
      has a gradient, and is as exact as the weights: within 2^-9 where a kernel rounds them to bfloat16. (jax.nn rounds
      it to the keys' dtype, and stops its gradient.)

    Raises:
      ValueError: Shapes, dtypes or lengths do not fit together.
      NotImplementedError: The named implementation refuses this call; the message says why.

    Source: FlashDecoding++ (arXiv 2311.01282), section 3.
    """
    operands = {"query": query, "key": key, "value": value}
    for name, axes in checks.operand_axes(page_table is not None).items():
        checks.check_array(name, operands[name], axes)
    is_one = query.ndim == key.ndim == value.ndim == 3

    def batched(x: Any, ndim: int) -> Any:
        return x[None] if is_one and x is not None and x.ndim == ndim - 1 else x

    def given(name: str, x: Any, ndim: int) -> Any:
        return batched(checks.as_array(name, x), ndim)

    arrays = AttentionArrays(
        batched(query, 4),
        batched(key, 4),
        batched(value, 4),
        lengths=given("key_value_seq_lengths", key_value_seq_lengths, 1),
        query_offset=given("query_offset", query_offset, 1),
        sinks=checks.as_array("sinks", sinks),
        page_table=checks.as_array("page_table", page_table),
        key_scale=batched(checks.as_scale("key_scale", key_scale), 3),
        value_scale=batched(checks.as_scale("value_scale", value_scale), 3),
        scale=scale if isinstance(scale, jax.core.Tracer) else None,
        bias=checks.with_all_axes(checks.as_array("bias", bias)),
        mask=checks.with_all_axes(checks.as_array("mask", mask)),
        starts=given("key_value_seq_starts", key_value_seq_starts, 1),
    )
    query_seq_lengths = given("query_seq_lengths", query_seq_lengths, 1)
    key_max_norm = given("key_max_norm", key_max_norm, 2)
    checks.check_cache(arrays)
    options = checks.checked_options(
        arrays.query, scale, is_causal, local_window_size, logits_soft_cap, return_residual
    )
    checks.check_names(softmax, implementation)
    checks.check_integers(arrays, query_seq_lengths)
    checks.check_pages(arrays)
    checks.check_floats(arrays, key_max_norm)
    checks.check_bias_and_mask(arrays)
    if softmax is not None and isinstance(softmax.phi, int | float):  # put explicitly, as a transfer guard wants it
        softmax = dataclasses.replace(softmax, phi=jax.device_put(np.float32(softmax.phi)))
    device = devices.planned()
    results = _run(arrays, options, softmax, key_max_norm, query_seq_lengths, implementation, device)
    if is_one:
        results = [x[0] for x in results]
    return tuple(results) if options.return_residual else results[0]


# Jitted so that an eager call is traced and compiled once.
@functools.partial(jax.jit, static_argnames=("options", "implementation", "device"))
def _run(
    arrays: AttentionArrays,
    options: AttentionOptions,
    softmax: UnifiedMax | None,
    key_max_norm: jax.Array | None,
    query_seq_lengths: jax.Array | None,
    implementation: AttentionImplementation | None,
    device: Device,
) -> list[jax.Array]:
    """The public op after its checks, planned for a device where it is lowered for its platform.

    Returns:
      [B, T, N, H], and with a residual the rows' log-sum-exp [B, T, N].
    """
    live = None
    if query_seq_lengths is not None:
        live = jnp.arange(arrays.query.shape[1])[None] < query_seq_lengths[:, None]  # [B, T]
        # Zero queries fit any window: what stands beyond the lengths causes no recompute.
        arrays = arrays._replace(query=jnp.where(live[..., None, None], arrays.query, 0))
    if softmax is not None and not softmax.is_bound:
        # No gradient: the answer does not depend on it.
        arrays = arrays._replace(phi=lax.stop_gradient(row_phi(softmax, arrays, options, weights_dtype="float32")))
    results = kernel_call.attention(options, softmax, implementation, device, arrays, key_max_norm)
    if live is None:
        return results
    out, *log_sums = results
    return [
        jnp.where(live[..., None, None], out, 0),
        *(jnp.where(live[..., None], x, -jnp.inf) for x in log_sums),
    ]


def unchecked_decode_attention(
    arrays: AttentionArrays,
    options: AttentionOptions,
    *,
    softmax: UnifiedMax | None = None,
    key_max_norm: jax.Array | None = None,
    redone: jax.Array | None = None,
    starts_early: bool = False,
    implementation: AttentionImplementation | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Decode attention that never takes a branch: for a model that redoes the whole step once where one is needed.

    Where the kernel redoes rows that left the safe window, it marks them in `redone`. Elsewhere such rows are NaN. The
    NaN runs through the rest of the model into every logit of the sequence, so that one look at the logits tells
    whether any layer overflowed.

    Args:
      arrays: One query per sequence; lengths; keys and values that are finite also beyond the lengths. The offset
        counts with a window only.
      options: The static facts of the call.
      softmax: As in `dot_product_attention`.
      key_max_norm: As in `dot_product_attention`.
      redone: [B, K] int32, of earlier layers. None: leave all failed rows NaN.
      starts_early: Whether the kernel may start before the launch before it has ended. Of lengths, offsets, keys and
        values that launch may write only each sequence's last key and value.
      implementation: As in `dot_product_attention`.

    Returns:
      [B, 1, N, H], and redone with 1 for every sequence and head of which a row was redone. None in its place: rows
      that must be recomputed with softmax=None are NaN.
    """
    if options.local_window_size is None:
        arrays = arrays._replace(query_offset=None)  # the lengths alone say what the last token sees
    checks.check_cache(arrays)
    if arrays.query.shape[1] != 1:
        raise ValueError(f"query must hold one token a sequence, [B, 1, N, H]; got {arrays.query.shape=}")
    checks.check_names(softmax, implementation)
    checks.check_integers(arrays, None)
    checks.check_floats(arrays, key_max_norm)
    # A finite cache has no NaN for cuDNN's padding mask to let through: plan as if there were no lengths.
    shape = attention_shape(arrays._replace(lengths=None), options, is_online=softmax is None)
    shape = dataclasses.replace(shape, starts_early=starts_early)
    plan = heuristics.plan_attention(shape, devices.planned(), implementation)
    run = module_of(plan).attention
    if softmax is None and plan.algorithm == "cudnn":
        return run(arrays, options, plan), None
    arrays = kernel_call.with_phi(arrays, options, shape, plan, softmax, key_max_norm)
    if plan.backend == "xla":  # cuDNN has no phi
        return reference.attention(arrays, options), None
    recompute = None if softmax is None else kernel_call.recompute_of(plan, softmax.recompute)
    if redone is None or recompute in (None, "cond"):
        return run(arrays, options, plan, starts_early=starts_early), None
    out: tuple[jax.Array, jax.Array] = run(
        arrays, options, plan, recompute=recompute, redone=redone, starts_early=starts_early
    )
    return out
