"""The fused layer's refs by name: arrays in global memory, rings and barriers in shared memory."""

from typing import NamedTuple

import jax
from jax.experimental import pallas as pl

from fdpp_jax.pallas.fused_layer.phases import Phase
from fdpp_jax.pallas.parts.ring import Barrier

# Rows of counters. The first ones count the finished units of each chunk of a result, a row per product that another
# product reads. The next one counts the units of each head whose sums of squares are there. The others count the
# helpers of each split unit that are done, a row per product.
NUM_RESULT_ROWS, NUM_HEAD_ROWS, NUM_HELPER_ROWS = 3, 1, 4
NUM_COUNTER_ROWS = NUM_RESULT_ROWS + NUM_HEAD_ROWS + NUM_HELPER_ROWS


class Join(NamedTuple):
    """Where a product joins the residual stream, and what it leaves for the norm behind that (`norms`).

    Attributes:
      bias: [D], of the product.
      product_gain: [D], of the product's own norm.
      before: [B, D], the residual stream before.
      after: [B, D], the residual stream behind.
      gain: [D], of the norm behind; None if none follows.
      gain_bias: [D], of a layer norm.
      scaled: [rows, D], x of the next product.
      sums: [kinds, sums, rows] float32, sums over columns, two per unit.
      added: [B, D], a product that still lacks its norm's factor.
      added_before: The same of the join before.
      sums_before: `sums` of the join before.
    """

    bias: jax.Ref | None
    product_gain: jax.Ref | None
    before: jax.Ref | None
    after: jax.Ref | None
    gain: jax.Ref | None
    gain_bias: jax.Ref | None
    scaled: jax.Ref | None
    sums: jax.Ref | None
    added: jax.Ref | None
    added_before: jax.Ref | None
    sums_before: jax.Ref | None


class GlobalRefs(NamedTuple):
    """Arrays in global memory; None where the launch has no such array.

    Weights are named as in `LayerWeights`; those from `next_norm` on are of the next layer, or of the head. Cache and
    rotation are named as in `LayerCache`.

    Attributes:
      counters: [NUM_COUNTER_ROWS, counters, words] int32.
      parts: [products, CTAs, elements of a product] float32, partial sums from a helper to an owner.
      attended: [rows, N * H], attention's output.
      hidden: [B, D], the residual stream before the layer.
      added: As in `Join`, of the launch before.
      sums: As in `Join`, of the launch before.
      middle: [B, D], the residual stream between attention and MLP.
      scaled_middle: As in `Join`.
      middle_sums: As in `Join`.
      added_middle: As in `Join`.
      inner: [rows, F], the MLP between its products.
      last: [B, D], the residual stream behind the layer.
      scaled_last: As in `Join`; the first layer's input is normed in full.
      last_sums: As in `Join`.
      added_last: As in `Join`.
      head_sums: [2 * units, rows] float32, sums of squares of queries and keys, two per unit.
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
    added: jax.Ref | None = None
    sums: jax.Ref | None = None
    o: jax.Ref | None = None
    o_bias: jax.Ref | None = None
    o_norm: jax.Ref | None = None
    mlp_norm: jax.Ref | None = None
    mlp_norm_bias: jax.Ref | None = None
    mlp_in: jax.Ref | None = None
    mlp_in_bias: jax.Ref | None = None
    mlp_out: jax.Ref | None = None
    mlp_out_bias: jax.Ref | None = None
    mlp_out_norm: jax.Ref | None = None
    next_norm: jax.Ref | None = None
    next_norm_bias: jax.Ref | None = None
    qkv: jax.Ref | None = None
    qkv_bias: jax.Ref | None = None
    query_norm: jax.Ref | None = None
    key_norm: jax.Ref | None = None
    head: jax.Ref | None = None
    middle: jax.Ref | None = None
    scaled_middle: jax.Ref | None = None
    middle_sums: jax.Ref | None = None
    added_middle: jax.Ref | None = None
    inner: jax.Ref | None = None
    last: jax.Ref | None = None
    scaled_last: jax.Ref | None = None
    last_sums: jax.Ref | None = None
    added_last: jax.Ref | None = None
    head_sums: jax.Ref | None = None
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
    def head_counters(self) -> jax.Ref:
        """A counter per head."""
        return self.counters.at[NUM_RESULT_ROWS]

    @property
    def helper_counters(self) -> jax.Ref:
        """A row per product, a counter per split unit."""
        return self.counters.at[pl.ds(NUM_RESULT_ROWS + NUM_HEAD_ROWS, NUM_HELPER_ROWS)]

    def operands(self, phase: Phase) -> tuple[jax.Ref, jax.Ref]:
        """x [rows, depth] and w [columns, depth] of a product."""
        x, w = {
            "o": (self.attended, self.o),
            "mlp_in": (self.scaled_middle, self.mlp_in),
            "mlp_out": (self.inner, self.mlp_out),
            "qkv": (self.scaled_last, self.qkv),
            "head": (self.scaled_last, self.head),
        }[phase.name]
        return present(x), present(w)

    def join(self, phase: Phase) -> Join:
        """Where a product joins the residual stream; or the join before it, for the product behind a norm."""
        if phase.name in ("o", "mlp_in"):
            return Join(
                self.o_bias, self.o_norm, self.hidden, self.middle, self.mlp_norm, self.mlp_norm_bias,
                self.scaled_middle, self.middle_sums, self.added_middle, self.added, self.sums,
            )  # fmt: skip
        return Join(
            self.mlp_out_bias, self.mlp_out_norm, self.middle, self.last, self.next_norm, self.next_norm_bias,
            self.scaled_last, self.last_sums, self.added_last, self.added_middle, self.middle_sums,
        )  # fmt: skip


class SharedRefs(NamedTuple):
    """Arrays and barriers in shared memory.

    Attributes:
      w: [stages, HEIGHT, block_k], the ring of weights.
      x: [stages, tiles, rows, block_k], the ring of x, a chunk per stage.
      y: [elements of a product] float32, a product on its way to the results' warpgroup.
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
