"""All matmuls from one attention to the next in one launch, or from the last attention to the logits.

Four products follow each other. Each needs the whole result of the one before, and ends in an epilogue:

    hidden += attended @ o^T
    inner = activation(gate) * up,   gate, up = norm(hidden) @ mlp_in^T
    hidden += inner @ mlp_out^T
    query, key, value = norm(hidden) @ qkv^T; query and key are rotated, key and value go to their slots of the cache

A `LayerSpec` says what else there is: biases, other norms and activations, no gate, norms of products or of heads.

Behind the last layer the fourth product is logits = norm(hidden) @ head^T. Before the first attention the product of
queries, keys and values runs alone (`fused_qkv`).

Reading the weights bounds a decode step, so their loads must never pause. One CTA per SM runs through all products. Its
four warpgroups run independently of each other:

- weights: streams tiles through one ring of TMA stages for all products. While the grid waits for the last results of
  one product, the ring fills with weights of the next; while attention ends, with weights of o.
- inputs: loads x, chunk by chunk, as soon as the grid has counted all results that make up a chunk (`grid_sync`).
- products: y^T [64, rows] += w [64, block_k] @ x^T [block_k, rows]. Rows are padded to a multiple of 8, and the weights
  are wgmma's large operand, as in `flat_matmul`. One CTA multiplies a unit of WIDTH columns over all of K; units of a
  round that is not full are split (`phases`).
- results: merges partial sums, applies a product's epilogue (`epilogues`), stores the result and counts it. Stores and
  counts queue behind the loads of weights, so this takes longer than a tile's product. Meanwhile the products of the
  next unit go on.

Norms need no pass of their own (`norms`). The CTA that finishes columns of hidden also stores them times the norm's
gain, and their sum of squares. 1 / rms is one factor per row, which the next product applies to its result.

Source: FlashDecoding++ (arXiv 2311.01282), section 4 (flat GEMM with double buffering), across products.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.pallas.fused_layer.norms import added_up, kind_of
from fdpp_jax.pallas.fused_layer.phases import LayerFacts, Step
from fdpp_jax.pallas.fused_layer.products import Products
from fdpp_jax.pallas.fused_layer.refs import NUM_COUNTER_ROWS, GlobalRefs, SharedRefs
from fdpp_jax.pallas.fused_layer.results import Results
from fdpp_jax.pallas.parts import grid_sync, ring
from fdpp_jax.pallas.parts.accumulators import HEIGHT, WIDTH
from fdpp_jax.plans.calls import HeadWeights, LayerCache, LayerWeights, NextAttention
from fdpp_jax.plans.hopper_layer import FusedLayerConfig, refuse_spec, rows_behind_norm
from fdpp_jax.plans.manual_axes import vary_as_operands
from fdpp_jax.plans.shapes import LayerShape, LayerSpec, cdiv, round_up


class Handover(NamedTuple):
    """What one launch leaves for the next, besides the residual stream and the cache.

    Attributes:
      counters: The grid's.
      added: [B, D] bfloat16, what has yet to be added to the residual stream; None unless products are normed.
      sums: [kinds, sums, rows] float32, by which it has to be normed; None as added.
    """

    counters: jax.Array
    added: jax.Array | None = None
    sums: jax.Array | None = None


def handover(shape: LayerShape, config: FusedLayerConfig) -> Handover:
    """That of the first launch: counters at zero, and nothing to be added."""
    depth = max(shape.num_query_heads * shape.head_dim, shape.hidden_size, shape.intermediate_size)
    num_heads = shape.num_query_heads + 2 * shape.num_kv_heads
    num_counters = max(cdiv(depth, config.chunk), config.num_ctas, num_heads)
    counters = grid_sync.counters(NUM_COUNTER_ROWS, num_counters)
    if not shape.spec.norms_products:
        return Handover(counters)
    sums = _sums(shape.spec, shape.batch, shape.hidden_size)
    return Handover(
        counters, jnp.zeros((shape.batch, shape.hidden_size), jnp.bfloat16), jnp.zeros(sums.shape, sums.dtype)
    )


def _sums(spec: LayerSpec, batch: int, hidden_size: int) -> jax.ShapeDtypeStruct:
    """Of the sums that a join leaves."""
    num_sums = round_up(2 * hidden_size // WIDTH, HEIGHT)
    return jax.ShapeDtypeStruct((kind_of(spec).num_sums, num_sums, round_up(batch, 8)), jnp.float32)


# Jitted so that all layers of a model share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("spec", "config", "interpret"))
@vary_as_operands
def fused_layer(
    attended: jax.Array,
    hidden: jax.Array,
    weights: LayerWeights,
    following: LayerWeights | HeadWeights | None,
    cache: LayerCache | None,
    before: Handover,
    *,
    spec: LayerSpec,
    config: FusedLayerConfig,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[jax.Array, NextAttention | jax.Array | None, Handover]:
    """A layer after its attention, and the next layer up to its own.

    Args:
      attended: [B, N, H] bfloat16, attention's output.
      hidden: [B, D] bfloat16, the residual stream before the layer.
      weights: Of this layer, bfloat16.
      following: Of the next layer; after the last one of the head, V a multiple of 32, or None without one.
      cache: Of the next layer, bfloat16; its keys and values are donated. None after the last layer.
      before: What the launch before left.
      spec: What the layer computes.
      config: Tiles and stages.
      interpret: Runs the kernel interpreted on the CPU, one launch per step, since the interpreter runs one CTA after
        the other.

    Returns:
      hidden [B, D] after the layer, as the next launch wants it (see `Handover.added`); what the next layer's attention
      reads, or after the last layer logits [B, V] float32, or None without a head; and what is left for the next
      launch. Without anything that follows, hidden is the whole residual stream.

    Raises:
      NotImplementedError: The kernel does not compute such a layer.
    """
    if refusal := refuse_spec(spec):
        raise NotImplementedError(refusal)
    batch, num_heads, head_dim = attended.shape
    hidden_size, inner_size = hidden.shape[1], weights.mlp_out.shape[1]
    is_last = not isinstance(following, LayerWeights)
    facts = LayerFacts(
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=0 if cache is None else cache.keys.shape[2],
        head_dim=head_dim,
        hidden_size=hidden_size,
        inner_size=inner_size,
        spec=spec,
        config=config,
        is_interpreted=interpret is not None,
        vocab_size=following.weight.shape[0] if isinstance(following, HeadWeights) else 0,
    )
    inputs: dict[str, jax.Array | None] = dict(attended=_loadable(attended.reshape(batch, -1)), hidden=hidden)
    inputs |= dict(added=before.added, sums=before.sums)
    inputs |= {name: x for name, x in weights._asdict().items() if name.startswith(("o", "mlp"))}
    rows = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    scaled = rows((ring.loadable_rows(rows_behind_norm(spec, batch)), hidden_size))
    sums, added = _sums(spec, batch, hidden_size), rows(hidden.shape) if spec.norms_products else None
    outputs: dict[str, jax.ShapeDtypeStruct | None] = dict(
        middle=rows(hidden.shape), scaled_middle=scaled, middle_sums=sums, added_middle=added,
        inner=rows((ring.loadable_rows(batch), inner_size)), last=rows(hidden.shape), added_last=added,
    )  # fmt: skip
    if following is not None or spec.norms_products:
        outputs["last_sums"] = sums
    match following:
        case LayerWeights():
            inputs |= _projections(following)
            inputs |= dict(next_norm=following.input_norm, next_norm_bias=following.input_norm_bias)
            outputs["scaled_last"] = scaled
        case HeadWeights():
            inputs |= dict(next_norm=following.norm, next_norm_bias=following.norm_bias, head=following.weight)
            outputs |= dict(scaled_last=scaled, logits=jax.ShapeDtypeStruct((batch, facts.vocab_size), jnp.float32))
    results, attention = _run(facts, inputs, outputs, cache, before.counters, interpret)
    hidden, left = results["last"], results.get("added_last")
    if following is None and left is not None:
        hidden = added_up(hidden, left, results["last_sums"], spec.norm.eps)
    after = Handover(results["counters"], left, None if left is None else results["last_sums"])
    return hidden, results.get("logits") if is_last else attention, after


@functools.partial(jax.jit, static_argnames=("spec", "config", "interpret"))
@vary_as_operands
def fused_qkv(
    x: jax.Array,
    weights: LayerWeights,
    cache: LayerCache,
    before: Handover,
    *,
    spec: LayerSpec,
    config: FusedLayerConfig,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[NextAttention, Handover]:
    """The first layer up to its attention.

    Args:
      x: [B, D] bfloat16, after the layer's first norm.
      weights: Of the first layer, bfloat16.
      cache: Of the first layer, as in `fused_layer`.
      before: `handover(shape, config)`.
      spec: What the layer computes.
      config: Tiles and stages.
      interpret: Runs the kernel interpreted on the CPU.

    Returns:
      What the layer's attention reads, and what is left for the next launch.

    Raises:
      NotImplementedError: The kernel does not compute such a layer.
    """
    if refusal := refuse_spec(spec):
        raise NotImplementedError(refusal)
    num_kv_heads, head_dim = cache.keys.shape[2:]
    facts = LayerFacts(
        batch=x.shape[0],
        num_heads=weights.qkv.shape[0] // head_dim - 2 * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=x.shape[1],
        inner_size=0,
        spec=spec,
        config=config,
        is_interpreted=interpret is not None,
        is_first=True,
    )
    inputs = dict(scaled_last=_loadable(x)) | _projections(weights)
    results, attention = _run(facts, inputs, {}, cache, before.counters, interpret)
    assert attention is not None
    return attention, before._replace(counters=results["counters"])


def _projections(weights: LayerWeights) -> dict[str, jax.Array | None]:
    """Of queries, keys and values."""
    return dict(qkv=weights.qkv, qkv_bias=weights.qkv_bias, query_norm=weights.query_norm, key_norm=weights.key_norm)


def _loadable(x: jax.Array) -> jax.Array:
    """x [B, columns] with as many rows as TMA reads."""
    return jnp.pad(x, ((0, ring.loadable_rows(x.shape[0]) - x.shape[0]), (0, 0)))


def _run(
    facts: LayerFacts,
    maybe_inputs: Mapping[str, jax.Array | None],
    maybe_outputs: Mapping[str, jax.ShapeDtypeStruct | None],
    cache: LayerCache | None,
    counters: jax.Array,
    interpret: plgpu.InterpretGPUParams | None,
) -> tuple[dict[str, jax.Array], NextAttention | None]:
    """The outputs and counters by name, and what the next attention reads, if there is one."""
    inputs = {name: x for name, x in maybe_inputs.items() if x is not None}
    outputs = {name: x for name, x in maybe_outputs.items() if x is not None}
    state, num_ctas, f32 = dict(counters=counters), facts.config.num_ctas, jnp.float32
    outputs["parts"] = jax.ShapeDtypeStruct((len(facts.phases), num_ctas, HEIGHT * facts.num_normed_rows), f32)
    if cache is not None:
        batch, capacity, num_kv_heads, head_dim = cache.keys.shape
        outputs["query"] = jax.ShapeDtypeStruct((batch, facts.num_heads * head_dim), jnp.bfloat16)
        rows = jnp.where(cache.slots < capacity, jnp.arange(batch) * capacity + cache.slots, batch * capacity)
        inputs["cache_rows"] = rows.astype(jnp.int32)
        if cache.rotation is not None:
            inputs["rotation"] = cache.rotation
        if facts.spec.norms_queries_and_keys:
            num_sums = 2 * facts.units_per_head * (facts.num_heads + 2 * num_kv_heads)
            outputs["head_sums"] = jax.ShapeDtypeStruct((num_sums, facts.num_rows), f32)
        flat = batch * capacity, num_kv_heads * head_dim
        state |= dict(keys=cache.keys.reshape(flat), values=cache.values.reshape(flat))
    refs = {name: jax.new_ref(x) for name, x in state.items()}  # updated in place
    if interpret is None:
        results = _launch(facts, facts.steps, inputs, refs, outputs, interpret)
    else:  # memory that nobody has written is NaN
        made = {name: jax.new_ref(jnp.full(x.shape, jnp.nan, x.dtype)) for name, x in outputs.items()}
        # Where heads are normalised, the second run of their step finds the sums of all units.
        is_again = facts.spec.norms_queries_and_keys and cache is not None
        for step in (*facts.steps, *facts.steps[-1:] * is_again):
            _launch(facts, (step,), inputs, refs | made, {}, interpret)
        results = {name: jax.freeze(ref) for name, ref in made.items()}
    results |= {name: jax.freeze(ref) for name, ref in refs.items()}
    if cache is None:
        return results, None
    query = results["query"].reshape(batch, facts.num_heads, head_dim)
    keys, values = (results[name].reshape(cache.keys.shape) for name in ("keys", "values"))
    return results, NextAttention(query, keys, values)


def _launch(
    facts: LayerFacts,
    steps: tuple[Step, ...],
    inputs: dict[str, jax.Array],
    refs: dict[str, jax.Ref],
    outputs: dict[str, jax.ShapeDtypeStruct],
    interpret: plgpu.InterpretGPUParams | None,
) -> dict[str, jax.Array]:
    """One launch; inputs, refs and outputs are named as in `GlobalRefs`."""
    config, num_rows, bf16, f32 = facts.config, facts.num_normed_rows, jnp.bfloat16, jnp.float32
    transforms = ring.tile_transforms(config.block_k)
    operands: dict[str, jax.Array | jax.Ref] = inputs | refs
    barriers = dict(
        w_ready=plgpu.Barrier(num_arrivals=2, num_barriers=config.num_stages),
        w_free=plgpu.Barrier(num_barriers=config.num_stages),
        x_ready=plgpu.Barrier(num_arrivals=config.num_x_tiles, num_barriers=config.num_x_stages),
        x_free=plgpu.Barrier(num_barriers=config.num_x_stages),
        y_ready=plgpu.Barrier(),
        y_free=plgpu.Barrier(),
    )
    x_shape = config.num_x_stages, config.num_x_tiles, num_rows, config.block_k

    def body(*gmem: jax.Ref, **smem: jax.Ref) -> None:
        by_name = dict(zip((*operands, *outputs), gmem, strict=True))
        arguments = GlobalRefs(**by_name), SharedRefs(**smem), facts, steps
        products, finish = Products(*arguments), Results(*arguments).finish
        group = lax.axis_index("warpgroup")
        for i, work in enumerate((products.multiply, products.stream_weights, products.stream_inputs, finish)):
            pl.when(group == i)(work)

    results = plgpu.kernel(
        body,
        out_type=list(outputs.values()),
        scratch_types=dict(
            w=plgpu.SMEM((config.num_stages, HEIGHT, config.block_k), bf16, transforms=transforms),
            x=plgpu.SMEM(x_shape, bf16, transforms=transforms),
            y=plgpu.SMEM((HEIGHT * num_rows,), f32),
            seen=plgpu.SMEM((1,), jnp.int32),
            **barriers,
        ),
        grid=(config.num_ctas,),
        grid_names=("cta",),
        num_threads=4,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="fused_layer",
    )(*operands.values())
    return dict(zip(outputs, results, strict=True))
