"""`fdpp-jax plan`: which kernels a decode step and a prefill would run on a device, and why."""

import argparse
from typing import Any

from fdpp_jax.cli.arguments import Commands, add_batch, add_command, add_dtype, add_model_shapes, size
from fdpp_jax.cli.checkpoints import model_config
from fdpp_jax.cli.output import plan_records, print_json, print_plans

_EXAMPLES = """\
  fdpp-jax plan --model llama-2-7b --batch 8 --context 4096 --device A100
  fdpp-jax plan --model llama-3-8b --device H200
  fdpp-jax plan --model qwen3-8b --device H100 --json
"""
_DEFAULT_MODEL = "llama-2-7b"


def add(commands: Commands) -> None:
    """Adds the command's parser."""
    summary = "show which kernels a decode step and a prefill would run, and why; needs no GPU and no checkpoint"
    parser = add_command(commands, "plan", run, summary, _EXAMPLES)
    add_model_shapes(parser, default=_DEFAULT_MODEL)
    add_batch(parser)
    parser.add_argument(
        "--context",
        type=size,
        help="slots of the KV cache, and tokens of the prefill (default: 4096, or as many as the model has positions)",
    )
    parser.add_argument("--device", help="such as A100, H200 or MI300X (default: the one JAX runs on)")
    add_dtype(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> None:
    """Prints the plans."""
    model = args.model or _DEFAULT_MODEL
    config = model_config(model)
    from fdpp_jax import models
    from fdpp_jax.models.checks import check_context, positive_int
    from fdpp_jax.plans import device
    from fdpp_jax.plans.shapes import AttentionShape

    limit = config.position_limit
    context = min(4096, limit or 4096) if args.context is None else positive_int("context", args.context)
    check_context(context, limit)
    target = device.by_name(args.device) if args.device is not None else device.current()
    sizes: dict[str, Any] = dict(batch=args.batch, capacity=context, device=target, dtype=args.dtype)
    step = models.model_plans(config, **sizes)
    plans = [*step, *models.prefill_plans(config, length=context, **sizes)]
    if args.json:
        settings = {"model": str(model), "device": target.kind, "batch": args.batch, "context": context}
        print_json({**settings, "dtype": args.dtype, "kernels": plan_records(plans)})
        return
    is_online = any(isinstance(shape, AttentionShape) and shape.is_online for _, shape, _ in step)
    softmax = "online softmax" if is_online else "a unified max"
    title = (
        f"{model} on {target.kind}: one decode step with {softmax}, and a prefill of {context} tokens in pieces of T "
        f"tokens; batch {args.batch}, context {context}, {args.dtype}"
    )
    print_plans(plans, title)
