"""What holds for the decode kernel whatever the input, the splits and the timing of its CTAs."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from decode_case import ON_GPU, Case, are_equal, check, check_log_sum
from hypothesis import strategies as st

from fdpp_jax.ops import reference
from fdpp_jax.plans import device, hopper, hopper_attention
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions
from fdpp_jax.plans.hopper_attention import DecodeAttentionConfig

# The interpreter multiplies in numpy, which warns of the infinities that these tests are about.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
    pytest.mark.slow,
]

tiles = DecodeAttentionConfig  # block_kv, splits, stages
CASE = Case(3, 100, 4, 1, 64, tiles(64, 2, 2))

# The shapes and configs are fixed and phi is traced: an example compiles nothing, and takes some 0.3 s interpreted.
# Failures are not shrunk, which would take minutes.
few = hypothesis.settings(
    max_examples=200 if ON_GPU else 5, derandomize=True, database=None, phases=[hypothesis.Phase.generate]
)
fewer = hypothesis.settings(few, max_examples=50 if ON_GPU else 2)
seeds = st.integers(0, 2**32 - 1)
lengths_of_3 = st.tuples(*3 * [st.one_of(st.sampled_from([0, 1, 64, 100]), st.integers(0, 100))])


def center(log_sum):
    """phi [B, N] that makes denominators about 1."""
    return np.where(np.isfinite(log_sum), log_sum, 0.0).mean(axis=1)


@few
@hypothesis.given(seeds, lengths_of_3, st.floats(-40, 40))
def test_phi_does_not_matter_inside_the_window(seed, lengths, shift):
    inputs = CASE.inputs(seed, lengths)
    expected, log_sum = CASE.expected(inputs)
    here, there = (CASE.run(inputs, center(log_sum) + x) for x in (0.0, shift))
    check(CASE, here, expected)
    check(CASE, there, np.asarray(here, np.float64))


# 40: more splits than live tiles, so that some of the splits between those of one sequence have nothing to do.
SPLIT = [tiles(64, 1, 2), tiles(64, 40, 4), tiles(128, 3, 3), tiles(64, 2, 2, "launch")]


@fewer
@hypothesis.given(seeds, lengths_of_3)
def test_splits_and_stages_do_not_matter(seed, lengths):
    inputs = CASE.inputs(seed, lengths)
    first = np.asarray(CASE.run(inputs, np.full((3, 4), 1.5)), np.float64)
    for config in SPLIT:
        out = dataclasses.replace(CASE, config=config).run(inputs, np.full((3, 4), 1.5))
        # The same weights, summed in another order: now and then a number rounds to its neighbour.
        check(CASE, out, first, factor=0.25)


@few
@hypothesis.given(
    seeds,
    lengths_of_3,
    st.sampled_from(["huge", "equal", "dominating"]),
    st.sampled_from([-1e4, -100.0, 0.0, 100.0, 1e4]),
    st.sampled_from([np.inf, -np.inf, 3e38]),
)
def test_hostile_scores_and_poison_do_not_matter(seed, lengths, kind, phi, poison):
    outs = []
    for value in (np.nan, poison):
        inputs = CASE.inputs(seed, lengths, poison=value)
        if kind == "huge":  # most scores of the first head are beyond +-1e4, and those of the last are of order 1
            inputs["query"] *= jnp.asarray([2e4, 1e3, 30.0, 1.0], inputs["query"].dtype)[:, None]
        key = inputs["key"]
        if kind == "equal":
            inputs["key"] = jnp.where(jnp.isfinite(key) & (abs(key) < 1e30), key[:, :1], key)
        if kind == "dominating":
            inputs["key"] = key.at[:, 0].set(8.0 * inputs["query"][:, 0, :1])
        outs.append(CASE.run(inputs, np.full((3, 4), phi), recompute=True))
        # Scores of 1e4 are good to about 0.01 in float32.
        check(CASE, outs[-1], CASE.expected(inputs)[0], factor=3.0 if kind == "huge" else 1.0)
    np.testing.assert_array_equal(*outs)


@few
@hypothesis.given(seeds, lengths_of_3, st.tuples(*3 * [st.integers(-5, 200)]), st.floats(-30, 30))
def test_rows_that_see_no_key_are_zero(seed, lengths, query_offset, phi):
    case = dataclasses.replace(CASE, query_length=3, is_causal=True, local_window_size=(40, 0), has_sinks=True)
    inputs = case.inputs(seed, lengths, query_offset=query_offset)
    expected, expected_log_sum = case.expected(inputs)
    out, log_sum = case.run(inputs, phi, return_residual=True)
    check(case, out, expected)
    check_log_sum(case, inputs, log_sum, expected_log_sum)
    assert not np.asarray(out)[~expected.any(axis=-1)].any()


# ---- everything at random


def random_case(seed):
    """A static shape, and what becomes of rows outside the window: "kernel" and "launch" redo them, "flag" does not."""
    rng = np.random.default_rng(seed)

    def choice(*values):
        return values[rng.integers(len(values))]

    while True:
        mode = choice("online", "kernel", "kernel", "kernel", "launch", "launch", "flag")
        kv_dtype = choice(None, None, "int8", "float8_e4m3fn")
        num_kv_heads = choice(1, 2, 3, 4, 8)
        combines = ("kernel", "cluster", "launch") if mode in ("online", "flag") else ("kernel", "kernel", "cluster")
        combine = choice(*combines)
        splits = choice(2, 3, 5, 8) if combine == "cluster" else choice(1, 2, 3, 5, 8, 21, 64)
        case = Case(
            batch=choice(1, 2, 3, 7, 40),
            capacity=choice(40, 64, 200, 511, 770, 1500),
            num_heads=num_kv_heads * choice(1, 2, 4, 7, 8, 16),
            num_kv_heads=num_kv_heads,
            head_dim=choice(*hopper.HEAD_DIMS),
            config=tiles(choice(64, 128), splits, choice(2, 3, 4), combine),
            query_length=choice(1, 1, 1, 2, 4, 16),
            dtype="bfloat16" if kv_dtype else choice("bfloat16", "float16"),
            is_causal=choice(True, False),
            local_window_size=choice(None, None, (100, 0), (700, 3)),
            logits_soft_cap=choice(None, None, 5.0),
            has_sinks=choice(True, False),
            page_size=choice(None, None, 16, 32, 64, 128, 256),
            kv_dtype=kv_dtype,
            scales=kv_dtype and choice("head", "token"),
            starts_early=choice(True, False),
        )
        size = case.batch * case.capacity * case.num_kv_heads * case.head_dim  # of the oracle's work
        fits = size <= 400_000 and case.config.smem_bytes(case.shape) <= 227 * 1024
        if fits and hopper_attention.refuse(case.shape, device.by_name("H200")) is None:
            return case, mode


def check_random_inputs(seed, num_inputs, num_repetitions):
    """None is wrong, and the same input gives the same bits each time: an error that comes and goes is a race."""
    case, mode = random_case(seed)
    rng = np.random.default_rng(seed)

    def repeated(*arguments, **options):
        outs = [case.run(*arguments, **options) for _ in range(num_repetitions)]
        assert are_equal(outs)
        return outs[0], np.asarray(outs[0], np.float64)

    for i in range(num_inputs):
        lengths = rng.choice([0, 1, case.capacity, *rng.integers(case.capacity + 1, size=3)], case.batch)
        lengths[rng.integers(case.batch)] = rng.integers(1, case.capacity + 1)  # a scale of heads needs a key
        if seed % 3 == 0:
            ends = np.maximum(lengths, 1)
            starts = np.random.default_rng((seed, i)).integers(ends) * (np.arange(case.batch) % 4 > 0)
            case = dataclasses.replace(case, starts=tuple(starts.tolist()))
        inputs = case.inputs((seed, i), lengths, rng.choice([0.1, 1.0, 4.0, 30.0]))
        expected, log_sum = case.expected(inputs)
        phi = center(log_sum)  # [B, N]
        is_aside = rng.random(phi.shape) < rng.choice([0.0, 0.1, 1.0])
        phi += rng.uniform(-1, 1, phi.shape) + is_aside * rng.choice([-300, -70, 70, 300], phi.shape)
        if seed % 2:  # one for all rows
            phi = rng.choice(phi.reshape(-1))
        resolution = case.resolution(log_sum, None if mode == "online" else phi)
        if mode in ("online", "kernel"):
            phi = None if mode == "online" else phi
            out = repeated(inputs, phi, recompute=mode == "kernel")[1]
            log_sums = case.run(inputs, phi, recompute=mode == "kernel", return_residual=True)[1]
            if phi is None:  # phi lets weights of float16 be subnormal
                check_log_sum(case, inputs, log_sums, log_sum)
            check(case, out, expected, 2.0, resolution)
            continue
        flagged, out = repeated(inputs, phi)
        leaves_window, is_near = case.leaves_window(log_sum, phi)
        is_nan = np.isnan(out).any(axis=-1)
        assert ((is_nan == leaves_window) | is_near).all()
        check(case, out[~is_nan], expected[~is_nan], 2.0, resolution[~is_nan])
        if mode == "launch":
            redone = repeated(inputs, None, prior=flagged)[1]
            check(case, redone, expected, 2.0, resolution)
            group_is_nan = is_nan.reshape(case.batch, case.query_length, case.num_kv_heads, -1).any(axis=(1, 3))
            is_kept = np.repeat(~group_is_nan, case.group, axis=1)[:, None].repeat(case.query_length, axis=1)
            np.testing.assert_array_equal(redone[is_kept], out[is_kept])


@pytest.mark.skipif(ON_GPU, reason="1,000 of these run here")
@pytest.mark.parametrize("seed", [2])
def test_random_inputs_are_right(seed):
    check_random_inputs(seed, num_inputs=2, num_repetitions=2)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(25))
def test_a_thousand_random_inputs_are_right_and_the_same_each_time(seed):
    check_random_inputs(seed, num_inputs=40, num_repetitions=20)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [tiles(64, 64, 2), tiles(64, 8, 2, "cluster")], ids=["grid", "clusters"])
@pytest.mark.parametrize("mode", ["online", "kernel", "launch"])
def test_more_ctas_than_the_gpu_holds(mode, config):
    """CTAs wait for sums of others, which must have run or be running: thousands of CTAs, some 264 at a time."""
    case = Case(64, 2048, 64, 32, 64, config)
    rng = np.random.default_rng(0)
    lengths = rng.choice([0, 1, 63, 2047, 2048, *rng.integers(2049, size=8)], case.batch)
    query, key, value = oracle.attention_inputs(
        0,
        batch=case.batch,
        query_length=1,
        capacity=case.capacity,
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        dtype=case.dtype,
        lengths=lengths,
    )
    inputs = dict(query=query, key=key, value=value, lengths=jnp.asarray(lengths, jnp.int32))
    expected = jax.jit(reference.attention, static_argnums=1)(
        AttentionArrays(**inputs), AttentionOptions(**case.options)
    )
    phi = np.where(rng.random((case.batch, case.num_heads)) < 0.05, 150.0, 5.0)
    prior = None
    if mode == "launch":
        prior = case.run(inputs, phi)
        assert jnp.isnan(prior).any()
    run = functools.partial(
        case.run, inputs, phi if mode == "kernel" else None, recompute=mode == "kernel", prior=prior
    )
    first = run()
    check(case, first, np.asarray(expected, np.float64))
    for _ in range(49):
        assert are_equal([first, run()])


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [3, 64, 128])
def test_hundreds_of_ctas_share_one_sequence(num_splits):
    case = Case(1, 32768, 8, 1, 64, tiles(64, num_splits, 2))
    inputs = case.inputs(0, (32700,))
    expected, log_sum = case.expected(inputs)
    for phi in (center(log_sum), None):
        outs = [case.run(inputs, phi) for _ in range(20)]
        check(case, outs[0], expected)
        assert are_equal(outs)
