"""`fdpp-jax generate | calibrate | tune | plan | bench | info`: arguments in, text and tables out.

Heavy imports stand inside the commands, so that `--help` answers at once.
"""

import argparse
import dataclasses
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import fdpp_jax
from fdpp_jax import cli_bench, cli_calibrate, cli_generate, cli_tune, cli_types

if TYPE_CHECKING:
    from fdpp_jax.config import AttentionPlan, AttentionShape, LayerPlan, LayerShape, MatmulPlan, MatmulShape
    from fdpp_jax.device import Device
    from fdpp_jax.models import DecoderConfig
    from fdpp_jax.timing import BenchReport

    type Shape = AttentionShape | LayerShape | MatmulShape
    type Plan = AttentionPlan | LayerPlan | MatmulPlan

_EXIT_ERROR = 2
_EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
_STREAM_CHUNK = 8  # tokens between two lines of communication with the device: lively, and still cheap
_DTYPES = ("bfloat16", "float16", "float32")
_BUNDLED = "tiny"
_PLANNED = "llama-2-7b"
_WIDTH_WITHOUT_TERMINAL = 160


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: Arguments without the program's name; None takes the process's.

    Returns:
      The exit code: 0, 2 for an error that the user can mend, 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        print(": ".join(["\nfdpp-jax: interrupted", *map(str, stop.args)]), file=sys.stderr)
        return _EXIT_INTERRUPTED
    except BrokenPipeError:  # e.g. `| head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"fdpp-jax: error: {error}", file=sys.stderr)
        return _EXIT_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fdpp-jax",
        description="Decode LLMs of the Hugging Face hub in JAX with FlashDecoding++'s kernels.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fdpp-jax {fdpp_jax.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_calibrate(commands)
    _add_tune(commands)
    _add_plan(commands)
    _add_bench(commands)
    _add_info(commands)
    return parser


_EXAMPLES = """\
examples:
  fdpp-jax generate --prompt "def "                     the bundled tiny model, on whatever device there is
  fdpp-jax generate --model ./Llama-2-7b-hf --prompt "The sea"
  fdpp-jax calibrate --model ./Llama-2-7b-hf --data ./texts
  fdpp-jax plan --model llama-2-7b --batch 8 --device A100
  fdpp-jax bench decode --model llama-2-7b --context 1024
  fdpp-jax info
"""


def _add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], summary: str, examples: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_generate(commands: Any) -> None:
    parser = _add_command(
        commands,
        "generate",
        _generate,
        "continue prompts, then say how fast it was and which kernels ran",
        cli_generate.GENERATE_EXAMPLES,
    )
    _add_checkpoint(parser)
    cli_generate.add_prompt_flags(parser)
    cli_calibrate.add_softmax_flags(parser)
    parser.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-sequence token")


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=cli_types.model,
        metavar="DIR-OR-HUB-ID",
        help='checkpoint in Hugging Face format; a directory goes before a hub id, and before "tiny", the bundled one '
        "(default: the bundled one)",
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")


def _add_calibrate(commands: Any) -> None:
    summary = "record a model's attention scores on your texts, and find the phi for its unified max"
    parser = _add_command(commands, "calibrate", _calibrate, summary, cli_calibrate.CALIBRATE_EXAMPLES)
    _add_checkpoint(parser)
    cli_calibrate.add_calibrate_flags(parser)


def _add_tune(commands: Any) -> None:
    summary = "measure which matmul kernel is the fastest on this GPU, weight by weight, for all later plans"
    cli_tune.add_tune_flags(_add_command(commands, "tune", _tune, summary, cli_tune.TUNE_EXAMPLES))


def _add_plan(commands: Any) -> None:
    parser = _add_command(
        commands,
        "plan",
        _plan,
        "show which kernels a decode step would run on a device, and why; needs no GPU and no checkpoint",
        "  fdpp-jax plan --model llama-2-7b --batch 8 --context 4096 --device A100\n"
        "  fdpp-jax plan --model llama-3-8b --device H200\n",
    )
    _add_model_shape(parser, default=_PLANNED)
    parser.add_argument("--batch", type=int, default=1, help="sequences decoded together (default: 1)")
    parser.add_argument("--context", type=int, default=4096, help="slots of the KV cache (default: 4096)")
    parser.add_argument("--device", help="such as A100, H200 or MI300X (default: the one JAX runs on)")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="default: bfloat16")


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser("bench", help="measure the decode step or one kernel, beside plain XLA")
    kinds = parser.add_subparsers(title="what to measure", required=True, metavar="WHAT")

    decode = _add_command(
        kinds,
        "decode",
        _bench_decode,
        "milliseconds a token of a model with random weights, beside plain XLA and the read floor",
        "  fdpp-jax bench decode --model llama-2-7b --batch 1 --context 1024\n"
        "  fdpp-jax bench decode --steps 16    the bundled tiny model: sensible on a CPU too\n",
    )
    _add_model_shape(decode, default=_BUNDLED)
    decode.add_argument("--batch", type=int, default=1, help="sequences decoded together (default: 1)")
    decode.add_argument("--context", type=int, default=1024, help="live tokens in the KV cache (default: 1024)")
    decode.add_argument("--steps", type=int, default=64, help="decode steps measured together (default: 64)")

    attention = _add_command(
        kinds,
        "attention",
        _bench_attention,
        "microseconds of decode attention, of one shape or a table of them, beside JAX's own and the read floor",
        cli_bench.ATTENTION_EXAMPLES,
    )
    cli_bench.add_attention_flags(attention)

    matmul = _add_command(
        kinds,
        "matmul",
        _bench_matmul,
        "microseconds of one x [M, K] @ w [K, N], beside XLA's own and the read floor",
        "  fdpp-jax bench matmul --m 8 --k 4096 --n 12288\n",
    )
    matmul.add_argument("--m", type=int, default=8, help="rows (default: 8)")
    matmul.add_argument("--k", type=int, default=4096, help="contraction (default: 4096)")
    matmul.add_argument("--n", type=int, default=12288, help="columns (default: 12288)")
    matmul.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="default: bfloat16")
    matmul.add_argument(
        "--order",
        choices=("kn", "nk"),
        default="nk",
        help="how w is stored: [K, N] or [N, K] (default: nk, as models do)",
    )

    for kind in (decode, attention, matmul):
        kind.add_argument(
            "--json",
            type=cli_types.output_file,
            metavar="FILE",
            help="also write the numbers, with device, versions and commit",
        )


def _add_model_shape(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--model",
        type=cli_types.model,
        metavar="PRESET-OR-DIR",
        help='preset such as llama-2-7b, "tiny", or a directory with a config.json, which goes before a preset of its '
        f"name (default: the preset {default})",
    )


def _add_info(commands: Any) -> None:
    _add_command(commands, "info", _info, "show versions, the device, and which kernels it has", "  fdpp-jax info\n")


def _generate(args: argparse.Namespace) -> None:
    if args.phi is not None and args.softmax not in ("auto", "unified"):
        raise ValueError(f"--phi belongs to --softmax unified, got --softmax {args.softmax}")
    if args.system is not None and not args.chat:
        raise ValueError("--system belongs to --chat")
    if not all(args.prompt):
        raise ValueError("--prompt must not be empty")

    import jax
    import numpy as np

    from fdpp_jax import device, generation, models

    _keep_compiled()
    directory = _checkpoint_directory(args.model or _BUNDLED)
    # The tokenizer first: a wrong one shows in a moment, weights take a while.
    tokenizer = models.load_tokenizer(directory, vocab_size=models.loading.read_config(directory).vocab_size)
    prompts = [cli_generate.prompt(args, prompt, directory, tokenizer) for prompt in args.prompt]
    sampling = cli_generate.sampling(args, directory)
    running = device.current()
    dtype = args.dtype or ("bfloat16" if running.is_gpu else "float32")
    softmax, why = cli_calibrate.choose_softmax(args.softmax, args.phi, directory, dtype)
    model = models.load(directory, dtype=dtype)

    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    chunks = generation.stream(
        model,
        tokens,
        lengths,
        args.max_new_tokens,
        eos_ids=() if args.ignore_eos else tokenizer.eos_ids,
        **dataclasses.asdict(sampling),
        key=jax.random.key(args.seed),
        softmax=softmax,
        chunk_size=_STREAM_CHUNK,
    )
    print(f"fdpp-jax: softmax: {why}", file=sys.stderr)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = cli_generate.print_stream(chunks, prompts, tokenizer)
    for warning in caught:
        print(f"fdpp-jax: warning: {warning.message}", file=sys.stderr)
    cli_generate.print_speed(result, lengths.tolist())
    plans = models.model_plans(
        model.config, batch=len(prompts), capacity=result.cache_capacity, device=running, dtype=model.dtype
    )
    _print_plans(plans, f"Kernels of a decode step on {running.kind}")


def _calibrate(args: argparse.Namespace) -> None:
    from fdpp_jax import device

    _keep_compiled()
    directory = _checkpoint_directory(args.model or _BUNDLED)
    dtype = args.dtype or ("bfloat16" if device.current().is_gpu else "float32")
    tables, output = cli_calibrate.run_calibrate(args, directory, dtype)
    for title, columns, rows in tables:
        _print_table(title, columns, rows)
    print(f"wrote {output}")


def _tune(args: argparse.Namespace) -> None:
    configs = {str(name): _model_config(name) for name in cli_tune.model_names(args)}
    from fdpp_jax import device

    tables, end = cli_tune.run_tune(args, configs, device.current())
    for title, columns, rows in tables:
        _print_table(title, columns, rows)
    print(end)


def _keep_compiled() -> None:
    """What is compiled is kept for the next run, where the user has not said otherwise to JAX."""
    import jax

    from fdpp_jax import tuned_tables

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(tuned_tables.cache_directory() / "xla"))


def _checkpoint_directory(model: str | pathlib.Path) -> pathlib.Path:
    """The local directory of a checkpoint that has weights; a hub id is downloaded."""
    from fdpp_jax import models

    if isinstance(model, pathlib.Path):
        return model
    if model == _BUNDLED:
        return models.bundled_path()
    if model in models.PRESETS:
        raise ValueError(f"{model} is a preset of shapes without weights; expected a directory or a hub id")
    return models.resolve(model)


def _model_config(model: str | pathlib.Path) -> "DecoderConfig":
    """The shapes of a preset, of the bundled model or of a directory with a config.json."""
    from fdpp_jax import models

    if isinstance(model, pathlib.Path):
        return models.loading.read_config(model)
    if model == _BUNDLED:
        return models.loading.read_config(models.bundled_path())
    if model not in models.PRESETS:
        known = ", ".join([_BUNDLED, *models.PRESETS])
        raise ValueError(f"unknown model {model!r}: neither a directory with a config.json nor one of {known}")
    return models.PRESETS[model]


def _plan(args: argparse.Namespace) -> None:
    model = args.model or _PLANNED
    config = _model_config(model)
    from fdpp_jax import device, models

    target = device.by_name(args.device) if args.device else device.current()
    plans = models.model_plans(config, batch=args.batch, capacity=args.context, device=target, dtype=args.dtype)
    title = f"One decode step of {model} on {target.kind}: batch {args.batch}, context {args.context}, {args.dtype}"
    _print_plans(plans, title)


def _print_plans(plans: "Sequence[tuple[str, Shape, Plan]]", title: str) -> None:
    _print_table(
        title,
        ("kernel", "shape", "runs", "config", "why"),
        [
            (name, _shape_text(shape), plan.implementation, _config_text(plan), plan.reason)
            for name, shape, plan in plans
        ],
    )


def _shape_text(shape: "Shape") -> str:
    from fdpp_jax.config import LayerShape, MatmulShape

    if isinstance(shape, MatmulShape):
        return f"[{shape.m}, {shape.k}] @ [{shape.k}, {shape.n}]"
    heads = f"{shape.num_query_heads}/{shape.num_kv_heads}"
    if isinstance(shape, LayerShape):
        return f"B {shape.batch}, D {shape.hidden_size}, F {shape.intermediate_size}, N/K {heads}, H {shape.head_dim}"
    return f"B {shape.batch}, N/K {heads}, S {shape.capacity}, H {shape.head_dim}"


def _config_text(plan: "Plan") -> str:
    if plan.config is None:
        return "-"
    settings = dataclasses.asdict(plan.config).items()
    return ", ".join(f"{name} {value}" for name, value in settings if value != 0)  # nothing unused: not worth a line


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: brackets of a shape are no markup
    Console(width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL).print(table)


def _bench_decode(args: argparse.Namespace) -> None:
    from fdpp_jax import device

    running = device.current()
    model = args.model or _BUNDLED
    config = _model_config(model)
    if not running.is_gpu and model != _BUNDLED:
        raise ValueError(
            f"bench decode --model {model} needs a GPU, this is {running.kind}; the bundled model, without --model, "
            "does not"
        )
    from fdpp_jax import benchmark

    _keep_compiled()
    _warn_off_gpu(running)
    report = benchmark.bench_decode(config, batch=args.batch, context=args.context, steps=args.steps)
    _print_bench(report, args.json)


def _bench_attention(args: argparse.Namespace) -> None:
    from fdpp_jax import device

    running = device.current()
    run = cli_bench.attention_bench(args, running)
    _warn_off_gpu(running)
    _print_bench(run(), args.json)


def _bench_matmul(args: argparse.Namespace) -> None:
    from fdpp_jax import benchmark, device
    from fdpp_jax.config import MatmulShape

    _warn_off_gpu(device.current())
    _print_bench(benchmark.bench_matmul(MatmulShape(args.m, args.k, args.n, args.dtype, args.order)), args.json)


def _print_bench(report: "BenchReport", path: str | None) -> None:
    _print_table(report.title, report.columns, report.rows)
    if path is not None:
        report.save(path)


def _warn_off_gpu(running: "Device") -> None:
    if not running.is_gpu:
        print(f"fdpp-jax: warning: no GPU: these are numbers of {running.kind}, of no kernel", file=sys.stderr)


def _info(args: argparse.Namespace) -> None:
    import platform

    import jax

    from fdpp_jax import device, limits
    from fdpp_jax.config import AttentionShape, MatmulShape

    del args
    packages = ("fdpp-jax", "jax", "jaxlib", "flax", "numpy")
    versions = [("python", platform.python_version()), *((name, _version(name)) for name in packages)]
    _print_table("Versions", ("package", "version"), versions)
    running = device.current()
    figures = {"kind": running.kind, "devices": len(jax.devices()), "SMs or cores": running.num_sms}
    if running.is_gpu:
        figures |= {
            "architecture": running.arch,
            "shared memory a block": f"{running.smem_bytes >> 10} KiB",
            "last cache": f"{running.l2_bytes >> 20} MiB",
            "memory reads": f"{running.read_gbps:.0f} GB/s",
            "bfloat16 peak": f"{running.bf16_tflops:.0f} Tflop/s",
        }
    _print_table("Device", ("what", "figure"), [(name, str(value)) for name, value in figures.items()])

    attention = AttentionShape(1, 1, 1024, 32, 32, 128)
    refusals = {
        "decode attention (mosaic_gpu)": limits.refuse_mosaic_attention(attention, running),
        "flat matmul (flat)": limits.refuse_kernel_matmul(MatmulShape(8, 4096, 4096), running, "flat"),
        "gemv (gemv)": limits.refuse_kernel_matmul(MatmulShape(1, 4096, 4096), running, "gemv"),
    }
    rows = [(name, "yes" if refusal is None else f"no: {refusal}") for name, refusal in refusals.items()]
    _print_table("Kernels", ("kernel", "available"), [*rows, ("XLA (xla)", "yes")])


def _version(package: str) -> str:
    import importlib.metadata

    return fdpp_jax.__version__ if package == "fdpp-jax" else importlib.metadata.version(package)
