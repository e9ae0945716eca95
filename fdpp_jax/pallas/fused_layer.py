"""All matmuls between one attention and the next in one launch, or those behind the last one.

Four products follow upon each other, each of the whole result of the one before, with what lies between them fused in:

    hidden += attended @ o^T
    inner = silu(g) * u,        g, u = norm(hidden) @ gate_up^T
    hidden += inner @ down^T
    query, key, value = norm(hidden) @ qkv^T, rotated; key and value go to their slots of the cache

Behind the last layer there are logits = norm(hidden) @ head^T in their place, and the last line alone comes before the
first attention (`fused_qkv`).

A decode step is bound by reading the weights, so they must not stop coming. One CTA an SM runs through all products,
and its four warpgroups run on their own:

- weights: streams tiles through a ring of TMA stages that knows no end of a product: while the grid waits for the last
  results of one product, the ring fills with weights of the next; and while attention ends, with those of o.
- inputs: loads x, chunk by chunk, as soon as the grid has counted all results that make up the chunk (grid_sync).
- products: y^T [64, rows] += w [64, block_k] @ x^T [block_k, rows], rows padded to 8, with the weights as the large
  operand (as in flat_matmul). A unit of WIDTH columns, over all of K, is one CTA's, but for those that fill no round
  (layer_phases). Gate and up, and the halves of a head that rotate together, are one unit with its partner columns.
- results: what becomes of a unit's product, until it is stored and counted. That takes longer than a tile's product,
  since stores and counts queue up behind the loads of weights; the next unit's products go on meanwhile.

RMSNorm needs no pass of its own: whoever finishes columns of hidden stores them times the norm's weight, too, and their
sum of squares; 1 / rms is a factor of a whole row, which the next product applies to its result.

Source: FlashDecoding++ (arXiv 2311.01282), section 4 (flat GEMM with double buffering), across products.
"""

import functools
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.config import FusedLayerConfig, round_up
from fdpp_jax.pallas import grid_sync, ring
from fdpp_jax.pallas.accumulators import HEIGHT, WIDTH
from fdpp_jax.pallas.layer_phases import Facts, Step
from fdpp_jax.pallas.layer_products import Products
from fdpp_jax.pallas.layer_results import Results


class LayerWeights(NamedTuple):
    """bfloat16; matrices are [out, in].

    Attributes:
      o: [D, N * H].
      post_norm: [D], of the norm before the MLP.
      gate_up: [2 * F, D].
      down: [D, F].
      next_norm: [D], of the norm before next_qkv or head; None without both.
      next_qkv: [(N + 2 K) * H, D], of the next layer; None after the last layer.
      next_bias: [(N + 2 K) * H], of the next layer's queries, keys and values, if it has one.
      head: [V, D], V a multiple of 64; only after the last layer, where it may be left out.
    """

    o: jax.Array
    post_norm: jax.Array
    gate_up: jax.Array
    down: jax.Array
    next_norm: jax.Array | None = None
    next_qkv: jax.Array | None = None
    next_bias: jax.Array | None = None
    head: jax.Array | None = None


class NextLayer(NamedTuple):
    """What the next layer's attention reads: query [B, N, H], and the cache [B, S, K, H] with the new token in it."""

    query: jax.Array
    keys: jax.Array
    values: jax.Array


# A row for each of the products that another reads: units that are done of each chunk. A row for each product: guests
# that are done of each unit that is split.
_RESULTS, _GUESTS = 3, 4


def counters_for(max_depth: int, config: FusedLayerConfig) -> jax.Array:
    """What the grid counts, all at zero, for products with up to max_depth columns of x."""
    return grid_sync.counters(_RESULTS + _GUESTS, max(pl.cdiv(max_depth, config.chunk), config.num_ctas))


# Jitted so that a model's layers share one trace and one lowering: a kernel takes some 0.3 s to lower.
@functools.partial(jax.jit, static_argnames=("eps", "config", "interpret"))
def fused_layer(
    attended: jax.Array,
    hidden: jax.Array,
    weights: LayerWeights,
    rotation: jax.Array,
    keys: jax.Array | None,
    values: jax.Array | None,
    lengths: jax.Array,
    counters: jax.Array,
    *,
    eps: float,
    config: FusedLayerConfig,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[jax.Array, NextLayer | jax.Array | None, jax.Array]:
    """A layer after its attention, and the next layer up to its own.

    Args:
      attended: [B, N, H] bfloat16, attention's output.
      hidden: [B, D] bfloat16, the residual stream before the layer.
      weights: Of this layer and the next.
      rotation: [2, B, H / 2] float32, cosines and sines of the rotary angles of the tokens' positions.
      keys: [B, S, K, H] bfloat16, of the next layer; donated. None after the last layer.
      values: As keys.
      lengths: [B] int32, the slot that each row's new key and value go to; one beyond S goes nowhere.
      counters: counters_for(max(N * H, D, F), config), then those that the last layer returned.
      eps: Of both norms.
      config: Tiles and stages.
      interpret: Runs the kernel interpreted on the CPU, a launch a step: it runs one CTA after the other.

    Returns:
      hidden [B, D] after the layer; what the next layer's attention reads, or after the last layer logits [B, V]
      float32, or None without a head; and counters.
    """
    batch, num_heads, head_dim = attended.shape
    hidden_size, inner_size = hidden.shape[1], weights.down.shape[1]
    facts = Facts(
        num_rows=round_up(batch, 8),
        num_heads=num_heads,
        num_kv_heads=0 if keys is None else keys.shape[2],
        head_dim=head_dim,
        hidden_size=hidden_size,
        inner_size=inner_size,
        eps=eps,
        config=config,
        is_interpreted=interpret is not None,
        vocab_size=0 if weights.head is None else weights.head.shape[0],
    )
    inputs: dict[str, Any] = dict(attended=_loadable(attended.reshape(batch, -1)), hidden=hidden)
    inputs |= {name: weight for name, weight in weights._asdict().items() if weight is not None}
    rows = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    x = rows((ring.loadable_rows(batch), hidden_size))
    squares = jax.ShapeDtypeStruct((round_up(2 * hidden_size // WIDTH, HEIGHT), facts.num_rows), jnp.float32)
    outputs: dict[str, Any] = dict(
        middle=rows(hidden.shape), scaled_middle=x, middle_squares=squares,
        inner=rows((x.shape[0], inner_size)), last=rows(hidden.shape),
    )  # fmt: skip
    if weights.next_norm is not None:
        outputs |= dict(scaled_last=x, last_squares=squares)
    if weights.head is not None:
        outputs["logits"] = jax.ShapeDtypeStruct((batch, facts.vocab_size), jnp.float32)
    cache = None if keys is None or values is None else _Cache(keys, values, lengths, rotation)
    results, following = _run(facts, inputs, outputs, cache, counters, interpret)
    return results["last"], results.get("logits") if following is None else following, results["counters"]


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def fused_qkv(
    x: jax.Array,
    qkv: jax.Array,
    bias: jax.Array | None,
    rotation: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    lengths: jax.Array,
    counters: jax.Array,
    *,
    config: FusedLayerConfig,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[NextLayer, jax.Array]:
    """The first layer up to its attention.

    Args:
      x: [B, D] bfloat16, after the layer's first norm.
      qkv: [(N + 2 K) * H, D] bfloat16.
      bias: [(N + 2 K) * H] bfloat16, if there is one.
      rotation: As in `fused_layer`, like all that follows.
      keys: [B, S, K, H].
      values: [B, S, K, H].
      lengths: [B] int32.
      counters: What `fused_layer` gets then.
      config: Tiles and stages.
      interpret: Runs the kernel interpreted on the CPU.

    Returns:
      What the layer's attention reads, and counters.
    """
    num_kv_heads, head_dim = keys.shape[2:]
    facts = Facts(
        num_rows=round_up(x.shape[0], 8),
        num_heads=qkv.shape[0] // head_dim - 2 * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=x.shape[1],
        inner_size=0,
        eps=0.0,
        config=config,
        is_interpreted=interpret is not None,
        is_first=True,
    )
    inputs = dict(scaled_last=_loadable(x), next_qkv=qkv) | ({} if bias is None else dict(next_bias=bias))
    results, following = _run(facts, inputs, {}, _Cache(keys, values, lengths, rotation), counters, interpret)
    assert following is not None
    return following, results["counters"]


def _loadable(x: jax.Array) -> jax.Array:
    """x [B, columns] with as many rows as TMA reads."""
    return jnp.pad(x, ((0, ring.loadable_rows(x.shape[0]) - x.shape[0]), (0, 0)))


class _Cache(NamedTuple):
    """Where queries, keys and values go to; as in `fused_layer`."""

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array
    rotation: jax.Array


def _run(
    facts: Facts,
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    cache: _Cache | None,
    counters: jax.Array,
    interpret: plgpu.InterpretGPUParams | None,
) -> tuple[dict[str, jax.Array], NextLayer | None]:
    """The outputs and counters by name, and what the next attention reads, if there is one."""
    num_ctas, f32 = facts.config.num_ctas, jnp.float32
    parts = jax.ShapeDtypeStruct((len(facts.phases), num_ctas, HEIGHT * facts.num_rows), f32)
    outputs, state = outputs | dict(parts=parts), dict(counters=counters)
    if cache is not None:
        batch, capacity, num_kv_heads, head_dim = cache.keys.shape
        outputs["query"] = jax.ShapeDtypeStruct((batch, facts.num_heads * head_dim), jnp.bfloat16)
        slots = jnp.where(cache.lengths < capacity, jnp.arange(batch) * capacity + cache.lengths, batch * capacity)
        inputs = inputs | dict(slots=slots.astype(jnp.int32), rotation=cache.rotation)
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
    return results, NextLayer(query, keys, values)


def _launch(
    facts: Facts,
    steps: tuple[Step, ...],
    inputs: dict[str, Any],
    refs: dict[str, Any],
    outputs: dict[str, Any],
    interpret: plgpu.InterpretGPUParams | None,
) -> dict[str, jax.Array]:
    config, num_rows, bf16, f32 = facts.config, facts.num_rows, jnp.bfloat16, jnp.float32
    transforms = ring.tile_transforms(config.block_k)
    operands = inputs | refs
    barriers = dict(
        w_ready=plgpu.Barrier(num_arrivals=2, num_barriers=config.num_stages),
        w_free=plgpu.Barrier(num_barriers=config.num_stages),
        x_ready=plgpu.Barrier(num_arrivals=config.num_x_tiles, num_barriers=config.num_x_stages),
        x_free=plgpu.Barrier(num_barriers=config.num_x_stages),
        y_ready=plgpu.Barrier(),
        y_free=plgpu.Barrier(),
    )
    x_shape = config.num_x_stages, config.num_x_tiles, num_rows, config.block_k

    def body(*args: Any, **smem: Any) -> None:
        gmem = types.SimpleNamespace(**dict(zip((*operands, *outputs), args, strict=True)))
        gmem.results = gmem.counters.at[pl.ds(0, _RESULTS)]
        gmem.guests = gmem.counters.at[pl.ds(_RESULTS, _GUESTS)]
        arguments = gmem, types.SimpleNamespace(**smem), facts, steps
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
