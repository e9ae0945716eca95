"""What lies between two attentions as a `LayerSpec` says, in float64, and random inputs for it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from fdpp_jax.models import PRESETS
from fdpp_jax.plans.calls import LayerCache, LayerWeights
from fdpp_jax.plans.shapes import LayerShape, LayerSpec, Norm

SPECS = {
    "llama": LayerSpec(),
    "qwen2": PRESETS["qwen2.5-7b"].layer_spec,
    "qwen3": PRESETS["qwen3-8b"].layer_spec,
    "chatglm": PRESETS["chatglm2-6b"].layer_spec,
    "gemma": dataclasses.replace(PRESETS["gemma-2-9b"].layer_spec, logits_soft_cap=2.0),  # which random logits reach
    "opt": PRESETS["opt-6.7b"].layer_spec,
    "all biases": LayerSpec(has_qkv_bias=True, has_o_bias=True, has_mlp_bias=True, norm=Norm(gain_offset=1.0)),
}
CAPACITY = 24
ON_GPU = jax.default_backend() == "gpu"
# In float64; on a GPU, where matrices are large, in its float32.
lib = jnp if ON_GPU else np
product = functools.partial(jnp.matmul, precision="highest") if ON_GPU else np.matmul


def exact(x):
    return jnp.asarray(x, jnp.float32) if ON_GPU else np.asarray(x, np.float64)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, and random inputs for it."""

    shape: LayerShape
    seed: int = 0

    def inputs(self):
        """attended, hidden, weights, the next layer's weights, its cache."""
        shape, spec, dtype = self.shape, self.shape.spec, self.shape.dtype
        keys = iter(jax.random.split(jax.random.key(self.seed), 40))

        def normal(*sizes, scale=1.0):
            return (scale * jax.random.normal(next(keys), sizes)).astype(dtype)

        def matrix(rows, columns):
            return normal(rows, columns, scale=columns**-0.5)

        def gain(size):
            return (1 - spec.norm.gain_offset + 0.1 * jax.random.normal(next(keys), (size,))).astype(dtype)

        def given(has, *made):
            return made[0] if has else None

        query, kv = shape.num_query_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        hidden, inner = shape.hidden_size, (1 + spec.is_gated) * shape.intermediate_size

        def layer():
            return LayerWeights(
                input_norm=gain(hidden),
                qkv=matrix(query + 2 * kv, hidden),
                o=matrix(hidden, query),
                mlp_norm=gain(hidden),
                mlp_in=matrix(inner, hidden),
                mlp_out=matrix(hidden, shape.intermediate_size),
                qkv_bias=given(spec.has_qkv_bias, normal(query + 2 * kv)),
                o_bias=given(spec.has_o_bias, normal(hidden)),
                mlp_in_bias=given(spec.has_mlp_bias, normal(inner)),
                mlp_out_bias=given(spec.has_mlp_bias, normal(hidden)),
                query_norm=given(spec.norms_queries_and_keys, gain(shape.head_dim)),
                key_norm=given(spec.norms_queries_and_keys, gain(shape.head_dim)),
                o_norm=given(spec.norms_products, gain(hidden)),
                mlp_out_norm=given(spec.norms_products, gain(hidden)),
                input_norm_bias=given(spec.norm.kind == "layer", normal(hidden)),
                mlp_norm_bias=given(spec.norm.kind == "layer", normal(hidden)),
            )

        cached = shape.batch, CAPACITY, shape.num_kv_heads, shape.head_dim
        rotation = None
        if spec.rotation is not None:
            size = shape.batch, spec.num_rotated(shape.head_dim) // 2
            angles = jax.random.uniform(next(keys), size, maxval=6.0)
            rotation = jnp.stack([jnp.cos(angles), jnp.sin(angles)])
        slots = jax.random.randint(next(keys), (shape.batch,), 0, CAPACITY, jnp.int32)
        attended = normal(shape.batch, shape.num_query_heads, shape.head_dim)
        cache = LayerCache(normal(*cached), normal(*cached), slots, rotation)
        # With a mean, so that a layer norm has something to subtract.
        return attended, 0.5 + normal(shape.batch, hidden), layer(), layer(), cache

    def expected(self, attended, hidden, weights, following, cache):
        """hidden, query, keys, values in float64."""
        hidden = self.expected_hidden(attended, hidden, weights)
        normed = self.normed(hidden, following.input_norm, following.input_norm_bias)
        return hidden, *self.expected_attention(normed, following, cache)

    def expected_hidden(self, attended, hidden, weights):
        """The residual stream behind the layer."""
        spec = self.shape.spec
        x = exact(attended).reshape(attended.shape[0], -1)
        hidden = exact(hidden) + self._joined(x, weights.o, weights.o_bias, weights.o_norm)
        normed = self.normed(hidden, weights.mlp_norm, weights.mlp_norm_bias)
        inner = self._joined(normed, weights.mlp_in, weights.mlp_in_bias)
        gate, *up = lib.split(inner, 2, axis=1) if spec.is_gated else (inner,)
        inner = _ACTIVATIONS[spec.activation](gate)
        if up:
            inner = inner * up[0]
        return hidden + self._joined(inner, weights.mlp_out, weights.mlp_out_bias, weights.mlp_out_norm)

    def expected_attention(self, x, weights, cache):
        """query, keys, values of x behind its norm."""
        shape, spec = self.shape, self.shape.spec
        qkv = self._joined(x, weights.qkv, weights.qkv_bias).reshape(shape.batch, -1, shape.head_dim)
        heads = shape.num_query_heads
        query, key, value = lib.split(qkv, [heads, heads + shape.num_kv_heads], axis=1)
        if spec.norms_queries_and_keys:
            query, key = self.normed(query, weights.query_norm), self.normed(key, weights.key_norm)
        if spec.rotation is not None:
            query, key = (_turned(y, cache.rotation) for y in (query, key))
        query, key, value = (np.asarray(x) for x in (query, key, value))
        keys, values = np.array(exact(cache.keys)), np.array(exact(cache.values))
        for row, slot in enumerate(np.asarray(cache.slots)):
            if slot < CAPACITY:
                keys[row, slot], values[row, slot] = key[row], value[row]
        return query, keys, values

    def _joined(self, x, w, bias=None, norm=None):
        y = product(x, exact(w).T)
        if bias is not None:
            y = y + exact(bias)
        return y if norm is None else self.normed(y, norm)

    def normed(self, x, weight, bias=None):
        norm = self.shape.spec.norm
        if norm.kind == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        x = x / lib.sqrt((x**2).mean(axis=-1, keepdims=True) + norm.eps) * (norm.gain_offset + exact(weight))
        return x if bias is None else x + exact(bias)


def _turned(x, rotation):
    """x [B, heads, H]: of its first R elements i and i + R / 2 turned together."""
    cos, sin = exact(rotation)[:, :, None]
    half = cos.shape[-1]
    low, high, rest = lib.split(x, [half, 2 * half], axis=-1)
    return lib.concatenate([low * cos - high * sin, high * cos + low * sin, rest], axis=-1)


_ACTIVATIONS = {
    "silu": lambda x: x / (1 + lib.exp(-x)),
    "relu": lambda x: lib.maximum(x, 0),
    "gelu_tanh": lambda x: x * (1 + lib.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
}


def check_slots(cache, following):
    """That no slot changed but the rows' own."""
    rows, slots = np.arange(len(cache.slots)), np.asarray(cache.slots)
    for before, after in ((cache.keys, following.keys), (cache.values, following.values)):
        changed = np.array((before != after).any(axis=(2, 3)))
        live = slots < CAPACITY
        changed[rows[live], slots[live]] = False
        assert not changed.any()
