"""A fused layer's inputs of every kind, and what it computes in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.pallas.fused_layer import fused_layer, handover
from fdpp_jax.plans.calls import LayerCache, LayerWeights
from fdpp_jax.plans.hopper_layer import FusedLayerConfig
from fdpp_jax.plans.shapes import LayerShape, LayerSpec, Norm

ON_GPU = jax.default_backend() == "gpu"
EPS = 1e-5
CAPACITY = 24


@dataclasses.dataclass(frozen=True)
class Case:
    shape: LayerShape
    config: FusedLayerConfig
    seed: int = 0

    @property
    def spec(self):
        return self.shape.spec

    def inputs(self):
        """attended, hidden, the layer's weights, the next layer's, cache."""
        shape, spec, keys = self.shape, self.spec, iter(jax.random.split(jax.random.key(self.seed), 40))
        query_size, kv_size = shape.num_query_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        hidden_size, inner = shape.hidden_size, shape.intermediate_size * (2 if spec.is_gated else 1)

        def normal(*sizes, scale=1.0):
            return (scale * jax.random.normal(next(keys), sizes)).astype(jnp.bfloat16)

        def matrix(rows, columns):
            return normal(rows, columns, scale=columns**-0.5)

        def gain(size=hidden_size):
            return (1 - spec.norm.gain_offset) + normal(size, scale=0.1)

        def maybe(is_there, make, *arguments):
            return make(*arguments) if is_there else None

        def layer():
            is_layer_norm = spec.norm.kind == "layer"
            return LayerWeights(
                input_norm=gain(),
                qkv=matrix(query_size + 2 * kv_size, hidden_size),
                o=matrix(hidden_size, query_size),
                mlp_norm=gain(),
                mlp_in=matrix(inner, hidden_size),
                mlp_out=matrix(hidden_size, shape.intermediate_size),
                qkv_bias=maybe(spec.has_qkv_bias, normal, query_size + 2 * kv_size),
                o_bias=maybe(spec.has_o_bias, normal, hidden_size),
                mlp_in_bias=maybe(spec.has_mlp_bias, normal, inner),
                mlp_out_bias=maybe(spec.has_mlp_bias, normal, hidden_size),
                query_norm=maybe(spec.norms_queries_and_keys, gain, shape.head_dim),
                key_norm=maybe(spec.norms_queries_and_keys, gain, shape.head_dim),
                o_norm=maybe(spec.norms_products, gain),
                mlp_out_norm=maybe(spec.norms_products, gain),
                input_norm_bias=maybe(is_layer_norm, normal, hidden_size),
                mlp_norm_bias=maybe(is_layer_norm, normal, hidden_size),
            )

        weights, following = layer(), layer()
        share = 0 if spec.rotation is None else spec.rotation.share
        angles = jax.random.uniform(next(keys), (shape.batch, int(shape.head_dim * share) // 2), maxval=6.0)
        slots = shape.batch, CAPACITY, shape.num_kv_heads, shape.head_dim
        attended = normal(shape.batch, shape.num_query_heads, shape.head_dim)
        # With a mean, so that a layer norm has something to subtract.
        hidden = 0.5 + normal(shape.batch, hidden_size)
        cache = LayerCache(
            keys=normal(*slots),
            values=normal(*slots),
            slots=jax.random.randint(next(keys), (shape.batch,), 0, CAPACITY, jnp.int32),
            rotation=jnp.stack([jnp.cos(angles), jnp.sin(angles)]) if share else None,
        )
        return attended, hidden, weights, following, cache

    def handover(self):
        """Of a launch before, whose last product still lacks its norm where a layer has such norms."""
        before = handover(self.shape, self.config)
        if before.added is None:
            return before
        added = jax.random.normal(jax.random.key(77), before.added.shape, jnp.bfloat16)
        return before._replace(added=added, sums=jnp.ones_like(before.sums))

    def run(self, inputs, before=None, *, detect_races=False):
        interpret = interpreted(detect_races=detect_races)
        run = functools.partial(fused_layer, spec=self.spec, config=self.config, interpret=interpret)
        results = jax.block_until_ready(jax.jit(run)(*inputs, self.handover() if before is None else before))
        assert ON_GPU or not detect_races or not gpu_callbacks.get_races().races_found  # JAX 0.12 raises by itself
        return results


def interpreted(*, detect_races):
    return None if ON_GPU else plgpu.InterpretGPUParams(detect_races=detect_races)


def case(batch, hidden, inner, heads, kv_heads, head_dim, tiles):
    spec = LayerSpec(norm=Norm(eps=EPS))
    return Case(LayerShape(batch, hidden, inner, heads, kv_heads, head_dim, spec=spec), FusedLayerConfig(*tiles))


def with_spec(case, **changes):
    spec = dataclasses.replace(case.spec, **changes)
    return dataclasses.replace(case, shape=dataclasses.replace(case.shape, spec=spec))


# In float64; on a GPU, where matrices are large, in its float32.
lib = jnp if ON_GPU else np
product = functools.partial(jnp.matmul, precision="highest") if ON_GPU else np.matmul


def in_exact(x):
    return x.astype(jnp.float32) if ON_GPU else np.asarray(x, np.float64)


def biased(x, bias):
    return x if bias is None else x + in_exact(bias)


def normed(spec, x, weight, bias=None):
    """Over the last axis."""
    if spec.norm.kind == "layer":
        x = x - x.mean(axis=-1, keepdims=True)
    gain = spec.norm.gain_offset + in_exact(weight)
    return biased(x / lib.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS) * gain, bias)


def activated(spec, x):
    match spec.activation:
        case "silu":
            return x / (1 + lib.exp(-x))
        case "gelu_tanh":
            return x / 2 * (1 + lib.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
        case "relu":
            return lib.maximum(x, 0)


def expected_hidden(case, attended, hidden, weights, before):
    spec = case.spec

    def joined(hidden, x, weight, bias, norm):
        y = biased(product(x, in_exact(weight).T), bias)
        return hidden + (y if norm is None else normed(spec, y, norm))

    hidden = in_exact(hidden)
    if before.added is not None:
        hidden = hidden + in_exact(before.added) * residual_factor(case, before)
    x = in_exact(attended).reshape(len(hidden), -1)
    hidden = joined(hidden, x, weights.o, weights.o_bias, weights.o_norm)
    x = normed(spec, hidden, weights.mlp_norm, weights.mlp_norm_bias)
    inner = biased(product(x, in_exact(weights.mlp_in).T), weights.mlp_in_bias)
    if spec.is_gated:
        gate, up = lib.split(inner, 2, axis=1)
        inner = activated(spec, gate) * up
    else:
        inner = activated(spec, inner)
    return joined(hidden, inner, weights.mlp_out, weights.mlp_out_bias, weights.mlp_out_norm)


def residual_factor(case, left):
    """[B, 1]: by what `left.added` is to be multiplied."""
    hidden_size = case.shape.hidden_size
    sums = in_exact(left.sums)[0, : 2 * hidden_size // 32, : case.shape.batch]
    return 1 / lib.sqrt(sums.sum(axis=0) / hidden_size + EPS)[:, None]


def whole(case, hidden, left):
    """The residual stream behind a layer."""
    hidden = in_exact(hidden)
    return hidden if left.added is None else hidden + in_exact(left.added) * residual_factor(case, left)


def expected_next(case, x, weights, cache):
    """query, keys, values, for x after the norm."""
    spec, (batch, _, num_kv_heads, head_dim) = case.spec, cache.keys.shape
    qkv = biased(product(x, in_exact(weights.qkv).T), weights.qkv_bias).reshape(batch, -1, head_dim)
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    query, key, value = lib.split(qkv, [num_heads, num_heads + num_kv_heads], axis=1)
    if spec.norms_queries_and_keys:
        query, key = normed(spec, query, weights.query_norm), normed(spec, key, weights.key_norm)
    if cache.rotation is not None:
        cos, sin = in_exact(cache.rotation)[:, :, None]
        width = cos.shape[-1]

        def turned(x):
            low, high, rest = lib.split(x, [width, 2 * width], axis=2)
            return lib.concatenate([low * cos - high * sin, high * cos + low * sin, rest], axis=2)

        query, key = turned(query), turned(key)
    query, key, value, keys, values = (np.array(x, np.float64) for x in (query, key, value, cache.keys, cache.values))
    for row, slot in enumerate(np.asarray(cache.slots)):
        if slot < keys.shape[1]:
            keys[row, slot], values[row, slot] = key[row], value[row]
    return query, keys, values


def expected(case, attended, hidden, weights, following, cache, before):
    """hidden, query, keys, values."""
    hidden = expected_hidden(case, attended, hidden, weights, before)
    x = normed(case.spec, hidden, following.input_norm, following.input_norm_bias)
    return hidden, *expected_next(case, x, following, cache)
