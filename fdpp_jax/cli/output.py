"""Tables that commands print."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fdpp_jax.plans.backend import AttentionPlan, LayerPlan, MatmulPlan
    from fdpp_jax.plans.shapes import AttentionShape, LayerShape, MatmulShape

    type Shape = AttentionShape | LayerShape | MatmulShape
    type Plan = AttentionPlan | LayerPlan | MatmulPlan

_WIDTH_WITHOUT_TERMINAL = 160


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints cells under their headings."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: the brackets of a shape are no markup
    Console(width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL).print(table)


def print_plans(plans: "Sequence[tuple[str, Shape, Plan]]", title: str) -> None:
    """Prints a line per kernel of a step, as `models.model_plans` lists them."""
    print_table(
        title,
        ("kernel", "shape", "runs", "config", "why"),
        [(name, _shape_text(shape), _runs_text(plan), _config_text(plan), plan.reason) for name, shape, plan in plans],
    )


def _shape_text(shape: "Shape") -> str:
    from fdpp_jax.plans.shapes import LayerShape, MatmulShape

    if isinstance(shape, MatmulShape):
        return f"[{shape.m}, {shape.k}] @ [{shape.k}, {shape.n}]"
    heads = f"{shape.num_query_heads}/{shape.num_kv_heads}"
    if isinstance(shape, LayerShape):
        return f"B {shape.batch}, D {shape.hidden_size}, F {shape.intermediate_size}, N/K {heads}, H {shape.head_dim}"
    return f"B {shape.batch}, N/K {heads}, S {shape.capacity}, H {shape.head_dim}"


def _runs_text(plan: "Plan") -> str:
    """Backend and algorithm, such as "mosaic_gpu flat" or "xla cudnn"."""
    return f"{plan.backend} {plan.algorithm}"


def _config_text(plan: "Plan") -> str:
    """ "num_ctas 132, block_n 64"; fields at zero are left out."""
    if plan.config is None:
        return "-"
    settings = dataclasses.asdict(plan.config).items()
    return ", ".join(f"{name} {value}" for name, value in settings if value != 0)
