"""A decoder with its head, whatever the family: scoring, prefill and one decode step."""

import abc
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdpp_jax import ops, unified_max
from fdpp_jax.models import checks
from fdpp_jax.models.cache import KVCache, check_cache, write_prompt
from fdpp_jax.models.config import DecoderConfig
from fdpp_jax.models.layers import Embedding, LayerNorm, RMSNorm
from fdpp_jax.models.plans import PrefillPlan, plan_prefill
from fdpp_jax.models.step_cache import PieceCache, StepCache
from fdpp_jax.ops.layer import FusedLayers, plan_layer
from fdpp_jax.plans import device as devices
from fdpp_jax.plans.backend import LayerPlan
from fdpp_jax.plans.calls import HeadWeights, LayerCache, LayerWeights
from fdpp_jax.plans.shapes import MatmulImplementation
from fdpp_jax.unified_max import UnifiedMax

# attend(layer, query [B, T, N, H], key [B, T, K, H], value [B, T, K, H]) -> [B, T, N, H]
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]
# The same inside one layer.
LayerAttend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


# A module whose weight a tensor repeats, or numbers of which it is one.
type Implied = Embedding | tuple[np.ndarray, ...]


class Layer(Protocol):
    """One transformer layer."""

    def __call__(
        self, x: jax.Array, context: Any, attend: LayerAttend, implementation: MatmulImplementation | None, /
    ) -> jax.Array:
        """x [B, T, D] behind the layer; context is what `embed` gives."""

    @property
    def input_norm(self) -> Callable[[jax.Array], jax.Array]:
        """The norm before attention's projections."""

    @property
    def weights(self) -> LayerWeights:
        """The layer's arrays by role, for a backend that fuses layers like the family's `layer_spec`."""


class CausalLM(nnx.Module):
    """What the families share; a family adds its modules, and says where they are.

    Attributes carry the checkpoint's names, so that loading needs no table. Inside `jax.jit` split a model first:
    `graphdef, state = nnx.split(model)`, then `nnx.merge` in the traced function.

    Attributes:
      config: Shapes and constants.
      dtype: dtype of weights, activations and KV cache.
      checkpoint: The directory it was loaded from, if any.
    """

    config: DecoderConfig
    dtype: jnp.dtype
    checkpoint: pathlib.Path | None = None

    @property
    def implied_tensors(self) -> Mapping[str, Implied]:
        """Tensors that checkpoints carry though the config implies them, by the endings of their names."""
        return {}

    @property
    @abc.abstractmethod
    def embedding(self) -> Embedding:
        """The rows of the tokens."""

    @property
    @abc.abstractmethod
    def layers(self) -> Sequence[Layer]:
        """From the first to the last."""

    @property
    @abc.abstractmethod
    def final_norm(self) -> RMSNorm | LayerNorm:
        """The norm before the head."""

    @property
    def head_weight(self) -> jax.Array:
        """[V, D]: the embedding's, unless the family has a head."""
        return self.embedding.weight[...]

    @abc.abstractmethod
    def embed(self, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any]:
        """What the first layer reads [B, T, D], and what every layer gets besides, such as rotary angles.

        Args:
          tokens: [B, T] integers.
          positions: [B, T] integers; [1, T] serves all rows.
        """

    def head(self, hidden: jax.Array, implementation: MatmulImplementation | None = None) -> jax.Array:
        """Logits [..., V] float32 of hidden states [..., D]: by the embedding, unless the family has a head."""
        return self.embedding.logits(hidden, implementation)

    def hidden_states(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
        implementation: MatmulImplementation | None = None,
    ) -> jax.Array:
        """What the head reads, with attention left to the caller: a cache, a probe of the scores, ...

        Args:
          tokens: [B, T] integers.
          positions: [B, T] integers; [1, T] serves all rows.
          attend: attend(layer, query [B, T, N, H], key, value [B, T, K, H]) -> [B, T, N, H]; query and key are rotated.
          implementation: Of the matmuls, None for the planned one.

        Returns:
          [B, T, D].
        """
        x, context = self.embed(tokens, positions)
        for i, layer in enumerate(self.layers):
            x = layer(x, context, functools.partial(attend, i), implementation)
        return self.final_norm(x)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of every position, causal, without a cache: for scoring and training.

        Args:
          tokens: [B, T] integers.

        Returns:
          [B, T, V] float32; row t predicts token t + 1.

        Raises:
          ValueError: tokens are no integers, or there are none.
        """
        tokens = jnp.asarray(checks.tokens_like(tokens, "[B, T]"))
        return self.head(self.hidden_states(tokens, _positions(tokens), self._causal_attend))

    def prefill(
        self,
        tokens: jax.Array,
        lengths: jax.Array,
        cache: KVCache,
        *,
        softmax: UnifiedMax | None = None,
        prefill_chunk_size: int | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Runs the prompts and fills the cache with them, from slot 0 whatever it held.

        Args:
          tokens: [B, T] integers, right-padded.
          lengths: [B] integers in 1..T, the live tokens of each row.
          cache: Of capacity T or more; donate it.
          softmax: None for exact online softmax, or the policy, which counts where a kernel computes attention.
          prefill_chunk_size: Tokens of a row that run at once; see `extend`. None: 4,096, or the whole prompt where
            cuDNN computes that and no kernel computes attention over a cache.

        Returns:
          Logits [B, V] float32 of each row's last live token, and the cache with these lengths.

        Raises:
          ValueError: The cache is none of this model, softmax no policy, T exceeds the capacity, the batch sizes
            differ, or prefill_chunk_size is not positive. Tokens or lengths, where they are not traced, are out of
            range.
        """
        tokens, lengths = self._checked_prompts(tokens, lengths, cache, is_behind_cache=False)
        batch, length = tokens.shape
        if length > cache.capacity:
            raise ValueError(f"a prompt of {length} tokens does not fit a cache of capacity {cache.capacity}")
        plan = self.prefill_plan(batch, length, cache.capacity, softmax, prefill_chunk_size)
        if plan.reads_cache:
            norms = tuple(map(jnp.zeros_like, cache.key_max_norms))
            cache = KVCache(cache.keys, cache.values, jnp.zeros_like(cache.lengths), norms)
            return self.extend(tokens, lengths, cache, softmax=softmax, prefill_chunk_size=plan.chunk_size)
        policy = softmax if plan.takes_unified_max else None
        keys, values, key_max_norms = list(cache.keys), list(cache.values), list(cache.key_max_norms)

        def attend(layer: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            keys[layer] = write_prompt(keys[layer], key)
            values[layer] = write_prompt(values[layer], value)
            if key_max_norms:
                key_max_norms[layer] = unified_max.max_norm(key.astype(keys[layer].dtype), lengths)
            # Padding stands on the right, so the causal mask already hides it from every live query.
            return self._causal_attend(
                layer, query, key, value, policy, key_max_norms[layer] if key_max_norms else None
            )

        hidden = _last(self.hidden_states(tokens, _positions(tokens), attend), lengths)
        cache = KVCache(tuple(keys), tuple(values), lengths.astype(jnp.int32), tuple(key_max_norms))
        return self.head(hidden), cache

    def extend(
        self,
        tokens: jax.Array,
        lengths: jax.Array,
        cache: KVCache,
        *,
        softmax: UnifiedMax | None = None,
        prefill_chunk_size: int | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Runs more tokens of each row, behind those that the cache holds.

        More tokens than a piece has are one loop over pieces, so that activations and scores take the memory of a
        piece. Beside the tokens, only the cache grows with T.

        Args:
          tokens: [B, T] integers, right-padded.
          lengths: [B] integers in 0..T, the live tokens of each row. A row without any stays as it is, and its logits
            mean nothing.
          cache: With room for them in every row, which is not checked where lengths are traced; donate it.
          softmax: As in `prefill`.
          prefill_chunk_size: Tokens of a row in a piece. None: 4,096.

        Returns:
          Logits [B, V] float32 of each row's last live token, and the cache with these tokens.

        Raises:
          ValueError: The cache is none of this model, softmax no policy, the batch sizes differ, or prefill_chunk_size
            is not positive. Tokens or lengths, where they are not traced, are out of range, or the cache has no room.
        """
        tokens, lengths = self._checked_prompts(tokens, lengths, cache, is_behind_cache=True)
        batch, length = tokens.shape
        plan = self.prefill_plan(batch, length, cache.capacity, softmax, prefill_chunk_size, is_behind_cache=True)
        size, policy = plan.chunk_size, softmax if plan.takes_unified_max else None
        lengths = lengths.astype(jnp.int32)
        if size == length:
            hidden, cache = self._extended(tokens, lengths, cache, policy)
            return self.head(hidden), cache
        tokens = jnp.pad(tokens, ((0, 0), (0, -length % size)))
        most = lengths.max()

        def is_left(carry: tuple[jax.Array, jax.Array, KVCache]) -> jax.Array:
            return carry[0] < most

        def run_piece(carry: tuple[jax.Array, jax.Array, KVCache]) -> tuple[jax.Array, jax.Array, KVCache]:
            first, hidden, cache = carry
            piece = jax.lax.dynamic_slice_in_dim(tokens, first, size, axis=1)
            live = jnp.clip(lengths - first, 0, size)
            new, cache = self._extended(piece, live, cache, policy)
            return first + size, jnp.where(live[:, None] > 0, new, hidden), cache

        nothing = jnp.zeros((batch, self.config.hidden_size), self.dtype)
        _, hidden, cache = jax.lax.while_loop(is_left, run_piece, (jnp.int32(0), nothing, cache))
        return self.head(hidden), cache

    def _extended(
        self, tokens: jax.Array, lengths: jax.Array, cache: KVCache, softmax: UnifiedMax | None
    ) -> tuple[jax.Array, KVCache]:
        """What the head reads of each row's last live token [B, D], and the cache with these tokens, [B, T]."""
        piece = PieceCache(self.config, cache, lengths, softmax)
        positions = piece.starts[:, None] + _positions(tokens).astype(jnp.int32)  # [B, T]
        return _last(self.hidden_states(tokens, positions, piece.attend), lengths), piece.grown()

    def decode(
        self,
        tokens: jax.Array,
        cache: KVCache,
        *,
        softmax: UnifiedMax | None = None,
        implementation: Literal["xla"] | None = None,
    ) -> tuple[jax.Array, KVCache, jax.Array | bool, jax.Array | bool]:
        """One decode step: appends a token to each row and predicts the next.

        Where `overflow` is true the logits, the new slots and the norms are not usable: call again with softmax=None
        on the returned keys and values, and the lengths and norms from before. That writes the same slots.

        Args:
          tokens: [B] integers.
          cache: With room for one more token in every row, which is not checked where lengths are traced; donate it.
          softmax: None for exact online softmax, or the policy.
          implementation: None for the planned kernels, "xla" for plain XLA throughout.

        Returns:
          Logits [B, V] float32, the cache one token longer, and two [] bool. overflow: some row of some layer left the
          policy's safe window, and was not redone. redone: some was, and all is exact. A Python False cannot be true:
          by the plans no layer overflows, or none redoes.

        Raises:
          ValueError: The cache is none of this model, softmax no policy, the batch sizes differ, or an unknown
            implementation. Tokens, where they are not traced, are out of range, or the cache has no room.
        """
        check_cache(cache, self.config)
        checks.check_softmax(softmax)
        tokens = checks.tokens_like(tokens, "[B]")
        checks.check_rows("tokens", tokens, cache.batch)
        checks.check_live_tokens(tokens[:, None], 1, self.config.vocab_size)
        checks.check_room(cache.lengths, 1, cache.capacity, self.config.position_limit)
        tokens = jnp.asarray(tokens)
        if implementation not in (None, "xla"):
            raise ValueError(f"implementation of a decode step must be None or 'xla', got {implementation!r}")
        step = StepCache(self.config, cache, softmax, implementation)
        redone, logits = step.redone(self.decode_logits(tokens, step))
        # A row that overflowed in any layer comes out as NaN and leaves no logit of its sequence finite.
        overflow = jnp.isnan(logits[:, 0]).any() if step.can_overflow else False
        return logits, step.grown(), overflow, redone

    def _checked_prompts(
        self, tokens: Any, lengths: Any, cache: KVCache, *, is_behind_cache: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Tokens [B, T] and lengths [B], which fit each other, the cache and the model as far as they are known."""
        check_cache(cache, self.config)
        tokens, lengths = checks.tokens_like(tokens, "[B, T]"), checks.integers("lengths", lengths, "[B]")
        for name, array in (("tokens", tokens), ("lengths", lengths)):
            checks.check_rows(name, array, cache.batch)
        checks.check_lengths(lengths, 0 if is_behind_cache else 1, tokens.shape[1])
        checks.check_live_tokens(tokens, lengths, self.config.vocab_size)
        checks.check_room(cache.lengths if is_behind_cache else 0, lengths, cache.capacity, self.config.position_limit)
        return jnp.asarray(tokens), jnp.asarray(lengths)

    def layer_plan(self, batch: int) -> LayerPlan:
        """Whether a decode step of `batch` rows runs fused layers on the device that JAX runs on now."""
        return plan_layer(self.config.layer_shape(batch, self.dtype))

    def prefill_plan(
        self,
        batch: int,
        length: int,
        capacity: int,
        softmax: UnifiedMax | None = None,
        prefill_chunk_size: int | None = None,
        *,
        is_behind_cache: bool = False,
    ) -> PrefillPlan:
        """How `prefill` of tokens [B, T] runs on the device that JAX runs on now, or behind a cache `extend`.

        Raises:
          ValueError: softmax is no policy, or a size is no positive integer.
        """
        checks.check_softmax(softmax)
        return plan_prefill(
            self.config,
            batch=batch,
            length=length,
            capacity=capacity,
            has_unified_max=softmax is not None,
            is_behind_cache=is_behind_cache,
            chunk_size=prefill_chunk_size,
            device=devices.planned(),
            dtype=self.dtype,
        )

    def decode_logits(self, tokens: jax.Array, step: StepCache) -> jax.Array:
        """[B, V] float32 behind one new token per row, tokens [B]; by fused layers where the plan has them."""
        plan = self.layer_plan(tokens.shape[0])
        if plan.algorithm == "fused" and step.implementation is None and step.arrays(0)[0].dtype == self.dtype:
            return self.fused_logits(tokens, step, plan)

        def attend(layer: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            step.append(layer, key, value)
            return step.attend(layer, query)

        hidden = self.hidden_states(tokens[:, None], step.slots[:, None], attend, step.implementation)[:, 0]
        return self.head(hidden, step.implementation)

    def fused_logits(self, tokens: jax.Array, step: StepCache, plan: LayerPlan, **options: Any) -> jax.Array:
        """`decode_logits` by a backend's fused layers: attention, and launches with all between it and the next one.

        What lies between the embedding's norm and the first attention is launched by the backend, too, and its last
        launch has the head where the plan says so. The options are those of `ops.layer.FusedLayers`.
        """
        layers = self.layers
        weights = [layer.weights for layer in layers]
        x, context = self.embed(tokens[:, None], step.slots[:, None])
        hidden, rotation = x[:, 0], None
        if self.config.layer_spec.rotation is not None:
            rotation = jnp.stack([angle[:, 0, 0] for angle in context])  # [2, B, R / 2]
        fused = FusedLayers(self.config.layer_shape(tokens.shape[0], self.dtype), plan, **options)

        def cache(layer: int) -> LayerCache:
            return LayerCache(*step.arrays(layer), step.slots, rotation)

        result: Any = fused.first(step.settle(layers[0].input_norm(hidden)), weights[0], cache(0))
        head = self._head_weights if plan.fuses_head else None
        for i in range(len(layers)):
            step.replace(i, result.keys, result.values)
            query = result.query[:, None]  # [B, 1, N, H]
            attended = step.attend(i, query, starts_early=plan.overlaps_attention)[:, 0]  # [B, N, H]
            is_last = i + 1 == len(layers)
            following, next_cache = (head, None) if is_last else (weights[i + 1], cache(i + 1))
            hidden, result = fused.after_attention(attended, hidden, weights[i], following, next_cache)
        return self.head(self.final_norm(hidden)) if result is None else result

    @property
    def _head_weights(self) -> HeadWeights:
        norm = self.final_norm
        return HeadWeights(norm.weight[...], self.head_weight, norm.bias[...] if isinstance(norm, LayerNorm) else None)

    def _causal_attend(
        self,
        layer: int,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        softmax: UnifiedMax | None = None,
        key_max_norm: jax.Array | None = None,
    ) -> jax.Array:
        return ops.dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            key_max_norm=key_max_norm,
            softmax=None if softmax is None else softmax.for_layer(layer, self.config.num_hidden_layers),
            **self.config.prefill_options(layer, query.shape[1]),
        )


def _positions(tokens: jax.Array) -> jax.Array:
    return jnp.arange(tokens.shape[1])[None]  # [1, T]


def _last(hidden: jax.Array, lengths: jax.Array) -> jax.Array:
    """Of hidden [B, T, D] that of each row's last live token, [B, D]."""
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, last, axis=1)[:, 0]
