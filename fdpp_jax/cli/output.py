"""What commands print: the answer on stdout, as a table or as JSON, and the report on stderr."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from fdpp_jax.progress import say

if TYPE_CHECKING:
    from fdpp_jax.plans.backend import AttentionPlan, LayerPlan, MatmulPlan
    from fdpp_jax.plans.device import Device
    from fdpp_jax.plans.shapes import AttentionShape, LayerShape, MatmulShape

    type Shape = AttentionShape | LayerShape | MatmulShape
    type Plan = AttentionPlan | LayerPlan | MatmulPlan
    type NamedPlan = tuple[str, Shape, Plan]

_WIDTH_WITHOUT_TERMINAL = 160


def report(line: str) -> None:
    """Says something that is not the answer, on stderr."""
    say("fdpp-jax", line)


def print_json(record: dict[str, Any]) -> None:
    """Prints one JSON object."""
    print(json.dumps(record, indent=2, ensure_ascii=False))


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, file: TextIO | None = None
) -> None:
    """Prints cells under their headings; to stdout, unless a file is given."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: the brackets of a shape are no markup
    file = file or sys.stdout
    Console(file=file, width=None if file.isatty() else _WIDTH_WITHOUT_TERMINAL).print(table)


def print_plans(plans: "Sequence[NamedPlan]", title: str, *, file: TextIO | None = None) -> None:
    """Prints a line per kernel, as `models.model_plans` lists those of a step; to stdout, unless a file is given."""
    print_table(
        title,
        ("kernel", "shape", "runs", "config", "why"),
        [(name, _shape_text(shape), _runs_text(plan), _config_text(plan), plan.reason) for name, shape, plan in plans],
        file=file,
    )


def plan_records(plans: "Sequence[NamedPlan]") -> list[dict[str, Any]]:
    """The same for JSON."""
    return [
        {
            "kernel": name,
            "shape": dataclasses.asdict(shape),
            "backend": plan.backend,
            "algorithm": plan.algorithm,
            "config": None if plan.config is None else dataclasses.asdict(plan.config),
            "reason": plan.reason,
        }
        for name, shape, plan in plans
    ]


def kernels_line(plans: "Sequence[NamedPlan]", running: "Device") -> str:
    """One line on the kernels of a step: which run, and what is left to plain XLA."""
    from fdpp_jax.plans.backends import no_kernel

    ours = [name for name, _, plan in plans if plan.backend != "xla"]
    others = [name for name, _, plan in plans if plan.backend == "xla"]
    if not ours:
        why = f": {running.why_no_triton or no_kernel(running)}" if running.is_gpu else ""
        return f"kernels: none on {running.kind}, plain XLA computes all{why} (--verbose says more)"
    rest = f"; plain XLA for {', '.join(others)}" if others else ""
    return f"kernels: {', '.join(ours)} on {running.kind}{rest} (--verbose says why)"


def _shape_text(shape: "Shape") -> str:
    from fdpp_jax.plans.shapes import LayerShape, MatmulShape

    if isinstance(shape, MatmulShape):
        return f"[{shape.m}, {shape.k}] @ [{shape.k}, {shape.n}]"
    heads = f"{shape.num_query_heads}/{shape.num_kv_heads}"
    if isinstance(shape, LayerShape):
        return f"B {shape.batch}, D {shape.hidden_size}, F {shape.intermediate_size}, N/K {heads}, H {shape.head_dim}"
    queries = f"T {shape.query_length}, " if shape.query_length > 1 else ""
    return f"B {shape.batch}, N/K {heads}, {queries}S {shape.capacity}, H {shape.head_dim}"


def _runs_text(plan: "Plan") -> str:
    """Backend and algorithm, such as "mosaic_gpu flat" or "xla cudnn"."""
    return f"{plan.backend} {plan.algorithm}"


def _config_text(plan: "Plan") -> str:
    """ "num_ctas 132, block_n 64", without fields at zero; of several kernels "o (64 x 128, ...), qkv (...)"."""
    if plan.config is None:
        return "-"
    settings = {field.name: getattr(plan.config, field.name) for field in dataclasses.fields(plan.config)}
    texts = {name: x if isinstance(x, int | str | None) else f"({x.text})" for name, x in settings.items() if x != 0}
    return ", ".join(f"{name} {text}" for name, text in texts.items())
