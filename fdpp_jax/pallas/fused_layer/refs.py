"""The fused layer's refs by name: arrays in global memory, rings and barriers in shared memory."""

from typing import NamedTuple

import jax
from jax.experimental import pallas as pl

from fdpp_jax.pallas.fused_layer.phases import Phase
from fdpp_jax.pallas.parts.ring import Barrier

# Rows of counters. The first ones count the finished units of each chunk of a result, a row per product that another
# product reads. The others count the helpers of each split unit that are done, a row per product.
NUM_RESULT_ROWS, NUM_HELPER_ROWS = 3, 4


class GlobalRefs(NamedTuple):
    """Arrays in global memory; None where the launch has no such array.

    Weights are named as in `BetweenWeights`, cache and rotation as in `LayerCache`.

    Attributes:
      counters: [NUM_RESULT_ROWS + NUM_HELPER_ROWS, counters, words] int32.
      parts: [products, CTAs, HEIGHT * rows] float32, partial sums from a helper to an owner.
      attended: [rows, N * H], attention's output.
      hidden: [B, D], the residual stream before the layer.
      middle: [B, D], the residual stream between attention and MLP.
      scaled_middle: [rows, D], middle times the gain of the norm, without 1 / rms.
      middle_squares: [sums, rows] float32, sums of squares of middle, two per unit.
      inner: [rows, F], the MLP between its products.
      last: [B, D], the residual stream behind the layer.
      scaled_last: As scaled_middle; the first layer's input is normed in full.
      last_squares: As middle_squares.
      cache_rows: [B] int32, the row of keys and values [B * S, K * H] that each token goes to; one beyond the last
        goes nowhere.
      keys: [B * S, K * H].
      values: [B * S, K * H].
      query: [B, N * H].
      logits: [B, V] float32.
    """

    counters: jax.Ref
    parts: jax.Ref
    attended: jax.Ref | None = None
    hidden: jax.Ref | None = None
    o: jax.Ref | None = None
    post_norm: jax.Ref | None = None
    gate_up: jax.Ref | None = None
    down: jax.Ref | None = None
    next_norm: jax.Ref | None = None
    next_qkv: jax.Ref | None = None
    next_bias: jax.Ref | None = None
    head: jax.Ref | None = None
    middle: jax.Ref | None = None
    scaled_middle: jax.Ref | None = None
    middle_squares: jax.Ref | None = None
    inner: jax.Ref | None = None
    last: jax.Ref | None = None
    scaled_last: jax.Ref | None = None
    last_squares: jax.Ref | None = None
    rotation: jax.Ref | None = None
    cache_rows: jax.Ref | None = None
    keys: jax.Ref | None = None
    values: jax.Ref | None = None
    query: jax.Ref | None = None
    logits: jax.Ref | None = None

    @property
    def result_counters(self) -> jax.Ref:
        """A row per product that another one reads, a counter per chunk."""
        return self.counters.at[pl.ds(0, NUM_RESULT_ROWS)]

    @property
    def helper_counters(self) -> jax.Ref:
        """A row per product, a counter per split unit."""
        return self.counters.at[pl.ds(NUM_RESULT_ROWS, NUM_HELPER_ROWS)]

    def operands(self, phase: Phase) -> tuple[jax.Ref, jax.Ref]:
        """x [rows, depth] and w [columns, depth] of a product."""
        x, w = {
            "o": (self.attended, self.o),
            "gate_up": (self.scaled_middle, self.gate_up),
            "down": (self.inner, self.down),
            "qkv": (self.scaled_last, self.next_qkv),
            "head": (self.scaled_last, self.head),
        }[phase.name]
        return present(x), present(w)


class SharedRefs(NamedTuple):
    """Arrays and barriers in shared memory.

    Attributes:
      w: [stages, HEIGHT, block_k], the ring of weights.
      x: [stages, tiles, rows, block_k], the ring of x, a chunk per stage.
      y: [HEIGHT * rows] float32, a product on its way to the results' warpgroup.
      seen: [1] int32, for `grid_sync.await_ahead`.
      w_ready: A stage of w is loaded.
      w_free: A stage of w has been read.
      x_ready: A stage of x is loaded.
      x_free: A stage of x has been read.
      y_ready: A product is in y.
      y_free: The product in y has been read.
    """

    w: jax.Ref
    x: jax.Ref
    y: jax.Ref
    seen: jax.Ref
    w_ready: Barrier
    w_free: Barrier
    x_ready: Barrier
    x_free: Barrier
    y_ready: Barrier
    y_free: Barrier


def present(ref: jax.Ref | None) -> jax.Ref:
    """A ref that the launch must have."""
    assert ref is not None
    return ref
