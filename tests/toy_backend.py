"""A backend in a few lines: what a new one has to bring. Attention of one query, and few rows, on an A100."""

import dataclasses

import jax

from fdpp_jax.ops import reference
from fdpp_jax.plans.backend import AttentionOp, AttentionPlan, Backend, MatmulOp, MatmulPlan

# What stands in a file of plans/.


def _refuse(shape, device, algorithm):
    del algorithm
    if device.arch != "sm_80":
        return f"no toy for {device.arch}"
    return None if shape.query_length == 1 else "the toy takes one query"


def _refuse_matmul(shape, device, algorithm):
    del algorithm
    return None if device.arch == "sm_80" and shape.m <= 16 else f"no toy for {device.arch} and M = {shape.m}"


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """Tiles of the toy's matmul."""

    num_warps: int = 4


BACKEND = Backend(
    name="toy",
    architectures=("sm_80",),
    run="toy_backend",
    attention=AttentionOp(
        configs={"toy": None},
        algorithm=lambda *_: "toy",
        refuse=_refuse,
        config=lambda *_: None,
        plan=lambda shape, device, why: AttentionPlan("toy", "toy", None, "a toy"),
        recomputes=("cond",),
        weights_dtype=lambda _: "float32",
    ),
    matmul=MatmulOp(
        configs={"flat": ToyConfig},  # as an algorithm of Mosaic GPU's is called, too
        algorithm=lambda *_: "flat",
        refuse=_refuse_matmul,
        config=lambda *_: ToyConfig(),
        plan=lambda shape, device, why: MatmulPlan("toy", "flat", ToyConfig(), "a toy"),
        refuse_config=lambda *_: None,
        candidates=lambda *_: [ToyConfig()],
        fit=lambda shape, device, config: config,
    ),
)

# What stands in a folder of kernels.

calls = []


def attention(arrays, options, plan, *, recompute=None, redone=None, starts_early=False):
    """As kernels are, without a derivative of its own."""
    assert recompute is None
    assert redone is None
    assert not starts_early
    calls.append(plan)

    @jax.custom_jvp
    def kernel(arrays):
        return reference.attention(arrays, options)

    @kernel.defjvp
    def _no_derivative(*_):
        raise AssertionError("a kernel has no derivative")

    return kernel(arrays)


def matmul(x, w, plan, *, out_dtype, w_order):
    assert plan.config == ToyConfig()
    calls.append(plan)
    return reference.matmul(x, w, out_dtype, w_order)
