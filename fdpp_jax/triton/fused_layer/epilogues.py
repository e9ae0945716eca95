"""The fused layer's products, each with an epilogue: a program multiplies all columns that its epilogue needs together.

A program's sums are [columns, rows] float32. They are rounded wherever a module of the model would store them. Columns
that an epilogue combines, such as a gate and its up, or the two elements of a head that turn together, are a pair. On
tensor cores column 2 j of a program's block is one element of its pair j, column 2 j + 1 the other one. On CUDA cores a
program has two blocks of columns, one of each element.

`squares` are the sums of squares of the last residual stream, one of each program that made it, in the order of the
programs. They give the factor 1 / rms of the norm, whose gain is in x already.
"""

import triton
import triton.language as tl

from fdpp_jax.triton.parts import products


@triton.jit
def fused_product(
    x_ptr,  # [NUM_ROWS, DEPTH]
    w_ptr,  # [WIDTH, DEPTH]
    bias_ptr,  # [WIDTH]
    squares_ptr,  # [NUM_PARTS, NUM_ROWS] float32
    hidden_ptr,  # [NUM_ROWS, WIDTH]
    gain_ptr,  # [WIDTH]
    out_ptr,  # [NUM_ROWS, WIDTH]
    scaled_ptr,  # [NUM_ROWS, WIDTH]
    next_squares_ptr,  # [programs, NUM_ROWS] float32
    IS_ROW: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_GROUPS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    EPS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    GAIN_OFFSET: tl.constexpr,
):
    """out = x @ w (+ bias) (+ hidden); with a gain also out times the gain, and its sums of squares."""
    rows, columns = tl.arange(0, PADDED_ROWS)[None, :], tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = (columns < WIDTH)[:, None]
    is_live = is_column & (rows < NUM_ROWS)
    places = rows * WIDTH + columns[:, None]
    dtype = out_ptr.dtype.element_ty
    if HAS_RESIDUAL and not IS_ROW:  # the product hides the latency; of one row, each thread would load all columns
        before = tl.load(hidden_ptr + places, is_live, other=0.0)
    y = _linear(
        x_ptr, w_ptr, bias_ptr, squares_ptr, tl.program_id(0) * BLOCK_N, dtype, IS_ROW, NUM_ROWS, PADDED_ROWS, DEPTH,
        WIDTH, BLOCK_N, BLOCK_K, K_GROUPS, NUM_STAGES, HAS_BIAS, NUM_PARTS, EPS,
    )  # fmt: skip
    if HAS_RESIDUAL:
        if IS_ROW:
            before = tl.load(hidden_ptr + places, is_live, other=0.0)
        y = _rounded(before.to(tl.float32) + y, dtype)
    tl.store(out_ptr + places, y.to(dtype), is_live)
    if HAS_GAIN:
        gain = GAIN_OFFSET + _column_of(gain_ptr, columns, is_column)
        tl.store(scaled_ptr + places, (y * gain).to(dtype), is_live)
        row = tl.arange(0, PADDED_ROWS)
        tl.store(next_squares_ptr + tl.program_id(0) * NUM_ROWS + row, tl.sum(y * y, 0), row < NUM_ROWS)


@triton.jit
def fused_mlp_in(
    x_ptr,  # [NUM_ROWS, DEPTH]
    w_ptr,  # [WIDTH, DEPTH]
    bias_ptr,  # [WIDTH]
    squares_ptr,  # [NUM_PARTS, NUM_ROWS] float32
    inner_ptr,  # [NUM_ROWS, WIDTH], with a gate [NUM_ROWS, WIDTH / 2]
    IS_ROW: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_GROUPS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
):
    """inner = activation(x @ w (+ bias)); with a gate activation(gate) * up."""
    INNER: tl.constexpr = WIDTH // 2 if IS_GATED else WIDTH
    BLOCK: tl.constexpr = BLOCK_N // 2 if IS_GATED else BLOCK_N
    first = tl.program_id(0) * BLOCK
    dtype = inner_ptr.dtype.element_ty
    if IS_GATED:
        local = tl.arange(0, BLOCK_N)
        gate, up = _linear_pairs(
            x_ptr, w_ptr, bias_ptr, squares_ptr, first, first + INNER, first + local // 2 + local % 2 * INNER,
            INNER - first, INNER, dtype, IS_ROW, NUM_ROWS, PADDED_ROWS, DEPTH, WIDTH, BLOCK_N, BLOCK_K, K_GROUPS,
            NUM_STAGES, HAS_BIAS, NUM_PARTS, EPS,
        )  # fmt: skip
        y = _activated(gate, ACTIVATION) * up
    else:
        y = _linear(
            x_ptr, w_ptr, bias_ptr, squares_ptr, first, dtype, IS_ROW, NUM_ROWS, PADDED_ROWS, DEPTH, WIDTH, BLOCK_N,
            BLOCK_K, K_GROUPS, NUM_STAGES, HAS_BIAS, NUM_PARTS, EPS,
        )  # fmt: skip
        y = _activated(y, ACTIVATION)
    rows, columns = tl.arange(0, PADDED_ROWS)[None, :], (first + tl.arange(0, BLOCK))[:, None]
    tl.store(inner_ptr + rows * INNER + columns, y.to(dtype), (rows < NUM_ROWS) & (columns < INNER))


@triton.jit
def fused_qkv(
    x_ptr,  # [NUM_ROWS, DEPTH]
    w_ptr,  # [WIDTH, DEPTH]
    bias_ptr,  # [WIDTH]
    squares_ptr,  # [NUM_PARTS, NUM_ROWS] float32
    slots_ptr,  # [NUM_ROWS] int32
    rotation_ptr,  # [2, NUM_ROWS, TURNED / 2] float32
    keys_ptr,  # [NUM_ROWS, CAPACITY, KV_WIDTH]
    values_ptr,  # [NUM_ROWS, CAPACITY, KV_WIDTH]
    query_ptr,  # [NUM_ROWS, QUERY_WIDTH]
    IS_ROW: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_GROUPS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    EPS: tl.constexpr,
    CAPACITY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERY_WIDTH: tl.constexpr,
    KV_WIDTH: tl.constexpr,
    TURNED: tl.constexpr,
):
    """Queries, keys and values of x; keys and values go to their slots."""
    if IS_ROW:  # columns of a block follow each other
        tl.static_assert(TURNED // 2 % (BLOCK_N // 2) == 0 and (HEAD_DIM - TURNED) // 2 % (BLOCK_N // 2) == 0)
    local = tl.arange(0, BLOCK_N)
    first_pair = tl.program_id(0) * (BLOCK_N // 2)
    low_at = _column_of_pair(first_pair, 0, HEAD_DIM, TURNED)
    high_at = _column_of_pair(first_pair, 1, HEAD_DIM, TURNED)
    columns = _column_of_pair(first_pair + local // 2, local % 2, HEAD_DIM, TURNED)
    low, high = _linear_pairs(
        x_ptr, w_ptr, bias_ptr, squares_ptr, low_at, high_at, columns, WIDTH // 2 - first_pair, WIDTH // 2,
        query_ptr.dtype.element_ty, IS_ROW, NUM_ROWS, PADDED_ROWS, DEPTH, WIDTH, BLOCK_N, BLOCK_K, K_GROUPS, NUM_STAGES,
        HAS_BIAS, NUM_PARTS, EPS,
    )  # fmt: skip
    pairs, rows = (first_pair + tl.arange(0, BLOCK_N // 2))[:, None], tl.arange(0, PADDED_ROWS)[None, :]
    finish_heads(
        low, high, pairs, rows, slots_ptr, rotation_ptr, keys_ptr, values_ptr, query_ptr, NUM_ROWS, WIDTH, CAPACITY,
        HEAD_DIM, QUERY_WIDTH, KV_WIDTH, TURNED,
    )  # fmt: skip


@triton.jit
def fused_heads(
    qkv_ptr,  # [NUM_ROWS, WIDTH]
    query_norm_ptr,  # [HEAD_DIM]
    key_norm_ptr,  # [HEAD_DIM]
    slots_ptr,  # as in `fused_qkv`
    rotation_ptr,
    keys_ptr,
    values_ptr,
    query_ptr,
    NUM_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CAPACITY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERY_WIDTH: tl.constexpr,
    KV_WIDTH: tl.constexpr,
    TURNED: tl.constexpr,
    EPS: tl.constexpr,
    GAIN_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,  # of the pairs of a head
):
    """One row of one head: queries and keys are normalised, then finished as `fused_qkv` does."""
    row, head = tl.program_id(0), tl.program_id(1)
    local = tl.arange(0, BLOCK)
    is_pair = local < HEAD_DIM // 2
    low_at = _column_of_pair(local, 0, HEAD_DIM, TURNED)
    high_at = _column_of_pair(local, 1, HEAD_DIM, TURNED)
    dtype = query_ptr.dtype.element_ty
    head_ptr = qkv_ptr + row * WIDTH + head * HEAD_DIM
    low = tl.load(head_ptr + low_at, is_pair, other=0.0).to(tl.float32)
    high = tl.load(head_ptr + high_at, is_pair, other=0.0).to(tl.float32)
    if head < (QUERY_WIDTH + KV_WIDTH) // HEAD_DIM:
        gains_ptr = query_norm_ptr
        if head >= QUERY_WIDTH // HEAD_DIM:
            gains_ptr = key_norm_ptr
        factor = tl.rsqrt(tl.sum(low * low + high * high, 0) / HEAD_DIM + EPS)
        low_gain = GAIN_OFFSET + tl.load(gains_ptr + low_at, is_pair, other=0.0).to(tl.float32)
        high_gain = GAIN_OFFSET + tl.load(gains_ptr + high_at, is_pair, other=0.0).to(tl.float32)
        low, high = _rounded(low * factor * low_gain, dtype), _rounded(high * factor * high_gain, dtype)
    # Beyond the last pair of a head lies the next head.
    pairs = tl.where(is_pair, head * (HEAD_DIM // 2) + local, WIDTH // 2)
    finish_heads(
        low[:, None], high[:, None], pairs[:, None], tl.zeros((1, 1), tl.int32) + row, slots_ptr, rotation_ptr,
        keys_ptr, values_ptr, query_ptr, NUM_ROWS, WIDTH, CAPACITY, HEAD_DIM, QUERY_WIDTH, KV_WIDTH, TURNED,
    )  # fmt: skip


@triton.jit
def finish_heads(
    low,  # [pairs, rows] float32
    high,
    pairs,  # [pairs, 1], counted over all heads
    rows,  # [1, rows]
    slots_ptr,
    rotation_ptr,
    keys_ptr,
    values_ptr,
    query_ptr,
    NUM_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CAPACITY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERY_WIDTH: tl.constexpr,
    KV_WIDTH: tl.constexpr,
    TURNED: tl.constexpr,
):
    """Turns the pairs of queries and keys, and stores everything: queries in a row, keys and values in their slots."""
    is_live = (rows < NUM_ROWS) & (pairs < WIDTH // 2)
    if TURNED > 0:
        angle = pairs % (HEAD_DIM // 2)
        is_turned = is_live & (pairs < (QUERY_WIDTH + KV_WIDTH) // 2) & (angle < TURNED // 2)
        cos_ptr = rotation_ptr + rows * (TURNED // 2) + angle
        cos = tl.load(cos_ptr, is_turned, other=1.0)
        sin = tl.load(cos_ptr + NUM_ROWS * (TURNED // 2), is_turned, other=0.0)
        low, high = low * cos - high * sin, high * cos + low * sin
    slots = tl.load(slots_ptr + rows, rows < NUM_ROWS, other=CAPACITY)
    is_slot = is_live & (slots >= 0) & (slots < CAPACITY)
    cached_at = (rows.to(tl.int64) * CAPACITY + slots) * KV_WIDTH
    dtype = query_ptr.dtype.element_ty
    for side in tl.static_range(2):
        y = (low if side == 0 else high).to(dtype)
        columns = _column_of_pair(pairs, side, HEAD_DIM, TURNED)
        tl.store(query_ptr + rows * QUERY_WIDTH + columns, y, is_live & (columns < QUERY_WIDTH))
        columns -= QUERY_WIDTH
        tl.store(keys_ptr + cached_at + columns, y, is_slot & (columns >= 0) & (columns < KV_WIDTH))
        columns -= KV_WIDTH
        tl.store(values_ptr + cached_at + columns, y, is_slot & (columns >= 0))


@triton.jit
def _column_of_pair(pair, side, HEAD_DIM: tl.constexpr, TURNED: tl.constexpr):
    """Where an element of a pair stands: a head's first TURNED elements are two halves, the others too."""
    i = pair % (HEAD_DIM // 2)
    other_half = tl.where(i < TURNED // 2, TURNED // 2, (HEAD_DIM - TURNED) // 2)
    first_half = tl.where(i < TURNED // 2, i, i + TURNED // 2)
    return 2 * (pair - i) + first_half + side * other_half


@triton.jit
def _linear(
    x_ptr,
    w_ptr,
    bias_ptr,
    squares_ptr,
    first,
    dtype: tl.constexpr,
    IS_ROW: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_GROUPS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    EPS: tl.constexpr,
):
    """[BLOCK_N, PADDED_ROWS] of x @ w (+ bias) for the columns from first on, with IS_ROW on CUDA cores."""
    columns = first + tl.arange(0, BLOCK_N)
    if IS_ROW:
        acc = products.of_row(
            x_ptr, w_ptr + first.to(tl.int64) * DEPTH, WIDTH - first, 0, (DEPTH + BLOCK_K - 1) // BLOCK_K, True, DEPTH,
            WIDTH, BLOCK_N, BLOCK_K, NUM_STAGES,
        )  # fmt: skip
        if NUM_PARTS > 0:  # before the product they would take registers that it needs; the sum hides their latency
            squares = _squares(squares_ptr, NUM_PARTS, NUM_ROWS, PADDED_ROWS)
        y = tl.sum(acc, 1)[:, None]
        if NUM_PARTS > 0:
            y *= _factor(squares, DEPTH, EPS)
    else:
        y = _linear_rows(
            x_ptr, w_ptr, squares_ptr, columns, NUM_ROWS, PADDED_ROWS, DEPTH, WIDTH, BLOCK_N, BLOCK_K, K_GROUPS,
            NUM_STAGES, NUM_PARTS, EPS,
        )  # fmt: skip
    return _biased(y, bias_ptr, columns, columns < WIDTH, dtype, HAS_BIAS)


@triton.jit
def _linear_pairs(
    x_ptr,
    w_ptr,
    bias_ptr,
    squares_ptr,
    low_at,  # the first pair's columns, which those of the other pairs follow: of one row alone
    high_at,
    columns,  # [BLOCK_N], of all pairs
    num_pairs,  # from the first one on
    ALL_PAIRS: tl.constexpr,
    dtype: tl.constexpr,
    IS_ROW: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_GROUPS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    EPS: tl.constexpr,
):
    """`_linear` for BLOCK_N / 2 pairs of columns: both elements of each, [pairs, PADDED_ROWS]."""
    NUM_PAIRS: tl.constexpr = BLOCK_N // 2
    if IS_ROW:
        low, high = products.of_row_in_two(
            x_ptr, w_ptr + low_at.to(tl.int64) * DEPTH, w_ptr + high_at.to(tl.int64) * DEPTH, num_pairs, DEPTH,
            ALL_PAIRS, NUM_PAIRS, BLOCK_K, NUM_STAGES,
        )  # fmt: skip
        if NUM_PARTS > 0:
            squares = _squares(squares_ptr, NUM_PARTS, NUM_ROWS, PADDED_ROWS)
        low, high = tl.sum(low, 1)[:, None], tl.sum(high, 1)[:, None]
        if NUM_PARTS > 0:
            factor = _factor(squares, DEPTH, EPS)
            low, high = low * factor, high * factor
        pairs = tl.arange(0, NUM_PAIRS)
        low = _biased(low, bias_ptr, low_at + pairs, pairs < num_pairs, dtype, HAS_BIAS)
        high = _biased(high, bias_ptr, high_at + pairs, pairs < num_pairs, dtype, HAS_BIAS)
    else:
        y = _linear_rows(
            x_ptr, w_ptr, squares_ptr, columns, NUM_ROWS, PADDED_ROWS, DEPTH, WIDTH, BLOCK_N, BLOCK_K, K_GROUPS,
            NUM_STAGES, NUM_PARTS, EPS,
        )  # fmt: skip
        y = _biased(y, bias_ptr, columns, columns < WIDTH, dtype, HAS_BIAS)
        low, high = tl.split(y.reshape(NUM_PAIRS, 2, PADDED_ROWS).permute(0, 2, 1))
    return low, high


@triton.jit
def _linear_rows(
    x_ptr,
    w_ptr,
    squares_ptr,
    columns,
    NUM_ROWS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_GROUPS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    EPS: tl.constexpr,
):
    """[BLOCK_N, PADDED_ROWS] of x @ w for any columns, on tensor cores."""
    if NUM_PARTS > 0:  # the product hides their latency
        squares = _squares(squares_ptr, NUM_PARTS, NUM_ROWS, PADDED_ROWS)
    y = products.of_rows(
        x_ptr, w_ptr, columns, WIDTH, 0, (DEPTH + BLOCK_K - 1) // BLOCK_K, True, NUM_ROWS, PADDED_ROWS, DEPTH, WIDTH,
        BLOCK_N, BLOCK_K, K_GROUPS, NUM_STAGES,
    )  # fmt: skip
    if NUM_PARTS > 0:
        y *= _factor(squares, DEPTH, EPS)
    return y


@triton.jit
def _biased(y, bias_ptr, columns, is_column, dtype: tl.constexpr, HAS_BIAS: tl.constexpr):
    """y [columns, rows] (+ bias), rounded as modules would."""
    y = _rounded(y, dtype)
    if HAS_BIAS:
        y = _rounded(y + _column_of(bias_ptr, columns, is_column[:, None]), dtype)
    return y


@triton.jit
def _squares(squares_ptr, NUM_PARTS: tl.constexpr, NUM_ROWS: tl.constexpr, PADDED_ROWS: tl.constexpr):
    """[parts, PADDED_ROWS]."""
    parts, rows = tl.arange(0, triton.next_power_of_2(NUM_PARTS))[:, None], tl.arange(0, PADDED_ROWS)[None, :]
    return tl.load(squares_ptr + parts * NUM_ROWS + rows, (parts < NUM_PARTS) & (rows < NUM_ROWS), other=0.0)


@triton.jit
def _factor(squares, SIZE: tl.constexpr, EPS: tl.constexpr):
    """1 / rms of the rows, [1, PADDED_ROWS]."""
    return tl.rsqrt(tl.sum(squares, 0) / SIZE + EPS)[None, :]


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
