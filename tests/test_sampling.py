"""Sampling: which tokens the filters leave, and that draws follow the probabilities."""

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from fdpp_jax.sampling import Sampling, candidates, make_sampling, rows_are_finite, sample

VOCAB = 8
PROBABILITIES = np.array([0.05, 0.4, 0.02, 0.2, 0.1, 0.15, 0.03, 0.05])
LOGITS = jnp.asarray(np.log(PROBABILITIES), jnp.float32)
NUM_DRAWS = 20_000


def _kept(logits, **filters) -> list[int]:
    """The tokens left, best first and lower ones first among equals."""
    logits = np.asarray(logits, np.float32)
    return _kept_rows(logits[None] - logits.max(), make_sampling(1.0, vocab_size=len(logits), **filters))[0]


def _kept_rows(scores, sampling) -> list[list[int]]:
    left, tokens = jax.jit(candidates)(jnp.asarray(scores), sampling)
    tokens = np.broadcast_to(np.arange(left.shape[1]), left.shape) if tokens is None else np.asarray(tokens)
    rows = zip(np.asarray(left), tokens, strict=True)
    # Stable, and over tokens in their order: the lower of two equals comes first.
    ordered = ((row[np.argsort(tokens)], np.sort(tokens)) for row, tokens in rows)
    kept = [(row[row > -np.inf], tokens[row > -np.inf]) for row, tokens in ordered]
    return [tokens[np.argsort(-row, kind="stable")].tolist() for row, tokens in kept]


def _sorted_and_cut(scores, top_k=None, top_p=None) -> list[int]:
    """What `candidates` keeps of one row, by a sort and in float64."""
    order = np.argsort(-scores, kind="stable")[:top_k]
    masses = np.exp(scores[order].astype(np.float64))
    before = np.cumsum(masses) - masses
    stays = np.full(len(order), True) if top_p is None else before < top_p * masses.sum()
    stays[0] = True
    return [token for token, live in zip(order.tolist(), stays, strict=True) if live and scores[token] > -np.inf]


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


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("second", [0.0, -1e-9])  # equal, and worse by less than shows in its probability
def test_a_token_that_reaches_top_p_exactly_is_the_last(second, top_k):
    assert _kept([0.0, second], top_k=top_k, top_p=0.5) == [0]


def test_top_p_counts_what_top_k_left():
    # Of 0.4, 0.2 and 0.15, renormalised: 0.53, 0.27, 0.2.
    assert _kept(LOGITS, top_k=3, top_p=0.79) == [1, 3]
    assert _kept(LOGITS, top_k=3, top_p=0.81) == [1, 3, 5]


def _rows(kind: str, vocab_size: int, num_rows: int) -> np.ndarray:
    """Scores of random tokens, the best 0."""
    rng = np.random.default_rng(vocab_size)
    logits = rng.standard_normal((num_rows, vocab_size)).astype(np.float32) * np.float32(3)
    match kind:
        case "tied":
            logits = np.round(logits)
        case "all equal":
            logits[:] = 1.5
        case "two values":
            logits = np.where(logits > 0, np.float32(0), np.float32(-1))
        case "forbidden":
            logits[rng.random(logits.shape) < 0.5] = -np.inf
            logits[:, vocab_size // 2] = 1
        case "one":
            logits[:, :] = -np.inf
            logits[:, vocab_size // 2] = 1
        case "cold":
            logits = (logits - logits.max(axis=1, keepdims=True)) * np.float32(2.0**100)
        case "hot":
            logits = (logits - logits.max(axis=1, keepdims=True)) * np.float32(2.0**-100)
        case "narrow":
            logits = 1 + logits * np.float32(1e-6)
    return logits - logits.max(axis=1, keepdims=True)


KINDS = ("random", "tied", "all equal", "two values", "forbidden", "one", "cold", "hot", "narrow")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [2, 7, 100, 1009])
def test_top_k_keeps_what_a_sort_does(kind, vocab_size):
    rows = _rows(kind, vocab_size, 5)
    for top_k in sorted({1, 2, min(5, vocab_size), vocab_size // 3 + 1, vocab_size}):
        kept = _kept_rows(rows, make_sampling(1.0, top_k=top_k, vocab_size=vocab_size))
        assert kept == [_sorted_and_cut(row, top_k) for row in rows]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocab_size", "top_k"), [(1, None), (2, None), (7, None), (100, 9), (1009, None), (1009, 40)])
def test_top_p_keeps_what_a_sort_does(kind, vocab_size, top_k):
    rows = _rows(kind, vocab_size, 5)
    for top_p in (1e-30, 1e-6, 0.037, 0.4, 0.77, 0.93, 0.9999):
        kept = _kept_rows(rows, make_sampling(1.0, top_k=top_k, top_p=top_p, vocab_size=vocab_size))
        for row, tokens in zip(rows, kept, strict=True):
            # Sums of float32 may round to either side of top_p.
            fewest, most = (_sorted_and_cut(row, top_k, top_p * scale) for scale in (1 - 1e-5, 1 + 1e-5))
            assert tokens == most[: len(tokens)]
            assert len(fewest) <= len(tokens) <= len(most)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [None, 20])
def test_a_top_p_of_one_keeps_all_that_can_be_drawn(kind, top_k):
    rows = _rows(kind, 1009, 5)
    kept = _kept_rows(rows, make_sampling(1.0, top_k=top_k, top_p=1.0, vocab_size=1009))
    for row, tokens in zip(rows, kept, strict=True):
        everything = _sorted_and_cut(row, top_k)
        assert tokens == everything[: len(tokens)]
        assert np.exp(row[everything[len(tokens) :]].astype(np.float64)).sum() < 1e-5 * np.exp(row).sum()


def test_filters_sort_no_vocabulary():
    def longest_sort(jaxpr) -> int:
        inner = (
            x.jaxpr for eqn in jaxpr.eqns for x in eqn.params.values() if isinstance(x, jax.extend.core.ClosedJaxpr)
        )
        sorts = (eqn for eqn in jaxpr.eqns if eqn.primitive.name in ("sort", "top_k", "cumsum"))
        return max(*(eqn.invars[0].aval.shape[-1] for eqn in sorts), *map(longest_sort, inner), 0, 0)

    logits = jnp.zeros((2, 10_000))
    for filters, longest in (({"top_k": 5}, 225), ({"top_k": 5, "top_p": 0.9}, 225), ({"top_p": 0.9}, 0)):
        sampling = make_sampling(1.0, **filters, vocab_size=10_000)
        assert longest_sort(jax.make_jaxpr(sample)(logits, jax.random.key(0), sampling).jaxpr) == longest


@pytest.mark.parametrize("filters", [{"top_k": 30}, {"top_p": 0.6}, {"top_k": 30, "top_p": 0.6}])
def test_draws_of_a_large_vocabulary_follow_the_probabilities(filters):
    """Pearson's chi-square over the tokens that stay, among them equal ones at the end."""
    scores = np.round(_rows("random", 500, 1)[0] * 4) / 4
    sampling = make_sampling(1.0, **filters, vocab_size=500)
    keys = jax.random.split(jax.random.key(2), NUM_DRAWS)
    draws = jax.vmap(lambda key: sample(scores[None], key, sampling)[0])(keys)  # the filters look at the row once
    kept = _sorted_and_cut(scores, **filters)
    expected = np.exp(scores[kept]) / np.exp(scores[kept]).sum() * NUM_DRAWS
    counts = np.bincount(draws, minlength=500)
    assert counts.sum() == counts[kept].sum() == NUM_DRAWS
    freedom = len(kept) - 1
    assert ((counts[kept] - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom)


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


@pytest.mark.parametrize("setting", ["jax_enable_x64", "jax_numpy_dtype_promotion"])
@pytest.mark.parametrize("filters", FILTERS)
def test_sampling_under_the_user_s_settings(setting, filters):
    rows = _rows("tied", 100, 3)
    sampling = make_sampling(0.7, **filters, vocab_size=100)
    expected = _kept_rows(rows, sampling)
    before = getattr(jax.config, setting)
    jax.config.update(setting, True if setting == "jax_enable_x64" else "strict")
    try:
        assert _kept_rows(rows, sampling) == expected
        assert sample(jnp.asarray(rows), jax.random.key(0), sampling).dtype == jnp.int32
    finally:
        jax.config.update(setting, before)


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
