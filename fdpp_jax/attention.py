"""One checked attention call: plan, run, recompute; its gradient, and what it does under vmap.

The arrays of a call travel as one pytree and its static facts as one dataclass, so that a backend, the
recompute and the transformations need no list of the optional arguments.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fdpp_jax import device, heuristics, limits, reference, unified_max
from fdpp_jax.config import (
    AttentionImplementation,
    AttentionPlan,
    AttentionShape,
    DecodeAttentionConfig,
    Recompute,
    XlaAttentionConfig,
)
from fdpp_jax.unified_max import UnifiedMax

_CACHE = ("key", "value", "key_scale", "value_scale")


class Arrays(NamedTuple):
    """The arrays of one call, as `dot_product_attention` takes them."""

    query: jax.Array  # [B, T, N, H]
    key: jax.Array  # [B, S, K, H], or a pool [P, page_size, K, H]
    value: jax.Array
    lengths: jax.Array | None = None  # [B] int32 live keys; None: all
    phi: jax.Array | None = None  # [] or [B, N] float32; None: online softmax
    query_offset: jax.Array | None = None  # [B] int32
    sinks: jax.Array | None = None  # [N]
    page_table: jax.Array | None = None  # [B, pages] int32
    key_scale: jax.Array | None = None  # [K] or like key without H, float32
    value_scale: jax.Array | None = None

    @property
    def capacity(self) -> int:
        """S: the keys a sequence has room for."""
        return self.key.shape[1] * (1 if self.page_table is None else self.page_table.shape[1])


@dataclasses.dataclass(frozen=True)
class Options:
    """The static facts of one call that its arrays do not tell."""

    scale: float
    is_causal: bool = False
    local_window_size: tuple[int, int] | None = None
    logits_soft_cap: float | None = None


def shape_of(arrays: Arrays, options: Options, softmax: UnifiedMax | None) -> AttentionShape:
    """What the heuristics need to know of a call."""
    batch, query_length, num_heads, head_dim = arrays.query.shape
    scales = None if arrays.key_scale is None else arrays.key_scale.ndim
    return AttentionShape(
        batch=batch,
        query_length=query_length,
        capacity=arrays.capacity,
        num_query_heads=num_heads,
        num_kv_heads=arrays.key.shape[2],
        head_dim=head_dim,
        dtype=arrays.query.dtype.name,
        is_causal=options.is_causal,
        has_lengths=arrays.lengths is not None,
        local_window_size=options.local_window_size,
        logits_soft_cap=options.logits_soft_cap,
        kv_dtype=None if arrays.key.dtype == arrays.query.dtype else arrays.key.dtype.name,
        page_size=None if arrays.page_table is None else arrays.key.shape[1],
        scales=None if scales is None else "head" if scales == 1 else "token",
        has_sinks=arrays.sinks is not None,
        has_query_offset=arrays.query_offset is not None,
        is_online=softmax is None,
    )


def plan(shape: AttentionShape, implementation: AttentionImplementation | None) -> AttentionPlan:
    """The heuristics' plan, or the named implementation's, or NotImplementedError with its reason."""
    here = device.current()
    planned = heuristics.plan_attention(shape, here)
    if implementation is None or implementation == planned.implementation:
        return planned
    if implementation == "xla":
        return heuristics.plan_xla_attention(shape, here, "named by the caller")
    refusal = limits.refuse_mosaic_attention(shape, here)
    if implementation == "triton":
        refusal = "there are no Triton kernels yet"
    raise NotImplementedError(f"{implementation=} cannot run this call: {refusal}")


def place_of_recompute(planned: AttentionPlan, softmax: UnifiedMax | None) -> Recompute:
    """The policy's, or else the plan's. Without a kernel there is one."""
    if softmax is None or softmax.recompute is None or not isinstance(planned.config, DecodeAttentionConfig):
        return planned.recompute
    return softmax.recompute


def with_phi(
    arrays: Arrays, options: Options, softmax: UnifiedMax | None, key_max_norm: jax.Array | None, *, in_kernel: bool
) -> Arrays:
    """`arrays` with the phi of the policy, which carries no gradient: the answer does not depend on it."""
    if softmax is None:
        return arrays
    phi = unified_max.row_phi(
        softmax,
        arrays.query,
        arrays.key,
        options.scale,
        arrays.lengths,
        dtype=arrays.query.dtype if in_kernel else jnp.float32,  # of the weights
        logits_soft_cap=options.logits_soft_cap,
        sinks=arrays.sinks,
        page_table=arrays.page_table,
        key_scale=arrays.key_scale,
        key_max_norm=key_max_norm,
    )
    return arrays._replace(phi=lax.stop_gradient(phi))


def run(
    arrays: Arrays,
    options: Options,
    *,
    softmax: UnifiedMax | None,
    key_max_norm: jax.Array | None,
    implementation: AttentionImplementation | None,
) -> jax.Array:
    """The whole of `dot_product_attention` after its checks, [B, T, N, H]."""
    shape = shape_of(arrays, options, softmax)
    planned = plan(shape, implementation)
    if isinstance(planned.config, DecodeAttentionConfig):
        config, recompute = planned.config, place_of_recompute(planned, softmax)
        if arrays.lengths is None:
            arrays = arrays._replace(lengths=jnp.full((shape.batch,), shape.capacity, jnp.int32))
        arrays = with_phi(arrays, options, softmax, key_max_norm, in_kernel=True)
        return _checked_kernel(options, config, recompute, arrays)
    if planned.config == XlaAttentionConfig("cudnn"):
        return run_cudnn(arrays, options)
    if softmax is None or shape.query_length > limits.MAX_QUERY_LENGTH:  # prefill has no splits
        return run_reference(arrays, options)
    return _checked_reference(options, with_phi(arrays, options, softmax, key_max_norm, in_kernel=False))


def run_kernel(
    arrays: Arrays,
    options: Options,
    config: DecodeAttentionConfig,
    *,
    recompute: bool = False,
    prior: jax.Array | None = None,
    redone: jax.Array | None = None,
    is_appended: bool = False,
) -> Any:
    """The Mosaic kernel; see `pallas.decode_attention`."""
    from fdpp_jax.pallas import decode_attention

    static = dict(**dataclasses.asdict(options), config=config, recompute=recompute, is_appended=is_appended)
    return decode_attention.decode_attention(**arrays._asdict(), **static, prior=prior, redone=redone)


def run_recomputing_kernel(
    arrays: Arrays,
    options: Options,
    config: DecodeAttentionConfig,
    recompute: Literal["kernel", "launch"],
    redone: jax.Array | None = None,
    *,
    is_appended: bool = False,
) -> Any:
    """The Mosaic kernel, by which rows outside the window are redone; with `redone` the pair that it gives then."""
    if recompute == "kernel":
        return run_kernel(arrays, options, config, recompute=True, redone=redone, is_appended=is_appended)
    out = run_kernel(arrays, options, config, is_appended=is_appended)
    return run_kernel(arrays._replace(phi=None), options, config, prior=out, redone=redone)


def run_reference(arrays: Arrays, options: Options) -> jax.Array:
    """Plain XLA in float32; rows outside the window are NaN."""
    return reference.dot_product_attention(**arrays._asdict(), **dataclasses.asdict(options))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _checked_reference(options: Options, arrays: Arrays) -> jax.Array:
    """The reference with phi and its recompute; its derivative, and the value beside it, are online softmax's."""
    out = run_reference(arrays, options)
    return lax.cond(jnp.isnan(out).any(), lambda: run_reference(arrays._replace(phi=None), options), lambda: out)


@_checked_reference.defjvp
def _checked_reference_jvp(
    options: Options, primals: tuple[Arrays], tangents: tuple[Arrays]
) -> tuple[jax.Array, jax.Array]:
    # Through the branch that was not taken NaN would come back: 0 times the slope of an overflow.
    arrays, tangent = (given[0]._replace(phi=None) for given in (primals, tangents))
    return jax.jvp(lambda arrays: run_reference(arrays, options), (arrays,), (tangent,))


def run_cudnn(arrays: Arrays, options: Options) -> jax.Array:
    """cuDNN, for calls that it does not refuse. Its padding mask wants lengths of both sides."""
    lengths = arrays.lengths
    return jax.nn.dot_product_attention(
        arrays.query,
        arrays.key,
        arrays.value,
        scale=options.scale,
        is_causal=options.is_causal,
        query_seq_lengths=None if lengths is None else jnp.full_like(lengths, arrays.query.shape[1]),
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _checked_kernel(options: Options, config: DecodeAttentionConfig, recompute: Recompute, arrays: Arrays) -> jax.Array:
    """The decode kernel with its recompute; gradients are the reference's."""

    @jax.custom_batching.custom_vmap
    def call(arrays: Arrays) -> jax.Array:
        if arrays.phi is None:
            return run_kernel(arrays, options, config)
        if recompute != "cond":
            return run_recomputing_kernel(arrays, options, config, recompute)
        out = run_kernel(arrays, options, config)
        online = arrays._replace(phi=None)
        return lax.cond(jnp.isnan(out).any(), lambda: run_kernel(online, options, config), lambda: out)

    @call.def_vmap
    def fold(axis_size: int, in_batched: Any, arrays: Arrays) -> tuple[jax.Array, bool]:
        (is_mapped,) = in_batched
        per_head = ("sinks", "key_scale", "value_scale")  # of all sequences: B cannot take a mapped axis of theirs in
        if any(getattr(is_mapped, name) and getattr(arrays, name).ndim == 2 for name in per_head):

            def call_one(i: jax.Array) -> jax.Array:
                return call(jax.tree.map(lambda x, mapped: x[i] if mapped else x, arrays, is_mapped))

            return lax.map(call_one, jnp.arange(axis_size)), True
        # A mapped lax.cond would run both branches for every row: B takes the mapped axis instead.
        out = call(_fold_into_batch(axis_size, is_mapped, arrays))
        return out.reshape(axis_size, -1, *out.shape[1:]), True

    return call(arrays)


def _fold_into_batch(axis_size: int, is_mapped: Any, arrays: Arrays) -> Arrays:
    """One call of batch A B for A calls of batch B. `is_mapped` is Arrays of bool."""

    def fold(name: str) -> Any:  # [A, B, ...] or [B, ...] -> [A B, ...]
        x = getattr(arrays, name)
        if x is None or (name in _CACHE and x.ndim == 1):  # the scales of heads, [K]
            return x
        if not getattr(is_mapped, name):
            x = jnp.broadcast_to(x, (axis_size, *x.shape))
        return x.reshape(-1, *x.shape[2:])

    folded = {name: fold(name) for name in ("query", "lengths", "query_offset", "page_table")}
    if arrays.page_table is None or any(getattr(is_mapped, name) for name in _CACHE):
        folded |= {name: fold(name) for name in _CACHE}
        if arrays.page_table is not None:  # the pools stand one behind the other
            num_tables, num_pages = (folded[name].shape[0] // axis_size for name in ("page_table", "key"))
            folded["page_table"] += (jnp.arange(axis_size) * num_pages).repeat(num_tables)[:, None]
    batch, num_heads = folded["query"].shape[0], folded["query"].shape[2]
    if arrays.phi is not None and arrays.phi.ndim == 1:  # [A]: a scalar for each call. An unmapped scalar stays one
        folded["phi"] = jnp.broadcast_to(arrays.phi.repeat(batch // axis_size)[:, None], (batch, num_heads))
    elif arrays.phi is not None and arrays.phi.ndim:
        folded["phi"] = fold("phi")
    return arrays._replace(**folded)


def _checked_kernel_fwd(
    options: Options, config: DecodeAttentionConfig, recompute: Recompute, arrays: Arrays
) -> tuple[jax.Array, Arrays]:
    return _checked_kernel(options, config, recompute, arrays), arrays


def _checked_kernel_bwd(
    options: Options, config: DecodeAttentionConfig, recompute: Recompute, arrays: Arrays, grad: jax.Array
) -> tuple[Arrays]:
    del config, recompute
    arrays = arrays._replace(phi=None)
    floats = {
        name: x for name, x in arrays._asdict().items() if x is not None and jnp.issubdtype(x.dtype, jnp.floating)
    }
    (grads,) = jax.vjp(lambda floats: run_reference(arrays._replace(**floats), options), floats)[1](grad)
    return (Arrays(**dict.fromkeys(Arrays._fields) | grads),)  # None is zero


_checked_kernel.defvjp(_checked_kernel_fwd, _checked_kernel_bwd)
