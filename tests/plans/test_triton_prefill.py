"""The rule for Triton's prefill kernel: legal on every device by name, and what it refuses."""

import dataclasses

import pytest

from fdpp_jax.plans import device, triton
from fdpp_jax.plans.shapes import AttentionShape
from fdpp_jax.plans.triton_prefill import PrefillAttentionConfig, plan, prefill_attention_config, refuse

DEVICES = [found for found in map(device.by_name, device.names()) if found.arch in triton.ARCHITECTURES]
A100 = device.by_name("A100")
PROMPT = AttentionShape(1, 4096, 4096, 32, 8, 128, is_causal=True)
HEAD_DIMS = (8, 40, 64, 72, 80, 96, 128, 192, 256)


def test_the_devices_are_known():
    assert {found.arch for found in DEVICES} >= {"sm_80", "sm_86", "sm_90", "sm_100", "gfx90a", "gfx942"}


@pytest.mark.parametrize("running", DEVICES, ids=lambda running: running.kind)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_config_is_legal(running, head_dim):
    for batch in (1, 4, 64):
        for query_length in (17, 64, 100, 512, 16384):
            for cache in ({}, dict(kv_dtype="int8", scales="head"), dict(kv_dtype="int8", scales="token")):
                shape = dataclasses.replace(
                    PROMPT, batch=batch, query_length=query_length, capacity=16384, head_dim=head_dim, **cache
                )
                assert refuse(shape, running) is None
                config = plan(shape, running).config
                assert config.smem_bytes(shape) <= running.smem_bytes
                assert config.arch == running.arch
                assert config.block_q % 16 == 0
                assert config.block_kv >= 16
                assert config.num_warps in (4, 8)
                assert config.num_stages >= 1
                assert config.heads_together >= 1


def test_a_plan_says_what_it_launches():
    found = plan(PROMPT, A100)
    assert (found.backend, found.algorithm, found.recompute) == ("triton", "prefill", "kernel")
    assert found.reason == "128 queries of a head per program: 1024 on 108 SMs"


def test_heads_are_packed_where_programs_would_be_half_empty_and_wait_for_sms():
    found = plan(dataclasses.replace(PROMPT, batch=32, query_length=32), A100)
    assert found.config.packs_group
    assert found.reason == "128 queries of a group of heads per program: 256 on 108 SMs"
    assert not plan(dataclasses.replace(PROMPT, batch=2, query_length=32), A100).config.packs_group
    assert not plan(dataclasses.replace(PROMPT, batch=32, query_length=65), A100).config.packs_group


def test_programs_are_smaller_where_sms_would_have_none():
    assert plan(dataclasses.replace(PROMPT, query_length=256), A100).config.block_q == 64
    assert plan(dataclasses.replace(PROMPT, query_length=512), A100).config.block_q == 128
    assert plan(dataclasses.replace(PROMPT, query_length=50, num_kv_heads=32), A100).config.block_q == 64


def test_few_bytes_of_shared_memory_take_keys_of_a_block_and_then_stages():
    wide = dataclasses.replace(PROMPT, head_dim=256)

    def config(smem_kib):
        found = prefill_attention_config(wide, dataclasses.replace(A100, smem_bytes=smem_kib * 1024))
        return found.block_kv, found.num_stages

    assert [config(smem_kib) for smem_kib in (227, 163, 99, 64)] == [(64, 3), (32, 3), (32, 2), (32, 1)]
    assert refuse(wide, dataclasses.replace(A100, smem_bytes=48 * 1024)) == (
        "the prefill kernel needs 71680 bytes of shared memory, a program gets 49152"
    )


def test_a_cache_of_8_bits_has_smaller_blocks_where_registers_widen_it():
    narrow = dataclasses.replace(PROMPT, kv_dtype="int8", scales="head")
    for name, block_kv in (("A100", 32), ("MI210", 32), ("H200", 64)):
        assert prefill_attention_config(PROMPT, device.by_name(name)).block_kv == 64
        assert prefill_attention_config(narrow, device.by_name(name)).block_kv == block_kv


def test_shared_memory_of_a_config():
    config = PrefillAttentionConfig(128, 64, 8, 3, "sm_80")
    blocks, queries, weights = 2 * 64 * 128 * 2, 128 * 128 * 2, 128 * 64 * 2
    assert config.smem_bytes(PROMPT) == 2 * blocks + queries + weights + 2048
    hopper = dataclasses.replace(config, arch="sm_90")
    assert hopper.smem_bytes(PROMPT) == 3 * blocks + queries + weights + 2048
    narrow = dataclasses.replace(PROMPT, kv_dtype="int8", scales="token")
    assert config.smem_bytes(narrow) == 2 * blocks + 2 * 2 * 64 * 4 + queries + weights + 2048
    amd = dataclasses.replace(config, arch="gfx90a")
    assert amd.smem_bytes(PROMPT) == 2 * blocks + weights
    assert dataclasses.replace(amd, block_kv=16, num_stages=2).smem_bytes(PROMPT) == queries


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"query_length": 0}, "takes 1 query and more, got T = 0"),
        ({"has_bias": True}, "takes no bias"),
        ({"has_mask": True}, "takes no mask as an array"),
        ({"dtype": "float32"}, "takes bfloat16 or float16, got float32"),
        ({"kv_dtype": "float16"}, "takes a cache of bfloat16, int8 or float8_e4m3fn, got float16"),
        ({"kv_dtype": "float8_e4m3fn", "scales": "head"}, "sm_80 has no conversion of float8_e4m3fn"),
        ({"head_dim": 100}, "takes head dims 8, 16, ... 256, got H = 100"),
        ({"head_dim": 264}, "got H = 264"),
        ({"page_size": 8}, "takes page sizes (16, 32, 64, 128, 256), got 8"),
        ({"dtype": "float16", "kv_dtype": "int8", "scales": "token"}, "may leave float16's range"),
        ({"logits_soft_cap": 1e6}, "tanh is good for caps up to 1000"),
        ({"has_traced_scale": True}, "a scale that is known before"),
        ({"batch": 0}, "needs a sequence, a query head and a key, got B = 0"),
    ],
)
def test_what_is_refused_has_a_reason(changes, reason):
    assert reason in refuse(dataclasses.replace(PROMPT, **changes), A100)


def test_float8_is_taken_where_it_is_converted():
    shape = dataclasses.replace(PROMPT, kv_dtype="float8_e4m3fn", scales="head")
    assert refuse(shape, device.by_name("H200")) is None


def test_other_devices_are_refused():
    assert refuse(PROMPT, device.by_name("cpu")) == "no kernel for cpu"
    assert refuse(PROMPT, dataclasses.replace(A100, arch="sm_75")) == "no Triton kernel for sm_75"
