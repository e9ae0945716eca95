"""The fused layer's norms that are launches of their own: a program per row, which holds the row."""

import triton
import triton.language as tl


@triton.jit
def fused_norm(
    y_ptr,  # [rows, SIZE], a product without its residual stream
    y_gain_ptr,  # [SIZE]
    hidden_ptr,  # [rows, SIZE], the residual stream
    gain_ptr,  # [SIZE]
    bias_ptr,  # [SIZE]
    after_ptr,  # [rows, SIZE]
    normed_ptr,  # [rows, SIZE]
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMS_PRODUCT: tl.constexpr,
    HAS_NEXT: tl.constexpr,
    IS_LAYER: tl.constexpr,
    EPS: tl.constexpr,
    GAIN_OFFSET: tl.constexpr,
):
    """after = hidden + norm(y), where products are normalised; normed = norm(after), where there is a next product."""
    row, columns = tl.program_id(0) * SIZE, tl.arange(0, BLOCK)
    is_live = columns < SIZE
    dtype = after_ptr.dtype.element_ty
    hidden = tl.load(hidden_ptr + row + columns, is_live, other=0.0).to(tl.float32)
    if NORMS_PRODUCT:
        y = tl.load(y_ptr + row + columns, is_live, other=0.0).to(tl.float32)
        y = _normed(y, y_gain_ptr, bias_ptr, columns, is_live, SIZE, False, EPS, GAIN_OFFSET)
        hidden = (hidden + y.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        tl.store(after_ptr + row + columns, hidden.to(dtype), is_live)
    if HAS_NEXT:
        normed = _normed(hidden, gain_ptr, bias_ptr, columns, is_live, SIZE, IS_LAYER, EPS, GAIN_OFFSET)
        tl.store(normed_ptr + row + columns, normed.to(dtype), is_live)


@triton.jit
def _normed(
    x,
    gain_ptr,
    bias_ptr,
    columns,
    is_live,
    SIZE: tl.constexpr,
    IS_LAYER: tl.constexpr,
    EPS: tl.constexpr,
    GAIN_OFFSET: tl.constexpr,
):
    """A row behind its norm, in float32."""
    if IS_LAYER:
        x = tl.where(is_live, x - tl.sum(x, 0) / SIZE, 0.0)
    x *= tl.rsqrt(tl.sum(x * x, 0) / SIZE + EPS)
    x *= GAIN_OFFSET + tl.load(gain_ptr + columns, is_live, other=0.0).to(tl.float32)
    if IS_LAYER:
        x += tl.load(bias_ptr + columns, is_live, other=0.0).to(tl.float32)
    return x
