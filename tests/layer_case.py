"""What lies between two attentions as a `LayerSpec` says, in float64, and random inputs for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fdpp_jax.plans.calls import LayerCache, LayerWeights
from fdpp_jax.plans.shapes import LayerShape, LayerSpec, Norm, Rotation

LLAMA = LayerSpec()
SPECS = {
    "llama": LLAMA,
    "qwen2": LayerSpec(has_qkv_bias=True),
    "qwen3": LayerSpec(norms_queries_and_keys=True, norm=Norm(eps=1e-6)),
    "chatglm": LayerSpec(has_qkv_bias=True, rotation=Rotation("neighbours", 0.5)),
    "half of each head turns": LayerSpec(rotation=Rotation(share=0.5)),
    "gemma": LayerSpec(norms_products=True, norm=Norm(eps=1e-6, gain_offset=1.0), activation="gelu_tanh"),
    "opt": LayerSpec(
        norm=Norm("layer"),
        activation="relu",
        is_gated=False,
        has_qkv_bias=True,
        has_o_bias=True,
        has_mlp_bias=True,
        rotation=None,
    ),
    "all biases": LayerSpec(has_qkv_bias=True, has_o_bias=True, has_mlp_bias=True, norm=Norm(gain_offset=1.0)),
}
CAPACITY = 24


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
            size = shape.batch, int(shape.head_dim * spec.rotation.share) // 2
            angles = jax.random.uniform(next(keys), size, maxval=6.0)
            rotation = jnp.stack([jnp.cos(angles), jnp.sin(angles)])
        slots = jax.random.randint(next(keys), (shape.batch,), 0, CAPACITY, jnp.int32)
        attended = normal(shape.batch, shape.num_query_heads, shape.head_dim)
        cache = LayerCache(normal(*cached), normal(*cached), slots, rotation)
        return attended, normal(shape.batch, hidden), layer(), layer(), cache

    def expected(self, attended, hidden, weights, following, cache):
        """hidden, query, keys, values in float64."""
        hidden = self.expected_hidden(attended, hidden, weights)
        normed = self._normed(hidden, following.input_norm, following.input_norm_bias)
        return hidden, *self.expected_attention(normed, following, cache)

    def expected_hidden(self, attended, hidden, weights):
        """The residual stream behind the layer."""
        spec = self.shape.spec
        x = _exact(attended).reshape(attended.shape[0], -1)
        hidden = _exact(hidden) + self._product(x, weights.o, weights.o_bias, weights.o_norm)
        normed = self._normed(hidden, weights.mlp_norm, weights.mlp_norm_bias)
        inner = self._product(normed, weights.mlp_in, weights.mlp_in_bias)
        gate, *up = np.split(inner, 2, axis=1) if spec.is_gated else (inner,)
        inner = _ACTIVATIONS[spec.activation](gate)
        if up:
            inner = inner * up[0]
        return hidden + self._product(inner, weights.mlp_out, weights.mlp_out_bias, weights.mlp_out_norm)

    def expected_attention(self, x, weights, cache):
        """query, keys, values of x behind its norm."""
        shape, spec = self.shape, self.shape.spec
        qkv = self._product(x, weights.qkv, weights.qkv_bias).reshape(shape.batch, -1, shape.head_dim)
        heads = shape.num_query_heads
        query, key, value = np.split(qkv, [heads, heads + shape.num_kv_heads], axis=1)
        if spec.norms_queries_and_keys:
            query, key = self._normed(query, weights.query_norm), self._normed(key, weights.key_norm)
        if spec.rotation is not None:
            query, key = (_turned(y, cache.rotation, spec.rotation.pairs) for y in (query, key))
        keys, values = np.array(_exact(cache.keys)), np.array(_exact(cache.values))
        for row, slot in enumerate(np.asarray(cache.slots)):
            if slot < CAPACITY:
                keys[row, slot], values[row, slot] = key[row], value[row]
        return query, keys, values

    def _product(self, x, w, bias=None, norm=None):
        y = x @ _exact(w).T
        if bias is not None:
            y = y + _exact(bias)
        return y if norm is None else self._normed(y, norm)

    def _normed(self, x, weight, bias=None):
        norm = self.shape.spec.norm
        if norm.kind == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + norm.eps) * (norm.gain_offset + _exact(weight))
        return x if bias is None else x + _exact(bias)


def _exact(x):
    return np.asarray(x, np.float64)


def _turned(x, rotation, pairs):
    """x [B, heads, H]: its first R elements turned, by pairs one after the other."""
    cos, sin = _exact(rotation)[:, :, None]
    out, half = x.copy(), cos.shape[-1]
    for i in range(half):
        low, high = (i, i + half) if pairs == "halves" else (2 * i, 2 * i + 1)
        out[..., low] = x[..., low] * cos[..., i] - x[..., high] * sin[..., i]
        out[..., high] = x[..., high] * cos[..., i] + x[..., low] * sin[..., i]
    return out


_ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
}


def check_slots(cache, following):
    """That no slot changed but the rows' own."""
    rows, slots = np.arange(len(cache.slots)), np.asarray(cache.slots)
    for before, after in ((cache.keys, following.keys), (cache.values, following.values)):
        changed = np.array((before != after).any(axis=(2, 3)))
        live = slots < CAPACITY
        changed[rows[live], slots[live]] = False
        assert not changed.any()
