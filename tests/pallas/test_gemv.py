"""gemv against float64, interpreted on the CPU and as it is on a GPU."""

import itertools

import pytest
from matmul_case import ON_GPU, WEIGHTS, check, check_lowers_for_cuda, check_races, in_both_orders

from fdpp_jax.pallas.gemv import gemv
from fdpp_jax.plans.hopper_matmul import GemvConfig

pytestmark = pytest.mark.usefixtures("fresh_interpreter")

RAGGED = [  # k, n, (block_n, block_k, stages, split_k)
    (512, 128, (64, 128, 2, 1)),
    (336, 128, (64, 64, 3, 2)),  # K is no multiple of a block
    (256, 208, (64, 64, 2, 1)),  # N is no multiple of a block, nor of the widest swizzle
    (272, 224, (128, 64, 2, 2)),  # neither is
    (128, 64, (64, 64, 4, 4)),  # more splits than K blocks
    (64, 64, (128, 128, 2, 1)),  # blocks larger than the matrix
    (16, 16, (64, 64, 2, 1)),
]


@pytest.mark.slow
@in_both_orders
@pytest.mark.parametrize(
    ("k", "n", "tiles", "dtype"),
    [
        pytest.param(*ragged, dtype, marks=() if dtype == on_cpu else pytest.mark.gpu)
        for ragged, on_cpu in zip(RAGGED, itertools.cycle(["bfloat16", "float16"]))
        for dtype in ("bfloat16", "float16")
    ],
)
def test_gemv_ragged_sizes(k, n, tiles, dtype, w_order):
    check(gemv, 1, k, n, dtype, w_order, GemvConfig(*tiles), out_dtype=dtype)


@pytest.mark.skipif(ON_GPU, reason="the race detector is the interpreter's")
@in_both_orders
def test_has_no_race(w_order):
    check_races(gemv, GemvConfig(64, 64, 2, 2), w_order)


@pytest.mark.parametrize(("k", "n"), WEIGHTS)
@in_both_orders
def test_lowers_for_cuda(k, n, w_order):
    check_lowers_for_cuda(gemv, 1, k, n, w_order, GemvConfig(64, 128, 5, 2))
