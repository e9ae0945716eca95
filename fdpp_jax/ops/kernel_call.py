"""A call of an attention kernel as a citizen of JAX: its recompute, its gradient, and what it does under vmap."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdpp_jax.ops import reference
from fdpp_jax.ops.running import module_of
from fdpp_jax.plans.backend import AttentionPlan
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions
from fdpp_jax.unified_max import Recompute

_CACHE = ("key", "value", "key_scale", "value_scale")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attention(
    options: AttentionOptions, plan: AttentionPlan, recompute: Recompute, arrays: AttentionArrays
) -> jax.Array:
    """A kernel's attention with its recompute, of arrays with lengths; gradients are the reference's."""

    @jax.custom_batching.custom_vmap
    def call(arrays: AttentionArrays) -> jax.Array:
        run = functools.partial(module_of(plan).attention, options=options, plan=plan)
        if arrays.phi is None:
            return run(arrays)
        if recompute != "cond":
            return run(arrays, recompute=recompute)
        out = run(arrays)
        online = arrays._replace(phi=None)
        return lax.cond(jnp.isnan(out).any(), lambda: run(online), lambda: out)

    @call.def_vmap
    def fold(axis_size: int, in_batched: Any, arrays: AttentionArrays) -> tuple[jax.Array, bool]:
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


def _fold_into_batch(axis_size: int, is_mapped: Any, arrays: AttentionArrays) -> AttentionArrays:
    """One call of batch A B for A calls of batch B. `is_mapped` is AttentionArrays of bool."""

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


def _attention_fwd(
    options: AttentionOptions, plan: AttentionPlan, recompute: Recompute, arrays: AttentionArrays
) -> tuple[jax.Array, AttentionArrays]:
    return attention(options, plan, recompute, arrays), arrays


def _attention_bwd(
    options: AttentionOptions, plan: AttentionPlan, recompute: Recompute, arrays: AttentionArrays, grad: jax.Array
) -> tuple[AttentionArrays]:
    del plan, recompute
    arrays = arrays._replace(phi=None)
    floats = {
        name: x for name, x in arrays._asdict().items() if x is not None and jnp.issubdtype(x.dtype, jnp.floating)
    }
    (grads,) = jax.vjp(lambda floats: reference.attention(arrays._replace(**floats), options), floats)[1](grad)
    return (AttentionArrays(**dict.fromkeys(AttentionArrays._fields) | grads),)  # None is zero


attention.defvjp(_attention_fwd, _attention_bwd)
