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
    ("batch", "num_kv_heads", "capacity", "num_splits"),
    [
        (1, 32, 4096, 4),  # 32 CTAs -> 128 of 132 SMs
        (1, 8, 4096, 16),
        (1, 1, 16384, 32),  # at most 32 splits
        (2, 32, 4096, 2),
        (4, 32, 4096, 1),  # 128 CTAs fill the SMs
        (8, 32, 4096, 1),
        (9, 8, 4096, 2),  # 72 CTAs -> 144, two of which share an SM
        (13, 8, 4096, 1),  # 104 of 132 SMs is enough
        (1, 8, 64, 1),  # one tile cannot be split
        (1, 8, 1, 1),
        (1, 8, 65, 1),  # every split keeps a whole tile
        (1, 8, 300, 4),
    ],
)
def test_kv_is_split_only_when_heads_leave_sms_idle(batch, num_kv_heads, capacity, num_splits):
    plan = plan_attention(_decode(batch=batch, num_kv_heads=num_kv_heads, capacity=capacity), "H200")
    assert plan.implementation == "mosaic_gpu"
    assert plan.config.num_splits == num_splits


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("num_query_heads", "num_kv_heads"), [(32, 32), (32, 8), (64, 8), (32, 1), (64, 1)])
def test_decode_on_hopper_takes_the_kernel(head_dim, dtype, num_query_heads, num_kv_heads):
    shape = _decode(head_dim=head_dim, dtype=dtype, num_query_heads=num_query_heads, num_kv_heads=num_kv_heads)
    plan = plan_attention(shape, "H100")
    if shape.rows * head_dim == 64 * 256:
        assert plan.implementation == "xla"
        assert "64 query rows of head dim 256 need 245760 bytes of shared memory, a CTA gets 232448" in plan.reason
        return
    assert plan.implementation == "mosaic_gpu"
    assert isinstance(plan.config, DecodeAttentionConfig)
    assert "memory-bound" in plan.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"query_length": 2}, "takes one query, got T = 2"),
        ({"is_causal": True}, "no causal mask"),
        ({"local_window_size": (128, 0)}, r"no local window, got \(128, 0\)"),
        ({"logits_soft_cap": 50.0}, "no soft cap, got 50.0"),
        ({"dtype": "float32"}, "takes bfloat16 or float16, got float32"),
        ({"head_dim": 96}, r"takes head dims \(64, 128, 256\), got H = 96"),
        ({"num_query_heads": 128, "num_kv_heads": 1}, "holds 64 query rows a key/value head, got 128"),
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
_ATTENTION = st.builds(
    AttentionShape,
    batch=st.integers(1, 256),
    query_length=st.just(1),
    capacity=st.integers(1, 200_000),
    num_query_heads=st.just(64),
    num_kv_heads=st.sampled_from([1, 2, 8, 32, 64]),
    head_dim=st.sampled_from([64, 128, 256]),
    dtype=st.sampled_from(["bfloat16", "float16"]),
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
    hypothesis.assume(shape.rows * shape.head_dim < 64 * 256)  # refused
    config = plan_attention(shape, gpu).config
    num_ctas = shape.batch * shape.num_kv_heads
    assert config.smem_bytes(shape) <= gpu.smem_bytes
    assert 2 <= config.num_stages <= 8
    assert config.num_splits & (config.num_splits - 1) == 0
    if config.num_splits > 1:
        assert config.num_splits * config.block_kv <= shape.capacity
        assert num_ctas < gpu.num_sms
        assert num_ctas * config.num_splits < 1.5 * gpu.num_sms
        if num_ctas * config.num_splits > gpu.num_sms:
            assert config.smem_bytes(shape) <= gpu.smem_bytes_shared(2)


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
