"""The decode kernel on Hopper: tiles and splits for every shape, and a reason for each refusal."""

import dataclasses

import hypothesis
import pytest
from hypothesis import strategies as st

from fdpp_jax.heuristics import plan_attention
from fdpp_jax.plans import device, hopper, hopper_attention
from fdpp_jax.plans.hopper_attention import MAX_CHUNK, DecodeAttentionConfig
from fdpp_jax.plans.shapes import AttentionShape

H200 = device.by_name("H200")


DECODE = AttentionShape(batch=1, query_length=1, capacity=4096, num_query_heads=32, num_kv_heads=32, head_dim=128)


def _decode(**changes):
    return dataclasses.replace(DECODE, **changes)


def _check_shares(shape, config, gpu):
    """The grid of a plan: no share without a tile, no SM idle that could have one, and all CTAs at once on the SMs."""
    chunk = min(shape.batch, MAX_CHUNK)
    num_heads = -(-shape.batch // chunk) * shape.num_kv_heads  # each with its own CTAs
    num_ctas, num_tiles = num_heads * config.num_splits, chunk * -(-shape.capacity // config.block_kv)
    assert config.combine in ("kernel", "cluster")  # "launch" is for the bench's ablation
    assert 1 <= config.num_splits <= min(num_tiles, 128)
    assert 2 <= config.num_stages <= 8
    assert config.smem_bytes(shape) <= gpu.smem_bytes
    per_sm = -(-num_ctas // gpu.num_sms)
    if config.combine == "cluster":
        assert shape.batch == 1
        assert 2 <= config.num_splits <= 8
        assert per_sm == 1
        if 2 * num_ctas > gpu.num_sms:  # two SMs are neighbours everywhere; four may find no place beside others
            assert config.num_splits == 2
            assert not shape.starts_early
        return num_ctas
    if config.num_splits > 1:  # a CTA waits for others, and should not for one that has no place yet
        assert config.smem_bytes(shape) <= gpu.smem_bytes_shared(per_sm)
    if not shape.starts_early or shape.batch == 1:
        assert config.unused_smem_bytes == 0
    elif per_sm <= 2:  # none takes the place of another
        assert config.smem_bytes(shape) > gpu.smem_bytes_shared(per_sm + 1)
    # With wide tiles, of narrow ones there are twice as many; more than 16 CTAs of a sequence may take longer.
    if config.num_splits < min(num_tiles // 2, 16 * chunk, 128):
        assert num_ctas > 3 / 8 * gpu.num_sms
    if shape.page_size is not None:
        assert config.block_kv % shape.page_size == 0 or shape.page_size % config.block_kv == 0
    return num_ctas


@pytest.mark.parametrize(
    ("batch", "num_kv_heads", "capacity"),
    [
        (1, 32, 4096),
        (1, 8, 131072),
        (1, 1, 16384),
        (1, 5, 8192),
        (2, 32, 4096),
        (8, 8, 4096),
        (32, 8, 4096),
        (33, 8, 4096),  # two chunks of sequences
        (256, 32, 1024),  # the heads of eight chunks fill the SMs
        (1, 8, 300),
        (1, 8, 65),
    ],
)
def test_the_ctas_of_a_head_share_the_keys_and_fill_the_sms(batch, num_kv_heads, capacity):
    shape = _decode(batch=batch, num_query_heads=num_kv_heads, num_kv_heads=num_kv_heads, capacity=capacity)
    plan = plan_attention(shape, "H200")
    assert (plan.implementation, plan.recompute) == ("mosaic_gpu", "kernel")
    num_ctas = _check_shares(shape, plan.config, H200)
    assert f"{num_ctas} on 132 SMs" in plan.reason
    chunk = min(batch, MAX_CHUNK)
    keys = f"the keys of {chunk} sequence" + ("s" if chunk > 1 else "")
    shares = f"{plan.config.num_splits} CTAs a head share" if plan.config.num_splits > 1 else "1 CTA a head takes"
    if plan.config.combine == "cluster":
        shares = f"a cluster of {plan.config.num_splits} CTAs a head shares"
    assert f"{shares} {keys}:" in plan.reason


@pytest.mark.parametrize(
    ("num_kv_heads", "capacity", "starts_early", "num_splits"),
    [
        (8, 131072, False, 8),  # half of the SMs are enough
        (8, 4096, True, 8),
        (16, 4096, True, 4),
        (4, 4096, False, 8),  # a quarter of them for short keys only
        (4, 16384, False, None),
        (32, 16384, False, 2),
        (32, 1024, True, None),
        (40, 4096, False, 2),  # all of them, where shares are short
        (40, 16384, False, None),
        (67, 1024, False, None),
    ],
)
def test_a_head_of_one_sequence_is_a_cluster_where_that_is_faster(num_kv_heads, capacity, starts_early, num_splits):
    heads = dict(num_query_heads=num_kv_heads, num_kv_heads=num_kv_heads)
    shape = _decode(**heads, capacity=capacity, starts_early=starts_early)
    config = plan_attention(shape, "H200").config
    assert (config.num_splits if config.combine == "cluster" else None) == num_splits
    for changes in (dict(batch=2), dict(kv_dtype="int8", scales="head")):
        assert plan_attention(dataclasses.replace(shape, **changes), "H200").config.combine == "kernel"


@pytest.mark.parametrize(("num_kv_heads", "capacity"), [(8, 4096), (32, 1024)])
def test_online_softmax_is_in_clusters_while_shares_are_short(num_kv_heads, capacity):
    shape = _decode(num_query_heads=32, num_kv_heads=num_kv_heads, capacity=capacity, is_online=True)
    assert plan_attention(shape, "H200").config.combine == "cluster"
    assert plan_attention(dataclasses.replace(shape, capacity=capacity + 1), "H200").config.combine == "kernel"


@pytest.mark.parametrize("capacity", [1, 64])
def test_one_tile_cannot_be_shared(capacity):
    shape = _decode(capacity=capacity)
    assert plan_attention(shape, "H200").config.num_splits == 1
    assert plan_attention(dataclasses.replace(shape, batch=4), "H200").config.num_splits <= 4


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("num_query_heads", "num_kv_heads"), [(32, 32), (32, 8), (64, 8), (32, 1), (64, 1)])
def test_decode_on_hopper_takes_the_kernel(head_dim, dtype, num_query_heads, num_kv_heads):
    shape = _decode(head_dim=head_dim, dtype=dtype, num_query_heads=num_query_heads, num_kv_heads=num_kv_heads)
    plan = plan_attention(shape, "H100")
    assert plan.implementation == "mosaic_gpu"
    assert isinstance(plan.config, DecodeAttentionConfig)
    assert "memory-bound" in plan.reason


FEATURES = {
    "draft": dict(query_length=5, is_causal=True, has_query_offset=True),
    "most queries": dict(query_length=16, num_query_heads=128),
    "window": dict(local_window_size=(128, 0)),
    "soft cap": dict(logits_soft_cap=50.0),
    "sinks": dict(has_sinks=True),
    "pages": dict(page_size=16),
    "large pages": dict(page_size=256),
    "int8": dict(kv_dtype="int8", scales="head"),
    "float8 by token": dict(kv_dtype="float8_e4m3fn", scales="token"),
    "odd capacity": dict(capacity=4099),
}


FEATURES["all"] = dict(query_length=3, **FEATURES["window"], **FEATURES["sinks"], **FEATURES["pages"]) | dict(
    is_causal=True, has_query_offset=True, kv_dtype="int8", scales="token", logits_soft_cap=30.0
)


@pytest.mark.parametrize("name", device.names())
@pytest.mark.parametrize("features", FEATURES)
def test_every_feature_has_a_legal_plan_everywhere(features, name):
    shape = _decode(**FEATURES[features])
    plan = plan_attention(shape, name)
    assert plan.reason
    assert "\n" not in plan.reason
    if device.by_name(name).arch == "sm_90":
        assert plan.implementation == "mosaic_gpu"
        _check_shares(shape, plan.config, device.by_name(name))
        assert plan.recompute == "kernel"
    elif name == "cpu":
        assert (plan.algorithm, plan.config) == ("reference", None)
        assert plan.recompute == "cond"
    else:
        converts = shape.kv_dtype != "float8_e4m3fn" or device.by_name(name).arch not in ("sm_80", "sm_86")
        assert plan.implementation == ("triton" if converts else "xla")


def test_smaller_caches_get_deeper_rings_and_every_tile_counts():
    config = DecodeAttentionConfig(64, 1, 2)
    tile = 64 * 128
    plain = config.smem_bytes(DECODE)
    assert plain > 2 * 2 * tile * 2 + 8 * (128 + 64) * 2  # ring, query and weights
    assert config.smem_bytes(_decode(head_dim=80)) == config.smem_bytes(_decode(head_dim=96)) == plain
    by_head = config.smem_bytes(_decode(kv_dtype="int8", scales="head"))
    assert by_head == plain - 2 * 2 * tile + tile * 2
    assert config.smem_bytes(_decode(kv_dtype="int8", scales="token")) == by_head + 2 * 2 * 64 * 4 * 4
    large = _decode(head_dim=256, capacity=64)  # whose one CTA a head has its SM to itself
    stages = [
        hopper_attention.decode_attention_config(dataclasses.replace(large, **changes), H200).num_stages
        for changes in ({}, dict(kv_dtype="int8", scales="head"))
    ]
    assert 2 <= stages[0] < stages[1]


@pytest.mark.parametrize(
    ("changes", "rows"),
    [({"num_query_heads": 128, "num_kv_heads": 1}, 128), ({"num_query_heads": 256, "query_length": 9}, 72)],
    ids=str,
)
def test_more_rows_than_the_decode_kernel_holds_are_the_prefill_kernel_s(changes, rows):
    shape = _decode(**changes)
    assert hopper_attention.refuse(shape, H200) == f"the decode kernel holds 64 query rows a key/value head, got {rows}"
    assert plan_attention(dataclasses.replace(shape, is_online=False), H200).algorithm == "prefill"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"query_length": 0}, "takes 1 to 16 queries, got T = 0"),
        ({"dtype": "float32"}, "takes bfloat16 or float16, got float32"),
        ({"kv_dtype": "float16"}, "takes a cache of bfloat16, int8 or float8_e4m3fn, got float16"),
        ({"head_dim": 72}, r"takes head dims \(64, 80, 96, 128, 256\), got H = 72"),
        ({"page_size": 8}, r"takes page sizes \(16, 32, 64, 128, 256\), got 8"),
        (
            {"num_kv_heads": 2, "kv_dtype": "int8", "scales": "token"},
            "scales per token need 4, 8, ... heads, got K = 2",
        ),
        ({"dtype": "float16", "kv_dtype": "int8", "scales": "token"}, "may leave float16's range"),
        ({"head_dim": 96, "kv_dtype": "int8", "scales": "head"}, "8-bit tiles are widened 64 columns at a time"),
        ({"logits_soft_cap": 1e6}, "tanh is good for caps up to 1000, got 1e"),
        ({"capacity": 0}, "needs a sequence, a query head and a key, got B = 1, N = 32, S = 0"),
        ({"batch": 0}, "needs a sequence, a query head and a key, got B = 0, N = 32, S = 4096"),
        ({"num_query_heads": 0}, "needs a sequence, a query head and a key, got B = 1, N = 0, S = 4096"),
    ],
)
def test_refused_decode_falls_back_with_its_reason(changes, reason):
    shape = _decode(**changes)
    refusal = hopper_attention.refuse(shape, H200)
    plan = plan_attention(shape, dataclasses.replace(H200, why_no_triton="no triton here"))
    assert plan.implementation == "xla"
    assert (plan.algorithm, plan.config) == ("reference", None)
    assert f"{refusal}; no triton here" in plan.reason
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(refusal)


def test_what_does_not_fit_an_sm_is_refused():
    shape = _decode(num_query_heads=64, num_kv_heads=1, head_dim=256)
    assert hopper_attention.refuse(shape, H200) is None
    small = dataclasses.replace(H200, smem_bytes=100 * 1024, why_no_triton="no triton here")
    plan = plan_attention(shape, small)
    assert plan.implementation == "xla"
    assert "64 query rows of head dim 256 need" in plan.reason
    assert "bytes of shared memory, a CTA gets 102400" in plan.reason


_HOPPER = st.sampled_from(["H100", "H200"])


_QUANTISED = [(None, None), *((dtype, scales) for dtype in ("int8", "float8_e4m3fn") for scales in ("head", "token"))]


_ATTENTION = st.builds(
    lambda quantised, **sizes: AttentionShape(**sizes, kv_dtype=quantised[0], scales=quantised[1]),
    batch=st.integers(1, 256),
    query_length=st.integers(1, 16),
    capacity=st.integers(1, 200_000),
    num_query_heads=st.just(64),
    num_kv_heads=st.sampled_from([1, 2, 8, 32, 64]),
    head_dim=st.sampled_from(hopper.HEAD_DIMS),
    dtype=st.sampled_from(["bfloat16", "float16"]),
    page_size=st.sampled_from([None, 16, 64, 256]),
    starts_early=st.booleans(),
    is_online=st.booleans(),
    quantised=st.sampled_from(_QUANTISED),
)


@hypothesis.given(_ATTENTION, _HOPPER)
def test_any_attention_config_fits_the_sm(shape, name):
    gpu = device.by_name(name)
    plan = plan_attention(shape, gpu)
    is_ours = (plan.backend, plan.algorithm) == ("mosaic_gpu", "decode")
    assert is_ours == (hopper_attention.refuse(shape, gpu) is None)
    hypothesis.assume(is_ours)
    _check_shares(shape, plan.config, gpu)
    assert plan.recompute == "kernel"
