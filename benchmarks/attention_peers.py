"""Decode attention of PyTorch and FlashInfer on the shapes of `fdpp-jax bench attention`.

Each kernel runs in a CUDA graph of many calls, each call on its own keys and values, so that neither launches from
Python nor the L2 help. The kernels of a shape and the read floor take turns; times are medians. Compare ratios to the
read floor with those of `fdpp-jax bench attention`: absolute times drift between processes.

Each kernel has a process of its own, and its result is compared with a reference before it is timed. A kernel that is
not installed, refuses a shape, crashes, hangs or answers wrongly is a reported cell.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from attention_kernels import HEAD_DIM, KERNELS, Case, Run, reference, relative_error
from peer_process import FailedError, PeerProcess, check

_EXAMPLES = """\
examples:
  python benchmarks/attention_peers.py                           all shapes, all kernels that are installed
  python benchmarks/attention_peers.py --only "8, 32/8, 4096"    the shapes whose label holds this text
  python benchmarks/attention_peers.py --peers SDPA --json benchmarks/results/h200-attention-peers.json

needs torch with CUDA; FlashInfer is optional (pip install flashinfer-python). FlashInfer compiles kernels when they
are first used, which needs nvcc and takes minutes, unless flashinfer-jit-cache is installed too.
"""

TIMEOUT_HELP = "seconds that a peer may take for one step, compiling included (default: %(default)g)"
_PROGRAM_BYTES = 2 << 30
_MAX_CALLS = 64
_PAST_L2 = 4
_READ_COLUMNS = 4096
_ROUNDS = 7
_SAMPLE_MS = 20.0
_WARM_UP_MS = 300.0
_TOLERANCE = 0.02  # of the largest value: bfloat16 weights and results
_TOLERANCE_FP8 = 0.1  # a kernel may round the weights to float8, too


TABLE = (
    Case(1, 32, 32, 1024),
    Case(1, 32, 32, 4096),
    Case(1, 32, 32, 16384),
    Case(8, 32, 32, 1024),
    Case(8, 32, 32, 4096),
    Case(32, 32, 32, 1024),
    Case(1, 32, 8, 4096),
    Case(8, 32, 8, 4096),
    Case(1, 64, 8, 16384),
    Case(8, 32, 8, 8192, lengths="mixed"),
    Case(1, 32, 32, 16384, lengths=1024),
    Case(8, 32, 8, 4096, page_size=16),
    Case(8, 32, 8, 4096, page_size=64),
    Case(8, 32, 8, 4096, page_size=256),
    Case(8, 32, 8, 4096, kv_dtype="int8", scales="head"),
    Case(8, 32, 8, 4096, kv_dtype="int8", scales="token"),
    Case(8, 32, 8, 4096, kv_dtype="fp8", scales="head"),
    Case(8, 32, 32, 4096, kv_dtype="int8", scales="head"),
    Case(8, 32, 32, 4096, kv_dtype="int8", scales="token"),
    Case(8, 32, 32, 4096, kv_dtype="fp8", scales="head"),
    Case(8, 32, 8, 16384),
    Case(8, 32, 8, 16384, kv_dtype="int8", scales="head"),
    Case(8, 32, 8, 16384, kv_dtype="fp8", scales="head"),
)


def _read_floor() -> dict[str, Callable[[Any], Any]]:
    """Ways to read a matrix whole; the fastest is the floor."""
    import torch

    ones = torch.ones(_READ_COLUMNS, dtype=torch.bfloat16, device="cuda")
    return {
        "sum": lambda x: x.sum(dim=1, dtype=torch.float32),
        "amax": lambda x: x.amax(dim=1),
        "mv": lambda x: x.mv(ones),
    }


class Graph:
    """Calls on one set after the other, and again, in one CUDA graph, and how long one takes."""

    def __init__(self, run: Run, num_sets: int, live_bytes: int) -> None:
        import torch

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled, workspaces allocated, before the capture
            for index in range(2):
                run(index)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        self._num_calls = num_sets * max(1, min(_MAX_CALLS, _PROGRAM_BYTES // live_bytes) // num_sets)
        with torch.cuda.graph(self._graph):
            self.outs = [run(index % num_sets) for index in range(self._num_calls)]
        self._replay_ms(1)
        self._replays = max(1, min(64, math.ceil(_SAMPLE_MS / self._replay_ms(1))))

    def sample(self) -> float:
        """Seconds a call."""
        self._replay_ms(1)  # the GPU comes from another process
        return self._replay_ms(self._replays) / (1e3 * self._replays * self._num_calls)

    def _replay_ms(self, num_replays: int) -> float:
        import torch

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(num_replays):
            self._graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def warm_up(self) -> None:
        """Runs until the clock of the GPU is up."""
        elapsed = 0.0
        while elapsed < _WARM_UP_MS:
            elapsed += self._replay_ms(self._replays)


def _num_sets(live_bytes: int) -> int:
    """As fdpp_jax.bench.clock.num_sets."""
    import torch

    past_l2 = -(-_PAST_L2 * torch.cuda.get_device_properties(0).L2_cache_size // live_bytes)
    return max(2, min(_MAX_CALLS, past_l2))


def _sets(case: Case, num_sets: int) -> list[Any]:
    """Flat random keys and values, and copies of them."""
    import torch

    size = case.batch * case.capacity * case.num_kv_heads * HEAD_DIM
    dtype = torch.float8_e4m3fn if case.kv_dtype == "fp8" else torch.bfloat16
    first = [torch.randn(size, device="cuda", dtype=torch.bfloat16).to(dtype) for _ in range(2)]
    return [first, *([buffer.clone() for buffer in first] for _ in range(num_sets - 1))]


class _Kernel:
    """A kernel, in the process that it has to itself."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._graph: Graph | None = None

    def prepare(self, case: Case) -> None:
        """Compiles the kernel for a case, and checks what it computes."""
        import torch

        self._graph = None
        torch.cuda.empty_cache()
        torch.manual_seed(0)
        num_sets = _num_sets(case.live_bytes)
        sets = _sets(case, num_sets)
        query = torch.randn(case.batch, case.num_heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        run, view = KERNELS[self._name](case, query, sets)
        graph = Graph(run, num_sets, case.live_bytes)
        expected = reference(case, query, *map(view, sets[0]))  # the other sets are copies
        tolerance = _TOLERANCE if case.kv_dtype is None else _TOLERANCE_FP8
        for out in (graph.outs[0], graph.outs[-1]):
            check(relative_error(out, expected), tolerance)
        self._graph = graph

    def sample(self) -> float:
        """Microseconds a call."""
        assert self._graph is not None
        return self._graph.sample() * 1e6


class _Floor:
    """The ways to read as many bytes as a case has live, in a process of their own."""

    def __init__(self) -> None:
        self._graphs: dict[str, Graph] = {}
        self._bytes_ratio = 1.0

    def prepare(self, case: Case) -> None:
        """Makes the matrices, and warms the GPU up."""
        import torch

        self._graphs = {}
        torch.cuda.empty_cache()
        rows = case.live_bytes // (2 * _READ_COLUMNS)
        matrix = torch.randn(rows, _READ_COLUMNS, device="cuda", dtype=torch.bfloat16)
        num_sets = _num_sets(matrix.nbytes)
        matrices = [matrix, *(matrix.clone() for _ in range(num_sets - 1))]
        for way, read in _read_floor().items():
            self._graphs[way] = Graph(lambda index, read=read: read(matrices[index]), num_sets, matrix.nbytes)
        self._bytes_ratio = case.live_bytes / matrix.nbytes

    def warm_up(self) -> None:
        """Runs until the clock of the GPU is up."""
        next(iter(self._graphs.values())).warm_up()

    def sample(self) -> dict[str, float]:
        """Microseconds that each way takes."""
        return {way: graph.sample() * 1e6 * self._bytes_ratio for way, graph in self._graphs.items()}


class Turns:
    """Peers that take turns at one case, each for as long as it does not fail."""

    def __init__(self, peers: Mapping[str, PeerProcess], case: Any) -> None:
        """Prepares all of them for the case."""
        self._peers = peers
        self._samples: dict[str, list[float]] = {name: [] for name in peers}
        self._failures: dict[str, str] = {}
        for name in peers:
            self._call(name, "prepare", case)

    def sample(self) -> None:
        """One turn of each."""
        for name in list(self._samples):
            time_us = self._call(name, "sample")
            if name in self._samples:
                self._samples[name].append(time_us)

    def record(self) -> dict[str, Any]:
        """Of each peer the median, or why there is none."""
        medians = {name: statistics.median(times) for name, times in self._samples.items()}
        return {"time_us": {name: medians.get(name) for name in self._peers}, "failures": self._failures}

    def _call(self, name: str, method: str, *arguments: Any) -> Any:
        try:
            return self._peers[name].call(method, *arguments)
        except FailedError as why:
            self._failures[name] = str(why)
            del self._samples[name]


def measure(case: Case, floor: PeerProcess, peers: dict[str, PeerProcess]) -> dict[str, Any]:
    """The record of one shape: of each peer the time, or why there is none.

    Raises:
      FailedError: The floor could not be measured.
    """
    record = dataclasses.asdict(case) | {"label": case.label, "bytes": case.live_bytes}
    if case.kv_dtype == "int8":
        return record | {"time_us": {}, "failures": dict.fromkeys(peers, "no int8 cache")}
    floor.call("prepare", case)
    turns = Turns(peers, case)
    floor.call("warm_up")
    floors: list[dict[str, float]] = []
    for _ in range(_ROUNDS):
        floors.append(floor.call("sample"))
        turns.sample()
    floors_us = {way: statistics.median(ways[way] for ways in floors) for way in floors[0]}
    return record | {"read_floor_us": min(floors_us.values()), "floors_us": floors_us} | turns.record()


def _line(record: dict[str, Any]) -> str:
    ran = {name: us for name, us in record["time_us"].items() if us is not None}
    if not ran:
        return f"{record['label']} | nothing ran"
    floor = record["read_floor_us"]
    best = min(ran, key=lambda name: ran[name])
    times = " | ".join(f"{name} {us:.1f}" for name, us in ran.items())
    megabytes = record["bytes"] / 1e6
    return (
        f"{record['label']} | {megabytes:.1f} MB | floor {floor:.1f} | {times} | best {ran[best] / floor:.2f} x floor"
    )


def provenance(device: str = "cuda") -> dict[str, Any]:
    """Device, versions, date and commit of a run."""
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    if importlib.util.find_spec("flashinfer") is not None:
        import flashinfer

        versions["flashinfer"] = flashinfer.__version__
    checkout = pathlib.Path(__file__).parent.parent
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except OSError:
        commit = ""
    return {
        "device": torch.cuda.get_device_name(0) if device == "cuda" else device,
        "versions": versions,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "commit": commit or None,
    }


def say(text: str, stream: Any = None) -> None:
    """A line to stdout, or to the stream, at once."""
    stream = sys.stdout if stream is None else stream
    stream.write(text + "\n")
    stream.flush()


def table_parser(description: str, examples: str, kernels: Iterable[str], timeout: float) -> argparse.ArgumentParser:
    """The flags of a script that times kernels on a table of shapes."""
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="shapes whose label holds TEXT (B, N/K, ...)")
    parser.add_argument(
        "--peers", metavar="TEXT", default="", help=f"kernels whose name holds TEXT: {'; '.join(kernels)}"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the numbers, with device, versions and date, after each shape"
    )
    parser.add_argument("--timeout", type=float, default=timeout, metavar="S", help=TIMEOUT_HELP)
    return parser


def chosen[C](args: argparse.Namespace, table: Iterable[C], kernels: Iterable[str]) -> tuple[list[C], list[str]]:
    """The shapes and the names of the kernels to time.

    Raises:
      FailedError: Nothing can be timed.
    """
    if importlib.util.find_spec("torch") is None:
        raise FailedError("torch is not installed")
    cases = [case for case in table if args.only in case.label]  # type: ignore[attr-defined]
    names = [name for name in kernels if args.peers in name]
    if not names:
        raise FailedError(f"no kernel's name holds {args.peers!r}")
    if not cases:
        raise FailedError(f"no shape's label holds {args.only!r}")
    import torch

    if not torch.cuda.is_available():
        raise FailedError("torch finds no CUDA device")
    return cases, names


def keep(record: dict[str, Any], line: str, records: list[dict[str, Any]]) -> None:
    """Shows a shape's line and what failed, and adds its record to the others."""
    say(line)
    for name, reason in record["failures"].items():
        say(f"  {name}: {reason}")
    records.append(record)


def save(path: str | None, result: dict[str, Any]) -> None:
    """Writes the numbers, if asked for."""
    if path is not None:
        pathlib.Path(path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Runs the script; 2 where nothing can be measured."""
    args = table_parser(__doc__ or "", _EXAMPLES, KERNELS, timeout=900.0).parse_args(argv)

    def fail(why: str) -> int:
        say(f"attention_peers: error: {why}", sys.stderr)
        return 2

    try:
        cases, names = chosen(args, TABLE, KERNELS)
    except FailedError as why:
        return fail(str(why))
    result = {**provenance(), "attention_peers": []}
    with contextlib.ExitStack() as processes:
        floor = processes.enter_context(PeerProcess(_Floor, args.timeout))
        peers = {
            name: processes.enter_context(PeerProcess(functools.partial(_Kernel, name), args.timeout)) for name in names
        }
        for case in cases:
            try:
                record = measure(case, floor, peers)
            except FailedError as why:
                return fail(f"the read floor of {case.label}: {why}")
            keep(record, _line(record), result["attention_peers"])
            save(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
