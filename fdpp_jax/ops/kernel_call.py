"""A call of attention as a citizen of JAX: its plan and recompute, its gradient, its shards, and what vmap does."""

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax import lax

from fdpp_jax import heuristics
from fdpp_jax.ops import partition, planned, reference
from fdpp_jax.ops.phi import row_phi
from fdpp_jax.ops.planned import Cotangent, Function
from fdpp_jax.ops.running import module_of
from fdpp_jax.plans.backend import AttentionPlan
from fdpp_jax.plans.backends import by_name
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions, alike, attention_shape
from fdpp_jax.plans.device import Device
from fdpp_jax.plans.shapes import AttentionImplementation, AttentionShape
from fdpp_jax.unified_max import Recompute, UnifiedMax

# Beyond, keys are not split, and a unified max saves XLA nothing.
_MAX_SPLIT_QUERIES = 16
_CACHE = ("key", "value", "key_scale", "value_scale")
# Axes of operands, as in `partition.Rule`; n is (k g). The cache's are other ones where it is paged.
_AXES = dict(
    query="b t n h",
    key="b s k h",
    value="b s k h",
    lengths="b",
    phi="b n",
    query_offset="b",
    sinks="n",
    page_table="b pages",
    key_scale="b s k",
    value_scale="b s k",
    scale="",
    key_max_norm="b k",
)
_WHOLE = ("t", "s", "h", "pages", "pool", "page")


@dataclasses.dataclass(frozen=True)
class AttentionFunction:
    """Static facts of a call of attention.

    Attributes:
      options: As for the kernels.
      names: Of the operands: fields of AttentionArrays, of which phi is the policy's, [] or [B, N]; key_max_norm.
      is_online: Whether there is no unified max.
      recompute: The policy's.
      implementation: The caller's.
      saves: Whether a gradient follows.
    """

    options: AttentionOptions
    names: tuple[str, ...]
    is_online: bool
    recompute: Recompute | None
    implementation: AttentionImplementation | None
    saves: bool = False

    def types(self, *operands: Any) -> list[tuple[tuple[int, ...], Any]]:
        """[B, T, N, H] in the query's dtype."""
        query = operands[self.names.index("query")]
        return [(query.shape, query.dtype)]

    def saving(self) -> "AttentionFunction":
        """The call where its gradient follows."""
        return dataclasses.replace(self, saves=True)

    def _given(self, operands: Sequence[jax.Array]) -> tuple[AttentionArrays, jax.Array | None]:
        """The arrays, and the norms of keys."""
        given = dict(zip(self.names, operands, strict=True))
        key_max_norm = given.pop("key_max_norm", None)
        return AttentionArrays(**given), key_max_norm

    def shape(self, arrays: AttentionArrays) -> AttentionShape:
        """The static shape of the call."""
        return attention_shape(arrays, self.options, is_online=self.is_online)

    def __call__(self, device: Device | None, *operands: jax.Array) -> list[jax.Array]:
        """By the plan for a device."""
        if device is None:
            return [reference.attention(self._given(operands)[0]._replace(phi=None), self.options)]

        def call(*operands: jax.Array) -> list[jax.Array]:
            arrays, key_max_norm = self._given(operands)
            return [self._run(arrays, key_max_norm, self.plan(arrays, device))]

        plan = self.plan(self._given(operands)[0], device)
        if plan.backend == "xla" and (plan.algorithm == "cudnn" or self.is_online):
            return call(*operands)  # as XLA maps it
        call_with_rule = jax.custom_batching.custom_vmap(call)

        @call_with_rule.def_vmap
        def fold(axis_size: int, is_mapped: list[bool], *operands: jax.Array) -> tuple[list[jax.Array], list[bool]]:
            mapped = dict(zip(self.names, is_mapped, strict=True))
            given = dict(zip(self.names, operands, strict=True))
            # Those of all sequences: B cannot take a mapped axis of theirs in.
            ndims = {"sinks": 2, "key_scale": 2, "value_scale": 2, "scale": 1}
            if any(mapped.get(name) and given[name].ndim == ndim for name, ndim in ndims.items()):

                def call_one(i: jax.Array) -> list[jax.Array]:
                    return call(*(x[i] if m else x for x, m in zip(operands, is_mapped, strict=True)))

                return lax.map(call_one, jnp.arange(axis_size)), [True]
            # A mapped lax.cond would run both branches for every row: B takes the mapped axis instead.
            (out,) = call_with_rule(*_fold_into_batch(self.names, axis_size, is_mapped, operands))
            return [out.reshape(axis_size, -1, *out.shape[1:])], [True]

        outs: list[jax.Array] = call_with_rule(*operands)
        return outs

    def plan(self, arrays: AttentionArrays, device: Device) -> AttentionPlan:
        """The plan for a device.

        Raises:
          NotImplementedError: The named implementation refuses the call.
        """
        shape = self.shape(arrays)
        if _is_known(shape):
            plan = heuristics.plan_attention(shape, device, self.implementation)
            if plan.algorithm != "cudnn" or jax.default_backend() == "gpu":
                return plan
            why = "JAX lowers cuDNN's attention only where there is a GPU"
            if self.implementation == "cudnn":
                raise NotImplementedError(f"implementation='cudnn' cannot run this call: {why}")
            warnings.warn(f"{why}; plain XLA computes attention of queries {arrays.query.shape}", stacklevel=2)
            return AttentionPlan("xla", "reference", None, f"float32 reference: {why}")
        if self.implementation in (None, "xla"):
            return AttentionPlan("xla", "reference", None, "float32 reference: no kernel takes symbolic sizes")
        raise NotImplementedError(f"implementation={self.implementation!r} cannot run this call: symbolic sizes")

    def _run(self, arrays: AttentionArrays, key_max_norm: jax.Array | None, plan: AttentionPlan) -> jax.Array:
        shape = self.shape(arrays)
        online = arrays._replace(phi=None)
        out: jax.Array
        if plan.backend != "xla":
            if arrays.lengths is None:
                arrays = arrays._replace(lengths=jnp.full((shape.batch,), shape.capacity, jnp.int32))
            recompute = recompute_of(plan, self.recompute)
            arrays = self._with_phi(arrays, shape, plan, key_max_norm)
            return _with_recompute(self.options, plan, recompute, arrays)
        if plan.algorithm == "cudnn" or self.is_online or shape.query_length > _MAX_SPLIT_QUERIES:
            if plan.algorithm == "cudnn" and self.saves:  # so that XLA finds the gradient's forward pass done
                return _cudnn_vjp(online, self.options, plan)[0]
            out = module_of(plan).attention(online, self.options, plan)
            return out
        arrays = self._with_phi(arrays, shape, plan, key_max_norm)
        out = reference.attention(arrays, self.options)
        return lax.cond(jnp.isnan(out).any(), lambda: reference.attention(online, self.options), lambda: out)

    def _with_phi(
        self, arrays: AttentionArrays, shape: AttentionShape, plan: AttentionPlan, key_max_norm: jax.Array | None
    ) -> AttentionArrays:
        op = by_name(plan.backend).attention
        if self.is_online or op is None:
            return arrays
        policy = UnifiedMax(arrays.phi, self.recompute)
        phi = row_phi(policy, arrays, self.options, weights_dtype=op.weights_dtype(shape), key_max_norm=key_max_norm)
        return arrays._replace(phi=phi)

    def gradients(
        self, device: Device, moved: tuple[int, ...], operands: Sequence[jax.Array], grads: Sequence[jax.Array]
    ) -> list[jax.Array] | None:
        """cuDNN's own gradients."""
        arrays, _ = self._given(operands)
        plan = self.plan(arrays, device)
        if plan.algorithm != "cudnn":
            return None
        found = _cudnn_vjp(arrays._replace(phi=None), self.options, plan)[1](grads[0])
        return [found[("query", "key", "value").index(self.names[i])] for i in moved]

    def bind(self, function: Function, device: Device, *operands: jax.Array) -> list[jax.Array]:
        """Partitioned by sequences and heads where a shard may have a kernel; XLA partitions its own operations."""
        arrays, _ = self._given(operands[: len(self.names)])
        if isinstance(function, Cotangent):
            if self.plan(arrays, device).algorithm != "cudnn":
                return planned.bind(function, device, *operands)
            return partition.bind(function, self._rule(function, operands), device, *operands)

        if not _may_have_shards(self.shape(arrays), device, self.implementation):
            return planned.bind(function, device, *operands)
        return partition.bind(function, self._rule(function, operands), device, *operands)

    def _rule(self, function: Function, operands: Sequence[jax.Array]) -> partition.Rule:
        arrays, _ = self._given(operands[: len(self.names)])
        group = arrays.query.shape[2] // arrays.key.shape[2]
        # One key/value head is everywhere; then a device has a share of its group.
        heads = "k" if group == 1 else "g" if arrays.key.shape[2] == 1 else "(k g)"

        def axes(name: str) -> str:
            x = getattr(arrays, name, None)
            if name in _CACHE and x is not None and x.ndim == 1:
                return "k"
            if name == "phi" and x is not None and x.ndim == 0:
                return ""
            text = _AXES[name]
            if name in _CACHE and arrays.page_table is not None:
                text = text.replace("b s", "pool page")
            return " ".join(heads if axis == "n" else axis for axis in text.split())

        own = tuple(axes(name) for name in self.names)
        if isinstance(function, Cotangent):
            return partition.Rule(
                (*own, axes("query")),
                tuple(own[i] for i in function.moved),
                sizes=(("g", group),) if heads == "(k g)" else (),
                whole=_WHOLE,
            )
        return partition.Rule(own, (axes("query"),), sizes=(("g", group),) if heads == "(k g)" else (), whole=_WHOLE)


def attention(
    options: AttentionOptions,
    softmax: UnifiedMax | None,
    implementation: AttentionImplementation | None,
    device: Device,
    arrays: AttentionArrays,
    key_max_norm: jax.Array | None,
) -> jax.Array:
    """The public op after its checks, [B, T, N, H]; arrays.phi is the policy's, [] or [B, N]."""
    given = {name: x for name, x in arrays._asdict().items() if x is not None}
    if key_max_norm is not None and softmax is not None and softmax.is_bound:
        given["key_max_norm"] = key_max_norm
    recompute = None if softmax is None else softmax.recompute
    function = AttentionFunction(options, tuple(given), softmax is None, recompute, implementation)

    def call(*operands: jax.Array) -> jax.Array:
        (out,) = planned.differentiable(function, device, *operands)
        return out

    def spec(query: Sequence[Any], key: Sequence[Any], *_: Any) -> Sequence[Any]:
        batch = query[0] or (key[0] if arrays.page_table is None else None)
        return batch, query[1], query[2] or key[2], None

    return partition.in_auto_axes(call, spec, alike(list(given.values())))


def recompute_of(plan: AttentionPlan, asked: Recompute | None) -> Recompute:
    """Where a row that left the window is redone: the policy's place if the backend has it, else the plan's."""
    op = by_name(plan.backend).attention
    return plan.recompute if op is None or asked not in op.recomputes else asked


def _with_recompute(
    options: AttentionOptions, plan: AttentionPlan, recompute: Recompute, arrays: AttentionArrays
) -> jax.Array:
    """A kernel's attention, of arrays with lengths."""
    run = functools.partial(module_of(plan).attention, options=options, plan=plan)
    out: jax.Array
    if arrays.phi is None:
        out = run(arrays)
        return out
    if recompute != "cond":
        out = run(arrays, recompute=recompute)
        return out
    out = run(arrays)
    online = arrays._replace(phi=None)
    return lax.cond(jnp.isnan(out).any(), lambda: run(online), lambda: out)


def _cudnn_vjp(arrays: AttentionArrays, options: AttentionOptions, plan: AttentionPlan) -> Any:
    """cuDNN's result, and the function that gives the gradients of query, key and value."""

    def run(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
        return module_of(plan).attention(arrays._replace(query=query, key=key, value=value), options, plan)

    return jax.vjp(run, arrays.query, arrays.key, arrays.value)


def _may_have_shards(shape: AttentionShape, device: Device, implementation: AttentionImplementation | None) -> bool:
    """Whether a kernel or cuDNN, neither of which XLA can partition, may compute a shard of a call."""
    if not device.is_gpu or not _is_known(shape):
        return False
    smallest = dataclasses.replace(shape, batch=1, num_query_heads=shape.group_size, num_kv_heads=1)
    named = implementation if implementation == "xla" else None
    plans = (heuristics.plan_attention(one, device, named) for one in (shape, smallest))
    return any(plan.backend != "xla" or plan.algorithm == "cudnn" for plan in plans)


def _is_known(shape: AttentionShape) -> bool:
    """Whether all sizes are numbers: kernels are planned for numbers, and XLA computes symbolic sizes."""
    return all(not jax.export.is_symbolic_dim(size) for size in (shape.batch, shape.query_length, shape.capacity))


def _fold_into_batch(
    names: tuple[str, ...], axis_size: int, is_mapped: Sequence[bool], operands: Sequence[jax.Array]
) -> list[jax.Array]:
    """Operands of one call of batch A B for A calls of batch B."""
    given = dict(zip(names, operands, strict=True))
    mapped = dict(zip(names, is_mapped, strict=True))

    def fold(name: str) -> jax.Array:  # [A, B, ...] or [B, ...] -> [A B, ...]
        x = given[name]
        if name in _CACHE and x.ndim == 1:  # the scales of heads, [K]
            return x
        if not mapped[name]:
            x = jnp.broadcast_to(x, (axis_size, *x.shape))
        return x.reshape(-1, *x.shape[2:])

    has_pages = "page_table" in given
    of_sequences = ["query", "lengths", "query_offset", "page_table", "key_max_norm"]
    if not has_pages or any(mapped.get(name) for name in _CACHE):
        of_sequences += _CACHE
    folded = {name: fold(name) for name in of_sequences if name in given}
    if has_pages and "key" in folded:  # the pools stand one behind the other
        num_tables, num_pages = (folded[name].shape[0] // axis_size for name in ("page_table", "key"))
        folded["page_table"] += (jnp.arange(axis_size) * num_pages).repeat(num_tables)[:, None]
    if (phi := given.get("phi")) is not None:
        batch, num_heads = folded["query"].shape[0], folded["query"].shape[2]
        if phi.ndim == 1:  # [A]: a scalar for each call. An unmapped scalar stays one
            folded["phi"] = jnp.broadcast_to(phi.repeat(batch // axis_size)[:, None], (batch, num_heads))
        elif phi.ndim:
            folded["phi"] = fold("phi")
    return [folded.get(name, given[name]) for name in names]
