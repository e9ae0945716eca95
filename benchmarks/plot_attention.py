"""Draws recorded attention times: how fast each kernel reads the live keys and values, beside what the memory gives.

python benchmarks/plot_attention.py [--results benchmarks/results] [--output docs/attention.png]
"""

import argparse
import json
import pathlib
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

FOLDER = pathlib.Path(__file__).parent
# Name in the legend, record, name in the record, colour.
KERNELS = (
    ("fdpp_jax", "h200-attention.json", "unified max", "#0b6e4f"),
    ("jax.nn, cuDNN", "h200-attention.json", "jax.nn, cudnn", "#e09f3e"),
    ("torch SDPA", "h200-attention-peers.json", "torch SDPA", "#9e2a2b"),
    ("jax.nn, XLA", "h200-attention.json", "jax.nn, xla", "#b0b0b0"),
)


def main() -> None:
    """Parses the command line, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, default=FOLDER / "results", help="where the records are")
    parser.add_argument("--output", type=pathlib.Path, default=FOLDER.parent / "docs" / "attention.png")
    args = parser.parse_args()
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    draw(figure.subplots(), args.results)
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(args.output, dpi=120)


def draw(axes: Axes, results: pathlib.Path) -> None:
    """Groups of bars, a group for every shape with a 16-bit contiguous cache that all kernels ran."""
    times: dict[str, dict[str, float]] = {}
    for name, file, kernel, _ in KERNELS:
        times[name] = {row["label"]: row["time_us"].get(kernel) for row in _rows(results / file)}
    rows = [row for row in _rows(results / KERNELS[0][1]) if all(times[name].get(row["label"]) for name in times)]
    height = 0.8 / len(KERNELS)
    for i, (name, _, _, color) in enumerate(KERNELS):
        places = [place + (i - (len(KERNELS) - 1) / 2) * height for place in range(len(rows))]
        speeds = [row["bytes"] / times[name][row["label"]] / 1e6 for row in rows]
        axes.barh(places, speeds, height, label=name, color=color)
    for place, row in enumerate(rows):
        floor = row["bytes"] / row["read_floor_us"] / 1e6
        axes.plot([floor, floor], [place - 0.45, place + 0.45], color="black", label=None if place else "read floor")
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("TB/s of live keys and values (longer is faster)")
    axes.set_ylabel("sequences, query/kv heads, keys")
    axes.spines[["top", "right"]].set_visible(False)


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The shapes of a record."""
    record = json.loads(path.read_text())
    return record.get("attention_table") or record["attention_peers"]


if __name__ == "__main__":
    main()
