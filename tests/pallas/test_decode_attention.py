"""The decode kernel against float64: interpreted on the CPU, with race detection, and as it is on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_case import Case, check, check_log_sum

from fdpp_jax.pallas.decode_attention import decode_attention
from fdpp_jax.pallas.decode_attention.kernel import attend
from fdpp_jax.pallas.decode_attention.refs import GlobalRefs
from fdpp_jax.pallas.decode_attention.shares import AttentionFacts, Share
from fdpp_jax.plans.calls import AttentionOptions
from fdpp_jax.plans.hopper_attention import DecodeAttentionConfig

# The interpreter multiplies in numpy, which warns of the infinities that these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

tiles = DecodeAttentionConfig  # block_kv, splits, stages
INT8, FLOAT8 = dict(kv_dtype="int8"), dict(kv_dtype="float8_e4m3fn")
HEAD, TOKEN = dict(scales="head"), dict(scales="token")
DRAFT = dict(is_causal=True)
HALF = dict(dtype="float16")

CASES = {  # batch, capacity, heads, kv heads, head dim; lengths
    "gqa": (Case(2, 136, 8, 2, 128, tiles(64, 1, 2), **HALF), (129, 1)),
    "nine rows, odd capacity": (Case(2, 67, 9, 1, 64, tiles(64, 2, 2)), (67, 66)),
    "64 rows, wide tiles": (Case(1, 300, 64, 1, 128, tiles(128, 2, 2)), (290,)),
    "splits without keys": (Case(1, 512, 2, 2, 64, tiles(64, 8, 2)), (63,)),
    "splits without keys between others": (Case(1, 512, 2, 1, 64, tiles(64, 8, 2)), (129,)),
    "ragged": (Case(5, 320, 4, 2, 64, tiles(64, 3, 2, "kernel", 4096), starts_early=True), (310, 0, 64, 129, 320)),
    "two chunks": (Case(34, 128, 2, 1, 64, tiles(64, 2, 2)), tuple(x * 17 % 80 for x in range(34))),
    "length 0": (Case(3, 72, 2, 2, 64, tiles(64, 2, 2), has_sinks=True, **HALF), (0, 5, 72)),
    "draft of 4": (Case(2, 200, 4, 2, 80, tiles(64, 2, 2), 4, **DRAFT), (190, 3)),
    "draft of 16": (Case(2, 139, 4, 1, 64, tiles(64, 3, 2), 16, has_sinks=True, **DRAFT, **HALF), (137, 9)),
    "window": (Case(2, 300, 4, 2, 96, tiles(64, 2, 2), local_window_size=(100, 0), starts_early=True), (290, 40)),
    "cluster": (Case(2, 330, 4, 2, 128, tiles(64, 5, 2, "cluster"), starts_early=True), (330, 70)),
    "window of a draft": (
        Case(3, 200, 4, 2, 64, tiles(64, 3, 2), 3, local_window_size=(70, 1), logits_soft_cap=5.0, **HALF),
        (190, 40, 1),
    ),
    "cap and sinks": (Case(1, 136, 2, 1, 256, tiles(64, 2, 2), logits_soft_cap=2.0, has_sinks=True), (130,)),
    "pages of 32": (Case(2, 250, 4, 2, 80, tiles(128, 2, 2), 2, page_size=32, **DRAFT, **HALF), (250, 33)),
    "pages of 64": (
        Case(3, 250, 4, 2, 64, tiles(64, 3, 2), page_size=64, local_window_size=(90, 0), has_sinks=True),
        (250, 0, 129),
    ),
    "int8 of tokens": (
        Case(2, 139, 4, 4, 64, tiles(64, 3, 2), 2, logits_soft_cap=3.0, **INT8, **TOKEN, **DRAFT),
        (130, 1),
    ),
    "float8": (Case(1, 139, 6, 3, 64, tiles(64, 1, 2), 2, has_sinks=True, **FLOAT8, **HEAD), (130,)),
    "float8 pages of 32 of tokens": (
        Case(2, 250, 8, 4, 128, tiles(64, 2, 2), page_size=32, local_window_size=(80, 0), **FLOAT8, **TOKEN),
        (250, 33),
    ),
    "starts": (
        Case(4, 320, 4, 2, 64, tiles(64, 3, 2), starts=(250, 0, 64, 200), starts_early=True),
        (310, 129, 200, 200),
    ),
    "starts, pages of a draft": (
        Case(3, 250, 4, 4, 64, tiles(64, 2, 2), 2, page_size=16, **INT8, **TOKEN, **DRAFT, starts=(70, 129, 33)),
        (250, 130, 33),
    ),
    "second launch of a draft": (
        Case(2, 139, 4, 2, 64, tiles(64, 3, 2, "launch"), 3, page_size=64, has_sinks=True, **DRAFT),
        (130, 2),
    ),
}
ONLINE = ["ragged", "starts", "draft of 16", "int8 of tokens", "second launch of a draft", "cluster", "float8"]
WITH_LOG_SUM = [
    ("draft of 16", None),
    ("starts", 1.5),
    ("cluster", None),
    ("length 0", 1.5),
    ("window of a draft", 1.5),
    ("second launch of a draft", 1.5),
    ("second launch of a draft", None),
    ("int8 of tokens", 1.5),
    ("float8", None),
]
# A case takes some two seconds interpreted. On a GPU these follow, and all with online softmax too.
CASES_ON_GPU = {
    "mha": (Case(2, 200, 4, 4, 64, tiles(64, 2, 2)), (200, 131)),
    "more tiles than stages": (Case(1, 1000, 2, 1, 64, tiles(64, 1, 3), starts_early=True, **HALF), (999,)),
    "cluster of a draft": (
        Case(3, 700, 8, 2, 80, tiles(64, 8, 3, "cluster"), 4, page_size=32, has_sinks=True, **DRAFT, **HALF),
        (690, 0, 65),
    ),
    "prefix": (Case(1, 72, 6, 2, 64, tiles(64, 1, 2), 5), (71,)),  # queries that see all keys
    "pages of 16": (Case(2, 250, 4, 2, 64, tiles(64, 2, 4), page_size=16), (250, 33)),
    "pages of 128": (Case(2, 250, 4, 2, 64, tiles(64, 2, 2), page_size=128, **INT8, **HEAD), (250, 33)),
    "pages of 256": (Case(2, 600, 2, 1, 128, tiles(128, 3, 2), page_size=256), (600, 1)),
    "int8": (Case(2, 200, 8, 4, 128, tiles(64, 2, 2), **INT8, **HEAD), (190, 40)),
    "float8 of many heads' tokens": (Case(1, 72, 24, 12, 64, tiles(128, 1, 2), **FLOAT8, **TOKEN), (70,)),
    "starts, cluster": (
        Case(2, 330, 4, 2, 128, tiles(64, 5, 2, "cluster"), starts=(129, 60), has_sinks=True),
        (330, 70),
    ),
    "starts, window of a draft": (
        Case(3, 330, 4, 2, 64, tiles(128, 3, 2), 3, local_window_size=(150, 1), **HALF, starts=(250, 10, 0)),
        (320, 330, 3),
    ),
    "starts, second launch": (
        Case(3, 139, 4, 2, 64, tiles(64, 3, 2, "launch"), 2, starts=(64, 130, 0), **DRAFT, has_sinks=True),
        (139, 130, 7),
    ),
    "second launch": (Case(2, 136, 8, 2, 128, tiles(64, 2, 2, "launch"), **HALF), (129, 0)),
}
ALL_CASES = CASES | CASES_ON_GPU
SLOW = [
    "ragged",
    "starts",
    "starts, pages of a draft",
    "two chunks",
    "length 0",
    "window of a draft",
    "cluster",
    "second launch of a draft",
    "draft of 16",
    "pages of 32",
    "int8 of tokens",
    "float8 pages of 32 of tokens",
]
CASES_AND_PHI = [
    *(pytest.param(name, 1.5, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES),
    *(pytest.param(name, None, marks=pytest.mark.slow) for name in ONLINE),
    *(pytest.param(name, 1.5, marks=pytest.mark.gpu) for name in CASES_ON_GPU),
    *(pytest.param(name, None, marks=pytest.mark.gpu) for name in ALL_CASES if name not in ONLINE),
]


@pytest.mark.parametrize(("case", "phi"), CASES_AND_PHI)
def test_agrees_with_float64(case, phi):
    """With a log-sum-exp beside it the result is the same bit for bit."""
    has_log_sum = (case, phi) in WITH_LOG_SUM
    case, lengths = ALL_CASES[case]
    inputs = case.inputs(len(lengths), lengths)
    expected, log_sum = case.expected(inputs)
    out = case.run(inputs, phi)
    check(case, out, expected)
    assert not np.asarray(out, np.float64)[~expected.any(axis=-1)].any()  # rows without keys are zeros, not almost
    if has_log_sum:
        again, found = case.run(inputs, phi, return_residual=True)
        np.testing.assert_array_equal(again, out)
        check_log_sum(case, inputs, found, log_sum)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_rows", "head_dim", "combine"),
    [
        (9, 64, "kernel"),
        (64, 256, "launch"),  # so many registers that shares are added one at a time
        *(pytest.param(*x, marks=pytest.mark.gpu) for x in ((9, 64, "launch"), (64, 256, "kernel"))),
        *(
            pytest.param(x, 128, combine, marks=pytest.mark.gpu)
            for x in (1, 2, 3, 7, 8, 9, 12, 16, 64)
            for combine in ("kernel", "cluster", "launch")
            if (x, combine) != (64, "cluster")  # whose sums are too many for its shared memory
        ),
    ],
)
def test_any_number_of_rows_is_added_up(num_rows, head_dim, combine):
    """CTAs hand over the rows there are; memory that none has written is NaN to the interpreter."""
    case = Case(2, 330, num_rows, 1, head_dim, tiles(64, 5, 2, combine))
    inputs = case.inputs(num_rows, (330, 129))
    expected, _ = case.expected(inputs)
    for phi in (1.5, None):
        check(case, case.run(inputs, phi), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.gpu)])
def test_is_as_accurate_as_online_softmax(dtype):
    """At most 1.1 times the error.

    Weights of 16 bits alone make it 1.01 to 1.1, by the spread of the scores: online softmax rounds the largest weight
    not at all, and those next to it less than most.
    """
    case = Case(4, 136, 16, 1, 64, tiles(64, 2, 2), dtype=dtype)
    unified, online = [], []
    for seed, query_scale in enumerate((0.3, 1.0, 3.0, 10.0)):
        inputs = case.inputs(seed, (136, 64, 33, 8), query_scale)
        expected, log_sum = case.expected(inputs)
        # Around the denominators' logarithms, and different for each row, for luck with the rounding of one phi.
        phi = log_sum[:, 0] + np.random.default_rng(seed).uniform(-2, 2, log_sum[:, 0].shape)
        for errors, out in ((unified, case.run(inputs, phi)), (online, case.run(inputs, None))):
            errors.append(np.asarray(out, np.float64) - expected)
    assert np.linalg.norm(unified) < 1.1 * np.linalg.norm(online)


RECOMPUTED = {
    "bfloat16": Case(6, 136, 4, 2, 64, tiles(64, 2, 4)),  # the ring holds tiles of several sequences
    "draft": Case(3, 139, 6, 2, 128, tiles(64, 4, 2), 3, page_size=16, has_sinks=True, **DRAFT, **HALF),
    "int8": Case(2, 139, 8, 4, 64, tiles(64, 2, 2), local_window_size=(70, 0), **INT8, **TOKEN),
    "cluster": Case(6, 139, 4, 2, 64, tiles(64, 3, 2, "cluster")),
}


def recomputed(*names_on_gpu, slow=()):
    """Parametrised with all, these on a GPU only; to the interpreter a cluster is a grid like another."""
    marks = dict.fromkeys(slow, pytest.mark.slow) | dict.fromkeys(names_on_gpu, pytest.mark.gpu)
    return pytest.mark.parametrize("case", [pytest.param(name, marks=marks.get(name, ())) for name in RECOMPUTED])


def _failing(case):
    """Inputs, and phi [B, N] by which some rows are safe, some overflow and some underflow, all far from the edges."""
    lengths = np.random.default_rng(0).integers(1, case.capacity, case.batch)
    lengths[0] = 0 if case.batch > 2 else lengths[0]
    inputs = case.inputs(0, lengths)
    expected, log_sum = case.expected(inputs)
    phi = np.where(np.isfinite(log_sum), log_sum, 0.0).mean(axis=1)
    aside = np.array([100.0, -100.0, 0.0])[np.arange(phi.size) % 3].reshape(phi.shape)
    aside[-1, : case.group] = 0  # a group without failures
    leaves_window, is_near = case.leaves_window(log_sum, phi + aside)
    assert not is_near.any()
    np.testing.assert_array_equal(leaves_window, np.isfinite(log_sum) & (aside != 0)[:, None])
    return inputs, expected, phi + aside, leaves_window


def _failed_groups(case, leaves_window):
    """[B, K] bool: whether a row [B, T, N] of the sequence and head leaves the window."""
    by_group = leaves_window.reshape(case.batch, case.query_length, case.num_kv_heads, case.group)
    return by_group.any(axis=(1, 3))


@recomputed("bfloat16", "int8", "cluster", slow=RECOMPUTED)
def test_flags_the_rows_outside_the_window_and_no_other(case):
    case = RECOMPUTED[case]
    inputs, expected, phi, leaves_window = _failing(case)
    for config in (case.config, dataclasses.replace(case.config, combine="launch")):
        out = np.asarray(dataclasses.replace(case, config=config).run(inputs, phi), np.float64)
        np.testing.assert_array_equal(np.isnan(out), np.broadcast_to(leaves_window[..., None], out.shape))
        check(case, out[~leaves_window], expected[~leaves_window])


@recomputed("bfloat16", "cluster", slow=["draft"])
def test_recomputes_in_the_kernel(case):
    case = RECOMPUTED[case]
    inputs, expected, phi, leaves_window = _failing(case)
    earlier = jnp.full((case.batch, case.num_kv_heads), 7, jnp.int32).at[1].set(0)
    out, redone = case.run(inputs, phi, recompute=True, redone=earlier)
    check(case, out, expected)
    np.testing.assert_array_equal(redone, np.where(_failed_groups(case, leaves_window), 1, earlier))
    safe = case.expected(inputs)[1].mean(axis=1)
    _, redone = case.run(inputs, np.where(np.isfinite(safe), safe, 0.0), recompute=True, redone=earlier)
    np.testing.assert_array_equal(redone, earlier)


@recomputed("draft", "cluster", slow=["int8"])
def test_recomputes_in_a_second_launch_only_the_groups_that_failed(case):
    case = RECOMPUTED[case]
    inputs, expected, _, leaves_window = _failing(case)
    # As a first launch leaves them, but recognisable: 3 is not the answer anywhere.
    prior = jnp.where(leaves_window[..., None], jnp.nan, jnp.full(expected.shape, 3.0)).astype(case.dtype)
    groups = _failed_groups(case, leaves_window)
    out, redone = case.run(inputs, None, prior=prior, redone=jnp.zeros(groups.shape, jnp.int32))
    np.testing.assert_array_equal(redone, groups)
    out = np.asarray(out, np.float64)
    failed = np.repeat(groups, case.group, axis=1)[:, None].repeat(case.query_length, axis=1)
    assert failed.any()
    assert not failed.all()
    np.testing.assert_array_equal(out[~failed], 3.0)
    check(case, out[failed], expected[failed])


@pytest.mark.parametrize("mode", ["online", "kernel", "flag"])
def test_a_log_sum_that_nobody_asks_for_costs_nothing(mode):
    case = Case(2, 136, 4, 2, 64, tiles(64, 2, 2), has_sinks=True, **DRAFT)
    inputs = case.inputs(0, (1, 1)) | {"phi": None if mode == "online" else jnp.zeros((2, 4))}
    call = functools.partial(decode_attention, **case.options, config=case.config, recompute=mode == "kernel")
    asked, not_asked = (
        str(jax.make_jaxpr(functools.partial(call, return_residual=x))(**inputs)) for x in (True, False)
    )
    assert "= log " in asked
    assert "= log " not in not_asked


@recomputed("draft", "int8", "cluster", slow=RECOMPUTED)
def test_log_sum_of_rows_outside_the_window(case):
    """NaN where the row is; redone with it, here or in a second launch, where those of other groups are undefined."""
    case = RECOMPUTED[case]
    inputs, _, phi, leaves_window = _failing(case)
    expected = case.expected(inputs)[1]
    expected = np.where(np.isneginf(expected), inputs.get("sinks", -np.inf), expected)
    _, log_sum = case.run(inputs, phi, recompute=True, return_residual=True)
    check_log_sum(case, inputs, log_sum, expected)
    for config in (case.config, dataclasses.replace(case.config, combine="launch")):
        flagged = dataclasses.replace(case, config=config).run(inputs, phi, return_residual=True)
        np.testing.assert_array_equal(np.isnan(flagged[1]), leaves_window)
        check_log_sum(case, inputs, np.where(leaves_window, expected, flagged[1]), expected)
    groups = _failed_groups(case, leaves_window)
    marks = jnp.zeros(groups.shape, jnp.int32)
    (_, again), marks = case.run(inputs, None, prior=flagged[0], redone=marks, return_residual=True)
    np.testing.assert_array_equal(marks, groups)
    is_redone = np.repeat(groups, case.group, axis=1)[:, None].repeat(case.query_length, axis=1)
    check_log_sum(case, inputs, np.where(is_redone, again, expected), expected)


@pytest.mark.slow
def test_one_infinite_sum_flags_its_row_and_is_redone():
    """The denominator is safe, and one value times e^(s - phi) is not: whoever redoes rows looks at a part of them."""
    case = Case(2, 136, 4, 2, 64, tiles(64, 2, 2))
    inputs = case.inputs(0, (136, 70))
    inputs["value"] = inputs["value"].at[1, 3, 1, 17].set(3e38)
    expected, log_sum = case.expected(inputs)
    phi = log_sum[:, 0] - 20
    failed = np.array([[False] * 4, [False, False, True, True]])
    for config in (case.config, dataclasses.replace(case.config, combine="launch")):
        flagged = dataclasses.replace(case, config=config).run(inputs, phi)
        np.testing.assert_array_equal(np.isnan(flagged[:, 0]), np.repeat(failed[..., None], 64, axis=-1))
    check(case, case.run(inputs, None, prior=flagged), expected)
    check(case, case.run(inputs, phi, recompute=True), expected)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e31, -1e37, *(pytest.param(x, marks=pytest.mark.gpu) for x in (1e9, -1e31, 1e37))])
def test_rows_of_the_largest_scores_are_exact(size):
    """float32's steps are far above 1 there: the largest score wins, and its difference to itself is 0."""
    case = Case(2, 136, 4, 2, 64, tiles(64, 2, 2))
    inputs = case.inputs(0, (136, 70))
    inputs["query"] = jnp.full_like(inputs["query"], 1e18)
    # Scores of size to 2 size: multiples of it that bfloat16 holds.
    factors = 1 + jnp.arange(case.capacity) % 97 / 128
    key = jnp.broadcast_to(factors[None, :, None, None] * (size / 1e18 / 8), inputs["key"].shape)
    inputs["key"] = jnp.where(jnp.isfinite(inputs["key"]), key, inputs["key"]).astype(case.dtype)
    expected, _ = case.expected(inputs)
    check(case, case.run(inputs, 1.5, recompute=True), expected)
    check(case, case.run(inputs, None), expected)


@pytest.mark.slow
def test_lengths_beyond_the_capacity_see_all_keys():
    """Under jit nobody checks them; a last tile that is not full has no keys of zeros."""
    case = Case(2, 67, 4, 2, 64, tiles(64, 2, 2))
    inputs = case.inputs(0, (67, 67))
    expected, _ = case.expected(inputs)
    check(case, case.run(inputs | {"lengths": jnp.array([68, 10**9])}, 1.5), expected)


@pytest.mark.slow
def test_starts_beyond_the_keys_see_none_and_negative_ones_all():
    """Under jit nobody checks them."""
    case = Case(3, 136, 2, 1, 64, tiles(64, 2, 2), starts=(0, 136, 136))
    inputs = case.inputs(0, (130, 5, 136))
    expected, _ = case.expected(inputs)
    check(case, case.run(inputs | {"starts": jnp.array([-(2**31), 2**31 - 1, 136])}, 1.5), expected)
    assert not expected[1:].any()


def test_tiles_before_the_start_are_nobodys():
    case = Case(4, 640, 4, 2, 64, tiles(64, 3, 2))
    facts = AttentionFacts(
        case.config,
        AttentionOptions(1.0),
        4,
        1,
        2,
        2,
        64,
        640,
        4,
        recompute=False,
        starts_early=False,
        is_interpreted=True,
    )
    lengths, starts = jnp.array([640, 640, 100, 129]), jnp.array([0, 575, 64, 300])
    zero = jnp.int32(0)
    shares = [
        Share(GlobalRefs(None, None, None, lengths, starts=starts), facts, zero, zero, jnp.int32(i)) for i in range(3)
    ]
    tiles_of = [int(shares[0].live(jnp.int32(i)).count) for i in range(4)]
    assert tiles_of == [10, 2, 1, 1]  # a sequence without live keys has one, whose owner writes zeros
    assert sorted((int(share.begin), int(share.end)) for share in shares) == [(0, 4), (4, 9), (9, 14)]


@pytest.mark.slow
def test_queries_far_beyond_the_keys_see_none_or_the_last():
    """query_offset is the caller's, and may be anywhere."""
    case = Case(3, 136, 2, 1, 64, tiles(64, 2, 2), 2, local_window_size=(200, 0), **DRAFT)
    inputs = case.inputs(0, (130, 5, 136), query_offset=(300, 10**6, -7))
    expected, _ = case.expected(inputs)
    check(case, case.run(inputs, -0.5), expected)
    assert not expected[1:].any()


def test_traced_phi_compiles_once():
    case, lengths = CASES["splits without keys"]
    inputs = case.inputs(0, lengths)
    for phi in (1.5, 2.0):  # JAX counts the first call of a process apart
        case.run(inputs, phi)
    before = attend._cache_size()
    for phi in (-1.0, 3.0):
        check(case, case.run(inputs, phi), case.expected(inputs)[0])
    assert attend._cache_size() == before


@pytest.mark.parametrize(
    ("case", "mode"),
    [
        (Case(7, 4100, 16, 2, 128, tiles(64, 16, 3), starts_early=True, **HALF), "kernel"),
        (Case(1, 4100, 32, 8, 128, tiles(64, 8, 4, "cluster"), starts_early=True), "kernel"),
        (Case(2, 4096, 128, 2, 128, tiles(128, 4, 2), has_sinks=True), "flag"),
        (Case(2, 4096, 4, 2, 256, tiles(64, 4, 2), logits_soft_cap=30.0), "online"),
        (Case(2, 4096, 16, 4, 80, tiles(64, 4, 2), 4, page_size=16, **DRAFT), "launch"),
        (Case(2, 4096, 16, 4, 128, tiles(64, 4, 2), page_size=256, **INT8, **TOKEN), "kernel"),
        (Case(2, 4096, 16, 4, 128, tiles(128, 4, 2), local_window_size=(512, 0), **FLOAT8, **HEAD), "kernel"),
        (Case(2, 4096, 16, 4, 128, tiles(64, 4, 2), 2, **DRAFT, starts=(0, 0)), "kernel"),
        (Case(1, 4096, 16, 4, 64, tiles(64, 4, 2, "cluster"), starts=(0,), has_sinks=True), "online"),
    ],
    ids=["ragged", "cluster", "64 rows", "head dim 256", "draft", "int8", "float8", "starts", "starts in a cluster"],
)
def test_lowers_for_cuda(case, mode):
    arrays = case.inputs(0, (1,) * case.batch)
    phi = None if mode in ("online", "launch") else np.zeros((case.batch, case.num_heads), np.float32)
    call = functools.partial(
        decode_attention,
        **case.options,
        config=case.config,
        recompute=mode == "kernel",
        starts_early=case.starts_early,
        return_residual=mode != "launch",
    )
    traced = jax.jit(call).trace(**arrays, phi=phi, prior=arrays["query"] if mode == "launch" else None)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
