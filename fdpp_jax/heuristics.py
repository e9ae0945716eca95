"""Which kernel runs: the paper's decision tree, from shapes and a device to a plan with its reason.

Attention: the decode kernel for up to 16 queries, with as many CTAs a key/value head as fill the SMs; cuDNN for
prefill; else the float32 reference. Matmul: what a table of measurements says (docs/tuning.md), of this weight or the
nearest; without one M = 1 gemv (the paper's ImplA), M up to 64 flat (ImplB), else XLA (ImplC).
The roofline says whether a call is memory- or compute-bound. Rules are analytic; `_MIN_FLAT_ROWS` and how many CTAs and
keys a tile attention takes were measured.

Pure Python without arrays, so that a plan can be had for any named device on any machine.

Source: FlashDecoding++ (arXiv 2311.01282), sections 4 and 5.
"""

import dataclasses
import functools
from typing import Any

from fdpp_jax import device as device_lib
from fdpp_jax import limits, tuned_tables
from fdpp_jax.config import (
    MAX_CHUNK,
    MAX_CLUSTER,
    MAX_COUNTERS,
    UNIT_WIDTH,
    AttentionPlan,
    AttentionShape,
    DecodeAttentionConfig,
    FlatMatmulConfig,
    FusedLayerConfig,
    GemvConfig,
    LayerPlan,
    LayerShape,
    MatmulImplementation,
    MatmulPlan,
    MatmulShape,
    XlaAttentionConfig,
)
from fdpp_jax.device import Device
from fdpp_jax.limits import BLOCK_KV, MATMUL_BLOCKS_K, MAX_FLAT_ROWS, MAX_K_SPLITS, MAX_STAGES, MIN_STAGES

# The paper's M1, from which on the flat kernel beats gemv: 2 unless measured.
_MIN_FLAT_ROWS = {"H200": 1}
# A head that would get fewer CTAs gets twice as many, two an SM, which even out better, unless one sequence has short
# shares (9.0 us with two an SM and 1024 keys, 8.5 with one; 20.7 and 20.1 with 4096) and the launch before has ended:
# else two would take an SM that is free early. Where a head has more, a CTA alone on its SM takes tiles of 128 keys:
# 21.2 us with 16 such CTAs a head, 22.1 with tiles of 64 (B 8, 32/8 heads, mixed lengths). 8-bit caches want two an SM,
# and tiles of 128 keys where a share has many of them: 71 us against 79 (B 8, 32/32 heads, int8), else of 64: 26.0
# against 28.3 (32/8 heads, 8 a share).
_FEW_SPLITS = 8
_MAX_TILES_ALONE = 16
_MANY_WIDE_TILES = 16
# CTAs that share a sequence, of which one adds up all sums: 12.1 us with 16, 13.0 with 32, 28.0 with 128 (one head of
# 16 query rows, 8192 keys); 14.4 with 16, 15.7 with 32 (28/4 heads, 16384 keys). More where each has so many tiles.
_MAX_SHARERS = 16
_TILES_OF_MORE = 32
# Loads in flight an SM. Memory is busy with a third of it; with twice as many, loads queue up, and the first and the
# last tiles come later: 9.4 us against 9.1 (B 1, 32/8 heads, 4096 keys), 23.8 against 22.3 with mixed lengths.
_BYTES_IN_FLIGHT = 96 * 1024
# One sequence in 16 bits: sums in the shared memory of a cluster are there 1 us earlier, and half of the SMs read as
# fast as all if each has more on its way: 8.7 us with 64 CTAs as clusters, 9.2 with 128 in a grid (32/8 heads, 4096
# keys), 20.4 and 21.7 with 16384; 35.6 and 36.4 (32/32 heads, 8192 keys), 67.3 and 67.6 with 16384. Fewer do not, from
# some 8 tiles each on (28/4 heads: 9.2 and 10.4 with 4096 keys, 19.5 and 16.1 with 16384), nor does online softmax,
# whose running max is not hidden any more (32/32 heads: 81.4 with 16384 keys, 66.6 with a unified max). Where half of
# the SMs are fewer than two a head, pairs win up to 20 tiles an SM (40/40 heads, 4096 keys: 24.2 and 25.1).
_CLUSTER_BYTES_IN_FLIGHT = 128 * 1024
_MAX_SHORT_SHARE = 8
_MAX_TILES_OF_ALL = 20
_MIN_CLUSTER_APPENDED = 4  # Llama-2-7B, whose clusters would have 2, is 1 % slower with so few CTAs
# A fused layer's CTAs end one by one. The first SMs to be free would take one attention CTA more than planned, where it
# fits, and the last none: 4.24 ms a step, 3.94 where it does not (16 layers of Llama-2-7B, B 32), 2.29 and 2.25 (B 8).
# One sequence is 1 % faster where it does. The margin is for what `smem_bytes` has too much.
_SMEM_MARGIN = 4 * 1024
_MAX_KV_SPLITS = 128  # a CTA has as many threads, and each waits for one other CTA
_MIN_BLOCKS_PER_SPLIT = 4  # a shorter split is over before its ring is full
# A tile of the flat kernel: 64 x 128, 128 x 128 and two CTAs an SM are slower for most weights and rows (H200).
_FLAT_BLOCK_N, _FLAT_BLOCK_K = 64, 256
# While the grid waits, some 5 us, each CTA's ring takes in 160 KiB, and memory does not stand still. Other tiles,
# deeper rings, fewer loads in flight and prefetches to L2 were slower: docs/performance.md.
_FUSED_BLOCK_K = 256
_FUSED_MAX_STAGES = 5
# Tiles of x in their ring, of which two halves would starve (docs/performance.md); two by two where they have 8 rows.
_FUSED_X_TILES = 6
_FUSED_X_BYTES = 64 * 1024


@functools.cache
def plan_attention(shape: AttentionShape, device: Device | str) -> AttentionPlan:
    """How `dot_product_attention` computes `shape` on `device`.

    Args:
      shape: The static facts of the call.
      device: A Device, or the name of a known one.

    Returns:
      The implementation, its config, and the reason in one line.

    Raises:
      ValueError: The device is unknown.
    """
    device = device_lib.resolve(device)
    refusal = limits.refuse_mosaic_attention(shape, device)
    if refusal is None:
        config = decode_attention_config(shape, device)
        return AttentionPlan("mosaic_gpu", config, _split_reason(shape, device, config), recompute="kernel")
    if device.is_gpu and device.arch != limits.KERNEL_ARCH and limits.refuse_attention_shape(shape) is None:
        config = decode_attention_config(shape, device)
        refusal += f"; the rule here would be: decode kernel, {_split_reason(shape, device, config)}"
    return plan_xla_attention(shape, device, refusal)


def plan_xla_attention(shape: AttentionShape, device: Device | str, why: str) -> AttentionPlan:
    """The best attention without a kernel of ours; `why` it is asked for joins the reason."""
    why_not_cudnn = limits.refuse_cudnn(shape, device)
    if why_not_cudnn is None:
        return AttentionPlan("xla", XlaAttentionConfig("cudnn"), f"cuDNN; {why}")
    return AttentionPlan("xla", XlaAttentionConfig("reference"), f"float32 reference: {why_not_cudnn}; {why}")


def plan_matmul(shape: MatmulShape, device: Device | str) -> MatmulPlan:
    """How `flat_matmul` computes x [m, k] @ w, [k, n] or [n, k], on `device`.

    The order of w's axes changes neither the kernel nor its config.

    Args:
      shape: The static facts of the call.
      device: A Device, or the name of a known one.

    Returns:
      The implementation, its config, and the reason in one line: "tuned on ...: exact", "tuned on ...: nearest ...",
      "rule: ...", or why no kernel runs.

    Raises:
      ValueError: The device is unknown, or a table of its measurements is malformed.
    """
    device = device_lib.resolve(device)
    return _tuned_plan(shape, device) or _rule_plan(shape, device)


@functools.cache
def plan_layer(shape: LayerShape, device: Device | str) -> LayerPlan:
    """Whether a layer's matmuls between one attention and the next run as one launch on `device`.

    Args:
      shape: The static facts of the layer.
      device: A Device, or the name of a known one.

    Returns:
      The implementation, its config, and the reason in one line.

    Raises:
      ValueError: The device is unknown.
    """
    device = device_lib.resolve(device)
    refusal = limits.refuse_fused_layer(shape, device)
    if refusal is not None:
        return LayerPlan("unfused", None, refusal)
    config = fused_layer_config(shape, device)
    depth = max(shape.num_query_heads * shape.head_dim, shape.hidden_size, shape.intermediate_size)
    max_depth = MAX_COUNTERS * config.chunk
    if depth > max_depth:
        return LayerPlan("unfused", None, f"the fused layer multiplies at most {max_depth} columns, got {depth}")
    reason = f"one stream of weights through {config.num_ctas} CTAs, which wait for each other in memory"
    return LayerPlan("fused", config, reason)


def fused_layer_config(shape: LayerShape, device: Device | str) -> FusedLayerConfig:
    """Tiles of `pallas.fused_layer`: as deep a ring as shared memory holds, up to what a wait for the grid lasts."""
    device = device_lib.resolve(device)
    # Each CTA has a unit of the MLP, which tells it that the product before is done. All of them must run at once.
    num_ctas = min(device.num_sms, shape.intermediate_size // UNIT_WIDTH)
    num_x_tiles = 2 if shape.rows == 8 else 1
    num_x_stages = min(_FUSED_X_TILES, _FUSED_X_BYTES // (2 * shape.rows * _FUSED_BLOCK_K)) // num_x_tiles
    config = FusedLayerConfig(num_ctas, _FUSED_BLOCK_K, _FUSED_MAX_STAGES, num_x_tiles, num_x_stages)
    return with_stages_that_fit(config, shape, device.smem_bytes)


def _tuned_plan(
    shape: MatmulShape, device: Device, implementation: MatmulImplementation | None = None
) -> MatmulPlan | None:
    """The measured plan, or that of the named kernel; None where no table has one that fits.

    Not cached here: tables may change under a running process, and are cached by `tuned_tables` until they do.
    """
    if shape.m < 1 or limits.refuse_device(device) or limits.refuse_matmul_shape(shape):
        return None
    match = tuned_tables.lookup(shape, device.kind)
    if match is None:
        return None
    chosen = implementation or match.entry.implementation
    if chosen == "xla":
        return MatmulPlan("xla", None, match.reason)
    config = match.entry.configs.get(chosen)
    if config is None:
        return None
    refusal = limits.refuse_matmul_config(shape, device, config)
    if refusal is None:
        return MatmulPlan(chosen, config, match.reason)
    if match.is_exact:
        raise ValueError(f"{match.entry.where}.configs.{chosen} cannot run: {refusal}")
    return None


def _rule_plan(shape: MatmulShape, device: Device) -> MatmulPlan:
    min_flat_rows = _MIN_FLAT_ROWS.get(device.kind, 2)
    implementation: MatmulImplementation = "flat" if shape.m >= min_flat_rows else "gemv"
    bound = _bound(_matmul_intensity(shape), device)
    if shape.m > MAX_FLAT_ROWS:
        return MatmulPlan("xla", None, f"rule: M = {shape.m} > {MAX_FLAT_ROWS} fills cuBLAS's tiles ({bound})")
    config = rule_matmul_config(shape, device, implementation)
    refusal = limits.refuse_kernel_matmul(shape, device, implementation)
    if refusal is None:
        measured = ", measured faster than gemv" if min_flat_rows == shape.m == 1 else ""
        return MatmulPlan(implementation, config, f"rule: M = {shape.m}{measured}, {_shares(config, shape)} ({bound})")
    if device.is_gpu and device.arch != limits.KERNEL_ARCH and limits.refuse_matmul_shape(shape) is None:
        refusal += f"; the rule here would be: {implementation}, {_shares(config, shape)} ({bound})"
    return MatmulPlan("xla", None, refusal)


def decode_attention_config(shape: AttentionShape, device: Device | str) -> DecodeAttentionConfig:
    """Tiles and splits of the decode kernel, whether or not it is the plan's choice."""
    device = device_lib.resolve(device)
    return _cluster_config(shape, device) or grid_attention_config(shape, device)


def _cluster_config(shape: AttentionShape, device: Device) -> DecodeAttentionConfig | None:
    """A cluster for each head of one sequence, on half of the SMs if these suffice; None where a grid is faster.

    After a fused layer the other SMs begin with the next layer's weights.
    """
    if shape.batch != 1 or shape.kv_itemsize == 1 or device.compute_capability < 90:
        return None
    num_heads, num_tiles = max(shape.num_kv_heads, 1), -(-shape.capacity // BLOCK_KV)
    half_share = device.num_sms // 2 // num_heads
    num_splits = min(max(half_share, 2), MAX_CLUSTER, num_tiles)
    if num_splits < 2 or num_splits * num_heads > device.num_sms:
        return None
    if shape.is_appended and half_share < _MIN_CLUSTER_APPENDED:
        return None
    if (half_share > MAX_CLUSTER or shape.is_online) and num_tiles > _MAX_SHORT_SHARE * num_splits:
        return None
    if half_share < 2 and num_tiles * num_heads > _MAX_TILES_OF_ALL * device.num_sms:
        return None
    num_stages = min(-(-num_tiles // num_splits), -(-_CLUSTER_BYTES_IN_FLIGHT // _stage_bytes(BLOCK_KV, shape)))
    config = DecodeAttentionConfig(BLOCK_KV, num_splits, min(max(num_stages, MIN_STAGES), MAX_STAGES), "cluster")
    config = with_stages_that_fit(config, shape, device.smem_bytes)
    return config if config.smem_bytes(shape) <= device.smem_bytes else None


def grid_attention_config(shape: AttentionShape, device: Device) -> DecodeAttentionConfig:
    """The decode kernel without clusters: CTAs that fill the SMs once or twice share the tiles of all sequences."""
    chunk = min(shape.batch, MAX_CHUNK)
    num_heads = max(1, -(-shape.batch // max(chunk, 1)) * shape.num_kv_heads)  # each with its own CTAs
    is_narrow = shape.kv_itemsize == 1
    smallest = DecodeAttentionConfig(BLOCK_KV, 1, MIN_STAGES).smem_bytes(shape)
    has_few = device.num_sms < _FEW_SPLITS * num_heads
    num_tiles = -(-shape.capacity // BLOCK_KV)
    is_short = num_tiles * num_heads <= _MAX_TILES_ALONE * device.num_sms
    wants_two = is_narrow or (has_few and not (is_short and shape.batch == 1 and not shape.is_appended))
    ctas_per_sm = 2 if wants_two and smallest <= device.smem_bytes_shared(2) else 1
    num_splits = ctas_per_sm * device.num_sms // num_heads
    if num_splits > chunk and 8 * (num_splits % chunk) <= num_splits:
        num_splits -= num_splits % chunk  # shares that end with sequences of one length need not be added up
    max_sharers = _MAX_KV_SPLITS if is_narrow else max(_MAX_SHARERS, num_tiles // _TILES_OF_MORE)
    num_splits = max(1, min(num_splits, chunk * min(num_tiles, max_sharers), _MAX_KV_SPLITS))
    ctas_per_sm = min(ctas_per_sm, -(-num_heads * num_splits // device.num_sms))
    num_wide_tiles = chunk * -(-shape.capacity // (2 * BLOCK_KV))
    wants_wide = num_wide_tiles >= num_splits * (_MANY_WIDE_TILES if is_narrow else 1) and shape.rows <= 16
    if wants_wide and (is_narrow or not has_few):
        wide = _with_stages(2 * BLOCK_KV, num_splits, ctas_per_sm, shape, device)
        if wide.smem_bytes(shape) <= device.smem_bytes_shared(ctas_per_sm):
            return wide
    return _with_stages(BLOCK_KV, num_splits, ctas_per_sm, shape, device)


def _stage_bytes(block_kv: int, shape: AttentionShape) -> int:
    """Of a tile of keys and one of values."""
    return 2 * block_kv * shape.padded_head_dim * shape.kv_itemsize


def _with_stages(
    block_kv: int, num_splits: int, ctas_per_sm: int, shape: AttentionShape, device: Device
) -> DecodeAttentionConfig:
    """As many stages as keep enough loads in flight and fit, at least two. After a fused layer no CTA more may fit."""
    num_stages = min(MAX_STAGES, -(-_BYTES_IN_FLIGHT // (ctas_per_sm * _stage_bytes(block_kv, shape))))
    config = DecodeAttentionConfig(block_kv, num_splits, max(num_stages, MIN_STAGES))
    config = with_stages_that_fit(config, shape, device.smem_bytes_shared(ctas_per_sm))
    if shape.is_appended and shape.batch > 1:  # an SM that is free early would take CTAs meant for others
        least = device.smem_bytes_shared(ctas_per_sm + 1) + _SMEM_MARGIN
        config = dataclasses.replace(config, unused_smem_bytes=max(0, least - config.smem_bytes(shape)))
    return config


def with_stages_that_fit[C: DecodeAttentionConfig | FlatMatmulConfig | GemvConfig | FusedLayerConfig](
    config: C, shape: Any, smem_bytes: int
) -> C:
    """The config with no more stages than fit `smem_bytes` with a shape of its kernel, but at least two."""
    while config.num_stages > MIN_STAGES and config.smem_bytes(shape) > smem_bytes:
        config = dataclasses.replace(config, num_stages=config.num_stages - 1)
    return config


def flat_matmul_config(shape: MatmulShape, device: Device | str) -> FlatMatmulConfig:
    """Tiles and splits of the flat kernel, measured or by rule, whether or not it is the plan's choice."""
    config = _kernel_config(shape, device_lib.resolve(device), "flat")
    assert isinstance(config, FlatMatmulConfig)
    return config


def gemv_config(shape: MatmulShape, device: Device | str) -> GemvConfig:
    """Tiles and splits of the gemv kernel, measured or by rule, whether or not it is the plan's choice."""
    config = _kernel_config(shape, device_lib.resolve(device), "gemv")
    assert isinstance(config, GemvConfig)
    return config


def _kernel_config(
    shape: MatmulShape, device: Device, implementation: MatmulImplementation
) -> FlatMatmulConfig | GemvConfig:
    tuned = _tuned_plan(shape, device, implementation)
    if tuned is not None and tuned.config is not None:
        return tuned.config
    return rule_matmul_config(shape, device, implementation)


def _num_splits(num_tiles: int, max_splits: int, device: Device, *, wanted_per_sm: int, ctas_per_sm: int) -> int:
    """Smallest power of two that fills three quarters of the wanted CTAs, without a second wave of them.

    Three quarters, since doubling beyond costs a longer reduction and buys no bandwidth: an SM fewer in four
    still leaves enough loads in flight to fill memory.
    """
    splits = 1
    while (
        4 * num_tiles * splits < 3 * wanted_per_sm * device.num_sms
        and 2 * splits <= max_splits
        and 2 * num_tiles * splits <= ctas_per_sm * device.num_sms
    ):
        splits *= 2
    return splits


def _smem_budget(num_ctas: int, two_fit: bool, device: Device) -> int:
    """Shared memory for one CTA: half an SM where the grid exceeds the SMs and two can share one."""
    return device.smem_bytes_shared(2 if two_fit and num_ctas > device.num_sms else 1)


def rule_matmul_config(
    shape: MatmulShape, device: Device, implementation: MatmulImplementation
) -> FlatMatmulConfig | GemvConfig:
    """Tiles and splits of the kernel "gemv" or "flat" by rule, where nothing was measured."""
    if implementation != "gemv":
        return _rule_flat_config(shape, device)
    # A tile holds 16 KiB of weights either way. Wide tiles where narrow ones would need more than two CTAs an SM.
    block_n, block_k = (64, 128) if -(-shape.n // 64) <= 2 * device.num_sms else (128, 64)
    num_units = -(-shape.n // block_n)
    max_splits = min(MAX_K_SPLITS, -(-shape.k // block_k) // _MIN_BLOCKS_PER_SPLIT)
    two_fit = GemvConfig(block_n, block_k, MIN_STAGES, 1).smem_bytes(shape) <= device.smem_bytes_shared(2)
    # Two CTAs an SM: 4096 x 4096 takes 12.7 us with 256 of them, 13.2 us with 128 (H200, 2026-11-23).
    ctas_per_sm = 2 if two_fit else 1
    split_k = _num_splits(num_units, max_splits, device, wanted_per_sm=ctas_per_sm, ctas_per_sm=ctas_per_sm)
    smem_bytes = _smem_budget(num_units * split_k, two_fit, device)
    return with_stages_that_fit(GemvConfig(block_n, block_k, MAX_STAGES, split_k), shape, smem_bytes)


def _rule_flat_config(shape: MatmulShape, device: Device) -> FlatMatmulConfig:
    """A CTA an SM, with as deep a ring as it has room for; fewer where a share would be too short."""
    block_n, block_k = _FLAT_BLOCK_N, _FLAT_BLOCK_K
    while block_k > MATMUL_BLOCKS_K[0] and block_k >= 2 * shape.k:
        block_k //= 2
    num_units, num_tiles = -(-shape.n // block_n), -(-shape.k // block_k)
    num_ctas = min(device.num_sms, num_units * min(MAX_K_SPLITS, num_tiles))
    config = FlatMatmulConfig(num_ctas, block_n, block_k, MAX_STAGES)
    return with_stages_that_fit(config, shape, device.smem_bytes)


def _shares(config: FlatMatmulConfig | GemvConfig, shape: MatmulShape) -> str:
    """ "132 CTAs share 64 column blocks", or "split 4"."""
    if isinstance(config, GemvConfig):
        return f"split {config.split_k}"
    num_units = -(-shape.n // config.block_n)
    takers = "1 CTA takes" if config.num_ctas == 1 else f"{config.num_ctas} CTAs share"
    return f"{takers} {num_units} column block" + "s" * (num_units != 1)


def _split_reason(shape: AttentionShape, device: Device, config: DecodeAttentionConfig) -> str:
    """ "8 CTAs a head share the keys of 1 sequence: 256 on 132 SMs (memory-bound: intensity 1 < ridge 223)"."""
    chunk = min(shape.batch, MAX_CHUNK)
    num_ctas = -(-shape.batch // max(chunk, 1)) * shape.num_kv_heads * config.num_splits
    shared = f"{config.num_splits} CTAs a head share" if config.num_splits > 1 else "1 CTA a head takes"
    keys = f"the keys of {chunk} sequence" + ("s" if chunk != 1 else "")
    if config.combine == "cluster":
        shared = f"a cluster of {config.num_splits} CTAs a head shares"
    # QK^T and PV: 4 B T N S H flop over 2 B K S H elements.
    intensity = 2 * shape.group_size * shape.query_length / shape.kv_itemsize
    return f"{shared} {keys}: {num_ctas} on {device.num_sms} SMs ({_bound(intensity, device)})"


def _matmul_intensity(shape: MatmulShape) -> float:
    """flop a byte of x [m, k] @ w [k, n], all three in 16 bits."""
    elements = shape.m * shape.k + shape.k * shape.n + shape.m * shape.n
    return shape.m * shape.k * shape.n / max(elements, 1)


def _bound(intensity: float, device: Device) -> str:
    """ "memory-bound: intensity 8 < ridge 153", flop a byte."""
    if intensity < device.ridge:
        return f"memory-bound: intensity {intensity:.0f} < ridge {device.ridge:.0f}"
    return f"compute-bound: intensity {intensity:.0f} >= ridge {device.ridge:.0f}"
