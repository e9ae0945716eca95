"""`fdpp-jax tune`: measures matmuls, and writes a table from which later plans answer."""

import argparse
import dataclasses
import math
import pathlib
import re
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fdpp_jax import progress
from fdpp_jax.cli.arguments import Commands, add_command, add_dtype, add_implementation, model
from fdpp_jax.cli.checkpoints import model_config
from fdpp_jax.cli.output import print_table

if TYPE_CHECKING:
    from fdpp_jax.bench.tuning import Weight
    from fdpp_jax.plans.device import Device
    from fdpp_jax.plans.tables import Table

_EXAMPLES = """\
  fdpp-jax tune                                       Llama 2 and 3, for yourself: later runs on this GPU find it
  fdpp-jax tune --model llama-3-8b --budget 4         what four minutes are enough for; the same command goes on
  fdpp-jax tune --model ./my-checkpoint --weights 4096x14336
  fdpp-jax tune --output ./tables                     then FDPP_TUNED_DIR=./tables
  fdpp-jax tune --implementation triton               on Hopper, too: a table beside that of Mosaic GPU's kernels
"""
_DEFAULT_MODELS = ("llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3-8b")
_FEW_ROWS, _MOST_ROWS = 16, 64


def add(commands: Commands) -> None:
    """Adds the command's parser."""
    summary = "measure which matmul kernel is the fastest on this GPU, weight by weight, for all later plans"
    parser = add_command(commands, "tune", run, summary, _EXAMPLES)
    parser.add_argument(
        "--model",
        action="append",
        type=model,
        metavar="PRESET-OR-DIR",
        help="tune its weights; more than one may be given, and a directory of a preset's name goes first (default: "
        f"{', '.join(_DEFAULT_MODELS)})",
    )
    parser.add_argument(
        "--weights",
        action="append",
        type=_size,
        metavar="KxN",
        help="tune a weight [K, N]; more than one may be given, with --model or without",
    )
    add_dtype(parser, ("bfloat16", "float16"))
    add_implementation(parser, "measure the kernels")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="stop when used up (default: no limit)")
    parser.add_argument(
        "--output", metavar="DIR", help="where the table lies (default: FDPP_TUNED_DIR, else ~/.cache/fdpp_jax/tuned)"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over: leave out what the table has instead of adding to it"
    )


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected KxN such as 4096x12288, got {text!r}")
    return int(match[1]), int(match[2])


def run(args: argparse.Namespace) -> None:
    """Measures the weights that the flags name, writes the table after each, and prints the result.

    Raises:
      ValueError: A flag is wrong, no kernel runs on the device or takes a weight, or the table there is malformed.
      NotImplementedError: --implementation has no kernels for the device.
      KeyboardInterrupt: Ctrl-C; the table has all weights but the one at work.
    """
    names = args.model or (() if args.weights else _DEFAULT_MODELS)
    configs = {str(name): model_config(name) for name in names}
    started = time.monotonic()
    if args.budget is not None and not 0 < args.budget < math.inf:
        raise ValueError(f"--budget must be positive, got {args.budget:g}")
    from fdpp_jax.bench import tuning
    from fdpp_jax.bench.provenance import provenance
    from fdpp_jax.plans import backends, device, tables

    running = backends.only(args.implementation, device.current())
    weights = [weight for name, config in configs.items() for weight in tuning.weights_of(name, config)]
    weights = tuning.distinct(weights + [tuning.Weight(k, n, "weight") for k, n in args.weights or ()])
    _check_weights(weights, args.dtype, running)

    directory = pathlib.Path(args.output) if args.output else tables.user_directory()
    path = directory / tables.name_for(running)
    here = provenance()
    source = tables.Run(here["date"], here["versions"], here["commit"])
    table = tables.Table(here["device"] | dataclasses.asdict(running))
    if path.is_file() and not args.fresh:
        table = tables.load(path, running)
    todo = tuning.pending(weights, args.dtype, table, source)
    num_before, num_done = len(weights) - len(todo), 0
    if num_before:
        progress.say("tune", f"{path} has {num_before} of {len(weights)} weights; --fresh measures them again")

    deadline = math.inf if args.budget is None else started + 60 * args.budget
    with progress.bar("Tuning", len(weights), num_before) as update:
        steps = tuning.tune(
            todo,
            args.dtype,
            running,
            table,
            source,
            make_timer=tuning.weight_timer,
            deadline=deadline,
            phase=lambda weight, text: update(title=f"{weight}: {text}"),
        )
        try:
            for step in steps:
                table = step.table
                tables.save(table, path)
                num_done += 1
                for failure in step.failures:
                    progress.say("tune", f"does not run: {failure}")
                m1, m2 = tuning.switch_points(table.of_weight(step.weight.k, step.weight.n, args.dtype))
                progress.say("tune", f"{step.weight}: M1 {m1}, M2 {m2} ({time.monotonic() - started:.0f} s)")
                update(done=num_before + num_done)
        except KeyboardInterrupt:
            done = f"{num_done} of {len(todo)} weights were measured"
            raise KeyboardInterrupt(f"{done}; the same command goes on") from None
    _print_weights(weights, args.dtype, table)
    _print_costs(table, running, args.dtype)
    print(f"wrote {path}" if num_done else "nothing was measured")
    if missing := todo[num_done:]:
        print(f"the budget of {args.budget:g} min is used up, the same command goes on; missing:")
        print("\n".join(f"  {weight}" for weight in missing))


def _check_weights(weights: "Sequence[Weight]", dtype: str, running: "Device") -> None:
    """Raises ValueError unless the flat kernel runs on the device and takes every weight."""
    from fdpp_jax.plans.backends import no_kernel, with_kernels
    from fdpp_jax.plans.shapes import MatmulShape

    backend = with_kernels(running, "matmul")
    if backend is None:
        raise ValueError(f"there is nothing to tune here: {no_kernel(running)}")
    op = backend.matmul
    assert op is not None
    if (refusal := op.refuse(MatmulShape(8, 4096, 4096), running, "flat")) is not None:
        raise ValueError(f"there is nothing to tune here: {refusal}")
    for weight in weights:
        if (refusal := op.refuse(weight.shape(8, dtype), running, "flat")) is not None:
            raise ValueError(f"there is nothing to tune in {weight}: {refusal}")


def _print_weights(weights: "Sequence[Weight]", dtype: str, table: "Table") -> None:
    """The switch points of each weight, and what the fastest kernels cost beside the read floor and XLA's dot."""
    from fdpp_jax.bench import tuning

    rows = []
    for weight in weights:
        entries = table.of_weight(weight.k, weight.n, dtype)
        if not entries:
            continue
        few = [entry for entry in entries if entry.shape.m <= _FEW_ROWS]
        most = [entry for entry in entries if entry.shape.m <= _MOST_ROWS]
        best = {entry.shape: min(entry.time_us.values()) for entry in entries}
        savings = [entry.time_us["xla"] / best[entry.shape] for entry in few if "xla" in entry.time_us]
        worst = [max((best[e.shape] / e.floor_us for e in some), default=math.nan) for some in (few, most)]
        config = next((e.configs["flat"] for e in entries if e.shape.m == 8 and "flat" in e.configs), None)
        rows.append(
            (
                str(weight),
                *map(str, tuning.switch_points(entries)),
                f"{entries[0].floor_us:.1f}",
                *(f"{ratio:.2f}" for ratio in worst),
                f"{statistics.geometric_mean(savings):.2f}" if savings else "-",
                "-" if config is None else config.text,
            )
        )
    title = f"Fastest by rows, {dtype}: gemv below M1, XLA from M2 on, flat between"
    floors = (f"worst x floor, M <= {m}" for m in (_FEW_ROWS, _MOST_ROWS))
    columns = ("weight", "M1", "M2", "floor us", *floors, f"jnp.dot / best, M <= {_FEW_ROWS}", "flat at M = 8")
    if rows:
        print_table(title, columns, rows)


def _print_costs(table: "Table", running: "Device", dtype: str) -> None:
    """What one choice for all weights costs."""
    from fdpp_jax.bench import tuning

    rows = [
        (cost.choice, f"{cost.geomean:.3f}", f"{cost.worst:.2f}", cost.where)
        for cost in tuning.static_costs(table, running, dtype)
    ]
    title = "What a static choice costs: its time by that of the best for each matmul"
    if rows:
        print_table(title, ("one choice for all weights in the table", "geomean", "worst", "of"), rows)
