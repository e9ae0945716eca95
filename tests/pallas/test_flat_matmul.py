"""flat_matmul against float64, interpreted on the CPU and as it is on a GPU."""

import functools
import itertools

import jax
import numpy as np
import oracle
import pytest
from matmul_case import ON_GPU, WEIGHTS, check, check_lowers_for_cuda, check_races, in_both_orders, operands

from fdpp_jax.pallas.flat_matmul import flat_matmul
from fdpp_jax.plans.hopper_matmul import FlatMatmulConfig

pytestmark = pytest.mark.usefixtures("fresh_interpreter")


# A case takes some two seconds interpreted. tests/ops/test_matmul_backends.py has all of bfloat16's.
ROWS = [(1, "float16", "nk"), (7, "float16", "kn"), (8, "bfloat16", "nk"), (9, "float16", "nk"), (64, "bfloat16", "kn")]


@pytest.mark.parametrize(
    ("m", "dtype", "w_order"),
    [
        pytest.param(*row, marks=() if row in ROWS else pytest.mark.gpu)
        for row in itertools.product([1, 7, 8, 9, 64], ["bfloat16", "float16"], ["kn", "nk"])
    ],
)
def test_flat_rows(m, dtype, w_order):
    check(flat_matmul, m, 512, 128, dtype, w_order, FlatMatmulConfig(3, 64, 128, 3), out_dtype=dtype)


FLAT_SIZES = [  # k, n, (CTAs, block_n, block_k, stages); where the order of w changes what is loaded, both run on a CPU
    (512, 128, (1, 64, 128, 2)),  # one CTA has all
    (512, 128, (2, 64, 128, 2)),  # whole column blocks
    (512, 320, (3, 64, 64, 3)),  # a share has ends and a whole column block
    (1024, 64, (8, 64, 64, 2)),  # shares in the middle of a column block
    (640, 192, (7, 64, 64, 4)),
    (768, 256, (5, 128, 256, 2)),
    (336, 128, (3, 64, 64, 3)),  # K is no multiple of a block
    (256, 208, (4, 64, 64, 2)),  # N is no multiple of a block, nor of the widest swizzle
    (272, 224, (3, 128, 64, 2)),  # neither is
    (128, 144, (4, 128, 64, 2)),  # of the last block only the first of two halves is there
    (64, 64, (1, 128, 128, 2)),  # blocks larger than the matrix
    (16, 16, (1, 64, 64, 2)),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("k", "n", "tiles", "w_order"),
    [
        pytest.param(k, n, tiles, w_order, marks=() if is_ragged or w_order == on_cpu else pytest.mark.gpu)
        for (k, n, tiles), on_cpu in zip(FLAT_SIZES, itertools.cycle(["kn", "nk"]))
        for is_ragged in [k % tiles[2] > 0 or n % tiles[1] > 0]
        for w_order in ("kn", "nk")
    ],
)
def test_flat_sizes_and_shares(k, n, tiles, w_order):
    check(flat_matmul, 5, k, n, "bfloat16", w_order, FlatMatmulConfig(*tiles))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "k", "n", "tiles"),
    [
        (8, 4096, 4096, (132, 64, 256, 5)),
        (1, 4096, 6144, (264, 64, 128, 5)),
        (16, 11008, 1024, (128, 64, 64, 8)),
        (33, 4096, 12288, (96, 128, 128, 4)),
        (64, 1024, 8192, (131, 64, 256, 3)),
    ],
)
def test_flat_gives_the_same_each_time(m, k, n, tiles):
    """200 calls in memory where flags and sums of earlier ones lie."""
    x, w = operands(m, k, n, "bfloat16")
    call = jax.jit(functools.partial(flat_matmul, config=FlatMatmulConfig(*tiles), out_dtype="float32"))
    outs = [call(x, w) for _ in range(200)]
    assert oracle.relative_error(outs[0], np.asarray(x, np.float64) @ np.asarray(w, np.float64)) < 1e-4
    assert all((out == outs[0]).all() for out in outs[1:])


@pytest.mark.skipif(ON_GPU, reason="the race detector is the interpreter's")
@in_both_orders
def test_has_no_race(w_order):
    check_races(flat_matmul, FlatMatmulConfig(3, 64, 64, 2), w_order)


@pytest.mark.parametrize(("k", "n"), WEIGHTS)
@in_both_orders
def test_lowers_for_cuda(k, n, w_order):
    check_lowers_for_cuda(flat_matmul, 8, k, n, w_order, FlatMatmulConfig(132, 64, 128, 5))
