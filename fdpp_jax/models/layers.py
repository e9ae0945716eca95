"""What all families are built of: norms, linear maps, embeddings. Weights are [out, in]; norms are in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from fdpp_jax import ops
from fdpp_jax.plans.shapes import MatmulImplementation

_INIT_STDDEV = 0.02


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + weight), in float32, rounded once to x's dtype."""

    def __init__(self, size: int, *, eps: float, offset: float = 0.0, dtype: jax.typing.DTypeLike):
        self.eps, self.offset = eps, offset
        self.weight = nnx.Param(jnp.full(size, 1.0 - offset, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * (self.offset + self.weight[...].astype(jnp.float32))).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias, in float32, rounded once to x's dtype."""

    def __init__(self, size: int, *, eps: float, dtype: jax.typing.DTypeLike):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(size, dtype))
        self.bias = nnx.Param(jnp.zeros(size, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y -= jnp.mean(y, axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class Linear(nnx.Module):
    """x [..., in] @ weight^T (+ bias), with weight [out, in] as checkpoints have it.

    Args:
      in_size: Columns of x and of the weight.
      out_size: Columns of the result, rows of the weight.
      use_bias: Whether there is a bias [out].
      parts: Where a checkpoint has several linear maps of x: the name and the rows of each, in our order.
      dtype: Of the parameters.
      rngs: Source of the random initial weights.
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        use_bias: bool = False,
        parts: tuple[tuple[str, int], ...] = (),
        dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.parts = parts
        self.weight = nnx.Param(_normal(rngs, (out_size, in_size), dtype))
        self.bias = nnx.Param(jnp.zeros(out_size, dtype)) if use_bias else None

    def __call__(
        self,
        x: jax.Array,
        *,
        out_dtype: jax.typing.DTypeLike | None = None,
        implementation: MatmulImplementation | None = None,
    ) -> jax.Array:
        y = ops.flat_matmul(x, self.weight[...], w_order="nk", out_dtype=out_dtype, implementation=implementation)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def in_our_order(self, rows: jax.Array) -> jax.Array:
        """A checkpoint's weight or bias, all its parts, with rows in our order: as they are, but for some families."""
        return rows

    @property
    def bias_array(self) -> jax.Array | None:
        """[out], if there is a bias."""
        return None if self.bias is None else self.bias[...]


class Embedding(nnx.Module):
    """weight [V, D]: rows by token, and logits by token when the head is tied."""

    def __init__(self, vocab_size: int, size: int, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.weight = nnx.Param(_normal(rngs, (vocab_size, size), dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.weight[...][tokens]

    def logits(self, x: jax.Array, implementation: MatmulImplementation | None = None) -> jax.Array:
        """x [..., D] @ weight^T -> [..., V] float32."""
        return ops.flat_matmul(x, self.weight[...], w_order="nk", out_dtype=jnp.float32, implementation=implementation)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    return jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(_INIT_STDDEV, dtype)
