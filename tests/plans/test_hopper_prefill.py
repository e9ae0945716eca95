"""The prefill kernel on Hopper: blocks that fit, a reason for each refusal, and where cuDNN stays."""

import dataclasses
import re

import pytest

from fdpp_jax.heuristics import plan_attention
from fdpp_jax.plans import device, hopper, hopper_prefill
from fdpp_jax.plans.shapes import AttentionShape

H200 = device.by_name("H200")
GEMMA = AttentionShape(1, 8192, 8192, 16, 8, 256, is_causal=True, has_lengths=False, logits_soft_cap=50.0)


CACHES = [
    *((head_dim, None, None) for head_dim in hopper.HEAD_DIMS),
    *(
        (head_dim, dtype, scales)
        for head_dim in (64, 128, 256)
        for dtype, scales in (("int8", "head"), ("int8", "token"))
    ),
]


@pytest.mark.parametrize("name", ["H100", "H200"])
@pytest.mark.parametrize("page_size", [None, 16, 256])
@pytest.mark.parametrize(("head_dim", "kv_dtype", "scales"), CACHES)
def test_blocks_fit_the_sm(name, head_dim, kv_dtype, scales, page_size):
    shape = dataclasses.replace(GEMMA, head_dim=head_dim, kv_dtype=kv_dtype, scales=scales, page_size=page_size)
    plan = plan_attention(shape, name)
    assert (plan.backend, plan.algorithm, plan.recompute) == ("mosaic_gpu", "prefill", "kernel")
    assert plan.config.smem_bytes(shape) <= device.by_name(name).smem_bytes
    in_turn = head_dim <= 128 and kv_dtype is None
    tiles = "at a time: 1024 for 132 CTAs on as many SMs" if in_turn else "per CTA: 1024 on 132 SMs"
    assert plan.reason == f"128 queries of a head {tiles}"


@pytest.mark.parametrize(
    ("batch", "query_length", "num_kv_heads", "packs"),
    [(32, 32, 8, True), (32, 64, 8, True), (32, 65, 8, False), (4, 32, 8, False), (32, 32, 16, False)],
)
def test_heads_are_packed_where_ctas_would_be_half_empty_and_wait_for_sms(batch, query_length, num_kv_heads, packs):
    shape = dataclasses.replace(GEMMA, batch=batch, query_length=query_length, num_kv_heads=num_kv_heads)
    plan = plan_attention(shape, H200)
    assert plan.config.packs_group == packs
    num_ctas = batch * num_kv_heads if packs else batch * 16
    rows = "queries of a group of heads" if packs else "queries of a head"
    assert plan.reason == f"128 {rows} per CTA: {num_ctas} on 132 SMs"


@pytest.mark.parametrize(
    ("changes", "num_ctas"),
    [
        (dict(query_length=2048), None),  # 256 tiles
        (dict(query_length=2049), 132),  # 272
        (dict(query_length=2049, head_dim=256), None),
        (dict(query_length=2049, kv_dtype="int8", scales="head"), None),
        (dict(query_length=2049, capacity=8193), None),
        (dict(query_length=2049, capacity=8193, local_window_size=(4096, 0)), 132),
    ],
    ids=str,
)
def test_ctas_take_tiles_in_turn_where_an_sm_has_many_short_ones(changes, num_ctas):
    shape = dataclasses.replace(GEMMA, **dict(head_dim=128) | changes)
    assert plan_attention(shape, H200).config.num_ctas == num_ctas


@pytest.mark.parametrize(
    ("num_ctas", "num_tiles", "launched"),
    [(None, 1000, 1000), (132, 1000, 132), (132, 100, 100), (132, 132 * 256, 132), (132, 132 * 256 + 1, 133)],
)
def test_a_cta_has_no_more_tiles_than_its_list_holds(num_ctas, num_tiles, launched):
    config = hopper_prefill.PrefillAttentionConfig(64, 2, num_ctas=num_ctas)
    assert hopper_prefill.num_ctas(config, num_tiles) == launched


def test_a_second_place_for_queries_takes_shared_memory():
    """Where a CTA takes tiles in turn; not for wide heads and 8 bits, which have no room for it."""

    def added(**changes):
        shape = dataclasses.replace(GEMMA, **changes)
        one, many = (hopper_prefill.PrefillAttentionConfig(64, 2, num_ctas=n).smem_bytes(shape) for n in (None, 132))
        return many - one - (257 + 512) * 4  # its tiles, and which of them have failed rows

    assert added(head_dim=128) == 128 * 128 * 2
    assert added(head_dim=80) == 128 * 128 * 2
    assert added(head_dim=256) == added(head_dim=128, kv_dtype="int8", scales="head") == 0


@pytest.mark.parametrize(
    ("shape", "heads"),
    [
        (dict(query_length=4096, capacity=4096, num_query_heads=32, num_kv_heads=32, head_dim=128), 12),  # 2 MiB a head
        (dict(query_length=16384, capacity=16384, num_query_heads=32, num_kv_heads=32, head_dim=128), 1),
        (dict(query_length=1024, capacity=1024, batch=8, num_query_heads=32, num_kv_heads=8, head_dim=128), 52),
        ({}, 6),  # 8 MiB per key/value head of two
    ],
)
def test_heads_run_together_as_far_as_the_l2_holds_their_keys(shape, heads):
    assert plan_attention(dataclasses.replace(GEMMA, **shape), H200).config.heads_together == heads


def test_cudnn_stays_where_it_is_as_fast():
    plain = dataclasses.replace(GEMMA, logits_soft_cap=None)
    online = dataclasses.replace(plain, is_online=True)
    assert plan_attention(plain, H200).algorithm == "prefill"
    assert plan_attention(online, H200).algorithm == "cudnn"
    assert "cuDNN is as fast" in plan_attention(online, H200).reason
    assert plan_attention(online, H200, "mosaic_gpu").algorithm == "prefill"  # as the caller asks
    capped = dataclasses.replace(online, logits_soft_cap=50.0)
    assert plan_attention(capped, H200).algorithm == "prefill"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"has_bias": True}, "prefill kernel takes no bias"),
        ({"has_mask": True}, "prefill kernel takes no mask"),
        ({"dtype": "float32"}, "takes bfloat16 or float16, got float32"),
        ({"kv_dtype": "int8", "scales": "head", "head_dim": 96}, "widened 64 columns at a time, got H = 96"),
        ({"kv_dtype": "int8", "scales": "token", "num_kv_heads": 2}, "need 4, 8, ... heads, got K = 2"),
        ({"page_size": 8}, "prefill kernel takes page sizes"),
        ({"head_dim": 72}, r"takes head dims \(64, 80, 96, 128, 256\), got H = 72"),
        ({"logits_soft_cap": 1e6}, "tanh is good for caps up to 1000"),
        ({"has_traced_scale": True}, "a scale that is known before"),
        ({"batch": 0}, "needs a sequence, a query head and a key, got B = 0"),
    ],
)
def test_what_is_refused_runs_in_plain_xla_with_the_reason(changes, reason):
    shape = dataclasses.replace(GEMMA, **changes)
    plan = plan_attention(shape, dataclasses.replace(H200, why_no_triton="no triton here"))
    assert (plan.backend, plan.algorithm) == ("xla", "blocks" if shape.batch else "reference")
    assert re.search(reason, plan.reason)
    with pytest.raises(NotImplementedError, match=reason):
        plan_attention(shape, H200, "mosaic_gpu")


@pytest.mark.parametrize("gpu", [H200, device.by_name("A100")], ids=lambda gpu: gpu.kind)
def test_few_queries_of_few_heads_are_the_decode_kernel_s(gpu):
    """Which holds 64 rows a key/value head."""
    for query_length, num_heads, algorithm in ((16, 32, "decode"), (16, 40, "prefill"), (5, 128, "prefill")):
        shape = dataclasses.replace(
            GEMMA, query_length=query_length, num_query_heads=num_heads, num_kv_heads=8, head_dim=128
        )
        assert plan_attention(shape, gpu).algorithm == algorithm


def test_a_call_without_queries_is_refused():
    reason = "the prefill kernel takes 1 query and more, got T = 0"
    assert hopper_prefill.refuse(dataclasses.replace(GEMMA, query_length=0), H200) == reason
