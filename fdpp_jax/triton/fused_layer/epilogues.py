"""The fused layer's products, each with an epilogue: a program multiplies all columns that its epilogue needs together.

A program's sums are [columns, rows] float32. They are rounded wherever a module of the model would store them. Columns
that an epilogue combines, such as a gate and its up, or the two elements of a head that turn together, are a pair. On
tensor cores column 2 j of a program's block is one element of its pair j, column 2 j + 1 the other one. On CUDA cores a
program has two blocks of columns, one of each element.

`squares` are the sums of squares of the last residual stream, one of each program that made it, in the order of the
programs. They give the factor 1 / rms of the norm, whose gain is in x already.

Arrays are as `facts` has them: f is the product's, h that of heads.
"""

import triton
import triton.language as tl

from fdpp_jax.triton.parts import products


@triton.jit
def fused_product(
    x_ptr,  # [num_rows, depth]
    w_ptr,  # [width, depth]
    bias_ptr,  # [width]
    squares_ptr,  # [num_parts, num_rows] float32
    hidden_ptr,  # [num_rows, width]
    gain_ptr,  # [width]
    out_ptr,  # [num_rows, width]
    scaled_ptr,  # [num_rows, width]
    next_squares_ptr,  # [programs, num_rows] float32
    f: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    GAIN_OFFSET: tl.constexpr,
):
    """out = x @ w (+ bias) (+ hidden); with a gain also out times the gain, and its sums of squares."""
    rows, columns = tl.arange(0, f.padded_rows)[None, :], tl.program_id(0) * f.block_n + tl.arange(0, f.block_n)
    is_column = (columns < f.width)[:, None]
    is_live = is_column & (rows < f.num_rows)
    places = rows * f.width + columns[:, None]
    dtype = out_ptr.dtype.element_ty
    if HAS_RESIDUAL and not f.is_row:  # the product hides the latency; of one row, each thread would load all columns
        before = tl.load(hidden_ptr + places, is_live, other=0.0)
    y = _linear(x_ptr, w_ptr, bias_ptr, squares_ptr, tl.program_id(0) * f.block_n, dtype, f)
    if HAS_RESIDUAL:
        if f.is_row:
            before = tl.load(hidden_ptr + places, is_live, other=0.0)
        y = _rounded(before.to(tl.float32) + y, dtype)
    tl.store(out_ptr + places, y.to(dtype), is_live)
    if HAS_GAIN:
        gain = GAIN_OFFSET + _column_of(gain_ptr, columns, is_column)
        tl.store(scaled_ptr + places, (y * gain).to(dtype), is_live)
        row = tl.arange(0, f.padded_rows)
        tl.store(next_squares_ptr + tl.program_id(0) * f.num_rows + row, tl.sum(y * y, 0), row < f.num_rows)


@triton.jit
def fused_mlp_in(
    x_ptr,  # [num_rows, depth]
    w_ptr,  # [width, depth]
    bias_ptr,  # [width]
    squares_ptr,  # [num_parts, num_rows] float32
    inner_ptr,  # [num_rows, width], with a gate [num_rows, width / 2]
    f: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
):
    """inner = activation(x @ w (+ bias)); with a gate activation(gate) * up."""
    INNER: tl.constexpr = f.width // 2 if IS_GATED else f.width
    BLOCK: tl.constexpr = f.block_n // 2 if IS_GATED else f.block_n
    first = tl.program_id(0) * BLOCK
    dtype = inner_ptr.dtype.element_ty
    if IS_GATED:
        local = tl.arange(0, f.block_n)
        columns = first + local // 2 + local % 2 * INNER
        gate, up = _linear_pairs(
            x_ptr, w_ptr, bias_ptr, squares_ptr, first, first + INNER, columns, INNER - first, INNER, dtype, f
        )
        y = _activated(gate, ACTIVATION) * up
    else:
        y = _activated(_linear(x_ptr, w_ptr, bias_ptr, squares_ptr, first, dtype, f), ACTIVATION)
    rows, columns = tl.arange(0, f.padded_rows)[None, :], (first + tl.arange(0, BLOCK))[:, None]
    tl.store(inner_ptr + rows * INNER + columns, y.to(dtype), (rows < f.num_rows) & (columns < INNER))


@triton.jit
def fused_qkv(
    x_ptr,  # [num_rows, depth]
    w_ptr,  # [width, depth]
    bias_ptr,  # [width]
    squares_ptr,  # [num_parts, num_rows] float32
    slots_ptr,  # [num_rows] int32
    rotation_ptr,  # [2, num_rows, turned / 2] float32
    keys_ptr,  # [num_rows, capacity, kv_width]
    values_ptr,  # [num_rows, capacity, kv_width]
    query_ptr,  # [num_rows, query_width]
    f: tl.constexpr,
    h: tl.constexpr,
):
    """Queries, keys and values of x; keys and values go to their slots."""
    if f.is_row:  # columns of a block follow each other
        tl.static_assert(h.turned // 2 % (f.block_n // 2) == 0 and (h.head_dim - h.turned) // 2 % (f.block_n // 2) == 0)
    local = tl.arange(0, f.block_n)
    first_pair = tl.program_id(0) * (f.block_n // 2)
    low_at = _column_of_pair(first_pair, 0, h)
    high_at = _column_of_pair(first_pair, 1, h)
    columns = _column_of_pair(first_pair + local // 2, local % 2, h)
    low, high = _linear_pairs(
        x_ptr, w_ptr, bias_ptr, squares_ptr, low_at, high_at, columns, f.width // 2 - first_pair, f.width // 2,
        query_ptr.dtype.element_ty, f,
    )  # fmt: skip
    pairs, rows = (first_pair + tl.arange(0, f.block_n // 2))[:, None], tl.arange(0, f.padded_rows)[None, :]
    _finish_heads(low, high, pairs, rows, slots_ptr, rotation_ptr, keys_ptr, values_ptr, query_ptr, h)


@triton.jit
def fused_heads(
    qkv_ptr,  # [num_rows, width]
    query_norm_ptr,  # [head_dim]
    key_norm_ptr,  # [head_dim]
    slots_ptr,  # as in `fused_qkv`
    rotation_ptr,
    keys_ptr,
    values_ptr,
    query_ptr,
    h: tl.constexpr,
    EPS: tl.constexpr,
    GAIN_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,  # of the pairs of a head
):
    """One row of one head: queries and keys are normalised, then finished as `fused_qkv` does."""
    row, head = tl.program_id(0), tl.program_id(1)
    local = tl.arange(0, BLOCK)
    is_pair = local < h.head_dim // 2
    low_at = _column_of_pair(local, 0, h)
    high_at = _column_of_pair(local, 1, h)
    dtype = query_ptr.dtype.element_ty
    head_ptr = qkv_ptr + row * h.width + head * h.head_dim
    low = tl.load(head_ptr + low_at, is_pair, other=0.0).to(tl.float32)
    high = tl.load(head_ptr + high_at, is_pair, other=0.0).to(tl.float32)
    if head < (h.query_width + h.kv_width) // h.head_dim:
        gains_ptr = query_norm_ptr
        if head >= h.query_width // h.head_dim:
            gains_ptr = key_norm_ptr
        factor = tl.rsqrt(tl.sum(low * low + high * high, 0) / h.head_dim + EPS)
        low_gain = GAIN_OFFSET + tl.load(gains_ptr + low_at, is_pair, other=0.0).to(tl.float32)
        high_gain = GAIN_OFFSET + tl.load(gains_ptr + high_at, is_pair, other=0.0).to(tl.float32)
        low, high = _rounded(low * factor * low_gain, dtype), _rounded(high * factor * high_gain, dtype)
    # Beyond the last pair of a head lies the next head.
    pairs = tl.where(is_pair, head * (h.head_dim // 2) + local, h.width // 2)
    rows = tl.zeros((1, 1), tl.int32) + row
    _finish_heads(
        low[:, None], high[:, None], pairs[:, None], rows, slots_ptr, rotation_ptr, keys_ptr, values_ptr, query_ptr, h
    )


@triton.jit
def _finish_heads(
    low,  # [pairs, rows] float32
    high,
    pairs,  # [pairs, 1], counted over all heads
    rows,  # [1, rows]
    slots_ptr,
    rotation_ptr,
    keys_ptr,
    values_ptr,
    query_ptr,
    h: tl.constexpr,
):
    """Turns the pairs of queries and keys, and stores everything: queries in a row, keys and values in their slots."""
    is_live = (rows < h.num_rows) & (pairs < h.width // 2)
    if h.turned > 0:
        angle = pairs % (h.head_dim // 2)
        is_turned = is_live & (pairs < (h.query_width + h.kv_width) // 2) & (angle < h.turned // 2)
        cos_ptr = rotation_ptr + rows * (h.turned // 2) + angle
        cos = tl.load(cos_ptr, is_turned, other=1.0)
        sin = tl.load(cos_ptr + h.num_rows * (h.turned // 2), is_turned, other=0.0)
        low, high = low * cos - high * sin, high * cos + low * sin
    slots = tl.load(slots_ptr + rows, rows < h.num_rows, other=h.capacity)
    is_slot = is_live & (slots >= 0) & (slots < h.capacity)
    cached_at = (rows.to(tl.int64) * h.capacity + slots) * h.kv_width
    dtype = query_ptr.dtype.element_ty
    for side in tl.static_range(2):
        y = (low if side == 0 else high).to(dtype)
        columns = _column_of_pair(pairs, side, h)
        tl.store(query_ptr + rows * h.query_width + columns, y, is_live & (columns < h.query_width))
        columns -= h.query_width
        tl.store(keys_ptr + cached_at + columns, y, is_slot & (columns >= 0) & (columns < h.kv_width))
        columns -= h.kv_width
        tl.store(values_ptr + cached_at + columns, y, is_slot & (columns >= 0))


@triton.jit
def _column_of_pair(pair, side, h: tl.constexpr):
    """Where an element of a pair stands: a head's first h.turned elements are two halves, the others too."""
    i = pair % (h.head_dim // 2)
    other_half = tl.where(i < h.turned // 2, h.turned // 2, (h.head_dim - h.turned) // 2)
    first_half = tl.where(i < h.turned // 2, i, i + h.turned // 2)
    return 2 * (pair - i) + first_half + side * other_half


@triton.jit
def _linear(x_ptr, w_ptr, bias_ptr, squares_ptr, first, dtype: tl.constexpr, f: tl.constexpr):
    """[f.block_n, f.padded_rows] of x @ w (+ bias) for the columns from first on, with f.is_row on CUDA cores."""
    columns = first + tl.arange(0, f.block_n)
    if f.is_row:
        acc = products.of_row(
            x_ptr, w_ptr + first.to(tl.int64) * f.depth, f.width - first, 0, (f.depth + f.block_k - 1) // f.block_k,
            True, f.depth, f.width, f.block_n, f.block_k, f.num_stages,
        )  # fmt: skip
        if f.num_parts > 0:  # before the product they would take registers that it needs; the sum hides their latency
            squares = _squares(squares_ptr, f)
        y = tl.sum(acc, 1)[:, None]
        if f.num_parts > 0:
            y *= _factor(squares, f)
    else:
        y = _linear_rows(x_ptr, w_ptr, squares_ptr, columns, f)
    return _biased(y, bias_ptr, columns, columns < f.width, dtype, f)


@triton.jit
def _linear_pairs(
    x_ptr,
    w_ptr,
    bias_ptr,
    squares_ptr,
    low_at,  # the first pair's columns, which those of the other pairs follow: of one row alone
    high_at,
    columns,  # [block_n], of all pairs
    num_pairs,  # from the first one on
    ALL_PAIRS: tl.constexpr,
    dtype: tl.constexpr,
    f: tl.constexpr,
):
    """`_linear` for f.block_n / 2 pairs of columns: both elements of each, [pairs, f.padded_rows]."""
    NUM_PAIRS: tl.constexpr = f.block_n // 2
    if f.is_row:
        low, high = products.of_row_in_two(
            x_ptr, w_ptr + low_at.to(tl.int64) * f.depth, w_ptr + high_at.to(tl.int64) * f.depth, num_pairs, f.depth,
            ALL_PAIRS, NUM_PAIRS, f.block_k, f.num_stages,
        )  # fmt: skip
        if f.num_parts > 0:
            squares = _squares(squares_ptr, f)
        low, high = tl.sum(low, 1)[:, None], tl.sum(high, 1)[:, None]
        if f.num_parts > 0:
            factor = _factor(squares, f)
            low, high = low * factor, high * factor
        pairs = tl.arange(0, NUM_PAIRS)
        low = _biased(low, bias_ptr, low_at + pairs, pairs < num_pairs, dtype, f)
        high = _biased(high, bias_ptr, high_at + pairs, pairs < num_pairs, dtype, f)
    else:
        y = _linear_rows(x_ptr, w_ptr, squares_ptr, columns, f)
        y = _biased(y, bias_ptr, columns, columns < f.width, dtype, f)
        low, high = tl.split(y.reshape(NUM_PAIRS, 2, f.padded_rows).permute(0, 2, 1))
    return low, high


@triton.jit
def _linear_rows(x_ptr, w_ptr, squares_ptr, columns, f: tl.constexpr):
    """[f.block_n, f.padded_rows] of x @ w for any columns, on tensor cores."""
    if f.num_parts > 0:  # the product hides their latency
        squares = _squares(squares_ptr, f)
    y = products.of_rows(
        x_ptr, w_ptr, columns, f.width, 0, (f.depth + f.block_k - 1) // f.block_k, True, f.num_rows, f.padded_rows,
        f.depth, f.width, f.block_n, f.block_k, f.k_groups, f.num_stages,
    )  # fmt: skip
    if f.num_parts > 0:
        y *= _factor(squares, f)
    return y


@triton.jit
def _biased(y, bias_ptr, columns, is_column, dtype: tl.constexpr, f: tl.constexpr):
    """y [columns, rows] (+ bias), rounded as modules would."""
    y = _rounded(y, dtype)
    if f.has_bias:
        y = _rounded(y + _column_of(bias_ptr, columns, is_column[:, None]), dtype)
    return y


@triton.jit
def _squares(squares_ptr, f: tl.constexpr):
    """[parts, f.padded_rows]."""
    parts, rows = tl.arange(0, triton.next_power_of_2(f.num_parts))[:, None], tl.arange(0, f.padded_rows)[None, :]
    return tl.load(squares_ptr + parts * f.num_rows + rows, (parts < f.num_parts) & (rows < f.num_rows), other=0.0)


@triton.jit
def _factor(squares, f: tl.constexpr):
    """1 / rms of the rows, [1, f.padded_rows]."""
    return tl.rsqrt(tl.sum(squares, 0) / f.depth + f.eps)[None, :]


@triton.jit
def _column_of(ptr, columns, is_column):
    """[columns, 1] float32 of a vector."""
    return tl.load(ptr + columns[:, None], is_column, other=0.0).to(tl.float32)


@triton.jit
def _rounded(y, dtype: tl.constexpr):
    """y as an array of the dtype would hold it."""
    return y.to(dtype).to(tl.float32)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """NaN stays NaN."""
    if ACTIVATION == "relu":
        y = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    else:  # gelu_tanh: x (1 + tanh(z)) / 2
        z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = x / (1.0 + tl.exp(-2.0 * z))
    return y
