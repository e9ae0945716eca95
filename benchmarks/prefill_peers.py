"""Prefill attention of PyTorch, FlashInfer and JAX on the shapes of `fdpp-jax bench prefill` that they may take.

Each kernel has a process of its own, and its result is compared with a float32 reference before it is timed. The
kernels of a shape take turns; times are medians. A kernel that is not installed, refuses a shape, crashes, hangs or
answers wrongly is a reported cell. Absolute times drift between processes: jax.nn's cuDNN is in both tables.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import sys
import time
from typing import Any

from attention_peers import Turns, chosen, keep, provenance, save, say, table_parser
from peer_process import FailedError, PeerProcess
from prefill_kernels import KERNELS, Case

_EXAMPLES = """\
examples:
  python benchmarks/prefill_peers.py                           all shapes, all kernels that are installed
  python benchmarks/prefill_peers.py --only "H 256"            the shapes whose label holds this text
  python benchmarks/prefill_peers.py --peers SDPA --json benchmarks/results/h200-prefill-peers.json

needs torch with CUDA; JAX with CUDA and FlashInfer are optional.
"""
_ROUNDS = 7

TABLE = (
    *(Case(1, 32, 32, length) for length in (1024, 4096, 8192, 16384)),
    Case(1, 32, 32, 8192, is_causal=False),
    Case(1, 32, 32, 8192, soft_cap=50.0),
    Case(1, 32, 32, 8192, window=4096),
    Case(1, 32, 32, 4096, capacity=8192),
    Case(8, 32, 8, 1024),
    Case(1, 32, 32, 8192, head_dim=64),
    Case(1, 16, 8, 8192, head_dim=256),
    Case(1, 16, 8, 8192, head_dim=256, soft_cap=50.0),
    Case(1, 32, 8, 512, capacity=32768, has_lengths=True),
)


def measure(case: Case, peers: dict[str, PeerProcess]) -> dict[str, Any]:
    """The record of one shape: of each peer the time, or why there is none."""
    turns = Turns(peers, case)
    for _ in range(_ROUNDS):
        turns.sample()
    return dataclasses.asdict(case) | {"label": case.label, "flops": case.flops} | turns.record()


def _line(record: dict[str, Any]) -> str:
    cells = [
        f"{name} {us:.0f} us, {record['flops'] / us / 1e6:.0f} Tflop/s"
        for name, us in record["time_us"].items()
        if us is not None
    ]
    return " | ".join([record["label"], *(cells or ["nothing ran"])])


def _jax_versions() -> dict[str, str]:
    found = (name for name in ("jax", "jaxlib") if importlib.util.find_spec(name) is not None)
    return {name: importlib.metadata.version(name) for name in found}


def main(argv: list[str] | None = None) -> int:
    """Runs the script; 2 where nothing can be measured."""
    parser = table_parser(__doc__ or "", _EXAMPLES, KERNELS, timeout=100.0)
    parser.add_argument(
        "--budget", type=float, default=270.0, metavar="S", help="begin no shape after so many seconds (default: 270)"
    )
    args = parser.parse_args(argv)
    try:
        cases, names = chosen(args, TABLE, KERNELS)
    except FailedError as why:
        say(f"prefill_peers: error: {why}", sys.stderr)
        return 2
    result = provenance()
    result["versions"] |= _jax_versions()
    result["prefill_peers"] = []
    started = time.perf_counter()
    with contextlib.ExitStack() as processes:
        peers = {name: processes.enter_context(PeerProcess(KERNELS[name], args.timeout)) for name in names}
        for case in cases:
            if time.perf_counter() - started > args.budget:
                say(f"{case.label} | left out: the budget of {args.budget:g} s is spent")
                continue
            record = measure(case, peers)
            keep(record, _line(record), result["prefill_peers"])
            save(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
