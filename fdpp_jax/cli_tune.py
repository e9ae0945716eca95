"""`fdpp-jax tune`: its flags, and from flags to a table of measured matmuls."""

import argparse
import contextlib
import math
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from fdpp_jax.cli_types import model

if TYPE_CHECKING:
    from fdpp_jax.device import Device
    from fdpp_jax.models import DecoderConfig
    from fdpp_jax.tuned_tables import Table
    from fdpp_jax.tuning import Weight

TUNE_EXAMPLES = """\
  fdpp-jax tune                                       Llama 2 and 3, for yourself: later runs on this GPU find it
  fdpp-jax tune --model llama-3-8b --budget 4         what four minutes are enough for; the same command goes on
  fdpp-jax tune --model ./my-checkpoint --weights 4096x14336
  fdpp-jax tune --output ./tables                     then FDPP_TUNED_DIR=./tables
"""
_DEFAULT_MODELS = ("llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3-8b")
_FEW_ROWS = 16

type CliTable = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, columns, rows


def add_tune_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `tune`."""
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
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="default: bfloat16")
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


def model_names(args: argparse.Namespace) -> Sequence[str | pathlib.Path]:
    """The models whose weights the flags ask for."""
    return args.model or (() if args.weights else _DEFAULT_MODELS)


def run_tune(
    args: argparse.Namespace, configs: "Mapping[str, DecoderConfig]", running: "Device"
) -> tuple[list[CliTable], str]:
    """Measures what the flags ask for, writes the table after every weight, and returns tables to print and an end.

    Args:
      args: The flags.
      configs: Of the models, by name.
      running: The device that is tuned.

    Raises:
      ValueError: A flag is wrong, no kernel runs on the device or takes a weight, or the table there is malformed.
      KeyboardInterrupt: Ctrl-C; the table has all weights but the one at work.
    """
    started = time.monotonic()
    if args.budget is not None and not 0 < args.budget < math.inf:
        raise ValueError(f"--budget must be positive, got {args.budget:g}")
    from fdpp_jax import limits, timing, tuned_tables, tuning
    from fdpp_jax.config import MatmulShape

    weights = [weight for name, config in configs.items() for weight in tuning.weights_of(name, config)]
    weights = tuning.distinct(weights + [tuning.Weight(k, n, "weight") for k, n in args.weights or ()])
    refusal = limits.refuse_kernel_matmul(MatmulShape(8, 4096, 4096), running, "flat")
    if refusal is not None:
        raise ValueError(f"there is nothing to tune here: {refusal}")
    for weight in weights:
        if (refusal := limits.refuse_kernel_matmul(weight.shape(8, args.dtype), running, "flat")) is not None:
            raise ValueError(f"there is nothing to tune in {weight}: {refusal}")

    directory = pathlib.Path(args.output) if args.output else tuned_tables.user_directory()
    path = directory / tuned_tables.file_name(running.kind)
    provenance = timing.provenance()
    run = tuned_tables.Run(provenance["date"], provenance["versions"], provenance["commit"])
    table = tuned_tables.Table(provenance["device"])
    if path.is_file() and not args.fresh:
        table = tuned_tables.load(path, running.kind)
    todo = tuning.pending(weights, args.dtype, table, run)
    if len(todo) < len(weights):
        _say(f"{path} has {len(weights) - len(todo)} of {len(weights)} weights; --fresh measures them again")

    deadline = math.inf if args.budget is None else started + 60 * args.budget
    num_done = 0
    with _bar(len(weights), len(weights) - len(todo)) as (advance, phase):
        steps = tuning.tune(
            todo, args.dtype, running, table, run, make_timer=tuning.weight_timer, deadline=deadline, phase=phase
        )
        try:
            for step in steps:
                table = step.table
                tuned_tables.save(table, path)
                num_done += 1
                for failure in step.failures:
                    _say(f"does not run: {failure}")
                m1, m2 = tuning.switch_points(table.of_weight(step.weight.k, step.weight.n, args.dtype))
                _say(f"{step.weight}: M1 {m1}, M2 {m2} ({time.monotonic() - started:.0f} s)")
                advance()
        except KeyboardInterrupt:
            done = f"{num_done} of {len(todo)} weights were measured"
            raise KeyboardInterrupt(f"{done}; the same command goes on") from None
    lines = [f"wrote {path}" if num_done else "nothing was measured"]
    if missing := todo[num_done:]:
        lines.append(f"the budget of {args.budget:g} min is used up, the same command goes on; missing:")
        lines += [f"  {weight}" for weight in missing]
    tables = [_weights_table(weights, args.dtype, table), _costs_table(table, running, args.dtype)]
    return [found for found in tables if found[2]], "\n".join(lines)


def _say(text: str) -> None:
    sys.stderr.write(f"tune: {text}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def _bar(total: int, done: int) -> "Iterator[tuple[Callable[[], None], Callable[[Weight, str], None]]]":
    """A bar on stderr, where that is a terminal; yields what advances it, and what tells it the weight and the work."""
    import rich.console
    import rich.progress

    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.MofNCompleteColumn())
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("Tuning", total=total, completed=done)
        yield (
            lambda: progress.advance(task),
            lambda weight, text: progress.update(task, description=f"{weight}: {text}"),
        )


def _weights_table(weights: "Sequence[Weight]", dtype: str, table: "Table") -> CliTable:
    from fdpp_jax import tuning
    from fdpp_jax.limits import MAX_FLAT_ROWS
    from fdpp_jax.tuned_tables import config_text

    rows = []
    for weight in weights:
        entries = table.of_weight(weight.k, weight.n, dtype)
        if not entries:
            continue
        few = [entry for entry in entries if entry.shape.m <= _FEW_ROWS]
        most = [entry for entry in entries if entry.shape.m <= MAX_FLAT_ROWS]
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
                "-" if config is None else config_text(config),
            )
        )
    title = f"Fastest by rows, {dtype}: gemv below M1, XLA from M2 on, flat between"
    floors = (f"worst x floor, M <= {m}" for m in (_FEW_ROWS, MAX_FLAT_ROWS))
    columns = ("weight", "M1", "M2", "floor us", *floors, f"jnp.dot / best, M <= {_FEW_ROWS}", "flat at M = 8")
    return title, columns, rows


def _costs_table(table: "Table", running: "Device", dtype: str) -> CliTable:
    from fdpp_jax import tuning

    rows = [
        (cost.choice, f"{cost.geomean:.3f}", f"{cost.worst:.2f}", cost.where)
        for cost in tuning.static_costs(table, running, dtype)
    ]
    title = "What a static choice costs: its time by that of the best for each matmul"
    return title, ("one choice for all weights in the table", "geomean", "worst", "of"), rows
