"""The 64 rows of one warpgroup of `prefill_attention`, from the first key block to the result."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax import unified_max
from fdpp_jax.pallas.parts import registers
from fdpp_jax.pallas.parts.scores import LN2, LOG2E, LOWEST, capped
from fdpp_jax.pallas.prefill_attention.blocks import Block, bounds, clear_dead_values, is_live, query_of, slot_of
from fdpp_jax.pallas.prefill_attention.refs import Facts, GlobalRefs, Past, SharedRefs
from fdpp_jax.plans.hopper_prefill import CONSUMERS, ROWS

_ROW = plgpu.Layout.WGMMA.reduce(1)  # one value per row
_COLUMN = plgpu.Layout.WGMMA.reduce(0)  # one value per key


def consume(
    gmem: GlobalRefs,
    smem: SharedRefs,
    facts: Facts,
    block: Block,
    warpgroup: jax.Array,
    past: Past | None = None,
    *,
    is_again: bool = False,
) -> jax.Array:
    """Computes and writes the 64 rows of one warpgroup, with online softmax where `is_again`.

    Where a CTA has many tiles, the caller has waited for the queries, and this warpgroup's place for the next tile's
    becomes free on the way.

    Returns:
      int32, 1 where a row has left the safe window, else 0.
    """
    config = facts.config
    first_row = block.first_row + warpgroup * ROWS
    box = query_box(block, warpgroup, facts)
    num_places = smem.q.shape[0]
    query = smem.q.at[0 if past is None else lax.rem(past.tiles, jnp.int32(num_places)), warpgroup]
    if past is None:
        if is_again:  # a store to the place of one that may be under way
            plgpu.wait_smem_to_gmem(0)
        plgpu.copy_gmem_to_smem(gmem.q.at[box], query, smem.q_ready.at[warpgroup])

    def free_next_place() -> None:
        assert past is not None
        free_place(smem, past.tiles + 1, warpgroup)

    def take_turn() -> None:
        plgpu.barrier_arrive(smem.turn)
        plgpu.barrier_wait(smem.turn)

    has_low = facts.options.local_window_size is not None or gmem.starts is not None
    phi = None if gmem.phi is None or is_again else _of_rows(gmem.phi, first_row, block, facts)
    scale: Any = facts.options.scale
    if gmem.k_scale is not None and gmem.k_scale.ndim == 1:
        scale *= gmem.k_scale[block.kv_head]

    if past is None:
        plgpu.barrier_wait(smem.q_ready.at[warpgroup])
    first_slot = 0 if past is None else slot_of(block.begin, block, past, facts)
    pl.when(block.end > block.begin)(lambda: plgpu.barrier_wait(smem.k_ready.at[first_slot]))
    pl.when(warpgroup == 1)(take_turn)

    def factors(ref: jax.Ref, slot: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        found = registers.load(ref.at[slot], _COLUMN, optimized=False)
        return lax.broadcast_in_dim(found, shape, [1])

    def step(i: jax.Array, carry: tuple[jax.Array, ...], *, is_masked: bool) -> tuple[jax.Array, ...]:
        acc, den, *row_max = carry
        slot = slot_of(i, block, past, facts)
        s = _scores(query, smem.k.at[slot], take_turn, facts)
        if smem.k_factors is not None:
            s *= factors(smem.k_factors, slot, s.shape)
        plgpu.barrier_arrive(smem.k_free.at[slot])
        cap = facts.options.logits_soft_cap
        if cap is None:
            s *= scale * LOG2E
        else:
            s = capped(s, scale, cap)
        if is_masked:
            live = is_live(s.shape, i * config.block_kv, first_row, block, facts, has_low)
            s = jnp.where(live, s, -jnp.inf)
        if phi is None:
            shift = jnp.maximum(row_max[0], s.max(axis=1))
            alpha = jnp.exp2(row_max[0] - shift)
            acc *= _across(alpha, acc.shape)
            den *= alpha
            row_max = [shift]
            p = jnp.exp2(s - _across(shift, s.shape))
        else:
            p = jnp.exp2(s - _across(phi, s.shape))
        scaled = p
        if smem.v_factors is not None:
            plgpu.barrier_wait(smem.v_ready.at[slot])
            scaled *= factors(smem.v_factors, slot, s.shape)
            if is_masked:  # a scale of a key that is not live may be NaN
                scaled = jnp.where(live, scaled, 0.0)
        weights = scaled.astype(query.dtype)
        # Not of the weights as rounded: converting them back takes a third of the time of a step.
        den += p.sum(axis=1)
        acc, den, weights, *row_max = lax.optimization_barrier((acc, den, weights, *row_max))
        plgpu.barrier_arrive(smem.turn)
        if smem.v_factors is None:
            plgpu.barrier_wait(smem.v_ready.at[slot])
        if is_masked:
            clear_dead_values(smem, slot, i * config.block_kv, block, facts, warpgroup)
        plgpu.barrier_wait(smem.turn)

        def meanwhile() -> None:
            following = slot_of(i + 1, block, past, facts)
            pl.when(i + 1 < block.end)(lambda: plgpu.barrier_wait(smem.k_ready.at[following]))
            if num_places > 1:  # the last tile's results have left by now
                pl.when(i == block.begin)(free_next_place)

        acc = _add_values(acc, weights, smem.v.at[slot], meanwhile, facts)
        plgpu.barrier_arrive(smem.v_free.at[slot])
        return acc, den, *row_max

    acc = plgpu.layout_cast(jnp.zeros((ROWS, facts.padded_dim), jnp.float32), plgpu.Layout.WGMMA)
    carry: tuple[jax.Array, ...] = (acc, _rows(0.0)) if phi is not None else (acc, _rows(0.0), _rows(LOWEST))
    masked, whole = (functools.partial(step, is_masked=is_masked) for is_masked in (True, False))
    if is_again:  # rare: less code goes before speed
        carry = lax.fori_loop(block.begin, block.outer, masked, carry)
    elif has_low:
        carry = lax.fori_loop(block.begin, block.inner, masked, carry)
        carry = lax.fori_loop(block.inner, block.outer, whole, carry)
    else:
        carry = lax.fori_loop(block.begin, block.outer, whole, carry)
    carry = lax.fori_loop(block.outer, block.end, masked, carry)
    pl.when(warpgroup == 0)(take_turn)
    if num_places > 1:
        pl.when(block.end == block.begin)(free_next_place)
    has_failed = _write(gmem, smem, facts, block, warpgroup, box, query, phi, carry)
    if past is None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    elif num_places == 1:
        free_next_place()
    return has_failed


def query_box(block: Block, warpgroup: jax.Array | int, facts: Facts) -> Any:
    """Where the queries of a warpgroup, and their results, are in global memory."""
    dims = pl.ds(block.batch * 0, facts.padded_dim)  # a traced start: TMA fills with zeros beyond the axis
    return block.batch, pl.ds(block.first_row + warpgroup * ROWS, ROWS), block.head, dims


def place_of(smem: SharedRefs, tile: jax.Array, warpgroup: jax.Array | int) -> jax.Array:
    """The place of a warpgroup's queries, for the CTA's tile of this number."""
    return lax.rem(tile, jnp.int32(smem.q.shape[0])) * CONSUMERS + warpgroup


def free_place(smem: SharedRefs, tile: jax.Array, warpgroup: jax.Array) -> None:
    """Once all results have left shared memory: the place of the queries of this tile is free."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    assert smem.q_free is not None
    plgpu.barrier_arrive(smem.q_free.at[place_of(smem, tile, warpgroup)])


def _of_rows(ref: jax.Ref, first_row: jax.Array, block: Block, facts: Facts) -> jax.Array:
    """phi or sinks in base 2, of the rows' head, or [64] where the rows are of many heads."""
    batch = block.batch if ref.shape[0] > 1 else 0
    if facts.pack > 1:
        return registers.load(ref.at[batch, block.head, pl.ds(first_row, ROWS)], _ROW, optimized=False) * LOG2E
    return (ref[0] if ref.ndim == 1 else ref[batch, block.head]) * LOG2E


def _across(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number per row, or one for all of them, for a matrix."""
    return lax.broadcast_in_dim(x, shape, [0]) if x.ndim else x


def _rows(value: float) -> jax.Array:
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), _ROW)


def _scores(query: jax.Ref, keys: Any, take_turn: Any, facts: Facts) -> jax.Array:
    """Q K^T [64, block_kv]; once it has been started, the other warpgroup may use the tensor cores."""
    if facts.is_interpreted:
        take_turn()
        s = jnp.dot(query[...].astype(jnp.float32), keys[...].astype(jnp.float32).T)
        plgpu.commit_smem()
        return s

    def product(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, query, keys.transpose((1, 0)))
        take_turn()
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC((ROWS, facts.config.block_kv), jnp.float32))


def _add_values(acc: jax.Array, weights: jax.Array, values: jax.Ref, meanwhile: Any, facts: Facts) -> jax.Array:
    """acc [64, H'] + p V; calls `meanwhile` once the product has been started."""
    if facts.is_interpreted:
        meanwhile()
        acc += jnp.dot(weights.astype(jnp.float32), values[...].astype(jnp.float32))
        plgpu.commit_smem()
        return acc

    def product(acc: Any) -> None:
        plgpu.wgmma(acc, weights, values)
        meanwhile()

    return pl.run_state(product)(plgpu.ACC.init(acc))


def _write(
    gmem: GlobalRefs,
    smem: SharedRefs,
    facts: Facts,
    block: Block,
    warpgroup: jax.Array,
    box: Any,
    out: Any,
    phi: Any,
    carry: tuple[jax.Array, ...],
) -> jax.Array:
    """Divides by the denominators and stores the rows; 1 where one has left the safe window, else 0."""
    acc, den, *row_max = carry
    first_row = block.first_row + warpgroup * ROWS
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=_ROW)
    position = query_of(row + first_row, facts) + block.offset if facts.has_positions else block.offset
    low, high = bounds(position, block.start, block.length, facts)
    sees_key = (row >= 0) & (high > low)
    sink: Any = None
    if gmem.sinks is not None:
        sink = _of_rows(gmem.sinks, first_row, block, facts)
        if row_max:
            shift = jnp.maximum(row_max[0], sink)
            alpha = jnp.exp2(row_max[0] - shift)
            den, row_max = den * alpha + jnp.exp2(sink - shift), [shift]
            acc *= _across(alpha, acc.shape)
        else:
            den += jnp.exp2(sink - phi)
    factor = 1.0 / den
    if gmem.v_scale is not None and gmem.v_scale.ndim == 1:
        factor *= gmem.v_scale[block.kv_head]
    has_failed, is_safe = jnp.int32(0), sees_key
    if phi is not None:
        den_min, den_max = unified_max.window(gmem.q.dtype, facts.capacity)
        checked = den + (acc - acc).sum(axis=1)  # NaN where a value as large as 1e18 made a sum infinite
        is_safe = (checked >= den_min) & (checked <= den_max)
        factor = jnp.where(is_safe, factor, jnp.nan)
        if facts.recompute:
            failed = jnp.where(is_safe, 0.0, jnp.where(sees_key, 1.0, 0.0))
            has_failed = registers.any_nonzero(failed, _ROW, is_interpreted=facts.is_interpreted)
    factor = jnp.where(sees_key, factor, 0.0)
    if gmem.log_sum is not None:
        log_sum = ((row_max[0] if row_max else phi) + jnp.log2(den)) * LN2
        if phi is not None:
            log_sum = jnp.where(is_safe, log_sum, jnp.nan)
        by_row = smem.by_row.at[warpgroup]
        by_row[...] = jnp.where(sees_key, log_sum, -jnp.inf if sink is None else sink * LN2)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(by_row, gmem.log_sum.at[block.batch, block.head, pl.ds(first_row, ROWS)])
    out[...] = (acc * _across(factor, acc.shape)).astype(out.dtype)
    plgpu.commit_smem()
    assert gmem.out is not None
    plgpu.copy_smem_to_gmem(out, gmem.out.at[box])
    return has_failed
