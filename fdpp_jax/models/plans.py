"""Which kernels one decode step of a model runs, and how a prefill does, for any device and without a checkpoint."""

import dataclasses

import jax
import jax.numpy as jnp

from fdpp_jax import heuristics
from fdpp_jax.models.checks import positive_int
from fdpp_jax.models.config import DecoderConfig
from fdpp_jax.plans.backend import AttentionPlan, LayerPlan, MatmulPlan
from fdpp_jax.plans.device import Device
from fdpp_jax.plans.shapes import AttentionShape, LayerShape, MatmulShape

# Tokens of a row that a prefill runs at once: enough rows for a matmul to be bound by the tensor cores on any GPU, and
# few enough for activations to be small beside the weights (0.6 GB a row of a 7B LLaMA).
PREFILL_CHUNK_SIZE = 4096


def model_plans(
    config: DecoderConfig,
    *,
    batch: int,
    capacity: int,
    device: Device | str,
    dtype: jax.typing.DTypeLike = "bfloat16",
    is_online: bool | None = None,
) -> list[tuple[str, AttentionShape | LayerShape | MatmulShape, AttentionPlan | LayerPlan | MatmulPlan]]:
    """The plan of every kind of kernel in one decode step, in the order they run in a layer.

    Args:
      config: The model's shapes.
      batch: Rows decoded together, B.
      capacity: Slots of the KV cache, S.
      device: A Device, or the name of a known one.
      dtype: dtype of weights, activations and cache.
      is_online: Whether the step has online softmax instead of a unified max. None: as `generate` takes it where
        nothing is asked for and nothing speaks against a unified max but the layers' plan.

    Returns:
      (name, shape, plan) of qkv, attention and layer, which run once a layer, then of the head. If the layer is fused,
      it includes all matmuls of the step but for a head that its plan does not fuse; else o, gate_up (up, where there
      is no gate) and down follow upon it. Where layers differ in attention, each kind is there once, under
      a name that tells its window.

    Raises:
      ValueError: batch or capacity is no positive integer, or the device is unknown.
    """
    batch, capacity = positive_int("batch", batch), positive_int("capacity", capacity)
    name = jnp.dtype(dtype).name

    def attention(layer: int) -> AttentionShape:
        options = config.attention_options(layer)
        return AttentionShape(
            batch=batch,
            query_length=1,
            capacity=capacity,
            num_query_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            dtype=name,
            local_window_size=options.get("local_window_size"),
            logits_soft_cap=options.get("logits_soft_cap"),
            has_query_offset="local_window_size" in options,
            has_lengths=False,  # as `ops.unchecked_decode_attention` plans: a cache holds no NaN behind the lengths
            starts_early=layer_plan.overlaps_attention,
            is_online=layer_plan.prefers_online(capacity) if is_online is None else is_online,
        )

    def matmul(what: str, k: int, n: int) -> tuple[str, MatmulShape, MatmulPlan]:
        shape = MatmulShape(batch, k, n, name, w_order="nk")
        return what, shape, heuristics.plan_matmul(shape, device)

    layer_shape = config.layer_shape(batch, dtype)
    layer_plan = heuristics.plan_layer(layer_shape, device)
    mlp_in = "gate_up" if config.mlp_in_size > config.intermediate_size else "up"
    attentions = list(dict.fromkeys(attention(layer) for layer in range(config.num_hidden_layers)))
    before = [matmul("qkv", config.hidden_size, config.qkv_size)]
    behind = [
        matmul("o", config.query_size, config.hidden_size),
        matmul(mlp_in, config.hidden_size, config.mlp_in_size),
        matmul("down", config.intermediate_size, config.hidden_size),
        matmul("head", config.hidden_size, config.vocab_size),
    ]
    if layer_plan.algorithm == "fused":
        before, behind, others = [], behind[-1:], "qkv"
        if layer_plan.fuses_head:
            behind, others = [], "qkv and head"
        layer_plan = dataclasses.replace(layer_plan, reason=f"{layer_plan.reason}; with {others}")
    return [
        *before,
        *((_name(shape, attentions), shape, heuristics.plan_attention(shape, device)) for shape in attentions),
        ("layer", layer_shape, layer_plan),
        *behind,
    ]


@dataclasses.dataclass(frozen=True)
class PrefillPlan:
    """How a prefill runs.

    Attributes:
      chunk_size: Tokens of a row that run at once.
      reads_cache: Whether they attend to the cache; if not, they are whole prompts, which attend to themselves.
      takes_unified_max: Whether a unified max is asked for, and a kernel that knows it computes attention.
    """

    chunk_size: int
    reads_cache: bool
    takes_unified_max: bool


def plan_prefill(
    config: DecoderConfig,
    *,
    batch: int,
    length: int,
    capacity: int,
    has_unified_max: bool,
    is_behind_cache: bool,
    chunk_size: int | None,
    device: Device | str,
    dtype: jax.typing.DTypeLike = "bfloat16",
) -> PrefillPlan:
    """How a prefill runs, from the model's shapes.

    Args:
      config: The model's shapes.
      batch: Rows, B.
      length: Tokens of a row, T.
      capacity: Slots of the KV cache, S.
      has_unified_max: Whether softmax has a unified max.
      is_behind_cache: Whether the cache may hold tokens that they follow.
      chunk_size: Tokens of a row to run at once. None: PREFILL_CHUNK_SIZE, or the whole prompt where cuDNN computes
        that and no kernel computes attention over a cache.
      device: A Device, or the name of a known one.
      dtype: dtype of activations and cache.

    Raises:
      ValueError: batch, length, capacity or chunk_size is no positive integer.
    """
    batch, length, capacity = (
        positive_int(name, size) for name, size in (("batch", batch), ("length", length), ("capacity", capacity))
    )
    if chunk_size is not None:
        chunk_size = positive_int("prefill_chunk_size", chunk_size)

    def attention(query_length: int, *, reads_cache: bool) -> list[AttentionPlan]:
        slots = capacity if reads_cache else None
        layers = range(config.num_hidden_layers)
        shapes = {prefill_shape(config, layer, batch, query_length, slots, dtype, has_unified_max) for layer in layers}
        return [heuristics.plan_attention(shape, device) for shape in shapes]

    if chunk_size is None:
        chunk_size = PREFILL_CHUNK_SIZE
        if length > chunk_size and not is_behind_cache:
            in_pieces = attention(chunk_size, reads_cache=True)
            whole = attention(length, reads_cache=False)
            is_plain = any(plan.backend == "xla" and plan.algorithm != "cudnn" for plan in in_pieces)
            if is_plain and any(plan.algorithm == "cudnn" for plan in whole):
                chunk_size = length
    chunk_size = min(chunk_size, length)
    reads_cache = is_behind_cache or chunk_size < length
    takes_unified_max = has_unified_max and any(
        plan.backend != "xla" for plan in attention(chunk_size, reads_cache=reads_cache)
    )
    return PrefillPlan(chunk_size, reads_cache, takes_unified_max)


def prefill_plans(
    config: DecoderConfig,
    *,
    batch: int,
    length: int,
    capacity: int,
    device: Device | str,
    dtype: jax.typing.DTypeLike = "bfloat16",
    has_unified_max: bool = True,
    chunk_size: int | None = None,
) -> list[tuple[str, AttentionShape, AttentionPlan]]:
    """The plan of every kind of attention in a prefill of a new cache; the arguments are those of `plan_prefill`.

    Returns:
      (name, shape, plan) of a piece's attention: the shape's queries are the piece's tokens. Where layers differ, each
      kind is there once, under a name that tells its window.

    Raises:
      ValueError: batch, length, capacity or chunk_size is no positive integer, or the device is unknown.
    """
    plan = plan_prefill(
        config,
        batch=batch,
        length=length,
        capacity=capacity,
        has_unified_max=has_unified_max,
        is_behind_cache=False,
        chunk_size=chunk_size,
        device=device,
        dtype=dtype,
    )
    slots, is_unified = capacity if plan.reads_cache else None, plan.takes_unified_max
    layers = range(config.num_hidden_layers)
    shapes = dict.fromkeys(
        prefill_shape(config, layer, batch, plan.chunk_size, slots, dtype, is_unified) for layer in layers
    )
    return [
        (_name(shape, list(shapes), "prefill attention"), shape, heuristics.plan_attention(shape, device))
        for shape in shapes
    ]


def prefill_shape(
    config: DecoderConfig,
    layer: int,
    batch: int,
    query_length: int,
    capacity: int | None,
    dtype: jax.typing.DTypeLike,
    has_unified_max: bool,
) -> AttentionShape:
    """A layer's attention in a prefill, over a cache of that capacity, or None: over the queries' own keys."""
    num_keys = query_length if capacity is None else capacity
    options = config.prefill_options(layer, num_keys)
    return AttentionShape(
        batch=batch,
        query_length=query_length,
        capacity=num_keys,
        num_query_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype=jnp.dtype(dtype).name,
        is_causal=True,
        local_window_size=options.get("local_window_size"),
        logits_soft_cap=options.get("logits_soft_cap"),
        has_lengths=capacity is not None,
        has_query_offset=capacity is not None,
        is_online=not has_unified_max,
    )


def _name(shape: AttentionShape, all_shapes: list[AttentionShape], what: str = "attention") -> str:
    if len(all_shapes) == 1 or shape.local_window_size is None:
        return what
    return f"{what} (window {shape.local_window_size[0] + 1})"
