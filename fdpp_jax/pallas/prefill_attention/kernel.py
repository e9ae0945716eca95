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

Roles: `blocks` (which keys a CTA sees), `rows` (one warpgroup's queries), `refs`.

Source: FlashDecoding++ (arXiv 2311.01282), section 3, and FlashAttention-3 (arXiv 2407.08608), sections 3.1 and 3.2.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.pallas.parts import ring
from fdpp_jax.pallas.parts.manual_axes import vary_as_operands
from fdpp_jax.pallas.prefill_attention.blocks import Block, block_of
from fdpp_jax.pallas.prefill_attention.refs import Facts, GlobalRefs, SharedRefs
from fdpp_jax.pallas.prefill_attention.rows import consume
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions
from fdpp_jax.plans.hopper_prefill import CONSUMERS, ROWS, PrefillAttentionConfig
from fdpp_jax.plans.shapes import cdiv, round_up

_LOADER_REGISTERS, _CONSUMER_REGISTERS = 40, 232  # per thread; 168 each before


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
    facts = Facts(
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
        gmem = GlobalRefs(**dict(zip((*operands, *results), refs, strict=True)))
        _attend(gmem, SharedRefs(**smem), facts)

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


def _scratch(query: jax.Array, facts: Facts) -> dict[str, Any]:
    """The kernel's shared memory and barriers, by the names of their refs in `SharedRefs`."""
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


def _attend(gmem: GlobalRefs, smem: SharedRefs, facts: Facts) -> None:
    """One CTA."""
    block = block_of(gmem, facts)
    warpgroup = lax.axis_index("warpgroup")

    def work() -> None:
        @pl.when(warpgroup < CONSUMERS)
        def _consume() -> None:
            plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
            consume(gmem, smem, facts, block, warpgroup)

        @pl.when(warpgroup == CONSUMERS)
        def _load() -> None:
            plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")
            _loader(gmem, smem, facts, block)

    if not facts.is_again:
        work()
        return
    assert gmem.failed is not None
    pl.when(gmem.failed[block.batch, block.head, block.number] > 0)(work)


def _loader(gmem: GlobalRefs, smem: SharedRefs, facts: Facts, block: Block) -> None:
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
