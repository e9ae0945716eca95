"""`fdpp-jax bench decode | attention | prefill | matmul`: from flags to one bench."""

import argparse
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fdpp_jax.cli.arguments import (
    BUNDLED,
    DTYPES,
    Commands,
    add_batch,
    add_command,
    add_dtype,
    add_implementation,
    add_model_shapes,
    output_file,
    size,
)
from fdpp_jax.cli.checkpoints import keep_compiled, model_config
from fdpp_jax.cli.output import print_table

if TYPE_CHECKING:
    from fdpp_jax.bench.attention import AttentionCase, Lengths
    from fdpp_jax.bench.prefill import PrefillCase
    from fdpp_jax.bench.report import BenchReport
    from fdpp_jax.models import DecoderConfig
    from fdpp_jax.plans.device import Device

_DECODE_EXAMPLES = """\
  fdpp-jax bench decode --model llama-2-7b --batch 1 --context 1024
  fdpp-jax bench decode --steps 16    the bundled tiny model: sensible on a CPU too
  fdpp-jax bench decode --model llama-3-8b --batch 8 --context 1536 --steps 512 --generate greedy top-p
  fdpp-jax bench decode --model llama-2-7b --implementation triton       on Hopper, too: all kernels are Triton's
"""
_ATTENTION_EXAMPLES = """\
  fdpp-jax bench attention                           the standard table, a line a shape (some minutes on a GPU)
  fdpp-jax bench attention --quick --only 32/8       of it the shapes that hold this text, ours and the floor only
  fdpp-jax bench attention --batch 8 --context 4096 --num-kv-heads 8     one shape, a line a kernel
  fdpp-jax bench attention --batch 8 --num-kv-heads 8 --capacity 8192 --lengths mixed --page-size 64
  fdpp-jax bench attention --batch 8 --kv-dtype int8 --scale-per token --json record.json
  fdpp-jax bench attention --implementation triton --json record.json    on Hopper, too: Triton's kernels
"""
_PREFILL_EXAMPLES = """\
  fdpp-jax bench prefill                             the standard table, a line a shape (some minutes on a GPU)
  fdpp-jax bench prefill --quick --only "H 256"      of it the shapes that hold this text, the unified max only
  fdpp-jax bench prefill --query-length 512 --capacity 32768 --num-kv-heads 8       one shape, a line a kernel
  fdpp-jax bench prefill --query-length 8192 --window 4096 --soft-cap 50 --json record.json
  fdpp-jax bench prefill --implementation triton --quick                 on Hopper, too: Triton's kernel
  fdpp-jax bench prefill --model gemma-2-9b --query-length 8192      milliseconds of a whole prefill, random weights
  fdpp-jax bench prefill --model tiny                the bundled tiny model: sensible on a CPU too
"""
_MATMUL_EXAMPLES = """\
  fdpp-jax bench matmul --m 8 --k 4096 --n 12288
  fdpp-jax bench matmul --m 1 --implementation triton    on Hopper, too: Triton's gemv and flat kernels
"""
# One shape of attention, where any of its flags is given.
_DEFAULT_SHAPE = dict(batch=1, num_heads=32, num_kv_heads=32, capacity=4096, head_dim=128, query_length=1)
_SHAPE_FLAGS = (*_DEFAULT_SHAPE, "dtype", "lengths", "page_size", "kv_dtype", "scale_per")
_DEFAULT_PREFILL = dict(batch=1, num_heads=32, num_kv_heads=32, query_length=4096)
_PREFILL_FLAGS = (
    *_DEFAULT_PREFILL,
    *("capacity", "head_dim", "dtype", "is_causal", "window", "soft_cap", "lengths", "page_size", "kv_dtype"),
)
# Those that a model leaves open.
_MODEL_PREFILL_FLAGS = ("batch", "query_length")


def add(commands: Commands) -> None:
    """Adds the command's parser, with one below it per bench."""
    parser = commands.add_parser("bench", help="measure the decode step or one kernel, beside plain XLA")
    kinds = parser.add_subparsers(title="what to measure", required=True, metavar="WHAT")

    summary = "milliseconds a token of a model with random weights, beside plain XLA and the read floor"
    decode = add_command(kinds, "decode", _run_decode, summary, _DECODE_EXAMPLES)
    add_model_shapes(decode, default=BUNDLED)
    add_batch(decode)
    decode.add_argument("--context", type=size, default=1024, help="live tokens in the KV cache (default: 1024)")
    decode.add_argument("--steps", type=size, default=64, help="decode steps measured together (default: 64)")
    decode.add_argument(
        "--generate",
        nargs="+",
        default=(),
        metavar="KIND",
        help="time generate as well, from its first token on: greedy, temperature, top-k, top-p, top-k-top-p",
    )

    summary = "microseconds of decode attention, of one shape or a table of them, beside JAX's own and the read floor"
    attention = add_command(kinds, "attention", _run_attention, summary, _ATTENTION_EXAMPLES)
    _add_attention_flags(attention)

    summary = "microseconds of prefill attention, of one shape or a table, or milliseconds of a model's prefill"
    prefill = add_command(kinds, "prefill", _run_prefill, summary, _PREFILL_EXAMPLES)
    _add_prefill_flags(prefill)

    summary = "microseconds of one x [M, K] @ w [K, N], beside XLA's own and the read floor"
    matmul = add_command(kinds, "matmul", _run_matmul, summary, _MATMUL_EXAMPLES)
    matmul.add_argument("--m", type=size, default=8, help="rows (default: 8)")
    matmul.add_argument("--k", type=size, default=4096, help="contraction (default: 4096)")
    matmul.add_argument("--n", type=size, default=12288, help="columns (default: 12288)")
    add_dtype(matmul)
    matmul.add_argument(
        "--order",
        choices=("kn", "nk"),
        default="nk",
        help="how w is stored: [K, N] or [N, K] (default: nk, as models do)",
    )

    for kind in (decode, attention, prefill, matmul):
        add_implementation(kind, "ours are the kernels")
        kind.add_argument(
            "--json",
            type=output_file,
            metavar="FILE",
            help="also write the numbers, with device, versions and commit",
        )


def _add_attention_flags(parser: argparse.ArgumentParser) -> None:
    """Any flag of the first group means one shape instead of the table."""
    shape = _add_shape_flags(parser, capacity="4096")
    shape.add_argument(
        "--query-length",
        type=size,
        metavar="T",
        help="the last T tokens, at most 16, attend, causally: speculation (default: 1)",
    )
    shape.add_argument(
        "--lengths",
        type=_lengths,
        metavar="full|mixed|N",
        help="live keys: all, from 64 to the capacity, or N of each sequence (default: full)",
    )
    shape.add_argument("--scale-per", choices=("head", "token"), help="scales of --kv-dtype (default: head)")


def _add_prefill_flags(parser: argparse.ArgumentParser) -> None:
    shape = _add_shape_flags(parser, capacity="as many as queries")
    shape.add_argument(
        "--query-length",
        type=size,
        metavar="T",
        help="queries, the last of their sequence's live keys; without --model more than 16 (default: 4096)",
    )
    shape.add_argument(
        "--window", type=size, metavar="W", help="keys that a query sees, its own included (default: all)"
    )
    shape.add_argument("--soft-cap", type=float, metavar="C", help="scores become C tanh(score / C) (default: none)")
    shape.add_argument(
        "--not-causal", dest="is_causal", action="store_const", const=False, help="each query sees all keys"
    )
    shape.add_argument(
        "--lengths",
        type=size,
        metavar="N",
        help="N live keys per sequence, as an array (default: all, not given)",
    )
    model = parser.add_argument_group(
        "a whole prefill of a model (with --batch and --query-length, by default the model's positions, at most 8192)"
    )
    add_model_shapes(model, default=None)
    model.add_argument(
        "--prefill-chunk-size", type=size, metavar="T", help="tokens of a row that run at once (default: as planned)"
    )


def _add_shape_flags(parser: argparse.ArgumentParser, *, capacity: str) -> argparse._ArgumentGroup:
    """The flags that all shapes of attention have, and those of a table; returns the group of one shape."""
    shape = parser.add_argument_group("one shape (any of these)")
    shape.add_argument("--batch", type=size, metavar="B", help="sequences (default: 1)")
    shape.add_argument("--num-heads", type=size, metavar="N", help="query heads (default: 32)")
    shape.add_argument("--num-kv-heads", type=size, metavar="K", help="key/value heads (default: 32)")
    shape.add_argument(
        "--capacity",
        "--context",
        type=size,
        metavar="S",
        help=f"keys that a sequence has room for (default: {capacity})",
    )
    shape.add_argument("--head-dim", type=size, metavar="H", help="default: 128")
    shape.add_argument("--dtype", choices=DTYPES, help="default: bfloat16")
    shape.add_argument("--page-size", type=size, metavar="P", help="pages of P keys anywhere in a pool (default: none)")
    shape.add_argument("--kv-dtype", choices=("int8", "float8_e4m3fn"), help="of a quantised cache")

    table = parser.add_argument_group("the table (none of those)")
    table.add_argument("--only", metavar="TEXT", help="of the table the shapes whose label holds TEXT")
    parser.add_argument("--quick", action="store_true", help="leave out ablations and peers")
    return shape


def _lengths(text: str) -> "Lengths":
    if text == "full":
        return "full"
    if text == "mixed":
        return "mixed"
    try:
        return size(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected full, mixed or a number, got {text!r}") from None


def _run_decode(args: argparse.Namespace) -> None:
    from fdpp_jax.plans import device

    running = device.current()
    config = _model_shapes(args.model or BUNDLED, "decode", "without --model", running)
    from fdpp_jax.bench.decode import bench_decode

    keep_compiled()
    sizes = dict(batch=args.batch, context=args.context, steps=args.steps)
    options = dict(implementation=args.implementation, generate=args.generate)
    _print_report(bench_decode(config, **sizes, **options), args.json)


def _model_shapes(model: str | pathlib.Path, bench: str, bundled: str, running: "Device") -> "DecoderConfig":
    """The shapes of the model to time; `bundled` says how the bundled one is asked for.

    Raises:
      ValueError: There is no such model, or it is too large for what JAX runs on.
    """
    config = model_config(model)
    if not running.is_gpu and model != BUNDLED:
        raise ValueError(
            f"bench {bench} --model {model} needs a GPU, this is {running.kind}; the bundled model, {bundled}, does not"
        )
    return config


def _run_attention(args: argparse.Namespace) -> None:
    from fdpp_jax.plans import device

    running = device.current()
    given = _given_shape(args, _SHAPE_FLAGS, "attention", running)
    if "scale_per" in given and "kv_dtype" not in given:
        raise ValueError("--scale-per belongs to --kv-dtype")
    from fdpp_jax.bench import attention

    if given:
        if "scale_per" in given:
            given["scales"] = given.pop("scale_per")
        case = attention.attention_case(**_DEFAULT_SHAPE | given)
        report = attention.bench_attention(case, quick=args.quick, implementation=args.implementation)
    else:
        cases = _cases_with(args.only, attention.TABLE)
        options = dict(quick=args.quick, record_path=args.json, implementation=args.implementation)
        report = attention.bench_attention_table(cases, **options)
    _print_report(report, args.json)


def _run_prefill(args: argparse.Namespace) -> None:
    from fdpp_jax.plans import device

    running = device.current()
    if args.model is not None:
        _run_model_prefill(args, running)
        return
    if args.prefill_chunk_size is not None:
        raise ValueError("--prefill-chunk-size belongs to --model")
    given = _given_shape(args, _PREFILL_FLAGS, "prefill", running)
    from fdpp_jax.bench import prefill

    if given:
        case = prefill.prefill_case(**_DEFAULT_PREFILL | given)
        report = prefill.bench_prefill(case, quick=args.quick, implementation=args.implementation)
    else:
        cases = _cases_with(args.only, prefill.TABLE)
        options = dict(quick=args.quick, record_path=args.json, implementation=args.implementation)
        report = prefill.bench_prefill_table(cases, **options)
    _print_report(report, args.json)


def _run_model_prefill(args: argparse.Namespace, running: "Device") -> None:
    """Without `keep_compiled`: the report has the seconds of compilation."""
    others = [name for name in (*_PREFILL_FLAGS, "only") if name not in _MODEL_PREFILL_FLAGS]
    if refused := [_flag(name) for name in others if getattr(args, name) is not None]:
        raise ValueError(f"--model, a whole prefill, takes its shapes from the model; got {', '.join(refused)}")
    config = _model_shapes(args.model, "prefill", "--model tiny", running)
    from fdpp_jax.bench import prefill_model

    report = prefill_model.bench_model_prefill(
        config,
        batch=1 if args.batch is None else args.batch,
        query_length=args.query_length,
        prefill_chunk_size=args.prefill_chunk_size,
        quick=args.quick,
        implementation=args.implementation,
    )
    _print_report(report, args.json)


def _flag(name: str) -> str:
    return "--not-causal" if name == "is_causal" else "--" + name.replace("_", "-")


def _given_shape(args: argparse.Namespace, flags: Sequence[str], bench: str, running: "Device") -> dict[str, Any]:
    """The flags of one shape that are given; none where the table is meant.

    Raises:
      ValueError: They do not go with --only, or the table needs a GPU.
    """
    given = {name: value for name in flags if (value := getattr(args, name)) is not None}
    if given and args.only is not None:
        raise ValueError("--only picks shapes of the table, and does not go with the flags of one shape")
    if not given and not running.is_gpu:
        small = "--num-heads 4 --num-kv-heads 2 " + ("--context 256" if bench == "attention" else "--query-length 64")
        raise ValueError(
            f"the table of bench {bench} needs a GPU, this is {running.kind}; try one small shape: {small}"
        )
    return given


def _cases_with[C: "AttentionCase | PrefillCase"](text: str | None, table: Sequence[C]) -> list[C]:
    """The shapes of a table whose label holds a text; all without one.

    Raises:
      ValueError: There are none.
    """
    cases = [case for case in table if text is None or text in case.label]
    if not cases:
        labels = "; ".join(case.label for case in table)
        raise ValueError(f"--only {text!r} is in no label of the table: {labels}")
    return cases


def _run_matmul(args: argparse.Namespace) -> None:
    from fdpp_jax.bench.matmul import bench_matmul
    from fdpp_jax.plans.shapes import MatmulShape

    shape = MatmulShape(args.m, args.k, args.n, args.dtype, args.order)
    _print_report(bench_matmul(shape, implementation=args.implementation), args.json)


def _print_report(report: "BenchReport", path: str | None) -> None:
    print_table(report.title, report.columns, report.rows)
    if path is not None:
        report.save(path)
