"""The policy and its window."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdpp_jax import UnifiedMax, unified_max


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_window_holds_its_ends_and_nothing_else(dtype):
    den_min, den_max = unified_max.window(dtype, 1024)
    den = jnp.array([0.0, den_min / 2, den_min, 1.0, den_max, 2 * den_max, jnp.inf, jnp.nan])
    expected = [True, True, False, False, False, True, True, True]
    np.testing.assert_array_equal(unified_max.leaves_window(den, 1024, dtype), expected)


def test_float16_window_keeps_the_sum_of_its_roundings_small():
    """1,024 equal weights at the bottom of the window, rounded to float16, still add up to within 2^-10."""
    den_min, den_max = unified_max.window("float16", 1024)
    for den in (den_min, den_max):
        weights = den / 1024 * np.random.default_rng(0).uniform(0.5, 1.5, 1024)
        rounded = weights.astype(np.float16).astype(np.float64)
        assert np.isfinite(rounded).all()
        assert abs(rounded.sum() / weights.sum() - 1) < 2**-10


def test_phi_is_a_traced_value():
    calls = []

    @jax.jit
    def shift(softmax):
        calls.append(softmax)
        return softmax.phi + 1

    assert shift(UnifiedMax(1.0)) == 2
    assert shift(UnifiedMax(5.0)) == 6
    assert len(calls) == 1


def test_recompute_is_static_and_checked():
    softmax = UnifiedMax(2.0, "launch")
    assert jax.tree.leaves(softmax) == [2.0]
    assert jax.tree.structure(softmax) != jax.tree.structure(UnifiedMax(2.0))
    assert jax.tree.map(lambda phi: phi + 1, softmax) == UnifiedMax(3.0, "launch")
    assert UnifiedMax.bound("cond") == UnifiedMax(None, "cond")
    with pytest.raises(ValueError, match="recompute must be None, kernel, launch, cond; got 'host'"):
        UnifiedMax(recompute="host")


@pytest.mark.parametrize("phi", [float("nan"), float("inf"), -1e39, 10**39])
def test_phi_is_finite(phi):
    with pytest.raises(ValueError, match=re.escape(f"phi must be finite in float32, got {phi}")):
        UnifiedMax(phi)
