"""The policy, its window and the bound."""

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


@pytest.mark.parametrize("scale", [0.3, -0.3])
def test_bound_is_above_every_live_score_and_ignores_dead_keys(scale):
    keys = jax.random.split(jax.random.key(0), 2)
    query = jax.random.normal(keys[0], (2, 1, 8, 16))
    key = jax.random.normal(keys[1], (2, 12, 2, 16)).at[0, 7:].set(jnp.nan)
    lengths = jnp.array([7, 12])
    phi = unified_max.row_phi(UnifiedMax.bound(), query, key, scale, lengths)  # [B, N]
    scores = scale * jnp.einsum("btkgh,bskh->bkgs", query.reshape(2, 1, 2, 4, 16), key).reshape(2, 8, 12)
    live = jnp.arange(12) < lengths[:, None, None]
    assert (jnp.where(live, scores, -jnp.inf) <= phi[..., None]).all()
    assert jnp.isfinite(phi).all()


def test_phi_broadcasts_over_heads():
    query, key = jnp.ones((2, 1, 4, 8)), jnp.ones((2, 3, 2, 8))
    phi = unified_max.row_phi(UnifiedMax(jnp.arange(4.0)), query, key, 1.0, None)
    np.testing.assert_array_equal(phi, [[0, 1, 2, 3]] * 2)
