"""The prefill kernel interpreted, against float64: masks, lengths, caches of all kinds, both directions of failure."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import prefill_case
import pytest
import triton_case
from prefill_case import CASES, Case

from fdpp_jax.plans.triton_prefill import PrefillAttentionConfig
from fdpp_jax.triton import bridge
from fdpp_jax.triton.prefill_attention import prefill_attention

# numpy, by which the interpreter computes, warns of what overflows on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setattr(bridge, "call", triton_case.call)


def run(case, arrays, phi, options=None, **settings):
    """The kernel: out and log-sum-exp."""
    config = PrefillAttentionConfig(64, 32, 4, 2, "sm_80", case.packs_group, case.heads_together)
    arrays = arrays._replace(phi=None if phi is None else jnp.asarray(phi, jnp.float32))
    return prefill_attention(arrays, options or case.options, config, **settings)


def check(case, phi, seed=0):
    """Right in all rows; recomputed where they leave the window. Products of bfloat16 are wrong when interpreted."""
    case = dataclasses.replace(case, dtype="float16")
    arrays = case.arrays(seed)
    prefill_case.check(case, run(case, arrays, phi, recompute=True), case.expected(arrays))


ALL = CASES | {
    "pages of 16, window": Case(
        batch=2,
        query_length=50,
        capacity=130,
        lengths=(130, 60),
        starts=(20, 3),
        offset=(80, 10),
        page_size=16,
        local_window_size=(40, 5),
    ),
    "head dim 80, cap": Case(query_length=70, capacity=70, head_dim=80, logits_soft_cap=5.0, num_heads=1),
    "head dim 40, more queries than keys": Case(query_length=70, capacity=20, head_dim=40, is_causal=False),
    "no keys in pages": Case(batch=2, query_length=17, capacity=64, lengths=(0, 33), page_size=16, has_sinks=True),
}


SLOW = ["whole", "starts", "float8 of tokens, pages", "few queries of many heads", "window", "packed"]


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in ALL])
def test_unified_max_against_float64(name):
    check(ALL[name], 2.0)


@pytest.mark.parametrize(
    "name",
    [
        *("chunk", "no keys", "pages of 16, window"),
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("causal", "starts", "packed", "float8 of tokens, pages")),
    ],
)
def test_online_softmax_against_float64(name):
    check(ALL[name], None)


@pytest.mark.parametrize("phi", [90.0, -90.0])
def test_rows_that_leave_the_window_are_nan_until_they_are_redone(phi):
    case = Case(query_length=20, capacity=64, num_heads=1, offset=(44,), has_sinks=True, dtype="float16")
    arrays = case.arrays()
    for result in run(case, arrays, phi):
        assert np.isnan(np.asarray(result, np.float32)).all()
    check(case, phi)


@pytest.mark.parametrize("packs_group", [False, True])
def test_each_head_has_its_phi_and_fails_alone(packs_group):
    case = Case(
        batch=2, query_length=20, capacity=30, num_heads=4, num_kv_heads=2, packs_group=packs_group, dtype="float16"
    )
    arrays = case.arrays()
    phi = np.array([[2.0, 90.0, 1.0, 3.0], [0.0, 2.0, 3.0, -90.0]])
    out, log_sum = run(case, arrays, phi)
    fails = np.broadcast_to(np.abs(phi)[:, None] > 9, log_sum.shape)
    np.testing.assert_array_equal(np.isnan(log_sum), fails)
    np.testing.assert_array_equal(np.isnan(np.asarray(out, np.float32)).all(axis=-1), fails)
    prefill_case.check(case, run(case, arrays, phi, recompute=True), case.expected(arrays))


def test_a_value_that_makes_a_sum_infinite_fails_its_rows():
    case = Case(query_length=20, capacity=40, num_heads=1, dtype="float16", is_causal=False)
    arrays = case.arrays()
    arrays = arrays._replace(value=arrays.value.at[0, 3, 0, 5].set(jnp.inf))
    out, _ = run(case, arrays, 2.0)
    assert np.isnan(np.asarray(out, np.float32)).all()


@pytest.mark.parametrize("phi", [None, 2.0])
def test_a_scale_may_be_negative(phi):
    case = Case(query_length=20, capacity=40, num_heads=1, dtype="float16")
    arrays = case.arrays()
    options = dataclasses.replace(case.options, scale=-0.2)
    found = run(case, arrays, phi, options)
    mirrored = arrays._replace(query=-arrays.query * (0.2 * 8))
    prefill_case.check(case, found, case.expected(mirrored))


def test_the_log_sum_is_a_result_where_it_is_asked_for():
    case = Case(query_length=20, capacity=40, num_heads=1, dtype="float16")
    out = run(case, case.arrays(), 2.0, dataclasses.replace(case.options, return_residual=False))
    assert out.shape == (1, 20, 1, 64)
