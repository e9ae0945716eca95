"""Sampling: which tokens the filters leave, and that draws follow the probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdpp_jax.sampling import Sampling, best_tokens, make_sampling, rows_are_finite, sample

VOCAB = 8
PROBABILITIES = np.array([0.05, 0.4, 0.02, 0.2, 0.1, 0.15, 0.03, 0.05])
LOGITS = jnp.asarray(np.log(PROBABILITIES), jnp.float32)
NUM_DRAWS = 20_000


def _kept(logits, **filters) -> list[int]:
    """The tokens left, best first."""
    scores, tokens = best_tokens(jnp.asarray(logits)[None], make_sampling(1.0, vocab_size=len(logits), **filters))
    return tokens[0][jnp.isfinite(scores[0])].tolist()


def _frequencies(temperature: float, **filters) -> np.ndarray:
    sampling = make_sampling(temperature, vocab_size=VOCAB, **filters)
    draws = sample(jnp.broadcast_to(LOGITS, (NUM_DRAWS, VOCAB)), jax.random.key(0), sampling)
    assert draws.dtype == jnp.int32
    return np.bincount(np.asarray(draws), minlength=VOCAB) / NUM_DRAWS


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5}])
def test_temperature_zero_takes_the_best(filters):
    logits = jnp.stack([LOGITS, LOGITS[::-1]])
    sampling = make_sampling(0.0, vocab_size=VOCAB, **filters)
    np.testing.assert_array_equal(sample(logits, jax.random.key(0), sampling), [1, VOCAB - 2])


@pytest.mark.parametrize("top_k", [1, 2, 3, VOCAB])
def test_top_k_keeps_exactly_the_k_best(top_k):
    assert _kept(LOGITS, top_k=top_k) == [1, 3, 5, 4, 0, 7, 6, 2][:top_k]  # 0 before 7: equal, the lower first


def test_top_k_among_equals_keeps_k():
    assert _kept(np.zeros(VOCAB), top_k=3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1e-6, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.74, [1, 3, 5]),
        (0.76, [1, 3, 5, 4]),
        (1.0, [1, 3, 5, 4, 0, 7, 6, 2]),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept):
    assert _kept(LOGITS, top_p=top_p) == kept


def test_top_p_counts_what_top_k_left():
    # Of 0.4, 0.2 and 0.15, renormalised: 0.53, 0.27, 0.2.
    assert _kept(LOGITS, top_k=3, top_p=0.79) == [1, 3]
    assert _kept(LOGITS, top_k=3, top_p=0.81) == [1, 3, 5]


@pytest.mark.parametrize(
    ("temperature", "filters"),
    [(1.0, {}), (0.5, {}), (2.0, {"top_k": 4}), (1.0, {"top_p": 0.7}), (0.7, {"top_k": 5, "top_p": 0.9})],
)
def test_draws_follow_the_probabilities(temperature, filters):
    weights = PROBABILITIES ** (1 / temperature)
    if "top_k" in filters:
        weights = np.where(weights >= np.sort(weights)[-filters["top_k"]], weights, 0)
        # Tokens 0 and 7 are equal; with five candidates the lower stays.
        weights[7] = 0 if filters["top_k"] == 5 else weights[7]
    weights = weights / weights.sum()
    if "top_p" in filters:
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[before >= filters["top_p"]]] = 0
    expected = weights / weights.sum()
    got = _frequencies(temperature, **filters)
    assert (got[expected == 0] == 0).all()
    # Five standard deviations of a count; the key is fixed.
    np.testing.assert_allclose(got, expected, atol=5 * 0.5 / np.sqrt(NUM_DRAWS))


FILTERS: list[dict[str, float]] = [{}, {"top_k": 2}, {"top_p": 0.9}, {"top_k": 2, "top_p": 0.9}, {"top_p": 1e-300}]
TINY = [5e-324, 1e-300, 1e-46, 1e-40, 1e-38, 1.1754943e-38, 1e-30, 1e-9]
HUGE = [1e37, 1e38, 3e38, 1e39, 1.7e308, 10**400]


def _draws(logits, temperature, filters, num_draws=64):
    sampling = make_sampling(temperature, vocab_size=len(logits), **filters)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (num_draws, len(logits)))
    return set(jax.jit(sample)(rows, jax.random.key(1), sampling).tolist())


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("temperature", TINY)
def test_a_tiny_temperature_takes_the_best(temperature, filters):
    for logits in ([1e4, 3e4, -3e4], [1.0, 1.0 + 2**-20, 0.0], [-np.inf, 0.0, -1e-3]):
        assert _draws(logits, temperature, filters) == {1}
    ties = {0} if filters.get("top_p") == 1e-300 else {0, 2}
    assert _draws([2.0, 1.0, 2.0], temperature, filters) == ties


@pytest.mark.parametrize("temperature", HUGE)
def test_a_huge_temperature_draws_evenly_among_those_left(temperature):
    logits = [-np.inf, 1.0, -3e4, 3e4]
    assert _draws(logits, temperature, {}) == {1, 2, 3}
    assert _draws(logits, temperature, {"top_k": 2}) == {1, 3}
    assert _draws(logits, temperature, {"top_p": 0.6}) == {1, 3}
    assert _draws(logits, temperature, {"top_p": 1.0}) == {1, 2, 3}


def test_strengths_are_traced():
    traces = 0

    @jax.jit
    def draw(logits, sampling):
        nonlocal traces
        traces += 1
        return sample(logits, jax.random.key(0), sampling)

    for temperature, top_p in ((0.5, 0.9), (0.6, 0.9), (0.6, 0.1)):
        draw(LOGITS[None], make_sampling(temperature, top_p=top_p, vocab_size=VOCAB))
    assert traces == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a finite number of at least 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature .* got nan"),
        ({"temperature": float("inf")}, "temperature .* got inf"),
        ({"top_k": 0}, r"top_k must be within 1\.\.8 \(the vocabulary\), got 0"),
        ({"top_k": 9}, "top_k .* got 9"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p .* got 1.1"),
        ({"temperature": "1"}, "temperature must be a number, got '1'"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"temperature": jnp.ones(2)}, "temperature must be a number, got"),
        ({"top_k": 2.5}, "top_k must be an integer or None, got 2.5"),
        ({"top_k": "3"}, "top_k must be an integer or None, got '3'"),
        ({"top_p": "0.5"}, "top_p must be a number, got '0.5'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_sampling(**arguments, vocab_size=VOCAB)


@pytest.mark.parametrize("sampling", [Sampling(), make_sampling(0.5, vocab_size=3)])
def test_which_rows_are_finite(sampling):
    rows = {
        (1.0, 2.0, 3.0): True,
        (-np.inf, 2.0, -np.inf): True,  # a family may forbid tokens so
        (-np.inf, -np.inf, -np.inf): False,
        (1.0, np.nan, 3.0): False,
        (np.inf, 2.0, 3.0): False,
        (3.4e38, -3.4e38, 0.0): True,
    }
    assert rows_are_finite(jnp.array(list(rows)), sampling).tolist() == list(rows.values())
