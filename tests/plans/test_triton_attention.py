"""The decode kernel in Triton: legal tiles and splits for every shape and device, and a reason for each refusal."""

import dataclasses

import hypothesis
import pytest
from hypothesis import strategies as st

from fdpp_jax.models import PRESETS
from fdpp_jax.plans import device, triton
from fdpp_jax.plans.shapes import AttentionShape, cdiv
from fdpp_jax.plans.triton_attention import MAX_CHUNK, DecodeAttentionConfig, decode_attention_config, plan, refuse

GPUS = [name for name in device.names() if device.by_name(name).arch in triton.ARCHITECTURES]
DECODE = AttentionShape(batch=1, query_length=1, capacity=4096, num_query_heads=32, num_kv_heads=32, head_dim=128)


def _decode(**changes):
    return dataclasses.replace(DECODE, **changes)


def _check_legal(shape, name):
    gpu = device.by_name(name)
    config = decode_attention_config(shape, gpu)
    assert triton.refuse_arch(config.arch, gpu) is None
    assert config.smem_bytes(shape) <= gpu.smem_bytes
    assert config.block_kv in (16, 32, 64)
    assert (2 if gpu.is_nvidia else 1) <= config.num_buffers <= 6
    assert config.num_warps in (4, 8)
    assert config.combine == "launch" or gpu.is_nvidia
    assert config.uses_dot or shape.live_rows == 1
    chunk = min(shape.batch, MAX_CHUNK)
    num_tiles = chunk * cdiv(shape.capacity, config.block_kv)
    num_ctas = cdiv(shape.batch, chunk) * shape.num_kv_heads * config.num_splits
    assert 1 <= config.num_splits <= num_tiles
    assert config.num_splits == 1 or num_ctas <= 2 * gpu.num_sms
    if shape.page_size is not None:
        assert config.block_kv % shape.page_size == 0 or shape.page_size % config.block_kv == 0
    made = plan(shape, gpu)
    assert (made.backend, made.algorithm, made.config, made.recompute) == ("triton", "decode", config, "kernel")
    assert "\n" not in made.reason
    return config


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("model", PRESETS)
def test_every_model_has_legal_tiles_everywhere(model, name):
    config = PRESETS[model]
    for batch in (1, 8, 64):
        for capacity in (1, 1024, 32768):
            for kv_dtype, page_size in ((None, None), (None, 64), ("int8", None)):
                shape = AttentionShape(
                    batch,
                    1,
                    capacity,
                    config.num_attention_heads,
                    config.num_key_value_heads,
                    config.head_dim,
                    kv_dtype=kv_dtype,
                    scales=kv_dtype and "token",
                    page_size=page_size,
                )
                assert refuse(shape, device.by_name(name)) is None
                _check_legal(shape, name)


_ANY = st.builds(
    lambda quantised, **sizes: AttentionShape(**sizes, kv_dtype=quantised[0], scales=quantised[1]),
    batch=st.integers(1, 3000),
    query_length=st.integers(1, 16),
    capacity=st.integers(1, 200_000),
    num_query_heads=st.just(64),
    num_kv_heads=st.sampled_from([1, 2, 8, 32, 64]),
    head_dim=st.sampled_from([8, 16, 64, 72, 80, 96, 128, 192, 256]),
    dtype=st.sampled_from(["bfloat16", "float16"]),
    page_size=st.sampled_from([None, 16, 64, 256]),
    quantised=st.sampled_from([(None, None), ("int8", "head"), ("int8", "token"), ("float8_e4m3fn", "token")]),
)


@hypothesis.given(_ANY, st.sampled_from(GPUS))
def test_any_shape_that_is_not_refused_has_legal_tiles(shape, name):
    hypothesis.assume(refuse(shape, device.by_name(name)) is None)
    _check_legal(shape, name)


@pytest.mark.parametrize(
    ("batch", "num_kv_heads", "capacity", "num_splits"),
    [
        (1, 32, 4096, 6),
        (8, 32, 1024, 6),
        (8, 8, 4096, 24),  # three CTAs each have a sequence: 27 would share them all
        (1, 8, 64, 1),
        (1, 1, 1024, 16),  # a tile each
        (300, 8, 4096, 27),
        (2048, 32, 4096, 3),  # two chunks
    ],
)
def test_the_ctas_of_a_head_share_the_keys_and_fill_the_sms(batch, num_kv_heads, capacity, num_splits):
    shape = _decode(batch=batch, num_kv_heads=num_kv_heads, capacity=capacity)
    config = _check_legal(shape, "A100")
    assert config.block_kv == 64
    assert config.num_splits == num_splits


def test_two_ctas_share_an_sm_and_tiles_fit_it():
    tiles = {name: decode_attention_config(DECODE, device.by_name(name)) for name in ("H200", "A100", "A10", "MI210")}
    assert {name: (x.block_kv, x.num_buffers) for name, x in tiles.items()} == {
        "H200": (64, 2),
        "A100": (64, 2),
        "A10": (32, 2),
        "MI210": (32, 1),
    }
    for name, config in tiles.items():
        assert config.smem_bytes(DECODE) <= device.by_name(name).smem_bytes_shared(2)
    large = _decode(num_query_heads=64, num_kv_heads=4, query_length=4, head_dim=256)
    config = decode_attention_config(large, device.by_name("A10"))
    assert config.num_warps == 8
    assert config.combine == "launch"  # 64 numbers a thread
    assert device.by_name("A10").smem_bytes_shared(2) < config.smem_bytes(large) <= device.by_name("A10").smem_bytes


def test_registers_hold_the_sums_that_are_merged_at_once():
    for changes, num in ((dict(), 8), (dict(num_query_heads=64, num_kv_heads=1), 2), (dict(head_dim=256), 4)):
        assert DecodeAttentionConfig("sm_80", 32, 8, 2).merged_at_once(_decode(**changes)) == num


@pytest.mark.parametrize(
    ("changes", "num_splits", "num_buffers"),
    [
        ({}, 8, 2),
        (dict(num_kv_heads=8), 16, 2),
        (dict(num_query_heads=64, num_kv_heads=8, capacity=16384), 16, 4),  # 33 CTAs a head: many to merge
        (dict(batch=8), 8, 2),  # a CTA for each sequence
        (dict(batch=8, num_kv_heads=8), 16, 4),  # two a sequence with one CTA per SM
        (dict(capacity=64), 1, 2),
    ],
    ids=str,
)
def test_tiles_on_the_h200_are_those_measured(changes, num_splits, num_buffers):
    config = decode_attention_config(_decode(**changes), device.by_name("H200"))
    assert (config.block_kv, config.num_splits, config.num_buffers) == (64, num_splits, num_buffers)
    assert config.combine == "kernel"
    assert decode_attention_config(_decode(**changes), device.by_name("MI300X")).combine == "launch"


@pytest.mark.parametrize(
    ("changes", "name", "reason"),
    [
        ({}, "cpu", "no kernel for cpu"),
        ({"query_length": 0}, "A100", "takes 1 to 16 queries, got T = 0"),
        ({"query_length": 17}, "A100", "takes 1 to 16 queries, got T = 17"),
        ({"dtype": "float32"}, "A100", "takes bfloat16 or float16, got float32"),
        ({"head_dim": 100}, "A100", "got H = 100"),
        ({"head_dim": 264}, "A100", "got H = 264"),
        ({"head_dim": 72, "kv_dtype": "int8", "scales": "head"}, "A100", "loaded 16 bytes at a time, got H = 72"),
        ({"kv_dtype": "float8_e4m3fn", "scales": "head"}, "A10", "sm_86 cannot convert float8_e4m3fn"),
        ({"num_kv_heads": 1, "query_length": 3}, "A100", "holds 64 query rows a key/value head, got 96"),
    ],
)
def test_what_it_cannot_compute_is_refused_in_words(changes, name, reason):
    refusal = refuse(_decode(**changes), device.by_name(name))
    assert refusal is not None
    assert reason in refusal


@pytest.mark.parametrize("name", ["L4", "H200", "MI210"])
def test_float8_is_taken_where_it_is_converted(name):
    assert refuse(_decode(kv_dtype="float8_e4m3fn", scales="token"), device.by_name(name)) is None


def test_the_reason_says_who_shares_what():
    assert plan(_decode(batch=8, num_kv_heads=8), device.by_name("A100")).reason == (
        "24 CTAs a head share the keys of 8 sequences: 192 on 108 SMs (memory-bound: intensity 4 < ridge 153)"
    )
