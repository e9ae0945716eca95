"""The arrays of a call and its static facts, which travel whole from the checks to the kernel."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from fdpp_jax.plans.shapes import AttentionShape


class AttentionArrays(NamedTuple):
    """The arrays of a call of attention.

    Attributes:
      query: [B, T, N, H].
      key: [B, S, K, H], or with a page table a pool [P, page_size, K, H].
      value: As key.
      lengths: [B] int32 live keys; None: all.
      phi: [] or [B, N] float32, natural-log units; None: online softmax.
      query_offset: [B] int32, the position of query 0 among the keys; None: 0.
      sinks: [N], one more score of each head, with a value of zero. Neither scaled nor capped.
      page_table: [B, pages] int32; entries of pages without live keys may be anything.
      key_scale: float32 factor on a quantised key: [K], or like key without H.
      value_scale: As key_scale.
      scale: [] float32, factor on the scores where it is traced; None: that of the options.
      bias: [B, N, T, S], each axis whole or 1, added to the scores behind the soft cap.
      mask: As bias, bool: False hides a key from a query.
      starts: [B] int32, the first live key; None: 0.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    lengths: jax.Array | None = None
    phi: jax.Array | None = None
    query_offset: jax.Array | None = None
    sinks: jax.Array | None = None
    page_table: jax.Array | None = None
    key_scale: jax.Array | None = None
    value_scale: jax.Array | None = None
    scale: jax.Array | None = None
    bias: jax.Array | None = None
    mask: jax.Array | None = None
    starts: jax.Array | None = None

    @property
    def capacity(self) -> int:
        """Keys that a sequence has room for, S."""
        return self.key.shape[1] * (1 if self.page_table is None else self.page_table.shape[1])


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """The static facts of a call of attention that its arrays do not tell.

    Attributes:
      scale: Factor on the scores, unless it is an array.
      is_causal: A query sees the keys up to its position.
      local_window_size: (left, right) keys around its position that a query sees; None: all.
      logits_soft_cap: Scores become cap * tanh(scores / cap); None: they stay.
      return_residual: Whether the log-sum-exp of the rows [B, T, N] float32 is a second result.
    """

    scale: float
    is_causal: bool = False
    local_window_size: tuple[int, int] | None = None
    logits_soft_cap: float | None = None
    return_residual: bool = False


def attention_shape(arrays: AttentionArrays, options: AttentionOptions, *, is_online: bool) -> AttentionShape:
    """The static shape of a call; is_online: whether softmax keeps a running max."""
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
        has_traced_scale=arrays.scale is not None,
        is_online=is_online,
        has_bias=arrays.bias is not None,
        has_mask=arrays.mask is not None,
        has_starts=arrays.starts is not None,
        returns_residual=options.return_residual,
    )


class LayerWeights(NamedTuple):
    """One layer's weights; matrices are [out, in]. What the layer's `LayerSpec` does not have is None.

    Attributes:
      input_norm: [D], of the norm before attention's projections.
      qkv: [(N + 2 K) * H, D], queries, keys and values.
      o: [D, N * H].
      mlp_norm: [D], of the norm before the MLP.
      mlp_in: [2 * F, D], gate and up; [F, D] without a gate.
      mlp_out: [D, F].
      qkv_bias: [(N + 2 K) * H].
      o_bias: [D].
      mlp_in_bias: As mlp_in has rows.
      mlp_out_bias: [D].
      query_norm: [H], of the queries' norm.
      key_norm: [H], of the keys' norm.
      o_norm: [D], of the norm behind o.
      mlp_out_norm: [D], of the norm behind mlp_out.
      input_norm_bias: [D], of a layer norm.
      mlp_norm_bias: [D], of a layer norm.
    """

    input_norm: jax.Array
    qkv: jax.Array
    o: jax.Array
    mlp_norm: jax.Array
    mlp_in: jax.Array
    mlp_out: jax.Array
    qkv_bias: jax.Array | None = None
    o_bias: jax.Array | None = None
    mlp_in_bias: jax.Array | None = None
    mlp_out_bias: jax.Array | None = None
    query_norm: jax.Array | None = None
    key_norm: jax.Array | None = None
    o_norm: jax.Array | None = None
    mlp_out_norm: jax.Array | None = None
    input_norm_bias: jax.Array | None = None
    mlp_norm_bias: jax.Array | None = None


class HeadWeights(NamedTuple):
    """What follows the last layer: the final norm [D], the head [V, D], and of a layer norm its bias [D]."""

    norm: jax.Array
    weight: jax.Array
    norm_bias: jax.Array | None = None


class LayerCache(NamedTuple):
    """Where a layer's new keys and values go.

    Attributes:
      keys: [B, S, K, H]; donated.
      values: As keys.
      slots: [B] int32, the slot of each row's new token; one beyond S goes nowhere.
      rotation: [2, B, R / 2] float32, cosines and sines of the rotary angles of the tokens' positions, where R
        elements of a head are rotated; None without a rotation.
    """

    keys: jax.Array
    values: jax.Array
    slots: jax.Array
    rotation: jax.Array | None


class NextAttention(NamedTuple):
    """What the next attention reads: query [B, N, H], and the cache [B, S, K, H] with the new token in it."""

    query: jax.Array
    keys: jax.Array
    values: jax.Array


def alike(arrays: Sequence[Any]) -> list[jax.Array]:
    """The arrays, all of which vary over the manual mesh axes that any of them varies over."""
    axes = frozenset[Any]().union(*(jax.typeof(x).mat.varying for x in arrays))
    missing = [tuple(sorted(axes - jax.typeof(x).mat.varying, key=str)) for x in arrays]
    return [lax.pcast(x, m, to="varying") if m else x for x, m in zip(arrays, missing, strict=True)]


def type_like(aval: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """The type of a result of a shape, which varies over the manual mesh axes of an operand's type."""
    sharding = NamedSharding(aval.sharding.mesh, PartitionSpec(*[None] * len(shape)))
    return aval.update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding)


def lower_without_mesh(function: Callable[..., Sequence[jax.Array]], context: Any, operands: Sequence[Any]) -> Any:
    """Lowers a primitive as a function, whose operands have no mesh: its axes are no concern of one device's program.

    Args:
      function: function(*operands) -> results.
      context: As a lowering rule gets it.
      operands: As a lowering rule gets them.
    """
    plain = [jax.core.ShapedArray(x.shape, x.dtype) for x in context.avals_in]
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return mlir.lower_fun(function, multiple_results=True)(context.replace(avals_in=plain), *operands)
