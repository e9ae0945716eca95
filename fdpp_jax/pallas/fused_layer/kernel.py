"""All matmuls from one attention to the next in one launch, or from the last attention to the logits.

Four products follow each other. Each needs the whole result of the one before, and ends in an epilogue:

    hidden += attended @ o^T
    inner = activation(gate) * up,   gate, up = norm(hidden) @ gate_up^T
    hidden += inner @ down^T
    query, key, value = norm(hidden) @ qkv^T; query and key are rotated, key and value go to their slots of the cache

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

The norm needs no pass of its own. The CTA that finishes columns of hidden also stores them times the norm's gain, and
their sum of squares. 1 / rms is one factor per row, which the next product applies to its result.

Source: FlashDecoding++ (arXiv 2311.01282), section 4 (flat GEMM with double buffering), across products.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.pallas.fused_layer.phases import LayerFacts, Step
from fdpp_jax.pallas.fused_layer.products import Products
from fdpp_jax.pallas.fused_layer.refs import NUM_HELPER_ROWS, NUM_RESULT_ROWS, GlobalRefs, SharedRefs
from fdpp_jax.pallas.fused_layer.results import Results
from fdpp_jax.pallas.parts import grid_sync, ring
from fdpp_jax.pallas.parts.accumulators import HEIGHT, WIDTH
from fdpp_jax.plans.calls import LayerCache, NextAttention
from fdpp_jax.plans.hopper_layer import FusedLayerConfig, refuse_spec
from fdpp_jax.plans.manual_axes import vary_as_operands
from fdpp_jax.plans.shapes import LayerSpec, cdiv, round_up


class BetweenWeights(NamedTuple):
    """The weights between two attentions, bfloat16; matrices are [out, in].

    Attributes:
      o: [D, N * H].
      post_norm: [D], of the norm before the MLP.
      gate_up: [2 * F, D].
      down: [D, F].
      next_norm: [D], of the norm before next_qkv or head; None without both.
      next_qkv: [(N + 2 K) * H, D], of the next layer; None after the last layer.
      next_bias: [(N + 2 K) * H], of the next layer's queries, keys and values; None without.
      head: [V, D], V a multiple of 64; after the last layer only, and optional there.
    """

    o: jax.Array
    post_norm: jax.Array
    gate_up: jax.Array
    down: jax.Array
    next_norm: jax.Array | None = None
    next_qkv: jax.Array | None = None
    next_bias: jax.Array | None = None
    head: jax.Array | None = None


def counters_for(max_depth: int, config: FusedLayerConfig) -> jax.Array:
    """The grid's counters at zero, for products with up to max_depth columns of x."""
    return grid_sync.counters(NUM_RESULT_ROWS + NUM_HELPER_ROWS, max(cdiv(max_depth, config.chunk), config.num_ctas))


# Jitted so that all layers of a model share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("spec", "config", "interpret"))
@vary_as_operands
def fused_layer(
    attended: jax.Array,
    hidden: jax.Array,
    weights: BetweenWeights,
    cache: LayerCache | None,
    counters: jax.Array,
    *,
    spec: LayerSpec,
    config: FusedLayerConfig,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[jax.Array, NextAttention | jax.Array | None, jax.Array]:
    """A layer after its attention, and the next layer up to its own.

    Args:
      attended: [B, N, H] bfloat16, attention's output.
      hidden: [B, D] bfloat16, the residual stream before the layer.
      weights: Of this layer and the next.
      cache: Of the next layer, bfloat16; its keys and values are donated. None after the last layer.
      counters: counters_for(max(N * H, D, F), config), then the counters that the last launch returned.
      spec: What the layer computes.
      config: Tiles and stages.
      interpret: Runs the kernel interpreted on the CPU, one launch per step, since the interpreter runs one CTA after
        the other.

    Returns:
      hidden [B, D] after the layer; what the next layer's attention reads, or after the last layer logits [B, V]
      float32, or None without a head; and counters.

    Raises:
      NotImplementedError: The kernel does not compute such a layer.
    """
    if refusal := refuse_spec(spec):
        raise NotImplementedError(refusal)
    batch, num_heads, head_dim = attended.shape
    hidden_size, inner_size = hidden.shape[1], weights.down.shape[1]
    facts = LayerFacts(
        num_rows=round_up(batch, 8),
        num_heads=num_heads,
        num_kv_heads=0 if cache is None else cache.keys.shape[2],
        head_dim=head_dim,
        hidden_size=hidden_size,
        inner_size=inner_size,
        spec=spec,
        config=config,
        is_interpreted=interpret is not None,
        vocab_size=0 if weights.head is None else weights.head.shape[0],
    )
    inputs: dict[str, jax.Array] = dict(attended=_loadable(attended.reshape(batch, -1)), hidden=hidden)
    inputs |= {name: weight for name, weight in weights._asdict().items() if weight is not None}
    rows = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    x = rows((ring.loadable_rows(batch), hidden_size))
    squares = jax.ShapeDtypeStruct((round_up(2 * hidden_size // WIDTH, HEIGHT), facts.num_rows), jnp.float32)
    outputs: dict[str, jax.ShapeDtypeStruct] = dict(
        middle=rows(hidden.shape), scaled_middle=x, middle_squares=squares,
        inner=rows((x.shape[0], inner_size)), last=rows(hidden.shape),
    )  # fmt: skip
    if weights.next_norm is not None:
        outputs |= dict(scaled_last=x, last_squares=squares)
    if weights.head is not None:
        outputs["logits"] = jax.ShapeDtypeStruct((batch, facts.vocab_size), jnp.float32)
    results, following = _run(facts, inputs, outputs, cache, counters, interpret)
    return results["last"], results.get("logits") if following is None else following, results["counters"]


@functools.partial(jax.jit, static_argnames=("spec", "config", "interpret"))
@vary_as_operands
def fused_qkv(
    x: jax.Array,
    qkv: jax.Array,
    bias: jax.Array | None,
    cache: LayerCache,
    counters: jax.Array,
    *,
    spec: LayerSpec,
    config: FusedLayerConfig,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[NextAttention, jax.Array]:
    """The first layer up to its attention.

    Args:
      x: [B, D] bfloat16, after the layer's first norm.
      qkv: [(N + 2 K) * H, D] bfloat16.
      bias: [(N + 2 K) * H] bfloat16, if there is one.
      cache: Of the first layer, as in `fused_layer`.
      counters: As in `fused_layer`, which gets the ones returned.
      spec: What the layer computes.
      config: Tiles and stages.
      interpret: Runs the kernel interpreted on the CPU.

    Returns:
      What the layer's attention reads, and counters.

    Raises:
      NotImplementedError: The kernel does not compute such a layer.
    """
    if refusal := refuse_spec(spec):
        raise NotImplementedError(refusal)
    num_kv_heads, head_dim = cache.keys.shape[2:]
    facts = LayerFacts(
        num_rows=round_up(x.shape[0], 8),
        num_heads=qkv.shape[0] // head_dim - 2 * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=x.shape[1],
        inner_size=0,
        spec=spec,
        config=config,
        is_interpreted=interpret is not None,
        is_first=True,
    )
    inputs = dict(scaled_last=_loadable(x), next_qkv=qkv) | ({} if bias is None else dict(next_bias=bias))
    results, following = _run(facts, inputs, {}, cache, counters, interpret)
    assert following is not None
    return following, results["counters"]


def _loadable(x: jax.Array) -> jax.Array:
    """x [B, columns] with as many rows as TMA reads."""
    return jnp.pad(x, ((0, ring.loadable_rows(x.shape[0]) - x.shape[0]), (0, 0)))


def _run(
    facts: LayerFacts,
    inputs: dict[str, jax.Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    cache: LayerCache | None,
    counters: jax.Array,
    interpret: plgpu.InterpretGPUParams | None,
) -> tuple[dict[str, jax.Array], NextAttention | None]:
    """The outputs and counters by name, and what the next attention reads, if there is one."""
    num_ctas, f32 = facts.config.num_ctas, jnp.float32
    parts = jax.ShapeDtypeStruct((len(facts.phases), num_ctas, HEIGHT * facts.num_rows), f32)
    outputs, state = outputs | dict(parts=parts), dict(counters=counters)
    if cache is not None:
        batch, capacity, num_kv_heads, head_dim = cache.keys.shape
        outputs["query"] = jax.ShapeDtypeStruct((batch, facts.num_heads * head_dim), jnp.bfloat16)
        rows = jnp.where(cache.slots < capacity, jnp.arange(batch) * capacity + cache.slots, batch * capacity)
        assert cache.rotation is not None
        inputs = inputs | dict(cache_rows=rows.astype(jnp.int32), rotation=cache.rotation)
        flat = batch * capacity, num_kv_heads * head_dim
        state |= dict(keys=cache.keys.reshape(flat), values=cache.values.reshape(flat))
    refs = {name: jax.new_ref(x) for name, x in state.items()}  # updated in place
    if interpret is None:
        results = _launch(facts, facts.steps, inputs, refs, outputs, interpret)
    else:  # memory that nobody has written is NaN
        made = {name: jax.new_ref(jnp.full(x.shape, jnp.nan, x.dtype)) for name, x in outputs.items()}
        for step in facts.steps:
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
    config, num_rows, bf16, f32 = facts.config, facts.num_rows, jnp.bfloat16, jnp.float32
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
