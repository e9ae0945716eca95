"""Attention of many queries per sequence over a cache, with a unified max or online softmax, for Hopper (Mosaic GPU).

A CTA has 128 queries of one head: two warpgroups with 64 rows each compute, and a third one loads. Both consumers go
through the same key blocks:

    s [64, block_kv] = Q K^T        p = e^(s - phi)        o [64, H] += p V

They take turns on the tensor cores: while one computes its weights p, the other has its products. With phi fixed, a
step depends on none before, and o is never rescaled. With phi=None there is online softmax. Blocks that a mask, a
window or the lengths hide from all queries of the CTA are not read. Only blocks that some of them see in part are
masked.

Where a denominator left the safe window, the row is NaN, and `failed` says so: a second launch with prior computes the
CTAs that have such rows with online softmax, and its other CTAs leave at once.

Source: FlashDecoding++ (arXiv 2311.01282), section 3, and FlashAttention-3 (arXiv 2407.08608), sections 3.1 and 3.2.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax import unified_max
from fdpp_jax.pallas.parts import ring
from fdpp_jax.pallas.parts.manual_axes import vary_as_operands
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions
from fdpp_jax.plans.hopper_prefill import CONSUMERS, ROWS, PrefillAttentionConfig
from fdpp_jax.plans.shapes import cdiv, round_up

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
# No score is lower. It is finite, so max - max is not NaN in a row without keys.
_LOWEST = float(jnp.finfo(jnp.float32).min)
_ROW = plgpu.Layout.WGMMA.reduce(1)  # one value per query
_LOADER_REGISTERS, _CONSUMER_REGISTERS = 40, 232  # per thread; 168 each before


class _GlobalRefs(NamedTuple):
    """Refs in global memory: operands, then results. R is T, padded to whole blocks of queries."""

    q: jax.Ref  # [B, T, N, H]
    k: jax.Ref  # [B, S, K, H]
    v: jax.Ref
    lengths: jax.Ref | None = None  # [B] int32
    starts: jax.Ref | None = None  # [B] int32
    phi: jax.Ref | None = None  # [1 or B * N] float32; None: online softmax
    offset: jax.Ref | None = None  # [B] int32
    sinks: jax.Ref | None = None  # [N] float32
    failed: jax.Ref | None = None  # [B, N, R] float32, 1 where a row must be recomputed; again: [B, N, blocks]
    out: jax.Ref | None = None  # [B, T, N, H]; an operand of the second launch, as is log_sum
    log_sum: jax.Ref | None = None  # [B, N, R] float32


class _SharedRefs(NamedTuple):
    """Refs in shared memory; H' is the head dim padded to whole swizzle tiles."""

    q: jax.Ref  # [consumers, 64, H'], queries, then results on their way out
    k: jax.Ref  # [stages, block_kv, H']
    v: jax.Ref
    by_row: jax.Ref  # [consumers, 64] float32
    q_ready: ring.Barrier
    k_ready: ring.Barrier
    v_ready: ring.Barrier
    k_free: ring.Barrier
    v_free: ring.Barrier
    turn: ring.Barrier  # the consumers' turns on the tensor cores
    cleared: ring.Barrier


class _Facts(NamedTuple):
    """Static facts of a launch."""

    config: PrefillAttentionConfig
    options: AttentionOptions
    query_length: int
    num_heads: int
    group: int
    padded_dim: int
    capacity: int
    is_again: bool  # whether it is the second launch
    is_interpreted: bool


@functools.partial(jax.jit, static_argnames=("options", "config", "recompute", "interpret"))
@vary_as_operands
def prefill_attention(
    arrays: AttentionArrays,
    options: AttentionOptions,
    config: PrefillAttentionConfig,
    *,
    recompute: bool = False,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Any:
    """softmax(scale * q k^T) v for many query tokens per sequence.

    Args:
      arrays: query [B, T, N, H] bfloat16 or float16, key and value [B, S, K, H] in its dtype; phi None is online
        softmax. No pages, scales, bias or mask.
      options: Static facts.
      config: Blocks and stages.
      recompute: Recompute rows outside the safe window, by a second launch; else they are NaN.
      interpret: Runs the kernel interpreted on the CPU.

    Returns:
      [B, T, N, H] in the query's dtype; with options.return_residual the pair of this and the rows' log-sum-exp
      [B, T, N] float32.
    """
    results = _launch(arrays, options, config, None, interpret)
    if recompute and arrays.phi is not None:
        by_block = results["failed"].reshape(*results["failed"].shape[:2], -1, config.block_q).max(axis=-1)
        results = _launch(arrays._replace(phi=None), options, config, results | dict(failed=by_block), interpret)
    query_length = arrays.query.shape[1]
    out = results["out"][:, :query_length]
    if not options.return_residual:
        return out
    return out, results["log_sum"][..., :query_length].swapaxes(1, 2)


def _launch(
    arrays: AttentionArrays,
    options: AttentionOptions,
    config: PrefillAttentionConfig,
    prior: dict[str, jax.Array] | None,
    interpret: plgpu.InterpretGPUParams | None,
) -> dict[str, jax.Array]:
    """One launch; with the results of the one before it computes the blocks of queries that have failed rows."""
    query = arrays.query
    batch, query_length, num_heads, head_dim = query.shape
    facts = _Facts(
        config=config,
        options=options,
        query_length=query_length,
        num_heads=num_heads,
        group=num_heads // arrays.key.shape[2],
        padded_dim=round_up(head_dim, 64),
        capacity=arrays.capacity,
        is_again=prior is not None,
        is_interpreted=interpret is not None,
    )

    def padded(x: jax.Array) -> jax.Array:  # TMA takes tiles of 8 rows; lengths that are multiples of 8 save this copy
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0))) if x.shape[1] % 8 else x

    operands: dict[str, Any] = dict(q=padded(query), k=padded(arrays.key), v=padded(arrays.value))
    for name, array in (("lengths", arrays.lengths), ("starts", arrays.starts), ("offset", arrays.query_offset)):
        if array is not None:
            operands[name] = array.astype(jnp.int32)
    if arrays.phi is not None:
        phi = arrays.phi.astype(jnp.float32)
        operands["phi"] = phi.reshape(1) if phi.ndim == 0 else jnp.broadcast_to(phi, (batch, num_heads)).reshape(-1)
    if arrays.sinks is not None:
        operands["sinks"] = arrays.sinks.astype(jnp.float32)
    num_blocks = cdiv(query_length, config.block_q)
    rows = jax.ShapeDtypeStruct((batch, num_heads, num_blocks * config.block_q), jnp.float32)
    results: dict[str, Any] = {}
    if prior is None:
        results["out"] = jax.ShapeDtypeStruct(operands["q"].shape, query.dtype)
        if options.return_residual:
            results["log_sum"] = rows
        if arrays.phi is not None:
            results["failed"] = rows
    else:  # updated in place
        operands |= {name: x if name == "failed" else jax.new_ref(x) for name, x in prior.items()}

    def body(*refs: jax.Ref, **smem: jax.Ref) -> None:
        gmem = _GlobalRefs(**dict(zip((*operands, *results), refs, strict=True)))
        _attend(gmem, _SharedRefs(**smem), facts)

    outs = plgpu.kernel(
        body,
        out_type=list(results.values()),
        scratch_types=_scratch(query, facts),
        grid=(batch, num_heads, num_blocks),
        grid_names=("batch", "head", "block"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name=f"prefill_attention_{'online' if arrays.phi is None else 'unified'}",
    )(*operands.values())
    if prior is None:
        return dict(zip(results, outs, strict=True))
    return {name: jax.freeze(operands[name]) for name in prior if name != "failed"}


def _scratch(query: jax.Array, facts: _Facts) -> dict[str, Any]:
    """The kernel's shared memory and barriers, by the names of their refs in `_SharedRefs`."""
    config, dtype, padded_dim = facts.config, query.dtype, facts.padded_dim
    transforms = ring.tile_transforms(query.shape[3], dtype)
    tile = plgpu.SMEM((config.num_stages, config.block_kv, padded_dim), dtype, transforms=transforms)
    loaded = plgpu.Barrier(num_barriers=config.num_stages)
    consumed = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=config.num_stages)
    everyone = plgpu.Barrier(num_arrivals=CONSUMERS)
    return dict(
        q=plgpu.SMEM((CONSUMERS, ROWS, padded_dim), dtype, transforms=transforms),
        k=tile,
        v=tile,
        by_row=plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
        q_ready=plgpu.Barrier(num_barriers=CONSUMERS),
        k_ready=loaded,
        v_ready=loaded,
        k_free=consumed,
        v_free=consumed,
        turn=everyone,
        cleared=everyone,
    )


class _Block(NamedTuple):
    """A CTA's queries, and the blocks of keys that they see: [begin, end), of which [inner, outer) are seen whole."""

    batch: jax.Array
    head: jax.Array
    number: jax.Array  # of the block of queries
    first_query: jax.Array
    offset: jax.Array | int
    length: jax.Array | int
    start: jax.Array | int
    low: jax.Array | int  # keys [low, high) are seen by a query of the CTA
    high: jax.Array
    begin: jax.Array
    inner: jax.Array
    outer: jax.Array
    end: jax.Array


def _bounds(position: Any, start: Any, length: Any, facts: _Facts) -> tuple[Any, Any]:
    """[low, high) of the keys that a query at a position sees."""
    low, high = start, length
    if facts.options.is_causal:
        high = jnp.minimum(high, position + 1)
    if facts.options.local_window_size is not None:
        left, right = facts.options.local_window_size
        low = jnp.maximum(low, position - left)
        high = jnp.minimum(high, position + right + 1)
    return low, high


def _block(gmem: _GlobalRefs, facts: _Facts) -> _Block:
    config = facts.config
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    num_blocks = cdiv(facts.query_length, config.block_q)
    # The last queries first: with a causal mask they have most keys to read.
    index = num_blocks - 1 - lax.axis_index("block")
    first_query = index * config.block_q
    length = facts.capacity if gmem.lengths is None else jnp.minimum(gmem.lengths[batch], facts.capacity)
    start = 0 if gmem.starts is None else jnp.maximum(gmem.starts[batch], 0)
    offset = 0 if gmem.offset is None else gmem.offset[batch]
    last_query = jnp.minimum(first_query + config.block_q, facts.query_length) - 1
    low, inner_high = _bounds(offset + first_query, start, length, facts)
    inner_low, high = _bounds(offset + last_query, start, length, facts)
    high = jnp.maximum(jnp.int32(high), 0)
    width = jnp.int32(config.block_kv)
    end = lax.div(high + width - 1, width)
    begin = jnp.minimum(lax.div(jnp.int32(low), width), end)
    inner = jnp.clip(lax.div(jnp.int32(inner_low) + width - 1, width), begin, end)
    outer = jnp.clip(lax.div(jnp.maximum(jnp.int32(inner_high), 0), width), inner, end)
    return _Block(batch, head, index, first_query, offset, length, start, low, high, begin, inner, outer, end)


def _attend(gmem: _GlobalRefs, smem: _SharedRefs, facts: _Facts) -> None:
    """One CTA."""
    block = _block(gmem, facts)
    warpgroup = lax.axis_index("warpgroup")

    def work() -> None:
        @pl.when(warpgroup < CONSUMERS)
        def _consume() -> None:
            plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
            _consumer(gmem, smem, facts, block, warpgroup)

        @pl.when(warpgroup == CONSUMERS)
        def _load() -> None:
            plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")
            _loader(gmem, smem, facts, block)

    if not facts.is_again:
        work()
        return
    assert gmem.failed is not None
    pl.when(gmem.failed[block.batch, block.head, block.number] > 0)(work)


def _loader(gmem: _GlobalRefs, smem: _SharedRefs, facts: _Facts, block: _Block) -> None:
    """Keeps the ring of key and value blocks full."""
    config = facts.config
    kv_head = lax.div(block.head, jnp.int32(facts.group))
    zero = block.batch * 0  # a traced start lets a box reach beyond the axis: TMA fills with zeros
    dims = pl.ds(zero, facts.padded_dim)

    def load(i: jax.Array, _: None) -> None:
        slot = lax.rem(i - block.begin, jnp.int32(config.num_stages))
        keys = block.batch, pl.ds(i * config.block_kv, config.block_kv), kv_head, dims
        is_reused = i - block.begin >= config.num_stages
        pl.when(is_reused)(lambda: plgpu.barrier_wait(smem.k_free.at[slot]))
        plgpu.copy_gmem_to_smem(gmem.k.at[keys], smem.k.at[slot], smem.k_ready.at[slot])
        pl.when(is_reused)(lambda: plgpu.barrier_wait(smem.v_free.at[slot]))
        plgpu.copy_gmem_to_smem(gmem.v.at[keys], smem.v.at[slot], smem.v_ready.at[slot])

    lax.fori_loop(block.begin, block.end, load, None)
    # A CTA must not end while an arrival at its barriers is pending.
    for free in (smem.k_free, smem.v_free):
        ring.drain(free, block.end - block.begin, config.num_stages)


def _consumer(gmem: _GlobalRefs, smem: _SharedRefs, facts: _Facts, block: _Block, warpgroup: jax.Array) -> None:
    """The 64 queries of one warpgroup."""
    config = facts.config
    first_query = block.first_query + warpgroup * ROWS
    zero = block.batch * 0
    box = block.batch, pl.ds(first_query, ROWS), block.head, pl.ds(zero, facts.padded_dim)
    query = smem.q.at[warpgroup]
    plgpu.copy_gmem_to_smem(gmem.q.at[box], query, smem.q_ready.at[warpgroup])

    def take_turn() -> None:
        plgpu.barrier_arrive(smem.turn)
        plgpu.barrier_wait(smem.turn)

    has_low = facts.options.local_window_size is not None or gmem.starts is not None
    phi = None
    if gmem.phi is not None:
        phi = gmem.phi[0 if gmem.phi.shape[0] == 1 else block.batch * facts.num_heads + block.head] * LOG2E
    position = block.offset + first_query  # of row 0

    plgpu.barrier_wait(smem.q_ready.at[warpgroup])
    pl.when(block.end > block.begin)(lambda: plgpu.barrier_wait(smem.k_ready.at[0]))
    pl.when(warpgroup == 1)(take_turn)

    def step(i: jax.Array, carry: tuple[jax.Array, ...], *, is_masked: bool) -> tuple[jax.Array, ...]:
        acc, den, *row_max = carry
        slot = lax.rem(i - block.begin, jnp.int32(config.num_stages))
        s = _scores(query, smem.k.at[slot], take_turn, facts)
        plgpu.barrier_arrive(smem.k_free.at[slot])
        cap, scale = facts.options.logits_soft_cap, facts.options.scale
        if cap is None:
            s *= scale * LOG2E
        else:  # tanh from exp2, since the hardware's tanh is good to 11 bits only
            s = 1.0 - 2.0 / (jnp.exp2(s * (scale * (2 * LOG2E / cap))) + 1.0)
            s *= cap * LOG2E
        if is_masked:
            s = jnp.where(_is_live(s.shape, i * config.block_kv, position, block, facts, has_low), s, -jnp.inf)
        if phi is None:
            shift = jnp.maximum(row_max[0], s.max(axis=1))
            alpha = jnp.exp2(row_max[0] - shift)
            acc *= lax.broadcast_in_dim(alpha, acc.shape, [0])
            den *= alpha
            row_max = [shift]
            p = jnp.exp2(s - lax.broadcast_in_dim(shift, s.shape, [0]))
        else:
            p = jnp.exp2(s - phi)
        weights = p.astype(query.dtype)
        # Not of the weights as rounded: converting them back takes a third of the time of a step.
        den += p.sum(axis=1)
        acc, den, weights, *row_max = lax.optimization_barrier((acc, den, weights, *row_max))
        plgpu.barrier_arrive(smem.turn)
        plgpu.barrier_wait(smem.v_ready.at[slot])
        if is_masked:
            _clear_dead_values(smem, slot, i * config.block_kv, block, facts, warpgroup)
        plgpu.barrier_wait(smem.turn)

        def await_next_keys() -> None:
            following = lax.rem(i + 1 - block.begin, jnp.int32(config.num_stages))
            pl.when(i + 1 < block.end)(lambda: plgpu.barrier_wait(smem.k_ready.at[following]))

        acc = _add_values(acc, weights, smem.v.at[slot], await_next_keys, facts)
        plgpu.barrier_arrive(smem.v_free.at[slot])
        return acc, den, *row_max

    acc = plgpu.layout_cast(jnp.zeros((ROWS, facts.padded_dim), jnp.float32), plgpu.Layout.WGMMA)
    carry: tuple[jax.Array, ...] = (acc, _rows(0.0)) if phi is not None else (acc, _rows(0.0), _rows(_LOWEST))
    masked, whole = (functools.partial(step, is_masked=is_masked) for is_masked in (True, False))
    if has_low:
        carry = lax.fori_loop(block.begin, block.inner, masked, carry)
        carry = lax.fori_loop(block.inner, block.outer, whole, carry)
    else:
        carry = lax.fori_loop(block.begin, block.outer, whole, carry)
    carry = lax.fori_loop(block.outer, block.end, masked, carry)
    pl.when(warpgroup == 0)(take_turn)
    _write(gmem, smem, facts, block, warpgroup, box, phi, carry)


def _rows(value: float) -> jax.Array:
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), _ROW)


def _scores(query: jax.Ref, keys: Any, take_turn: Any, facts: _Facts) -> jax.Array:
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


def _add_values(acc: jax.Array, weights: jax.Array, values: jax.Ref, meanwhile: Any, facts: _Facts) -> jax.Array:
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


def _is_live(
    shape: tuple[int, ...], first_key: jax.Array, position: jax.Array, block: _Block, facts: _Facts, has_low: bool
) -> Any:
    """Which keys of a block each query sees: [64, block_kv] bool."""
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, shape, layout=plgpu.Layout.WGMMA)
    key = iota(1) + first_key
    low, high = _bounds(iota(0) + position, block.start, block.length, facts)
    is_live = key < high
    return is_live & (key >= low) if has_low else is_live


def _clear_dead_values(
    smem: _SharedRefs, slot: jax.Array, first_key: jax.Array, block: _Block, facts: _Facts, warpgroup: jax.Array
) -> None:
    """Zeroes values of a block that no query of the CTA sees: 0 * NaN would be NaN. Each warpgroup clears a part."""
    width = facts.config.block_kv

    def clear(part: int) -> None:
        values = smem.v.at[slot, pl.ds(part * ROWS, ROWS)]
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS, facts.padded_dim), 0, layout=plgpu.Layout.WGMMA)
        row += first_key + part * ROWS
        loaded = plgpu.load(values, layout=plgpu.Layout.WGMMA)
        values[...] = jnp.where((row >= block.low) & (row < block.high), loaded, jnp.zeros_like(loaded))
        plgpu.commit_smem()

    @pl.when((first_key + width > block.high) | (first_key < block.low))
    def _clear() -> None:
        for part in range(width // ROWS):
            pl.when(warpgroup == part % CONSUMERS)(functools.partial(clear, part))
        plgpu.barrier_arrive(smem.cleared)
        plgpu.barrier_wait(smem.cleared)


def _write(
    gmem: _GlobalRefs,
    smem: _SharedRefs,
    facts: _Facts,
    block: _Block,
    warpgroup: jax.Array,
    box: Any,
    phi: Any,
    carry: tuple[jax.Array, ...],
) -> None:
    """Divides by the denominators and stores the rows."""
    acc, den, *row_max = carry
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=_ROW)
    low, high = _bounds(row + block.offset + block.first_query + warpgroup * ROWS, block.start, block.length, facts)
    sees_key = (row >= 0) & (high > low)
    if gmem.sinks is not None:
        sink = gmem.sinks[block.head] * LOG2E
        if row_max:
            shift = jnp.maximum(row_max[0], sink)
            alpha = jnp.exp2(row_max[0] - shift)
            den, row_max = den * alpha + jnp.exp2(sink - shift), [shift]
            acc *= lax.broadcast_in_dim(alpha, acc.shape, [0])
        else:
            den += jnp.exp2(sink - phi)
    factor = 1.0 / den
    rows = block.batch, block.head, pl.ds(block.first_query + warpgroup * ROWS, ROWS)
    by_row = smem.by_row.at[warpgroup]

    def store_rows(values: jax.Array, target: jax.Ref) -> None:
        by_row[...] = values
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(by_row, target.at[rows])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    if gmem.phi is not None:
        assert gmem.failed is not None
        den_min, den_max = unified_max.window(gmem.q.dtype, facts.capacity)
        checked = den + (acc - acc).sum(axis=1)  # NaN where a value as large as 1e18 made a sum infinite
        is_safe = (checked >= den_min) & (checked <= den_max)
        store_rows(jnp.where(is_safe, 0.0, jnp.where(sees_key, 1.0, 0.0)), gmem.failed)
        factor = jnp.where(is_safe, factor, jnp.nan)
    factor = jnp.where(sees_key, factor, 0.0)
    if gmem.log_sum is not None:
        log_sum = ((row_max[0] if row_max else phi) + jnp.log2(den)) * LN2
        if gmem.phi is not None:
            log_sum = jnp.where(is_safe, log_sum, jnp.nan)
        store_rows(jnp.where(sees_key, log_sum, -jnp.inf), gmem.log_sum)
    out = smem.q.at[warpgroup]
    out[...] = (acc * lax.broadcast_in_dim(factor, acc.shape, [0])).astype(out.dtype)
    plgpu.commit_smem()
    assert gmem.out is not None
    plgpu.copy_smem_to_gmem(out, gmem.out.at[box])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
