"""The decision tree, for explicit devices: which kernel, how many splits, and a reason for each refusal."""

import dataclasses

import hypothesis
import pytest
from hypothesis import strategies as st

from fdpp_jax import device, heuristics
from fdpp_jax.config import (
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


def _decode(**changes):
    return dataclasses.replace(DECODE, **changes)


def _prefill(**changes):
    return dataclasses.replace(PREFILL, **changes)


@pytest.mark.parametrize(
    ("batch", "num_kv_heads", "capacity", "num_splits", "combine"),
    [
        (1, 32, 4096, 4, "cluster"),  # 32 CTAs -> 128 of 132 SMs
        (1, 8, 4096, 8, "cluster"),  # at most 8 in a cluster
        (1, 8, 131072, 8, "cluster"),  # 64 CTAs are enough for a second launch not to pay
        (1, 1, 16384, 32, "launch"),  # at most 32 splits
        (1, 1, 8191, 8, "cluster"),  # too few keys to pay for a second launch
        (1, 5, 8192, 32, "launch"),  # 40 CTAs of a cluster are under a third of the SMs
        (1, 6, 8192, 8, "cluster"),
        (2, 32, 4096, 2, "cluster"),
        (4, 32, 4096, 1, "cluster"),  # 128 CTAs fill the SMs
        (8, 32, 4096, 1, "cluster"),
        (9, 8, 4096, 2, "cluster"),  # 72 CTAs -> 144, two of which share an SM
        (13, 8, 4096, 1, "cluster"),  # 104 of 132 SMs is enough
        (1, 8, 64, 1, "cluster"),  # one tile cannot be split
        (1, 8, 1, 1, "cluster"),
        (1, 8, 65, 1, "cluster"),  # every split keeps a whole tile
        (1, 8, 300, 4, "cluster"),
    ],
)
def test_kv_is_split_only_when_heads_leave_sms_idle(batch, num_kv_heads, capacity, num_splits, combine):
    shape = _decode(batch=batch, num_query_heads=num_kv_heads, num_kv_heads=num_kv_heads, capacity=capacity)
    plan = plan_attention(shape, "H200")
    assert plan.implementation == "mosaic_gpu"
    assert (plan.config.num_splits, plan.config.combine) == (num_splits, combine)
    assert plan.recompute == ("kernel" if combine == "cluster" else "cond")
    if num_splits > 1:
        how = "in a cluster" if combine == "cluster" else "and added in a second launch"
        assert f"split {num_splits} {how}" in plan.reason


def test_a_cluster_can_be_asked_for():
    shape = _decode(num_query_heads=1, num_kv_heads=1, capacity=16384)
    config = heuristics.decode_attention_config(shape, "H200", "cluster")
    assert (config.num_splits, config.combine) == (8, "cluster")


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("num_query_heads", "num_kv_heads"), [(32, 32), (32, 8), (64, 8), (32, 1), (64, 1)])
def test_decode_on_hopper_takes_the_kernel(head_dim, dtype, num_query_heads, num_kv_heads):
    shape = _decode(head_dim=head_dim, dtype=dtype, num_query_heads=num_query_heads, num_kv_heads=num_kv_heads)
    plan = plan_attention(shape, "H100")
    if shape.rows * head_dim == 64 * 256:
        assert plan.implementation == "xla"
        assert "64 query rows of head dim 256 need 278528 bytes of shared memory, a CTA gets 232448" in plan.reason
        return
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
        assert plan.config.smem_bytes(shape) <= device.by_name(name).smem_bytes
    else:
        assert plan.config == XlaAttentionConfig("reference")
        assert plan.recompute == "cond"
        assert name == "cpu" or "the rule here would be: decode kernel" in plan.reason


def test_smaller_caches_get_deeper_rings_and_every_tile_counts():
    config = DecodeAttentionConfig(64, 1, 2)
    tile = 64 * 128
    plain = config.smem_bytes(DECODE)
    assert plain == 2 * 2 * tile * 2 + 8 * (128 * 8 + 64 * 2) + 8192
    assert config.smem_bytes(_decode(head_dim=80)) == config.smem_bytes(_decode(head_dim=96)) == plain
    by_head = config.smem_bytes(_decode(kv_dtype="int8", scales="head"))
    assert by_head == plain - 2 * 2 * tile + 2 * tile * 2
    assert config.smem_bytes(_decode(kv_dtype="int8", scales="token")) == by_head + 2 * 2 * 64 * 8 * 4
    stages = [
        heuristics.decode_attention_config(_decode(head_dim=256, **changes), H200).num_stages
        for changes in ({}, dict(kv_dtype="int8", scales="head"))
    ]
    assert stages == [3, 4]


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
        ({"capacity": 0}, "needs a key, got S = 0"),
    ],
)
def test_refused_decode_falls_back_with_its_reason(changes, reason):
    shape = _decode(**changes)
    refusal = heuristics.refuse_mosaic_attention(shape, H200)
    plan = plan_attention(shape, H200)
    assert plan.implementation == "xla"
    assert plan.config == XlaAttentionConfig("reference")
    assert refusal in plan.reason
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(refusal)


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
    assert ("compute-bound" if m == 4096 else "memory-bound") in plan.reason


def test_one_row_is_gemv_where_nothing_was_measured():
    plan = plan_matmul(MatmulShape(m=1, k=4096, n=12288), "H100")
    assert plan.implementation == "gemv"
    assert isinstance(plan.config, GemvConfig)
    assert plan_matmul(MatmulShape(m=2, k=4096, n=12288), "H100").implementation == "flat"


@pytest.mark.parametrize(
    ("k", "n", "block_n", "split_k"),
    [
        (4096, 12288, 64, 1),  # 192 tiles
        (4096, 4096, 64, 4),  # 64 tiles -> 256 CTAs, two on each of 132 SMs
        (4096, 22016, 128, 1),  # 344 narrow tiles would need a second wave
        (11008, 4096, 64, 4),
        (4096, 32000, 128, 1),
        (4096, 1024, 64, 8),
        (1024, 1024, 64, 2),  # every split keeps four blocks of K
        (64, 64, 64, 1),
        (16, 16, 64, 1),
    ],
)
@pytest.mark.parametrize("m", [1, 8])
def test_matmul_tiles_and_splits(m, k, n, block_n, split_k):
    config = plan_matmul(MatmulShape(m=m, k=k, n=n), "H200").config
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
        (MatmulShape(8, 64, 64, "float32"), "flat", "bfloat16 or float16, got float32"),
    ],
)
def test_refused_matmul_says_why(shape, implementation, reason):
    assert reason in heuristics.refuse_kernel_matmul(shape, H200, implementation)
    assert plan_matmul(shape, H200).implementation != implementation


def test_what_the_kernels_take_is_not_refused():
    assert heuristics.refuse_kernel_matmul(MatmulShape(1, 4096, 4096), H200, "gemv") is None
    assert heuristics.refuse_kernel_matmul(MatmulShape(1, 4096, 4096), H200, "flat") is None
    assert heuristics.refuse_kernel_matmul(MatmulShape(4096, 9, 9, "float32"), H200, "xla") is None
    assert heuristics.refuse_mosaic_attention(DECODE, H200) is None


@pytest.mark.parametrize("name", [name for name in device.names() if name not in ("H100", "H200")])
def test_other_devices_refuse_and_tell_the_rule(name):
    attention = plan_attention(DECODE, name)
    matmul = plan_matmul(MatmulShape(8, 4096, 4096), name)
    assert attention.implementation == matmul.implementation == "xla"
    if name == "cpu":
        assert matmul.reason == "no kernel for cpu"
    else:
        assert f"no kernel for {device.by_name(name).arch} yet; the rule here would be: flat, split" in matmul.reason
        assert "the rule here would be: decode kernel, 32 CTAs" in attention.reason


def test_reason_of_the_a100():
    assert plan_matmul(MatmulShape(8, 4096, 4096), "A100").reason == (
        "no kernel for sm_80 yet; the rule here would be: flat, split 2 (memory-bound: intensity 8 < ridge 153)"
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
    head_dim=st.sampled_from(heuristics.ATTENTION_HEAD_DIMS),
    dtype=st.sampled_from(["bfloat16", "float16"]),
    page_size=st.sampled_from([None, 16, 64, 256]),
    quantised=st.sampled_from(_QUANTISED),
)
_MATMUL = st.builds(
    MatmulShape,
    m=st.integers(1, 64),
    k=st.integers(1, 2000).map(lambda value: 16 * value),
    n=st.integers(1, 10_000).map(lambda value: 16 * value),
)


@hypothesis.given(_ATTENTION, _HOPPER)
def test_any_attention_config_fits_the_sm(shape, name):
    gpu = device.by_name(name)
    plan = plan_attention(shape, gpu)
    assert (plan.implementation == "mosaic_gpu") == (heuristics.refuse_mosaic_attention(shape, gpu) is None)
    hypothesis.assume(plan.implementation == "mosaic_gpu")
    num_ctas = shape.batch * shape.num_kv_heads
    for config in (plan.config, heuristics.decode_attention_config(shape, gpu, "cluster")):
        assert config.smem_bytes(shape) <= gpu.smem_bytes
        assert 2 <= config.num_stages <= 8
        assert config.num_splits in ((1, 2, 4, 8) if config.combine == "cluster" else (2, 4, 8, 16, 32))
        if shape.page_size is not None:
            assert config.block_kv % shape.page_size == 0 or shape.page_size % config.block_kv == 0
        if config.num_splits > 1:
            assert config.num_splits * config.block_kv <= shape.capacity
            assert num_ctas < gpu.num_sms
            assert num_ctas * config.num_splits < 1.5 * gpu.num_sms
            if num_ctas * config.num_splits > gpu.num_sms:
                assert config.smem_bytes(shape) <= gpu.smem_bytes_shared(2)
    assert plan.recompute == ("kernel" if plan.config.combine == "cluster" else "cond")


@hypothesis.given(_MATMUL, _HOPPER)
def test_any_matmul_config_fits_the_sm(shape, name):
    gpu = device.by_name(name)
    config = plan_matmul(shape, gpu).config
    num_tiles = -(-shape.n // config.block_n)
    assert config.smem_bytes(shape) <= gpu.smem_bytes
    assert 2 <= config.num_stages <= 8
    assert config.split_k in (1, 2, 4, 8)
    if config.split_k > 1:
        assert -(-shape.k // config.block_k) // config.split_k >= 4
        assert num_tiles * config.split_k <= 2 * gpu.num_sms
