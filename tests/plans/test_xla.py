"""Which attention runs where there is no kernel of ours: cuDNN, or the reference."""

import dataclasses

import pytest

from fdpp_jax.heuristics import plan_attention
from fdpp_jax.plans.device import by_name
from fdpp_jax.plans.shapes import AttentionShape

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
    is_online=True,
)


def _prefill(**changes):
    return dataclasses.replace(PREFILL, **changes)


@pytest.mark.parametrize(
    ("shape", "device_name", "algorithm"),
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
        (_prefill(has_lengths=True), "A100", "reference"),
        *((_prefill(**{axis: 0}), "H200", "reference") for axis in ("batch", "query_length", "capacity")),
        (_prefill(num_query_heads=0), "H200", "reference"),
        (_prefill(logits_soft_cap=30.0), "A100", "reference"),
        (_prefill(local_window_size=(64, 0)), "A100", "reference"),
        (_prefill(page_size=16), "A100", "reference"),
        (_prefill(kv_dtype="int8", scales="head"), "A100", "reference"),
        (_prefill(has_sinks=True), "A100", "reference"),
        (_prefill(has_query_offset=True), "A100", "reference"),
        (_prefill(has_starts=True), "A100", "reference"),
        (_prefill(returns_residual=True), "A100", "reference"),
        (_prefill(kv_dtype="bfloat16"), "H200", "cudnn"),
        (DECODE, "A100", "reference"),
        (DECODE, "cpu", "reference"),
        (_prefill(query_length=4096, capacity=4096), "cpu", "blocks"),
        (_prefill(query_length=4096, capacity=4096, has_mask=True), "H200", "blocks"),
        (_prefill(query_length=16384, capacity=16384), "H200", "cudnn"),
        (dataclasses.replace(DECODE, query_length=16, batch=512), "A100", "reference"),
    ],
)
def test_xla_attention(shape, device_name, algorithm):
    plan = plan_attention(shape, dataclasses.replace(by_name(device_name), why_no_triton="no triton here"))
    assert plan.implementation == "xla"
    assert (plan.algorithm, plan.config) == (algorithm, None)


@pytest.mark.parametrize(("capacity", "algorithm"), [(4096, "reference"), (4097, "blocks")])
def test_blocks_begin_behind_256_mib_of_scores(capacity, algorithm):
    plan = plan_attention(_prefill(capacity=capacity, dtype="float32"), "H200")
    assert plan.algorithm == algorithm
    assert plan.reason.startswith(
        "float32 reference: cuDNN has no float32; "
        if algorithm == "reference"
        else "in blocks, for the float32 reference would have 0.25 GiB of scores: cuDNN has no float32; "
    )
