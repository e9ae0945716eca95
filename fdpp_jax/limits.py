"""What each kernel takes: a shape and a device to the reason why not, in one line, or None.

Pure Python without arrays, as `heuristics`, which chooses among those that take a call.
"""

from fdpp_jax import device as device_lib
from fdpp_jax.config import (
    PAGE_SIZES,
    QUANTISED_DTYPES,
    UNIT_WIDTH,
    AttentionShape,
    DecodeAttentionConfig,
    FlatMatmulConfig,
    GemvConfig,
    LayerShape,
    MatmulImplementation,
    MatmulShape,
)
from fdpp_jax.device import Device

KERNEL_ARCH = "sm_90"  # wgmma exists on Hopper only
_KERNEL_DTYPES = ("bfloat16", "float16")
MIN_STAGES, MAX_STAGES = 2, 8

ATTENTION_HEAD_DIMS = (64, 80, 96, 128, 256)
BLOCK_KV = 64  # keys of the smallest tile
MAX_ATTENTION_ROWS = 64
MAX_QUERY_LENGTH = 16
MAX_SOFT_CAP = 1000.0  # tanh is 1 - 2 / (e^2x + 1), off by up to 3e-7 of the cap

# The paper's M2: the kernel's rows are the N operand of wgmma, and beyond 64 cuBLAS wastes no rows any more.
MAX_FLAT_ROWS = 64
MAX_K_SPLITS = 8  # CTAs that a column block is shared by
# wgmma's large operand has 64 rows, the swizzle 64 elements.
MATMUL_BLOCKS_N = (64, 128)
MATMUL_BLOCKS_K = (64, 128, 256)
_ALIGNMENT = 16  # 16-bit elements: TMA reads whole swizzle widths along the last axes, the narrowest has 32 bytes

# 8 rows are 9 to 12 % faster in a fused step than with a launch for each product, 16 rows 8 and 7 %, 32 rows 4 and 5 %
# (Llama-2-7B and Llama-3-8B, H200). More were not tried with such rings of x.
MAX_FUSED_ROWS = 32
_SWIZZLE_COLUMNS = 64  # of which TMA wants whole ones, but for a last axis that has less


def refuse_mosaic_attention(shape: AttentionShape, device: Device | str) -> str | None:
    """Why the Mosaic decode kernel cannot compute `shape` on `device`, or None if it can."""
    device = device_lib.resolve(device)
    return refuse_device(device) or refuse_attention_shape(shape) or _smem_refusal(shape, device)


def refuse_kernel_matmul(shape: MatmulShape, device: Device | str, implementation: MatmulImplementation) -> str | None:
    """Why the kernel `implementation` ("gemv" or "flat") cannot compute `shape` on `device`, or None if it can."""
    if implementation == "xla":
        return None
    if implementation == "gemv" and shape.m != 1:
        return f"gemv takes one row, got M = {shape.m}"
    if not 1 <= shape.m <= MAX_FLAT_ROWS:
        return f"{implementation} takes 1 to {MAX_FLAT_ROWS} rows, got M = {shape.m}"
    return refuse_device(device_lib.resolve(device)) or refuse_matmul_shape(shape)


def refuse_matmul_config(shape: MatmulShape, device: Device | str, config: FlatMatmulConfig | GemvConfig) -> str | None:
    """Why a kernel with `config` cannot compute `shape` on `device`, or None if it can."""
    device = device_lib.resolve(device)
    refusal = refuse_kernel_matmul(shape, device, "gemv" if isinstance(config, GemvConfig) else "flat")
    if refusal is not None:
        return refusal
    for name, blocks in (("block_n", MATMUL_BLOCKS_N), ("block_k", MATMUL_BLOCKS_K)):
        if getattr(config, name) not in blocks:
            return f"{name} must be one of {blocks}, got {getattr(config, name)}"
    if not MIN_STAGES <= config.num_stages <= MAX_STAGES:
        return f"num_stages must lie in {MIN_STAGES}..{MAX_STAGES}, got {config.num_stages}"
    num_units, num_tiles = -(-shape.n // config.block_n), -(-shape.k // config.block_k)
    max_splits = min(MAX_K_SPLITS, num_tiles)
    if isinstance(config, GemvConfig):
        if not 1 <= config.split_k <= max_splits:
            return f"split_k must lie in 1..{max_splits} (K = {shape.k}), got {config.split_k}"
    elif not 1 <= config.num_ctas <= num_units * max_splits:
        return f"num_ctas must lie in 1..{num_units * max_splits} ({num_units} column blocks), got {config.num_ctas}"
    if (smem_bytes := config.smem_bytes(shape)) > device.smem_bytes:
        return f"the tiles need {smem_bytes} bytes of shared memory, a CTA gets {device.smem_bytes}"
    return None


def refuse_fused_layer(shape: LayerShape, device: Device | str) -> str | None:
    """Why `pallas.fused_layer` cannot compute `shape` on `device`, or None if it can."""
    refusal = refuse_device(device_lib.resolve(device))
    if refusal is not None:
        return refusal
    if shape.dtype != "bfloat16":
        return f"the fused layer takes bfloat16, got {shape.dtype}"
    if not 1 <= shape.batch <= MAX_FUSED_ROWS:
        return f"1 to {MAX_FUSED_ROWS} rows are faster fused, more in a launch for each product, got B = {shape.batch}"
    if shape.head_dim % (2 * UNIT_WIDTH):
        return f"the fused layer takes head dims that are multiples of {2 * UNIT_WIDTH}, got H = {shape.head_dim}"
    sizes = shape.hidden_size, shape.intermediate_size
    if any(size % _SWIZZLE_COLUMNS for size in sizes):
        return f"the fused layer wants multiples of {_SWIZZLE_COLUMNS}, got D = {sizes[0]}, F = {sizes[1]}"
    return None


def refuse_cudnn(shape: AttentionShape, device: Device | str) -> str | None:
    """Why cuDNN cannot compute `shape` on `device`, or None if it can."""
    device = device_lib.resolve(device)
    if device.compute_capability < 80:
        return f"no cuDNN attention on {device.arch}"
    if shape.has_lengths:
        return "cuDNN lets NaN beyond the lengths through"
    if shape.page_size is not None or shape.kv_dtype not in (None, shape.dtype):
        return "no paged or quantised cache through cuDNN"
    if shape.has_sinks or shape.has_query_offset:
        return "no sinks or query offset through cuDNN"
    if shape.dtype not in _KERNEL_DTYPES:
        return f"cuDNN has no {shape.dtype}"
    if shape.local_window_size is not None or shape.logits_soft_cap is not None:
        return "no local window or soft cap through cuDNN"
    max_head_dim = 256 if device.compute_capability >= 90 else 128
    if shape.head_dim % 8 or shape.head_dim > max_head_dim:
        return f"cuDNN takes head dims up to {max_head_dim} in steps of 8, got H = {shape.head_dim}"
    return None


def refuse_device(device: Device) -> str | None:
    """Why no kernel of ours runs on a device, or None."""
    if device.arch == KERNEL_ARCH:
        return None
    if device.is_gpu:
        return f"no kernel for {device.arch} yet"
    return f"no kernel for {device.kind}"


def refuse_attention_shape(shape: AttentionShape) -> str | None:
    """Why the decode kernel does not take a shape whatever the device, or None."""
    if not 1 <= shape.query_length <= MAX_QUERY_LENGTH:
        return f"the decode kernel takes 1 to {MAX_QUERY_LENGTH} queries, got T = {shape.query_length}"
    if shape.dtype not in _KERNEL_DTYPES:
        return f"the decode kernel takes {' or '.join(_KERNEL_DTYPES)}, got {shape.dtype}"
    if shape.kv_dtype not in (None, shape.dtype, *QUANTISED_DTYPES):
        return f"the decode kernel takes a cache of {shape.dtype}, int8 or float8_e4m3fn, got {shape.kv_dtype}"
    if shape.head_dim not in ATTENTION_HEAD_DIMS:
        return f"the decode kernel takes head dims {ATTENTION_HEAD_DIMS}, got H = {shape.head_dim}"
    if shape.rows > MAX_ATTENTION_ROWS:
        return f"the decode kernel holds {MAX_ATTENTION_ROWS} query rows a key/value head, got {shape.rows}"
    if shape.page_size not in (None, *PAGE_SIZES):
        return f"the decode kernel takes page sizes {PAGE_SIZES}, got {shape.page_size}"
    if shape.scales == "token" and shape.dtype == "float16":
        return "a weight times its token's scale may leave float16's range"
    if shape.kv_itemsize == 1 and shape.head_dim % 64:
        return f"8-bit tiles are widened 64 columns at a time, got H = {shape.head_dim}"
    if shape.scales == "token" and shape.num_kv_heads % 4:
        return f"TMA strides are whole 16 bytes: scales per token need 4, 8, ... heads, got K = {shape.num_kv_heads}"
    if shape.logits_soft_cap is not None and shape.logits_soft_cap > MAX_SOFT_CAP:
        return f"the decode kernel's tanh is good for caps up to {MAX_SOFT_CAP:g}, got {shape.logits_soft_cap:g}"
    if shape.batch < 1 or shape.capacity < 1:
        return f"the decode kernel needs a sequence and a key, got B = {shape.batch}, S = {shape.capacity}"
    return None


def refuse_matmul_shape(shape: MatmulShape) -> str | None:
    """Why neither kernel takes a weight whatever the device, or None."""
    if shape.dtype not in _KERNEL_DTYPES:
        return f"the kernel takes {' or '.join(_KERNEL_DTYPES)}, got {shape.dtype}"
    if shape.k % _ALIGNMENT or shape.n % _ALIGNMENT or not shape.k or not shape.n:
        return f"the kernel takes K and N that are multiples of {_ALIGNMENT}, got K = {shape.k}, N = {shape.n}"
    return None


def _smem_refusal(shape: AttentionShape, device: Device) -> str | None:
    smem_bytes = DecodeAttentionConfig(BLOCK_KV, 1, MIN_STAGES).smem_bytes(shape)
    if smem_bytes <= device.smem_bytes:
        return None
    rows = f"{shape.rows} query rows of head dim {shape.head_dim}"
    return f"{rows} need {smem_bytes} bytes of shared memory, a CTA gets {device.smem_bytes}"
