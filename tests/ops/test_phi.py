"""phi of every row: the policy's constant, or a bound that no score exceeds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdpp_jax import UnifiedMax, unified_max
from fdpp_jax.ops import phi
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions


def row_phi(
    query, key, scale, lengths=None, softmax=None, dtype="float32", logits_soft_cap=None, key_max_norm=None, **arrays
):
    softmax = UnifiedMax.bound() if softmax is None else softmax
    options = AttentionOptions(scale, logits_soft_cap=logits_soft_cap)
    # Under jit, as it is used: one program instead of one for each operation.
    call = jax.jit(
        lambda softmax, arrays, key_max_norm: phi.row_phi(
            softmax, arrays, options, weights_dtype=dtype, key_max_norm=key_max_norm
        )
    )
    return call(softmax, AttentionArrays(query, key, key, lengths, **arrays), key_max_norm)


@pytest.mark.parametrize("scale", [0.3, -0.3])
def test_bound_fits_every_live_score_and_ignores_dead_keys(scale):
    keys = jax.random.split(jax.random.key(0), 2)
    query = jax.random.normal(keys[0], (2, 1, 8, 16))
    key = jax.random.normal(keys[1], (2, 12, 2, 16)).at[0, 7:].set(jnp.nan)
    lengths = jnp.array([7, 12])
    shift = row_phi(query, key, scale, lengths)  # [B, N]
    scores = scale * jnp.einsum("btkgh,bskh->bkgs", query.reshape(2, 1, 2, 4, 16), key).reshape(2, 8, 12)
    live = jnp.arange(12) < lengths[:, None, None]
    den = jnp.where(live, jnp.exp(scores - shift[..., None]), 0.0).sum(axis=-1)
    assert not unified_max.leaves_window(den, 12, jnp.float32).any()
    assert jnp.isfinite(shift).all()


@pytest.mark.parametrize("page_size", [None, 4])
def test_keys_before_the_start_and_behind_the_length_do_not_count(page_size):
    query, key = jnp.ones((2, 1, 4, 16)), jax.random.normal(jax.random.key(1), (2, 12, 2, 16))
    lengths, starts = jnp.array([7, 12]), jnp.array([6, 12])
    dead = (jnp.arange(12) < starts[:, None]) | (jnp.arange(12) >= lengths[:, None])
    dirty, clean = (jnp.where(dead[..., None, None], x, key) for x in (jnp.nan, 0.0))
    table = None if page_size is None else jnp.arange(6).reshape(2, 3)
    pool = dirty if page_size is None else dirty.reshape(6, 4, 2, 16)
    found = row_phi(query, pool, 0.3, lengths, page_table=table, starts=starts)
    np.testing.assert_array_equal(found, row_phi(query, clean, 0.3))


def test_a_bound_counts_the_bias():
    query, key = jnp.ones((2, 1, 4, 16)), jax.random.normal(jax.random.key(1), (2, 12, 2, 16))
    bias = jnp.stack([jnp.full((1, 12), 50.0), jnp.full((1, 12), -jnp.inf), jnp.zeros((1, 12)), jnp.zeros((1, 12))])
    raised = row_phi(query, key, 0.3, bias=bias[None]) - row_phi(query, key, 0.3)
    np.testing.assert_allclose(raised, jnp.broadcast_to(jnp.array([50.0, 0.0, 0.0, 0.0]), (2, 4)), atol=1e-3)


@pytest.mark.parametrize("sink", [None, 0.0, 100.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("num_keys", [1, 1024, 2**17])
def test_bound_cannot_overflow_and_wastes_no_room(num_keys, dtype, sink):
    """Keys along the query and all of full length make the largest denominator that there is."""
    _, den_max = unified_max.window(dtype, num_keys)
    for size in (0.01, 3.0, 300.0):
        query = jnp.zeros((1, 1, 1, 4)).at[..., 0].set(size)
        key = jnp.broadcast_to(query[0, 0, 0], (1, num_keys, 1, 4))
        shift = row_phi(query, key, 1.0, dtype=dtype, sinks=None if sink is None else jnp.array([sink]))
        scores = np.append(np.full(num_keys, size**2), [] if sink is None else [sink])
        log_den = np.log(np.exp(scores - scores.max()).sum()) + scores.max() - float(shift[0, 0])
        assert log_den <= np.log(den_max)
        if sink is None:
            assert log_den > np.log(den_max) - 1.1 - 2e-5 * size**2


def _adversarial_keys(query, num_keys, norm):
    """Keys [rows, num_keys, H] of norms up to `norm` that make the bound of query [rows, H] as loose as can be."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((len(query), num_keys, query.shape[1])).astype(np.float32)
    along = query / np.linalg.norm(query, axis=-1, keepdims=True)
    across = keys - (keys @ along[..., None]) * along[:, None]
    across /= np.linalg.norm(across, axis=-1, keepdims=True)
    one_huge = across.copy()
    one_huge[:, 3] = norm * rng.choice([-1, 1], (len(query), 1)) * along
    return {
        "orthogonal": across * rng.uniform(1, norm, (len(query), num_keys, 1)).astype(np.float32),
        "one huge": one_huge,
        "all equal": np.broadcast_to(norm * across[:, :1], keys.shape),
        "along": np.broadcast_to(norm * along[:, None], keys.shape),
        "against": np.broadcast_to(-norm * along[:, None], keys.shape),
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("norm", [10.0, 100.0, 1000.0])
def test_no_keys_make_a_bound_overflow_and_only_loose_ones_recompute(norm, dtype):
    num_keys, head_dim = 128, 64
    query = np.random.default_rng(1).standard_normal((64, head_dim)).astype(np.float32)
    q = jnp.asarray(query, dtype)
    den_min, den_max = unified_max.window(dtype, num_keys)
    for name, keys in _adversarial_keys(query, num_keys, norm).items():
        k = jnp.asarray(keys, dtype)
        shift = row_phi(q[:, None, None], k[:, :, None], head_dim**-0.5, dtype=dtype)  # [rows, 1]
        scores = np.asarray(q, np.float64)[:, None] @ np.asarray(k, np.float64).transpose(0, 2, 1) * head_dim**-0.5
        weights = jnp.exp(jnp.asarray(scores[:, 0], jnp.float32) - shift)
        den = np.asarray(weights.astype(dtype).astype(jnp.float32).sum(axis=-1))
        assert (den <= den_max).all(), name
        top = scores[:, 0].max(axis=-1)
        log_sum = top + np.log(np.exp(scores[:, 0] - top[:, None]).sum(axis=-1))
        sizes = np.linalg.norm(np.asarray(q, np.float64), axis=-1), np.linalg.norm(np.asarray(k, np.float64), axis=-1)
        looseness = sizes[0] * sizes[1].max(axis=1) * head_dim**-0.5 - log_sum
        depth = np.log(den_max / den_min) - np.log(num_keys) - 1
        failed = np.asarray(unified_max.leaves_window(jnp.asarray(den), num_keys, dtype))
        is_clear = abs(looseness - depth) > 0.1
        np.testing.assert_array_equal(failed[is_clear], (looseness > depth)[is_clear], name)
        assert not failed.any() or name != "along"


def test_bound_of_capped_scores_is_the_cap():
    query, key = 100 * jnp.ones((1, 1, 2, 16)), jnp.ones((1, 4, 1, 16))
    capped = row_phi(query, key, 1.0, logits_soft_cap=30.0)
    free = row_phi(jnp.ones((1, 1, 2, 1)), 30 * jnp.ones((1, 4, 1, 1)), 1.0)
    np.testing.assert_allclose(capped, free)


def test_bound_takes_the_largest_of_the_queries_and_a_given_norm():
    query = jnp.ones((1, 3, 2, 4)) * jnp.array([1.0, 5.0, 2.0])[None, :, None, None]
    key = jnp.ones((1, 8, 1, 4))
    np.testing.assert_allclose(row_phi(query, key, 1.0), row_phi(query[:, 1:2], key, 1.0))
    given = row_phi(query, jnp.full_like(key, jnp.nan), 1.0, key_max_norm=jnp.full((1, 1), 2.0))
    np.testing.assert_allclose(given, row_phi(query, key, 1.0))


def test_bound_of_quantised_pages():
    key = jax.random.randint(jax.random.key(0), (5, 16, 2, 8), -127, 128).astype(jnp.int8)
    table = jnp.array([[3, 1], [4, -7]])
    lengths = jnp.array([20, 16])
    query = jnp.ones((2, 1, 2, 8))
    for scale in (jnp.array([0.1, 0.2]), jax.random.uniform(jax.random.key(1), (5, 16, 2))):
        shift = row_phi(query, key, 1.0, lengths, page_table=table, key_scale=scale)
        whole = key.astype(jnp.float32) * scale[..., None]
        plain = jnp.stack([jnp.concatenate([whole[3], whole[1]]), jnp.concatenate([whole[4], whole[0]])])
        np.testing.assert_allclose(shift, row_phi(query, plain, 1.0, lengths), rtol=1e-5)


def test_phi_broadcasts_over_heads_and_a_scalar_stays_one():
    query, key = jnp.ones((2, 1, 4, 8)), jnp.ones((2, 3, 2, 8))
    shift = row_phi(query, key, 1.0, softmax=UnifiedMax(jnp.arange(4.0)))
    np.testing.assert_array_equal(shift, [[0, 1, 2, 3]] * 2)
    assert row_phi(query, key, 1.0, softmax=UnifiedMax(2)).shape == ()
    with pytest.raises(ValueError, match=r"broadcast to \[B, N\] = \[2, 4\], got shape \(3,\)"):
        row_phi(query, key, 1.0, softmax=UnifiedMax(jnp.ones(3)))
