"""Prefill attention on Hopper (`pallas.prefill_attention`): its config, what it refuses, and the rule that plans it.

Measured: docs/experiments/prefill.md.
"""

import dataclasses

from fdpp_jax.plans import hopper
from fdpp_jax.plans.backend import AttentionPlan
from fdpp_jax.plans.device import Device
from fdpp_jax.plans.shapes import AttentionShape, cdiv, round_up
from fdpp_jax.plans.xla import refuse_cudnn

MIN_QUERY_LENGTH = 17  # the decode kernel takes fewer
ROWS = 64  # queries per warpgroup: the rows of a wgmma
CONSUMERS = 2  # warpgroups that compute


@dataclasses.dataclass(frozen=True)
class PrefillAttentionConfig:
    """Blocks of `pallas.prefill_attention`.

    Attributes:
      block_kv: Keys per block, a multiple of 64.
      num_stages: Stages of the ring of key and value blocks.
    """

    block_kv: int
    num_stages: int

    @property
    def block_q(self) -> int:
        """Queries per CTA."""
        return ROWS * CONSUMERS

    def smem_bytes(self, shape: AttentionShape) -> int:
        """Shared memory per CTA: the ring, the queries, a number per row."""
        row_bytes = 2 * round_up(shape.head_dim, 64)
        return (self.num_stages * 2 * self.block_kv + self.block_q) * row_bytes + 4 * self.block_q


def prefill_attention_config(shape: AttentionShape) -> PrefillAttentionConfig:
    """Blocks by rule: as wide as the registers hold, and as many as the shared memory does."""
    if shape.head_dim > 128:
        return PrefillAttentionConfig(64, 2)
    return PrefillAttentionConfig(128, 4 if shape.head_dim <= 64 else 2)


def refuse(shape: AttentionShape, device: Device, algorithm: str | None = "prefill") -> str | None:
    """Why the kernel cannot compute `shape` on `device`, or None if it can; see `backend.Op`."""
    refusal = hopper.refuse_device(device) or _refuse_shape(shape)
    if refusal is None and (num_bytes := prefill_attention_config(shape).smem_bytes(shape)) > device.smem_bytes:
        return f"the prefill kernel needs {num_bytes} bytes of shared memory, a CTA gets {device.smem_bytes}"
    if refusal is None and algorithm is None and shape.is_online and refuse_cudnn(shape, device) is None:
        return "without a unified max cuDNN is as fast as the prefill kernel, and has a gradient in blocks"
    return refusal


def _refuse_shape(shape: AttentionShape) -> str | None:
    if shape.query_length < MIN_QUERY_LENGTH:
        return f"the prefill kernel takes {MIN_QUERY_LENGTH} queries and more, got T = {shape.query_length}"
    if shape.has_bias or shape.has_mask:
        return "the prefill kernel takes no bias and no mask as an array"
    if shape.dtype not in hopper.DTYPES:
        return f"the prefill kernel takes {' or '.join(hopper.DTYPES)}, got {shape.dtype}"
    if shape.kv_dtype not in (None, shape.dtype) or shape.page_size is not None:
        return "the prefill kernel takes no quantised or paged cache"
    if shape.head_dim not in hopper.HEAD_DIMS:
        return f"the prefill kernel takes head dims {hopper.HEAD_DIMS}, got H = {shape.head_dim}"
    return hopper.refuse_scores(shape, "prefill")


def plan(shape: AttentionShape, device: Device) -> AttentionPlan:
    """The rule's plan of a shape that is not refused."""
    config = prefill_attention_config(shape)
    num_ctas = shape.batch * shape.num_query_heads * cdiv(shape.query_length, config.block_q)
    reason = f"{config.block_q} queries of a head per CTA: {num_ctas} on {device.num_sms} SMs"
    return AttentionPlan(hopper.NAME, "prefill", config, reason, recompute="launch")
