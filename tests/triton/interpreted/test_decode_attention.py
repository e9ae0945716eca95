"""The decode kernel in Triton against float64, interpreted."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import triton_case
from decode_case import check, check_log_sum
from triton_decode_case import CASES, DRAFT, ONLINE, RECOMPUTED, tiles
from triton_decode_case import HalfCase as Case

from fdpp_jax.triton import bridge

# The interpreter computes in numpy, which warns of the infinities that these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setattr(bridge, "call", triton_case.call)


SLOW = [
    "mha",
    "nine rows, odd capacity",
    "64 rows",
    "many sequences",
    "window, each thread multiplies",
    "starts",
    "draft of 4",
    "ragged, second launch",
    "starts, pages of a draft",
    "pages of 64",
    "window of a draft",
    "int8 of tokens",
]
QUICK_ONLINE = ["mha, each thread multiplies", "draft of 16"]
CASES_AND_PHI = [
    *(pytest.param(x, 1.5, marks=pytest.mark.slow if x in SLOW else ()) for x in CASES),
    *(pytest.param(x, None, marks=() if x in QUICK_ONLINE else pytest.mark.slow) for x in ONLINE),
]


@pytest.mark.parametrize(("case", "phi"), CASES_AND_PHI)
def test_agrees_with_float64(case, phi):
    case, lengths = CASES[case]
    case.check(lengths, phi)


@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=pytest.mark.slow if x in ("draft", "second launch") else ()) for x in RECOMPUTED]
)
def test_rows_outside_the_window_are_redone(case):
    case, lengths = RECOMPUTED[case]
    case.check_recompute(lengths)


@pytest.mark.parametrize(("capacity", "pages"), [(68, {}), (128, dict(page_size=64))], ids=["", "pages"])
def test_queries_far_beyond_the_keys_see_none_or_the_last(capacity, pages):
    """query_offset is the caller's, and may be anywhere: no page is looked up that a table does not have."""
    case = Case(3, capacity, 2, 1, 16, tiles(32, 2, 2), 2, local_window_size=(100, 0), **DRAFT, **pages)
    case.check((65, 5, 68), -0.5, query_offset=(150, 10**9, -7))


def test_lengths_beyond_the_capacity_see_all_keys():
    """Under jit nobody checks them."""
    case = Case(2, 67, 4, 2, 16, tiles(32, 2, 2))
    inputs = case.inputs(0, (67, 67))
    expected, _ = case.expected(inputs)
    check(case, case.run(inputs | {"lengths": jnp.array([68, 10**9])}, 1.5), expected)


def test_starts_beyond_the_keys_see_none_and_negative_ones_all():
    """Under jit nobody checks them."""
    case = Case(3, 68, 2, 1, 16, tiles(32, 2, 2), starts=(0, 68, 68))
    inputs = case.inputs(0, (65, 5, 68))
    expected, _ = case.expected(inputs)
    check(case, case.run(inputs | {"starts": jnp.array([-(2**31), 2**31 - 1, 68])}, 1.5), expected)
    assert not expected[1:].any()


@pytest.mark.parametrize("phi", [0.5, [[0.5, 1.0, -1.0, 2.0]] * 2])
def test_phi_is_one_or_of_each_row(phi):
    case = Case(2, 67, 4, 2, 16, tiles(32, 2, 2), 2, **DRAFT)
    case.check((67, 20), phi)


@pytest.mark.slow
def test_the_order_of_the_splits_is_fixed_and_their_number_does_not_matter():
    case = Case(3, 130, 2, 1, 16, tiles(16, 1, 2))
    inputs = case.inputs(0, (130, 17, 100))
    first = np.asarray(case.run(inputs, 1.5), np.float64)
    for config in (tiles(16, 5, 2), tiles(32, 20, 2), tiles(32, 3, 2, "launch")):
        check(case, dataclasses.replace(case, config=config).run(inputs, 1.5), first, factor=0.5)


def test_one_infinite_sum_flags_its_row_and_is_redone():
    """The denominator is safe, and one value times e^(s - phi) is not."""
    case = Case(2, 68, 4, 2, 16, tiles(32, 2, 2), dtype="float16")
    inputs = case.inputs(0, (68, 35))
    inputs["value"] = inputs["value"].at[1, 3, 1, 7].set(jnp.inf)
    flagged = np.asarray(case.run(inputs, 1.5))
    failed = np.array([[False] * 4, [False, False, True, True]])
    np.testing.assert_array_equal(np.isnan(flagged[:, 0]).all(axis=-1), failed)


@pytest.mark.parametrize("size", [1e31, -1e37])
def test_rows_of_the_largest_scores_are_exact(size):
    """float32's steps are far above 1 there: the largest score wins, and its difference to itself is 0."""
    case = Case(2, 68, 4, 2, 64, tiles(32, 2, 2), kv_dtype="int8", scales="head")
    inputs = case.inputs(0, (68, 35))
    inputs["query"] = jnp.full_like(inputs["query"], 1.0)
    factors = 64 + jnp.arange(case.capacity) % 63
    inputs["key"] = jnp.broadcast_to(factors[None, :, None, None], inputs["key"].shape).astype(jnp.int8)
    inputs["key_scale"] = jnp.full((2,), size / 64 / 8, jnp.float32)
    expected, _ = case.expected(inputs)
    check(case, case.run(inputs, 1.5, recompute=True), expected)
    check(case, case.run(inputs, None), expected)


def test_log_sums_of_rows_without_keys_are_their_sinks():
    case = Case(2, 68, 4, 2, 16, tiles(32, 2, 2), has_sinks=True)
    inputs = case.inputs(0, (0, 35))
    _, log_sum = case.run(inputs, 1.5, return_residual=True)
    check_log_sum(case, inputs, log_sum, case.expected(inputs)[1])
