"""flat_matmul and gemv in Triton, against float64, interpreted on the CPU."""

import functools
import itertools

import jax
import numpy as np
import pytest
import triton_case
from matmul_case import check, in_both_orders, operands

from fdpp_jax.plans.triton_matmul import FlatMatmulConfig, GemvConfig
from fdpp_jax.triton import bridge
from fdpp_jax.triton.flat_matmul import flat_matmul
from fdpp_jax.triton.gemv import gemv


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setattr(bridge, "call", triton_case.call)


def _flat(x, w, *, interpret, **options):
    del interpret  # Mosaic GPU's
    return flat_matmul(x, w, **options)


def _gemv(x, w, *, interpret, **options):
    del interpret
    return gemv(x, w, **options)


@in_both_orders
@pytest.mark.parametrize(("m", "arch"), [*itertools.product([1, 7, 8, 9, 64], ["sm_80"]), (3, "gfx90a")])
def test_flat_rows(m, arch, w_order):
    config = FlatMatmulConfig(arch, 32, 64, 1, 2, 4, 3)
    check(_flat, m, 256, 64, "float16", w_order, config, out_dtype="float16")


SIZES = [  # k, n, (block_n, block_k, k_groups, split_k)
    (128, 64, (16, 32, 1, 4)),  # a tile for each share
    (160, 64, (16, 32, 2, 3)),  # shares of one and two tiles
    (168, 64, (16, 32, 1, 2)),  # K is no multiple of a block
    (96, 72, (32, 32, 1, 1)),  # N is no multiple of a block
    (104, 136, (64, 64, 4, 2)),  # neither is
    (24, 8, (32, 64, 2, 1)),  # blocks larger than the matrix
    (33, 21, (16, 32, 1, 2)),  # odd
]


@in_both_orders
@pytest.mark.parametrize(("k", "n", "tiles"), SIZES)
def test_flat_sizes_and_splits(k, n, tiles, w_order):
    check(_flat, 5, k, n, "float16", w_order, FlatMatmulConfig("sm_80", *tiles, 4, 2))


@in_both_orders
@pytest.mark.parametrize(("k", "n", "tiles"), SIZES)
def test_gemv_sizes_and_splits(k, n, tiles, w_order):
    block_n, block_k, _, split_k = tiles
    check(_gemv, 1, k, n, "float16", w_order, GemvConfig("sm_80", block_n, block_k, split_k, 4, 1))


@pytest.mark.parametrize("arch", ["sm_80", "gfx90a"])
def test_gemv_in_float16(arch):
    check(_gemv, 1, 256, 64, "float16", "nk", GemvConfig(arch, 8, 64, 2, 4, 1), out_dtype="float16")


@pytest.mark.parametrize("m", [1, 9])
def test_shares_are_added_in_order(m):
    """In the kernel as by XLA in a second launch: the same bits."""
    x, w = operands(m, 512, 48, "float16")
    outs = [
        jax.jit(functools.partial(flat_matmul, config=FlatMatmulConfig(arch, 16, 32, 1, 8, 4, 2), out_dtype="float32"))(
            x, w
        )
        for arch in ("sm_80", "gfx90a")
    ]
    np.testing.assert_array_equal(*outs)
