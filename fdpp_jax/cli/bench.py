"""`fdpp-jax bench decode | attention | matmul`: from flags to one bench."""

import argparse
from typing import TYPE_CHECKING, Any

from fdpp_jax.cli.arguments import (
    BUNDLED,
    DTYPES,
    Commands,
    add_batch,
    add_command,
    add_dtype,
    add_model_shapes,
    output_file,
)
from fdpp_jax.cli.checkpoints import keep_compiled, model_config
from fdpp_jax.cli.output import print_table, report

if TYPE_CHECKING:
    from fdpp_jax.bench.attention import Lengths
    from fdpp_jax.bench.report import BenchReport
    from fdpp_jax.plans.device import Device

_DECODE_EXAMPLES = """\
  fdpp-jax bench decode --model llama-2-7b --batch 1 --context 1024
  fdpp-jax bench decode --steps 16    the bundled tiny model: sensible on a CPU too
"""
_ATTENTION_EXAMPLES = """\
  fdpp-jax bench attention                           the standard table, a line a shape (some minutes on a GPU)
  fdpp-jax bench attention --quick --only 32/8       of it the shapes that hold this text, ours and the floor only
  fdpp-jax bench attention --batch 8 --context 4096 --num-kv-heads 8     one shape, a line a kernel
  fdpp-jax bench attention --batch 8 --num-kv-heads 8 --capacity 8192 --lengths mixed --page-size 64
  fdpp-jax bench attention --batch 8 --kv-dtype int8 --scale-per token --json record.json
"""
_MATMUL_EXAMPLES = "  fdpp-jax bench matmul --m 8 --k 4096 --n 12288\n"
# One shape of attention, where any of its flags is given.
_DEFAULT_SHAPE = dict(batch=1, num_heads=32, num_kv_heads=32, capacity=4096, head_dim=128, query_length=1)
_SHAPE_FLAGS = (*_DEFAULT_SHAPE, "dtype", "lengths", "page_size", "kv_dtype", "scale_per")


def add(commands: Commands) -> None:
    """Adds the command's parser, with one below it per bench."""
    parser = commands.add_parser("bench", help="measure the decode step or one kernel, beside plain XLA")
    kinds = parser.add_subparsers(title="what to measure", required=True, metavar="WHAT")

    summary = "milliseconds a token of a model with random weights, beside plain XLA and the read floor"
    decode = add_command(kinds, "decode", _run_decode, summary, _DECODE_EXAMPLES)
    add_model_shapes(decode, default=BUNDLED)
    add_batch(decode)
    decode.add_argument("--context", type=int, default=1024, help="live tokens in the KV cache (default: 1024)")
    decode.add_argument("--steps", type=int, default=64, help="decode steps measured together (default: 64)")

    summary = "microseconds of decode attention, of one shape or a table of them, beside JAX's own and the read floor"
    attention = add_command(kinds, "attention", _run_attention, summary, _ATTENTION_EXAMPLES)
    _add_attention_flags(attention)

    summary = "microseconds of one x [M, K] @ w [K, N], beside XLA's own and the read floor"
    matmul = add_command(kinds, "matmul", _run_matmul, summary, _MATMUL_EXAMPLES)
    matmul.add_argument("--m", type=int, default=8, help="rows (default: 8)")
    matmul.add_argument("--k", type=int, default=4096, help="contraction (default: 4096)")
    matmul.add_argument("--n", type=int, default=12288, help="columns (default: 12288)")
    add_dtype(matmul)
    matmul.add_argument(
        "--order",
        choices=("kn", "nk"),
        default="nk",
        help="how w is stored: [K, N] or [N, K] (default: nk, as models do)",
    )

    for kind in (decode, attention, matmul):
        kind.add_argument(
            "--json",
            type=output_file,
            metavar="FILE",
            help="also write the numbers, with device, versions and commit",
        )


def _add_attention_flags(parser: argparse.ArgumentParser) -> None:
    """Any flag of the first group means one shape instead of the table."""
    shape = parser.add_argument_group("one shape (any of these)")
    shape.add_argument("--batch", type=int, metavar="B", help="sequences (default: 1)")
    shape.add_argument("--num-heads", type=int, metavar="N", help="query heads (default: 32)")
    shape.add_argument("--num-kv-heads", type=int, metavar="K", help="key/value heads (default: 32)")
    shape.add_argument(
        "--capacity", "--context", type=int, metavar="S", help="keys that a sequence has room for (default: 4096)"
    )
    shape.add_argument("--head-dim", type=int, metavar="H", help="default: 128")
    shape.add_argument("--dtype", choices=DTYPES, help="default: bfloat16")
    shape.add_argument(
        "--query-length", type=int, metavar="T", help="the last T tokens attend, causally: speculation (default: 1)"
    )
    shape.add_argument(
        "--lengths",
        type=_lengths,
        metavar="full|mixed|N",
        help="live keys: all, from 64 to the capacity, or N of each sequence (default: full)",
    )
    shape.add_argument("--page-size", type=int, metavar="P", help="pages of P keys, anywhere in a pool (default: none)")
    shape.add_argument("--kv-dtype", choices=("int8", "float8_e4m3fn"), help="of a quantised cache")
    shape.add_argument("--scale-per", choices=("head", "token"), help="scales of --kv-dtype (default: head)")

    table = parser.add_argument_group("the table (none of those)")
    table.add_argument("--only", metavar="TEXT", help="of the table the shapes whose label holds TEXT")
    parser.add_argument("--quick", action="store_true", help="leave out ablations and peers")


def _lengths(text: str) -> "Lengths":
    if text == "full":
        return "full"
    if text == "mixed":
        return "mixed"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected full, mixed or a number, got {text!r}") from None


def _run_decode(args: argparse.Namespace) -> None:
    from fdpp_jax.plans import device

    running = device.current()
    model = args.model or BUNDLED
    config = model_config(model)
    if not running.is_gpu and model != BUNDLED:
        raise ValueError(
            f"bench decode --model {model} needs a GPU, this is {running.kind}; the bundled model, without --model, "
            "does not"
        )
    from fdpp_jax.bench.decode import bench_decode

    keep_compiled()
    _warn_off_gpu(running)
    _print_report(bench_decode(config, batch=args.batch, context=args.context, steps=args.steps), args.json)


def _run_attention(args: argparse.Namespace) -> None:
    from fdpp_jax.plans import device

    running = device.current()
    given: dict[str, Any] = {name: value for name in _SHAPE_FLAGS if (value := getattr(args, name)) is not None}
    if given and args.only is not None:
        raise ValueError("--only picks shapes of the table, and does not go with the flags of one shape")
    if "scale_per" in given and "kv_dtype" not in given:
        raise ValueError("--scale-per belongs to --kv-dtype")
    if not given and not running.is_gpu:
        raise ValueError(
            f"the table of bench attention needs a GPU, this is {running.kind}; try one small shape: "
            "--num-heads 4 --num-kv-heads 2 --context 256"
        )
    from fdpp_jax.bench import attention

    if given:
        if "scale_per" in given:
            given["scales"] = given.pop("scale_per")
        case = attention.attention_case(**_DEFAULT_SHAPE | given)
        _warn_off_gpu(running)
        report = attention.bench_attention(case, quick=args.quick)
    else:
        cases = [case for case in attention.TABLE if args.only is None or args.only in case.label]
        if not cases:
            labels = "; ".join(case.label for case in attention.TABLE)
            raise ValueError(f"--only {args.only!r} is in no label of the table: {labels}")
        report = attention.bench_attention_table(cases, quick=args.quick, record_path=args.json)
    _print_report(report, args.json)


def _run_matmul(args: argparse.Namespace) -> None:
    from fdpp_jax.bench.matmul import bench_matmul
    from fdpp_jax.plans import device
    from fdpp_jax.plans.shapes import MatmulShape

    _warn_off_gpu(device.current())
    _print_report(bench_matmul(MatmulShape(args.m, args.k, args.n, args.dtype, args.order)), args.json)


def _print_report(report: "BenchReport", path: str | None) -> None:
    print_table(report.title, report.columns, report.rows)
    if path is not None:
        report.save(path)


def _warn_off_gpu(running: "Device") -> None:
    if not running.is_gpu:
        report(f"warning: no GPU: these are numbers of {running.kind}, of no kernel")
