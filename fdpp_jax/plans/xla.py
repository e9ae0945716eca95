"""Plain XLA, which computes everything everywhere: attention by cuDNN where it can, else at once or in blocks."""

from fdpp_jax.plans.backend import AttentionOp, AttentionPlan, Backend, LayerPlan, MatmulOp, MatmulPlan, Op
from fdpp_jax.plans.device import Device
from fdpp_jax.plans.shapes import AttentionShape

NAME = "xla"
_CUDNN_DTYPES = ("bfloat16", "float16")
# Up to so many queries the scores are in proportion to the cache: they are not computed in blocks, and with a unified
# max in one pass.
MAX_SPLIT_QUERIES = 16
MAX_SPLIT_ROWS = 64  # query rows per key/value head
# The float32 reference holds all scores at once. Beyond so many bytes of them they are computed in blocks.
MAX_SCORE_BYTES = 256 << 20


def refuse_cudnn(shape: AttentionShape, device: Device) -> str | None:
    """Why cuDNN cannot compute `shape` on `device`, or None if it can."""
    if device.compute_capability < 80:
        return f"no cuDNN attention on {device.arch}"
    if shape.has_lengths:
        return "cuDNN lets NaN beyond the lengths through"
    if not (shape.batch and shape.query_length and shape.num_query_heads and shape.capacity):
        return "an axis of length 0 is not for cuDNN"
    if shape.returns_residual:
        return "cuDNN's log-sum-exp comes rounded to the query's dtype"
    if shape.has_starts:
        return "cuDNN has no first keys"
    if shape.has_mask:
        return "cuDNN lets NaN that a mask hides through"
    if shape.has_bias:
        return "no bias through cuDNN"
    if shape.page_size is not None or shape.kv_dtype not in (None, shape.dtype):
        return "no paged or quantised cache through cuDNN"
    if shape.has_sinks or shape.has_query_offset or shape.has_traced_scale:
        return "no sinks, query offset or traced scale through cuDNN"
    if shape.dtype not in _CUDNN_DTYPES:
        return f"cuDNN has no {shape.dtype}"
    if shape.local_window_size is not None or shape.logits_soft_cap is not None:
        return "no local window or soft cap through cuDNN"
    max_head_dim = 256 if device.compute_capability >= 90 else 128
    if shape.head_dim % 8 or shape.head_dim > max_head_dim:
        return f"cuDNN takes head dims up to {max_head_dim} in steps of 8, got H = {shape.head_dim}"
    return None


def leave_to_cudnn(shape: AttentionShape, device: Device, algorithm: str | None) -> str | None:
    """Why a prefill kernel that is not named leaves `shape` to cuDNN, or None if it does not."""
    if algorithm is None and shape.is_online and refuse_cudnn(shape, device) is None:
        return "without a unified max cuDNN is as fast as the prefill kernel, and has a gradient in blocks"
    return None


def _refuse_attention(shape: AttentionShape, device: Device, algorithm: str | None) -> str | None:
    return refuse_cudnn(shape, device) if algorithm == "cudnn" else None


def _rule_algorithm(shape: AttentionShape, device: Device) -> str:
    return _plan_attention(shape, device, "").algorithm


def _plan_attention(shape: AttentionShape, device: Device, why: str) -> AttentionPlan:
    why_not_cudnn = refuse_cudnn(shape, device)
    if why_not_cudnn is None:
        return AttentionPlan(NAME, "cudnn", None, f"cuDNN; {why}")
    return plan_without_cudnn(shape, f"{why_not_cudnn}; {why}")


def plan_without_cudnn(shape: AttentionShape, why: str) -> AttentionPlan:
    """XLA's own operations: the float32 reference, or blocks where its scores would take too much memory."""
    if has_large_scores(shape):
        size = f"{shape.score_bytes / 2**30:.2f} GiB of scores"
        return AttentionPlan(NAME, "blocks", None, f"in blocks, for the float32 reference would have {size}: {why}")
    return AttentionPlan(NAME, "reference", None, f"float32 reference: {why}")


def has_large_scores(shape: AttentionShape) -> bool:
    """Whether the float32 reference would hold more scores than `MAX_SCORE_BYTES`, of more than a few queries or rows.

    Those of fewer are no more than a part of the cache.
    """
    has_many = shape.query_length > MAX_SPLIT_QUERIES or shape.live_rows > MAX_SPLIT_ROWS
    return has_many and shape.score_bytes > MAX_SCORE_BYTES


BACKEND = Backend(
    name=NAME,
    architectures=(),
    run="fdpp_jax.ops.xla",
    attention=AttentionOp(
        configs={"cudnn": None, "blocks": None, "reference": None},
        algorithm=_rule_algorithm,
        refuse=_refuse_attention,
        config=lambda *_: None,
        plan=_plan_attention,
        recomputes=("cond",),
        weights_dtype=lambda _: "float32",
    ),
    matmul=MatmulOp(
        configs={"dot": None},
        algorithm=lambda *_: "dot",
        refuse=lambda *_: None,
        config=lambda *_: None,
        plan=lambda shape, device, why: MatmulPlan(NAME, "dot", None, why),
        refuse_config=lambda *_: None,
        candidates=lambda *_: [None],
        fit=lambda *_: None,
    ),
    layer=Op(
        configs={"unfused": None},
        algorithm=lambda *_: "unfused",
        refuse=lambda *_: None,
        config=lambda *_: None,
        plan=lambda shape, device, why: LayerPlan(NAME, "unfused", None, why),
    ),
)
