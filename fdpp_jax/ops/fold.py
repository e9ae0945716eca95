"""Many calls of attention under `jax.vmap` as one: their axis joins the heads of a group, or the batch."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax

from fdpp_jax.plans.shapes import PAGE_SIZES, AttentionShape, cdiv

CACHE = ("key", "value", "key_scale", "value_scale")
# Arrays of query rows, and where N stands in them.
_ROW_AXIS = dict(query=2, phi=1, sinks=0)
# Those of all sequences have so many axes when they are mapped: B cannot take a mapped axis of theirs in.
_NDIM_OF_ALL = dict(sinks=2, key_scale=2, value_scale=2, scale=1)
# Of these, B may have size 1.
_BROADCAST = ("bias", "mask")
_OF_SEQUENCES = ("query", "lengths", "starts", "query_offset", "page_table", "key_max_norm", *_BROADCAST)

type Given = Mapping[str, jax.Array]
type Call = Callable[[Given], list[jax.Array]]
type Refuses = Callable[[AttentionShape], bool]


def mapped_call(
    call: Call,
    given: Given,
    with_axis: frozenset[str],
    axis_size: int,
    shape: AttentionShape,
    refuses: Refuses | None,
) -> list[jax.Array]:
    """The results of the calls that vmap makes of one.

    A mapped lax.cond would run both branches for every row, and a mapped kernel would read shared keys once per call.

    Args:
      call: call(given) -> [B, T, N, ...] each.
      given: Operands by their names in AttentionArrays, and key_max_norm.
      with_axis: Names of those that have an axis A in front.
      axis_size: How many calls there are, A.
      shape: Of one call.
      refuses: Whether the kernel refuses another shape. None: XLA computes the calls.

    Returns:
      [A, B, T, N, ...] each.
    """
    outs = None if refuses is None else _in_rows(call, given, with_axis, axis_size, shape, refuses)
    if outs is None:
        outs = _in_batch(call, given, with_axis, axis_size, shape, refuses)
    if outs is None:
        outs = lax.map(lambda i: call(_at(i, given, with_axis)), jnp.arange(axis_size))
    return outs


def _at(i: jax.Array, given: Given, with_axis: frozenset[str]) -> Given:
    """The operands of call i, or of the calls i."""
    return {name: x[i] if name in with_axis else x for name, x in given.items()}


def _in_rows(
    call: Call, given: Given, with_axis: frozenset[str], axis_size: int, shape: AttentionShape, refuses: Refuses
) -> list[jax.Array] | None:
    """A calls that share their keys, as one call with A times the heads per group; so each key is read once.

    As many of the A calls as the kernel has rows for become one; the rest is mapped anew.

    Returns:
      The results; None where other operands than query, phi and sinks are mapped, or there is no room.
    """
    if not with_axis <= set(_ROW_AXIS):
        return None
    num_heads, num_kv_heads = shape.num_query_heads, shape.num_kv_heads
    heads = ((num, dataclasses.replace(shape, num_query_heads=num * num_heads)) for num in range(axis_size, 0, -1))
    most = next((num for num, folded in heads if not refuses(folded)), 0)
    if most < min(2, axis_size):
        return None
    num_calls = cdiv(axis_size, most)
    size = cdiv(axis_size, num_calls)

    def with_heads(x: jax.Array, axis: int) -> jax.Array:  # [V, ..., K G, ...] -> [..., K V G, ...]
        x = x.reshape(*x.shape[: axis + 1], num_kv_heads, -1, *x.shape[axis + 2 :])
        x = jnp.moveaxis(x, 0, axis + 1)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 3 :])

    def by_call(x: jax.Array) -> jax.Array:  # [B, T, K V G, ...] -> [V, B, T, K G, ...]
        x = x.reshape(*x.shape[:2], num_kv_heads, size, -1, *x.shape[3:])
        x = jnp.moveaxis(x, 3, 0)
        return x.reshape(*x.shape[:3], -1, *x.shape[5:])

    def call_some(some: Given) -> list[jax.Array]:
        folded = dict(some)
        for name, axis in _ROW_AXIS.items():
            x = some.get(name)
            if x is None or (name not in with_axis and not x.ndim):
                continue
            if name not in with_axis:
                x = jnp.broadcast_to(x, (size, *x.shape))
            if x.ndim == 1:  # phi, a scalar for each call
                x = jnp.broadcast_to(x[:, None, None], (size, shape.batch, num_heads))
            folded[name] = with_heads(x, axis)
        return [by_call(x) for x in call(folded)]

    if num_calls == 1:
        return call_some(given)
    # The last call repeats the last of the A, which fails no more often than that one does.
    index = jnp.minimum(jnp.arange(num_calls * size), axis_size - 1).reshape(num_calls, size)
    outs = jax.vmap(lambda i: call_some(_at(i, given, with_axis)))(index)
    return [x.reshape(-1, *x.shape[2:])[:axis_size] for x in outs]


def _in_batch(
    call: Call, given: Given, with_axis: frozenset[str], axis_size: int, shape: AttentionShape, refuses: Refuses | None
) -> list[jax.Array] | None:
    """A calls of batch B, as one of batch A B.

    Returns:
      The results; None where B cannot take A in: sinks and scales per head are those of all sequences, and a cache that
      is not mapped is not copied A times for a kernel.
    """
    if any(name in with_axis and given[name].ndim == ndim for name, ndim in _NDIM_OF_ALL.items()):
        return None
    is_shared = with_axis.isdisjoint(CACHE)
    if is_shared and refuses is not None and "page_table" not in given:
        paged = _paged(given)
        if paged is None:
            return None
        given = paged
    has_pages = "page_table" in given

    def fold(name: str) -> jax.Array:  # [A, B, ...] or [B, ...] -> [A B, ...]
        x = given[name]
        if name in CACHE and x.ndim == 1:  # the scales of heads, [K]
            return x
        if name not in with_axis:
            if name in _BROADCAST and x.shape[0] == 1:
                return x
            x = jnp.broadcast_to(x, (axis_size, *x.shape))
        elif name in _BROADCAST:
            x = jnp.broadcast_to(x, (axis_size, shape.batch, *x.shape[2:]))
        return x.reshape(-1, *x.shape[2:])

    names = _OF_SEQUENCES if has_pages and is_shared else (*_OF_SEQUENCES, *CACHE)
    folded = dict(given) | {name: fold(name) for name in names if name in given}
    if has_pages and not is_shared:  # the pools stand one behind the other
        num_tables, num_pages = (folded[name].shape[0] // axis_size for name in ("page_table", "key"))
        folded["page_table"] += (jnp.arange(axis_size) * num_pages).repeat(num_tables)[:, None]
    if (phi := given.get("phi")) is not None:
        if phi.ndim == 1:  # [A]: a scalar for each call. An unmapped scalar stays one
            rows = phi.repeat(shape.batch)[:, None]
            folded["phi"] = jnp.broadcast_to(rows, (axis_size * shape.batch, shape.num_query_heads))
        elif phi.ndim:
            folded["phi"] = fold("phi")
    page_size = folded["key"].shape[1] if has_pages else None
    if refuses is not None and refuses(dataclasses.replace(shape, batch=axis_size * shape.batch, page_size=page_size)):
        return None
    return [x.reshape(axis_size, -1, *x.shape[1:]) for x in call(folded)]


def _paged(given: Given) -> Given | None:
    """A contiguous cache as pages, where it lies, for many sequences to share; None if no page size divides S."""
    batch, capacity = given["key"].shape[:2]
    page_size = next((size for size in reversed(PAGE_SIZES) if capacity % size == 0), None)
    if page_size is None:
        return None
    caches = {name: given[name] for name in CACHE if name in given and given[name].ndim > 1}
    pools = {name: x.reshape(-1, page_size, *x.shape[2:]) for name, x in caches.items()}
    table = jnp.arange(batch * (capacity // page_size), dtype=jnp.int32).reshape(batch, -1)
    return {**given, **pools, "page_table": table}
