"""What lies between two attentions, a launch for each product, with all that can be done with its columns.

    hidden += attended @ o^T
    inner = activation(gate) * up,   gate, up = norm(hidden) @ mlp_in^T
    hidden += inner @ mlp_out^T
    query, key, value = norm(hidden) @ qkv^T; query and key are rotated, key and value go to their slots of the cache

An RMSNorm needs no pass of its own. Who stores columns of hidden also stores them times the norm's gain, and the sum of
their squares. 1 / rms is one factor per row, which the next product applies to its result. Other norms are launches of
their own, and so are norms of queries and keys, whose heads are wider than a program's columns.

The loops over tiles are those of `gemv` and `flat_matmul`. What a `LayerSpec` decides is in here and in `epilogues`.

Source: FlashDecoding++ (arXiv 2311.01282), section 4 (flat GEMM with double buffering).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton

from fdpp_jax.plans.calls import LayerCache, LayerWeights, NextAttention
from fdpp_jax.plans.shapes import LayerSpec, Norm, cdiv
from fdpp_jax.plans.triton_layer import FusedLayerConfig, folds_norms, refuse_spec
from fdpp_jax.plans.triton_matmul import GemvConfig, MatmulConfig, padded_rows
from fdpp_jax.triton import bridge
from fdpp_jax.triton.fused_layer import epilogues, norms
from fdpp_jax.triton.fused_layer.facts import HeadFacts, ProductFacts

_HEAD_WARPS = 1
_NORM_WARPS = 8


class _Normed(NamedTuple):
    """Rows behind a norm.

    Attributes:
      x: [B, D], normalised; where squares are given, the rows times the norm's gain, not yet divided by their rms.
      squares: [parts, B] float32, sums of squares of the rows before the gain; None where x is normalised in full.
    """

    x: jax.Array
    squares: jax.Array | None = None


# Jitted so that all layers of a model share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("spec", "config"))
def fused_layer(
    attended: jax.Array,
    hidden: jax.Array,
    weights: LayerWeights,
    following: LayerWeights | None,
    cache: LayerCache | None,
    *,
    spec: LayerSpec,
    config: FusedLayerConfig,
) -> tuple[jax.Array, NextAttention | None]:
    """A layer after its attention, and the next layer up to its own.

    Args:
      attended: [B, N, H], attention's output.
      hidden: [B, D], the residual stream before the layer.
      weights: Of this layer.
      following: Of the next layer; None behind the last one.
      cache: Of the next layer; its keys and values are donated. None behind the last one.
      spec: What the layer computes.
      config: Tiles.

    Returns:
      hidden [B, D] after the layer, and what the next layer's attention reads, if there is one.

    Raises:
      NotImplementedError: The kernels do not compute such a layer.
    """
    _check(spec)
    x = attended.reshape(attended.shape[0], -1)
    mlp_norm = weights.mlp_norm, weights.mlp_norm_bias
    hidden, normed = _joined(x, weights.o, weights.o_bias, weights.o_norm, hidden, mlp_norm, spec, config.o)
    assert normed is not None
    inner = _mlp_in(normed, weights.mlp_in, weights.mlp_in_bias, spec, config.mlp_in)
    next_norm = None if following is None else (following.input_norm, following.input_norm_bias)
    hidden, normed = _joined(
        inner, weights.mlp_out, weights.mlp_out_bias, weights.mlp_out_norm, hidden, next_norm, spec, config.mlp_out
    )
    if following is None:
        return hidden, None
    assert normed is not None
    assert cache is not None
    return hidden, _qkv(normed, following, cache, spec, config.qkv)


@functools.partial(jax.jit, static_argnames=("spec", "config"))
def fused_qkv(
    x: jax.Array, weights: LayerWeights, cache: LayerCache, *, spec: LayerSpec, config: FusedLayerConfig
) -> NextAttention:
    """The first layer up to its attention.

    Args:
      x: [B, D], behind the layer's first norm.
      weights: Of the layer.
      cache: Of the layer, as in `fused_layer`.
      spec: What the layer computes.
      config: Tiles.

    Returns:
      What the layer's attention reads.

    Raises:
      NotImplementedError: The kernels do not compute such a layer.
    """
    _check(spec)
    return _qkv(_Normed(x), weights, cache, spec, config.qkv)


def _check(spec: LayerSpec) -> None:
    if refusal := refuse_spec(spec):
        raise NotImplementedError(refusal)


def _joined(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    product_norm: jax.Array | None,
    hidden: jax.Array,
    norm: tuple[jax.Array, jax.Array | None] | None,
    spec: LayerSpec,
    config: MatmulConfig,
) -> tuple[jax.Array, _Normed | None]:
    """hidden + x @ w^T, and that behind the next norm (gain and bias), if there is one."""
    gain = None if norm is None else norm[0]
    if folds_norms(spec):
        return _product(_Normed(x), w, bias, config, spec.norm, hidden=hidden, gain=gain)
    added_at_once = None if spec.norms_products else hidden
    y, _ = _product(_Normed(x), w, bias, config, spec.norm, hidden=added_at_once)
    if norm is None and not spec.norms_products:
        return y, None
    nothing = jax.ShapeDtypeStruct((1, 1), x.dtype)
    whole = jax.ShapeDtypeStruct(hidden.shape, x.dtype)
    after, normed = bridge.call(
        norms.fused_norm,
        y,
        _or(product_norm, y),
        hidden if spec.norms_products else y,
        _or(gain, y),
        _or(None if norm is None else norm[1], y),
        results=(whole if spec.norms_products else nothing, nothing if norm is None else whole),
        grid=(hidden.shape[0],),
        arch=config.arch,
        num_warps=_NORM_WARPS,
        num_stages=1,
        SIZE=hidden.shape[1],
        BLOCK=triton.next_power_of_2(hidden.shape[1]),
        NORMS_PRODUCT=spec.norms_products,
        HAS_NEXT=norm is not None,
        IS_LAYER=spec.norm.kind == "layer",
        EPS=spec.norm.eps,
        GAIN_OFFSET=spec.norm.gain_offset,
    )
    return after if spec.norms_products else y, None if norm is None else _Normed(normed)


def _product(
    normed: _Normed,
    w: jax.Array,
    bias: jax.Array | None,
    config: MatmulConfig,
    norm: Norm,
    *,
    hidden: jax.Array | None = None,
    gain: jax.Array | None = None,
) -> tuple[jax.Array, _Normed | None]:
    """x @ w^T (+ bias) (+ hidden), and where there is a gain, that times the gain with its sums of squares."""
    x = normed.x
    num_rows, width = x.shape[0], w.shape[0]
    num_programs = cdiv(width, config.block_n)
    out, nothing = (jax.ShapeDtypeStruct(size, x.dtype) for size in ((num_rows, width), (1, 1)))
    squares = jax.ShapeDtypeStruct((1, 1) if gain is None else (num_programs, num_rows), jnp.float32)
    y, scaled, squared = bridge.call(
        epilogues.fused_product,
        *_operands(normed, w, bias),
        _or(hidden, x),
        _or(gain, x),
        results=(out, nothing if gain is None else out, squares),
        **_settings(normed, w, bias, config, norm),
        HAS_RESIDUAL=hidden is not None,
        HAS_GAIN=gain is not None,
        GAIN_OFFSET=norm.gain_offset,
    )
    return y, None if gain is None else _Normed(scaled, squared)


def _mlp_in(normed: _Normed, w: jax.Array, bias: jax.Array | None, spec: LayerSpec, config: MatmulConfig) -> jax.Array:
    """[B, F]: activation(x @ w^T (+ bias)), or activation(gate) * up."""
    inner_size = w.shape[0] // (1 + spec.is_gated)
    (inner,) = bridge.call(
        epilogues.fused_mlp_in,
        *_operands(normed, w, bias),
        results=(jax.ShapeDtypeStruct((normed.x.shape[0], inner_size), normed.x.dtype),),
        **_settings(normed, w, bias, config, spec.norm),
        ACTIVATION=spec.activation,
        IS_GATED=spec.is_gated,
    )
    return inner


def _qkv(
    normed: _Normed, weights: LayerWeights, cache: LayerCache, spec: LayerSpec, config: MatmulConfig
) -> NextAttention:
    """Queries, and the cache with the new keys and values."""
    batch, capacity, num_kv_heads, head_dim = cache.keys.shape
    kv_width = num_kv_heads * head_dim
    query_width = weights.qkv.shape[0] - 2 * kv_width
    turned = 0 if cache.rotation is None else 2 * cache.rotation.shape[2]
    places = cache.slots, _or(cache.rotation, cache.slots), cache.keys, cache.values
    facts = HeadFacts(batch, weights.qkv.shape[0], capacity, head_dim, query_width, kv_width, turned)
    results = (jax.ShapeDtypeStruct((batch, query_width), normed.x.dtype),)
    if spec.norms_queries_and_keys:
        qkv, _ = _product(normed, weights.qkv, weights.qkv_bias, config, spec.norm)
        assert weights.query_norm is not None
        assert weights.key_norm is not None
        query, keys, values = bridge.call(
            epilogues.fused_heads,
            qkv,
            weights.query_norm,
            weights.key_norm,
            *places,
            results=results,
            updated=(5, 6),
            grid=(batch, qkv.shape[1] // head_dim),
            arch=config.arch,
            num_warps=_HEAD_WARPS,
            num_stages=1,
            h=facts,
            EPS=spec.norm.eps,
            GAIN_OFFSET=spec.norm.gain_offset,
            BLOCK=triton.next_power_of_2(head_dim // 2),
        )
    else:
        query, keys, values = bridge.call(
            epilogues.fused_qkv,
            *_operands(normed, weights.qkv, weights.qkv_bias),
            *places,
            results=results,
            updated=(6, 7),
            **_settings(normed, weights.qkv, weights.qkv_bias, config, spec.norm),
            h=facts,
        )
    return NextAttention(query.reshape(batch, -1, head_dim), keys, values)


def _operands(normed: _Normed, w: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, ...]:
    """The arrays that all products begin with."""
    return normed.x, w, _or(bias, w), _or(normed.squares, w)


def _settings(
    normed: _Normed, w: jax.Array, bias: jax.Array | None, config: MatmulConfig, norm: Norm
) -> dict[str, Any]:
    """How a product is launched, and its facts."""
    (num_rows, depth), width = normed.x.shape, w.shape[0]
    is_row = isinstance(config, GemvConfig)
    assert num_rows == 1 or not is_row, f"gemv takes one row, got {num_rows}"
    assert config.split_k == 1, f"K is whole, got a split of {config.split_k}"
    facts = ProductFacts(
        is_row=is_row,
        num_rows=num_rows,
        padded_rows=1 if is_row else padded_rows(num_rows, "nk", config.arch),
        depth=depth,
        width=width,
        block_n=config.block_n,
        block_k=config.block_k,
        k_groups=1 if isinstance(config, GemvConfig) else config.k_groups,
        num_stages=config.num_stages,
        has_bias=bias is not None,
        num_parts=0 if normed.squares is None else normed.squares.shape[0],
        eps=norm.eps,
    )
    return dict(
        grid=(cdiv(width, config.block_n),),
        arch=config.arch,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        f=facts,
    )


def _or(array: jax.Array | None, other: jax.Array) -> jax.Array:
    """The array; where there is none, another one, which the kernel does not read in its place."""
    return other if array is None else array
