"""A call of attention as a citizen of JAX: its plan and recompute, its gradient, its shards, and what vmap does."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax import lax

from fdpp_jax import heuristics
from fdpp_jax.ops import blockwise, fold, partition, planned, reference
from fdpp_jax.ops.phi import row_phi
from fdpp_jax.ops.planned import Cotangent, Function
from fdpp_jax.ops.running import module_of
from fdpp_jax.plans.backend import AttentionPlan
from fdpp_jax.plans.backends import by_name
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions, alike, attention_shape
from fdpp_jax.plans.device import Device
from fdpp_jax.plans.shapes import AttentionImplementation, AttentionShape
from fdpp_jax.plans.xla import MAX_SPLIT_QUERIES, has_large_scores, plan_without_cudnn
from fdpp_jax.unified_max import Recompute, UnifiedMax

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
    bias="b n t s",
    mask="b n t s",
    starts="b",
    key_max_norm="b k",
)
_RESULTS = ("b t n h", "b t n")
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
      copies: How many derivatives vmap computes at once.
    """

    options: AttentionOptions
    names: tuple[str, ...]
    is_online: bool
    recompute: Recompute | None
    implementation: str | None
    saves: bool = False
    copies: int = 1

    def types(self, *operands: Any) -> list[tuple[tuple[int, ...], Any]]:
        """[B, T, N, H] in the query's dtype, and with a residual the rows' log-sum-exp [B, T, N] float32."""
        query = operands[self.names.index("query")]
        residual = [(query.shape[:3], jnp.dtype(jnp.float32))] if self.options.return_residual else []
        return [(query.shape, query.dtype), *residual]

    def saving(self) -> "AttentionFunction":
        """The call where its gradient follows."""
        return dataclasses.replace(self, saves=True)

    def times(self, copies: int) -> "AttentionFunction":
        """The call of which vmap computes so many derivatives at once."""
        return dataclasses.replace(self, copies=copies * self.copies)

    def _given(self, operands: Sequence[jax.Array]) -> tuple[AttentionArrays, jax.Array | None]:
        """The arrays, and the norms of keys."""
        given = dict(zip(self.names, operands, strict=True))
        key_max_norm = given.pop("key_max_norm", None)
        return AttentionArrays(**given), key_max_norm

    def shape(self, arrays: AttentionArrays) -> AttentionShape:
        """The static shape of the call, or of all copies of it at once."""
        shape = attention_shape(arrays, self.options, is_online=self.is_online)
        return dataclasses.replace(shape, batch=shape.batch * self.copies)

    def __call__(self, device: Device | None, *operands: jax.Array) -> list[jax.Array]:
        """By the plan for a device."""
        if device is None:
            arrays, _ = self._given(operands)
            _warn_of_large_scores(self.shape(arrays))
            return jax.tree.leaves(reference.attention(arrays._replace(phi=None), self.options))

        def call(*operands: jax.Array) -> list[jax.Array]:
            arrays, key_max_norm = self._given(operands)
            return jax.tree.leaves(self._run(arrays, key_max_norm, self.plan(arrays, device)))

        one, _ = self._given(operands)
        plan, shape = self.plan(one, device), self.shape(one)
        has_many = _is_known(shape) and (shape.query_length > MAX_SPLIT_QUERIES or has_large_scores(shape))
        is_small = self.is_online and not has_many
        if plan.backend == "xla" and (plan.algorithm == "cudnn" or is_small):
            return call(*operands)  # as XLA maps it
        call_with_rule, num_results = jax.custom_batching.custom_vmap(call), len(self.types(*operands))

        @call_with_rule.def_vmap
        def folded(axis_size: int, is_mapped: list[bool], *operands: jax.Array) -> tuple[list[jax.Array], list[bool]]:
            def call_again(given: Mapping[str, jax.Array]) -> list[jax.Array]:
                # By the kernel of one call.
                implementation = self.implementation if refuses is None else plan.implementation
                function = dataclasses.replace(self, names=tuple(given), implementation=implementation)
                return function(device, *given.values())

            if jax.export.is_symbolic_dim(axis_size):
                if self.implementation not in (None, "xla"):
                    raise NotImplementedError(f"implementation={self.implementation!r} takes no symbolic sizes")
                plain = functools.partial(self, None)
                return jax.vmap(plain, [0 if mapped else None for mapped in is_mapped])(*operands), [True] * num_results
            many = dataclasses.replace(shape, batch=axis_size * shape.batch)
            if plan.backend == "xla" and self.is_online and not has_large_scores(many):
                outs = jax.vmap(call, [0 if mapped else None for mapped in is_mapped])(*operands)  # as XLA maps it
                return outs, [True] * len(outs)
            refuses = _refusals(plan, device)
            given = dict(zip(self.names, operands, strict=True))
            with_axis = frozenset(name for name, m in zip(self.names, is_mapped, strict=True) if m)
            outs = fold.mapped_call(call_again, given, with_axis, axis_size, shape, refuses)
            return outs, [True] * len(outs)

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
            planned.warn_caller(f"{why}; plain XLA computes attention of queries {arrays.query.shape}")
            return plan_without_cudnn(shape, why)
        if self.implementation in (None, "xla"):
            return AttentionPlan("xla", "reference", None, "float32 reference: no kernel takes symbolic sizes")
        raise NotImplementedError(f"implementation={self.implementation!r} takes no symbolic sizes")

    def _run(self, arrays: AttentionArrays, key_max_norm: jax.Array | None, plan: AttentionPlan) -> Any:
        shape = self.shape(arrays)
        online = arrays._replace(phi=None)
        policy = None if self.is_online else UnifiedMax(arrays.phi, self.recompute)
        if plan.backend != "xla":
            if arrays.lengths is None:
                arrays = arrays._replace(lengths=jnp.full((shape.batch,), shape.capacity, jnp.int32))
            recompute = recompute_of(plan, self.recompute)
            arrays = with_phi(arrays, self.options, shape, plan, policy, key_max_norm)
            return _with_recompute(self.options, plan, recompute, arrays)
        if (
            plan.algorithm in ("cudnn", "blocks")
            or self.is_online
            or not _is_known(shape)
            or shape.query_length > MAX_SPLIT_QUERIES
        ):
            if plan.algorithm == "cudnn" and self.saves:  # so that XLA finds the gradient's forward pass done
                return _cudnn_vjp(online, self.options, plan)[0]
            return module_of(plan).attention(online, self.options, plan)
        arrays = with_phi(arrays, self.options, shape, plan, policy, key_max_norm)
        out = reference.attention(arrays, self.options)
        return lax.cond(_has_failed(out), lambda: reference.attention(online, self.options), lambda: out)

    def _gradient_plan(self, arrays: AttentionArrays, device: Device) -> AttentionPlan:
        """Whose gradient is taken: behind a prefill kernel, too, cuDNN's where it computes the call."""
        plan = self.plan(arrays, device)
        if plan.algorithm != "prefill":
            return plan
        return dataclasses.replace(self, implementation="xla").plan(arrays, device)

    def gradients(
        self, device: Device, moved: tuple[int, ...], operands: Sequence[jax.Array], grads: Sequence[jax.Array]
    ) -> list[jax.Array] | None:
        """cuDNN's own gradients, or gradients in blocks."""
        arrays, _ = self._given(operands)
        plan, online = self._gradient_plan(arrays, device), arrays._replace(phi=None)
        names = [self.names[i] for i in moved]
        if plan.algorithm == "cudnn":
            of_arrays = _cudnn_vjp(online, self.options, plan)[1](grads[0])
            found = dict(zip(("query", "key", "value"), of_arrays, strict=True))
        elif plan.algorithm == "blocks":
            found = blockwise.gradients(online, self.options, names, grads, copies=self.copies)
        else:
            return None
        return [found[self.names[i]] if self.names[i] in found else jnp.zeros_like(operands[i]) for i in moved]

    def bind(self, function: Function, device: Device, *operands: jax.Array) -> list[jax.Array]:
        """Partitioned by sequences and heads where a shard may have a kernel; XLA partitions its own operations."""
        arrays, _ = self._given(operands[: len(self.names)])
        if isinstance(function, Cotangent):
            if self._gradient_plan(arrays, device).algorithm != "cudnn":
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
        whole = list(_WHOLE)

        def axes(name: str) -> str:
            x = getattr(arrays, name, None)
            if name in fold.CACHE and x is not None and x.ndim == 1:
                return "k"
            if name == "phi" and x is not None and x.ndim == 0:
                return ""
            text = _AXES[name]
            if name in fold.CACHE and arrays.page_table is not None:
                text = text.replace("b s", "pool page")
            factors = text.split()
            if name in ("bias", "mask") and x is not None:  # an axis of size 1 is none of the scores'
                ones = [f"{name}{i}" for i in range(x.ndim)]
                whole.extend(ones)
                factors = [one if size == 1 else axis for one, size, axis in zip(ones, x.shape, factors, strict=True)]
            return with_heads(factors)

        def with_heads(factors: Sequence[str]) -> str:
            return " ".join(heads if factor == "n" else factor for factor in factors)

        operand_axes = tuple(axes(name) for name in self.names)
        results = tuple(with_heads(text.split()) for text in _RESULTS[: 1 + self.options.return_residual])
        sizes = (("g", group),) if heads == "(k g)" else ()
        if isinstance(function, Cotangent):
            if heads == "g" and {"key", "value"} & {self.names[i] for i in function.moved}:
                whole.append("g")  # the gradient of the one key/value head is a sum over its group
            operand_axes, results = (*operand_axes, *results), tuple(operand_axes[i] for i in function.moved)
        return partition.Rule(operand_axes, results, sizes, tuple(whole))


def attention(
    options: AttentionOptions,
    softmax: UnifiedMax | None,
    implementation: AttentionImplementation | None,
    device: Device,
    arrays: AttentionArrays,
    key_max_norm: jax.Array | None,
) -> list[jax.Array]:
    """The public op after its checks, of arrays whose phi is the policy's, [] or [B, N].

    Returns:
      [B, T, N, H], and with a residual the rows' log-sum-exp [B, T, N].
    """
    mesh = jax.typeof(arrays.query).sharding.mesh
    if arrays.phi is not None and not arrays.phi.ndim and mesh.manual_axes and mesh.explicit_axes:
        # Of this mesh JAX's shard_map saves no scalar for a gradient.
        arrays = arrays._replace(phi=jnp.broadcast_to(arrays.phi, (arrays.query.shape[0], arrays.query.shape[2])))
    given = {name: x for name, x in arrays._asdict().items() if x is not None}
    if key_max_norm is not None and softmax is not None and softmax.is_bound:
        given["key_max_norm"] = key_max_norm
    recompute = None if softmax is None else softmax.recompute
    function = AttentionFunction(options, tuple(given), softmax is None, recompute, implementation)

    def call(*operands: jax.Array) -> list[jax.Array]:
        return planned.differentiable(function, device, *operands)

    def specs(query: Sequence[Any], key: Sequence[Any], *_: Any) -> Sequence[Sequence[Any]]:
        batch = query[0] or (key[0] if arrays.page_table is None else None)
        rows = batch, query[1], query[2] or key[2]
        return [(*rows, None), rows] if options.return_residual else [(*rows, None)]

    return partition.in_auto_axes(call, specs, alike(list(given.values())))


def with_phi(
    arrays: AttentionArrays,
    options: AttentionOptions,
    shape: AttentionShape,
    plan: AttentionPlan,
    softmax: UnifiedMax | None,
    key_max_norm: jax.Array | None,
) -> AttentionArrays:
    """`arrays` with the phi of the policy, which carries no gradient: the answer does not depend on it."""
    op = by_name(plan.backend).attention
    if softmax is None or op is None:
        return arrays
    weights_dtype = op.weights_dtype(shape)
    phi = row_phi(softmax, arrays, options, weights_dtype=weights_dtype, key_max_norm=key_max_norm)
    return arrays._replace(phi=lax.stop_gradient(phi))


def recompute_of(plan: AttentionPlan, asked: Recompute | None) -> Recompute:
    """Where a row that left the window is redone: the policy's place if the backend has it, else the plan's."""
    op = by_name(plan.backend).attention
    return plan.recompute if op is None or asked not in op.recomputes else asked


def _with_recompute(
    options: AttentionOptions, plan: AttentionPlan, recompute: Recompute, arrays: AttentionArrays
) -> Any:
    """A kernel's attention, of arrays with lengths."""
    run = functools.partial(module_of(plan).attention, options=options, plan=plan)
    if arrays.phi is None:
        return run(arrays)
    if recompute != "cond":
        return run(arrays, recompute=recompute)
    out = run(arrays)
    online = arrays._replace(phi=None)
    return lax.cond(_has_failed(out), lambda: run(online), lambda: out)


def _has_failed(out: Any) -> jax.Array:
    """Whether a row has left the window, of a result with or without a residual."""
    return jnp.isnan(jax.tree.leaves(out)[0]).any()


def _refusals(plan: AttentionPlan, device: Device) -> fold.Refuses | None:
    """Whether the kernel of a plan refuses another shape; None where XLA computes the plan."""
    op = by_name(plan.backend).attention
    if plan.backend == "xla" or op is None:
        return None
    return lambda shape: op.refuse(shape, device, plan.algorithm) is not None


def _cudnn_vjp(arrays: AttentionArrays, options: AttentionOptions, plan: AttentionPlan) -> Any:
    """cuDNN's result, and the function that gives the gradients of query, key and value."""

    def run(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
        return module_of(plan).attention(arrays._replace(query=query, key=key, value=value), options, plan)

    return jax.vjp(run, arrays.query, arrays.key, arrays.value)


def _warn_of_large_scores(shape: AttentionShape) -> None:
    """Says so where all scores are held at once though they take much memory: blocks have no derivative."""
    if _is_known(shape) and has_large_scores(shape):
        scores = [shape.batch, shape.num_query_heads, shape.query_length, shape.capacity]
        planned.warn_caller(
            f"fdpp_jax holds all scores {scores} of attention at once, {shape.score_bytes} bytes: derivatives in "
            "forward mode and of higher order are not computed in blocks, and neither is what is lowered for a device "
            "that is not known"
        )


def _may_have_shards(shape: AttentionShape, device: Device, implementation: str | None) -> bool:
    """Whether a kernel or cuDNN, neither of which XLA can partition, may compute a shard of a call."""
    if not device.is_gpu or not _is_known(shape):
        return False
    named = implementation if implementation == "xla" else None
    group = shape.group_size
    if shape.num_kv_heads == 1:  # which every device has, with a share of its group
        shards = [
            dataclasses.replace(shape, batch=batch, num_query_heads=heads)
            for batch, heads in partition.shares(shape.batch, group)
        ]
    else:
        shards = [
            dataclasses.replace(shape, batch=batch, num_query_heads=heads * group, num_kv_heads=heads)
            for batch, heads in partition.shares(shape.batch, shape.num_kv_heads)
        ]
    plans = (heuristics.plan_attention(one, device, named) for one in shards)
    return any(plan.backend != "xla" or plan.algorithm == "cudnn" for plan in plans)


def _is_known(shape: AttentionShape) -> bool:
    """Whether all sizes are numbers: kernels are planned for numbers, and XLA computes symbolic sizes."""
    return all(not jax.export.is_symbolic_dim(size) for size in (shape.batch, shape.query_length, shape.capacity))
