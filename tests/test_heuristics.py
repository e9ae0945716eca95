"""The decision tree, for explicit devices: which kernel, how many splits, and a reason for each refusal."""

import dataclasses
import re

import hypothesis
import pytest
from hypothesis import strategies as st

from fdpp_jax import device, heuristics, limits, tuned_tables
from fdpp_jax.config import (
    MAX_CHUNK,
    AttentionShape,
    DecodeAttentionConfig,
    FlatMatmulConfig,
    GemvConfig,
    MatmulShape,
    XlaAttentionConfig,
)
from fdpp_jax.heuristics import plan_attention, plan_matmul

H200 = device.by_name("H200")
DECODE = AttentionShape(batch=1, query_length=1, capacity=4096, num_query_heads=32, num_kv_heads=32, head_dim=128)
PREFILL = AttentionShape(
    batch=1,
    query_length=512,
    capacity=512,
    num_query_heads=32,
    num_kv_heads=32,
    head_dim=128,
    is_causal=True,
    has_lengths=False,
)


@pytest.fixture(autouse=True, scope="module")
def _rules_only(tmp_path_factory):
    """The rules, whatever tables are shipped; tests/test_tuned_tables.py is about these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuned_tables, "SHIPPED_DIRECTORY", tmp_path_factory.mktemp("no_tables"))
        yield


def _decode(**changes):
    return dataclasses.replace(DECODE, **changes)


def _prefill(**changes):
    return dataclasses.replace(PREFILL, **changes)


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
            assert not shape.is_appended
        return num_ctas
    if config.num_splits > 1:  # a CTA waits for others, and should not for one that has no place yet
        assert config.smem_bytes(shape) <= gpu.smem_bytes_shared(per_sm)
    if not shape.is_appended or shape.batch == 1:
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
    ("num_kv_heads", "capacity", "is_appended", "num_splits"),
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
def test_a_head_of_one_sequence_is_a_cluster_where_that_is_faster(num_kv_heads, capacity, is_appended, num_splits):
    shape = _decode(num_query_heads=num_kv_heads, num_kv_heads=num_kv_heads, capacity=capacity, is_appended=is_appended)
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
    else:
        assert plan.config == XlaAttentionConfig("reference")
        assert plan.recompute == "cond"
        assert name == "cpu" or "the rule here would be: decode kernel" in plan.reason


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
        heuristics.decode_attention_config(dataclasses.replace(large, **changes), H200).num_stages
        for changes in ({}, dict(kv_dtype="int8", scales="head"))
    ]
    assert 2 <= stages[0] < stages[1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"query_length": 17}, "takes 1 to 16 queries, got T = 17"),
        ({"query_length": 0}, "takes 1 to 16 queries, got T = 0"),
        ({"dtype": "float32"}, "takes bfloat16 or float16, got float32"),
        ({"kv_dtype": "float16"}, "takes a cache of bfloat16, int8 or float8_e4m3fn, got float16"),
        ({"head_dim": 72}, r"takes head dims \(64, 80, 96, 128, 256\), got H = 72"),
        ({"num_query_heads": 128, "num_kv_heads": 1}, "holds 64 query rows a key/value head, got 128"),
        ({"num_query_heads": 256, "query_length": 9}, "holds 64 query rows a key/value head, got 72"),
        ({"page_size": 8}, r"takes page sizes \(16, 32, 64, 128, 256\), got 8"),
        (
            {"num_kv_heads": 2, "kv_dtype": "int8", "scales": "token"},
            "scales per token need 4, 8, ... heads, got K = 2",
        ),
        ({"dtype": "float16", "kv_dtype": "int8", "scales": "token"}, "may leave float16's range"),
        ({"head_dim": 96, "kv_dtype": "int8", "scales": "head"}, "8-bit tiles are widened 64 columns at a time"),
        ({"logits_soft_cap": 1e6}, "tanh is good for caps up to 1000, got 1e"),
        ({"capacity": 0}, "needs a sequence and a key, got B = 1, S = 0"),
        ({"batch": 0}, "needs a sequence and a key, got B = 0, S = 4096"),
    ],
)
def test_refused_decode_falls_back_with_its_reason(changes, reason):
    shape = _decode(**changes)
    refusal = limits.refuse_mosaic_attention(shape, H200)
    plan = plan_attention(shape, H200)
    assert plan.implementation == "xla"
    assert plan.config == XlaAttentionConfig("reference")
    assert refusal in plan.reason
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(refusal)


def test_what_does_not_fit_an_sm_is_refused():
    shape = _decode(num_query_heads=64, num_kv_heads=1, head_dim=256)
    assert limits.refuse_mosaic_attention(shape, H200) is None
    small = dataclasses.replace(H200, smem_bytes=100 * 1024)
    plan = plan_attention(shape, small)
    assert plan.implementation == "xla"
    assert "64 query rows of head dim 256 need" in plan.reason
    assert "bytes of shared memory, a CTA gets 102400" in plan.reason


@pytest.mark.parametrize(
    ("shape", "device_name", "backend"),
    [
        (PREFILL, "H200", "cudnn"),
        (PREFILL, "A100", "cudnn"),
        (PREFILL, "B200", "cudnn"),
        (PREFILL, "MI300X", "reference"),
        (PREFILL, "cpu", "reference"),
        (_prefill(head_dim=256), "H200", "cudnn"),
        (_prefill(head_dim=256), "A100", "reference"),
        (_prefill(head_dim=100), "H200", "reference"),
        (_prefill(dtype="float16"), "H200", "cudnn"),
        (_prefill(dtype="float32"), "H200", "reference"),
        (_prefill(has_lengths=True), "H200", "reference"),
        (_prefill(logits_soft_cap=30.0), "H200", "reference"),
        (_prefill(local_window_size=(64, 0)), "H200", "reference"),
        (_prefill(page_size=16), "H200", "reference"),
        (_prefill(kv_dtype="int8", scales="head"), "H200", "reference"),
        (_prefill(has_sinks=True), "H200", "reference"),
        (_prefill(has_query_offset=True), "H200", "reference"),
        (_prefill(kv_dtype="bfloat16"), "H200", "cudnn"),
        (DECODE, "A100", "reference"),
        (DECODE, "cpu", "reference"),
    ],
)
def test_xla_attention_backend(shape, device_name, backend):
    plan = plan_attention(shape, device_name)
    assert plan.implementation == "xla"
    assert plan.config == XlaAttentionConfig(backend)


@pytest.mark.parametrize(
    ("m", "implementation", "config_type"),
    [
        (1, "flat", FlatMatmulConfig),  # measured on that GPU
        (2, "flat", FlatMatmulConfig),
        (7, "flat", FlatMatmulConfig),
        (8, "flat", FlatMatmulConfig),
        (9, "flat", FlatMatmulConfig),
        (64, "flat", FlatMatmulConfig),
        (65, "xla", type(None)),
        (4096, "xla", type(None)),
    ],
)
def test_rows_choose_the_matmul_on_an_h200(m, implementation, config_type):
    plan = plan_matmul(MatmulShape(m=m, k=4096, n=12288), "H200")
    assert plan.implementation == implementation
    assert isinstance(plan.config, config_type)
    assert plan.reason.startswith(f"rule: M = {m}")
    assert ("compute-bound" if m == 4096 else "memory-bound") in plan.reason


def test_one_row_is_gemv_where_nothing_was_measured():
    plan = plan_matmul(MatmulShape(m=1, k=4096, n=12288), "H100")
    assert plan.implementation == "gemv"
    assert isinstance(plan.config, GemvConfig)
    assert plan_matmul(MatmulShape(m=2, k=4096, n=12288), "H100").implementation == "flat"


@pytest.mark.parametrize(
    ("m", "k", "n", "tile", "num_ctas"),
    [
        (1, 4096, 12288, (64, 256), 132),
        (8, 4096, 4096, (64, 256), 132),  # 64 column blocks of 16 tiles
        (16, 4096, 128256, (64, 256), 132),
        (64, 4096, 12288, (64, 256), 132),
        (8, 4096, 512, (64, 256), 64),  # no more than eight CTAs a column block
        (8, 512, 512, (64, 256), 16),  # nor fewer tiles than CTAs
        (8, 128, 4096, (64, 128), 64),  # no tile is deeper than K
        (64, 64, 64, (64, 64), 1),
        (8, 16, 16, (64, 64), 1),
    ],
)
def test_flat_tiles_and_ctas(m, k, n, tile, num_ctas):
    config = plan_matmul(MatmulShape(m=m, k=k, n=n), "H200").config
    assert (config.block_n, config.block_k) == tile
    assert config.num_ctas == num_ctas


@pytest.mark.parametrize(
    ("k", "n", "block_n", "split_k"),
    [
        (4096, 12288, 64, 1),  # 192 column blocks
        (4096, 4096, 64, 4),  # 64 of them -> 256 CTAs, two on each of 132 SMs
        (4096, 22016, 128, 1),  # 344 narrow ones would need a second wave
        (11008, 4096, 64, 4),
        (4096, 32000, 128, 1),
        (4096, 1024, 64, 8),
        (1024, 1024, 64, 2),  # every split keeps four blocks of K
        (64, 64, 64, 1),
        (16, 16, 64, 1),
    ],
)
def test_gemv_tiles_and_splits(k, n, block_n, split_k):
    config = heuristics.gemv_config(MatmulShape(m=1, k=k, n=n), "H200")
    assert (config.block_n, config.split_k) == (block_n, split_k)
    assert config.block_n * config.block_k == 64 * 128


@pytest.mark.parametrize(
    ("shape", "implementation", "reason"),
    [
        (MatmulShape(2, 64, 64), "gemv", "gemv takes one row, got M = 2"),
        (MatmulShape(65, 64, 64), "flat", "flat takes 1 to 64 rows, got M = 65"),
        (MatmulShape(0, 64, 64), "flat", "flat takes 1 to 64 rows, got M = 0"),
        (MatmulShape(8, 64, 72), "flat", "multiples of 16, got K = 64, N = 72"),
        (MatmulShape(1, 72, 64), "gemv", "multiples of 16, got K = 72, N = 64"),
        (MatmulShape(8, 64, 72, w_order="nk"), "flat", "multiples of 16, got K = 64, N = 72"),
        (MatmulShape(1, 72, 64, w_order="nk"), "gemv", "multiples of 16, got K = 72, N = 64"),
        (MatmulShape(8, 64, 64, "float32"), "flat", "bfloat16 or float16, got float32"),
    ],
)
def test_refused_matmul_says_why(shape, implementation, reason):
    assert reason in limits.refuse_kernel_matmul(shape, H200, implementation)
    assert plan_matmul(shape, H200).implementation != implementation


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (FlatMatmulConfig(4, 96, 64, 4), r"block_n must be one of (64, 128), got 96"),
        (FlatMatmulConfig(4, 64, 32, 4), r"block_k must be one of (64, 128, 256), got 32"),
        (FlatMatmulConfig(4, 64, 64, 1), "num_stages must lie in 2..8, got 1"),
        (FlatMatmulConfig(4, 64, 64, 9), "num_stages must lie in 2..8, got 9"),
        (FlatMatmulConfig(17, 64, 64, 4), "num_ctas must lie in 1..16 (4 column blocks), got 17"),
        (FlatMatmulConfig(0, 64, 64, 4), "num_ctas must lie in 1..16 (4 column blocks), got 0"),
        (FlatMatmulConfig(2, 128, 128, 8), "the tiles need 286720 bytes of shared memory, a CTA gets 232448"),
        (GemvConfig(64, 64, 4, 1), "gemv takes one row, got M = 8"),
    ],
)
def test_a_config_that_cannot_run_is_refused(config, reason):
    assert limits.refuse_matmul_config(MatmulShape(8, 256, 256), H200, config) == reason
    assert limits.refuse_matmul_config(MatmulShape(8, 256, 256), "cpu", FlatMatmulConfig(4, 64, 64, 4)) == (
        "no kernel for cpu"
    )


@pytest.mark.parametrize(("split_k", "reason"), [(4, None), (5, "split_k must lie in 1..4 (K = 256), got 5")])
def test_a_split_that_gemv_cannot_run_is_refused(split_k, reason):
    assert limits.refuse_matmul_config(MatmulShape(1, 256, 256), H200, GemvConfig(64, 64, 4, split_k)) == reason


def test_what_the_kernels_take_is_not_refused():
    assert limits.refuse_kernel_matmul(MatmulShape(1, 4096, 4096), H200, "gemv") is None
    assert limits.refuse_kernel_matmul(MatmulShape(1, 4096, 4096), H200, "flat") is None
    assert limits.refuse_kernel_matmul(MatmulShape(4096, 9, 9, "float32"), H200, "xla") is None
    assert limits.refuse_mosaic_attention(DECODE, H200) is None


@pytest.mark.parametrize("name", [name for name in device.names() if name not in ("H100", "H200")])
def test_other_devices_refuse_and_tell_the_rule(name):
    attention = plan_attention(DECODE, name)
    matmul = plan_matmul(MatmulShape(8, 4096, 4096), name)
    assert attention.implementation == matmul.implementation == "xla"
    if name == "cpu":
        assert matmul.reason == "no kernel for cpu"
    else:
        assert f"no kernel for {device.by_name(name).arch} yet; the rule here would be: flat, " in matmul.reason
        assert re.search(r"the rule here would be: decode kernel, (a cluster of )?\d+ CTAs? a head", attention.reason)


def test_reason_of_the_a100():
    assert plan_matmul(MatmulShape(8, 4096, 4096), "A100").reason == (
        "no kernel for sm_80 yet; the rule here would be: flat, 108 CTAs share 64 column blocks "
        "(memory-bound: intensity 8 < ridge 153)"
    )


def test_unknown_device_is_an_error():
    with pytest.raises(ValueError, match="unknown device 'H300'"):
        plan_matmul(MatmulShape(8, 64, 64), "H300")


_HOPPER = st.sampled_from(["H100", "H200"])
_QUANTISED = [(None, None), *((dtype, scales) for dtype in ("int8", "float8_e4m3fn") for scales in ("head", "token"))]
_ATTENTION = st.builds(
    lambda quantised, **sizes: AttentionShape(**sizes, kv_dtype=quantised[0], scales=quantised[1]),
    batch=st.integers(1, 256),
    query_length=st.integers(1, 16),
    capacity=st.integers(1, 200_000),
    num_query_heads=st.just(64),
    num_kv_heads=st.sampled_from([1, 2, 8, 32, 64]),
    head_dim=st.sampled_from(limits.ATTENTION_HEAD_DIMS),
    dtype=st.sampled_from(["bfloat16", "float16"]),
    page_size=st.sampled_from([None, 16, 64, 256]),
    is_appended=st.booleans(),
    is_online=st.booleans(),
    quantised=st.sampled_from(_QUANTISED),
)
_MATMUL = st.builds(
    MatmulShape,
    m=st.integers(1, 64),
    k=st.integers(1, 2000).map(lambda value: 16 * value),
    n=st.integers(1, 10_000).map(lambda value: 16 * value),
    w_order=st.sampled_from(["kn", "nk"]),
)


@hypothesis.given(_ATTENTION, _HOPPER)
def test_any_attention_config_fits_the_sm(shape, name):
    gpu = device.by_name(name)
    plan = plan_attention(shape, gpu)
    assert (plan.implementation == "mosaic_gpu") == (limits.refuse_mosaic_attention(shape, gpu) is None)
    hypothesis.assume(plan.implementation == "mosaic_gpu")
    _check_shares(shape, plan.config, gpu)
    assert plan.recompute == "kernel"


@hypothesis.given(_MATMUL, _HOPPER)
def test_any_matmul_config_fits_the_sm(shape, name):
    gpu = device.by_name(name)
    config = plan_matmul(shape, gpu).config
    other = dataclasses.replace(shape, w_order="nk" if shape.w_order == "kn" else "kn")
    assert plan_matmul(other, gpu).config == config
    num_units, num_tiles = -(-shape.n // config.block_n), -(-shape.k // config.block_k)
    assert limits.refuse_matmul_config(shape, gpu, config) is None
    if isinstance(config, FlatMatmulConfig):
        assert config.num_ctas <= min(gpu.num_sms, num_units * num_tiles)
        return
    assert config.split_k in (1, 2, 4, 8)
    if config.split_k > 1:
        assert num_tiles // config.split_k >= 4
        assert num_units * config.split_k <= 2 * gpu.num_sms
