"""Decode attention of PyTorch and FlashInfer on the shapes of `fdpp-jax bench attention`.

Each kernel runs in a CUDA graph of many calls, each call on its own keys and values, so that neither launches from
Python nor the L2 help. The kernels of a shape and the read floor take turns; times are medians. Compare ratios to the
read floor with those of `fdpp-jax bench attention`: absolute times drift between processes.

A kernel that cannot run a shape, or fails, is a reported cell and no crash.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import pathlib
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

_EXAMPLES = """\
examples:
  python benchmarks/attention_peers.py                           all shapes, all kernels that are installed
  python benchmarks/attention_peers.py --only "8, 32/8, 4096"    the shapes whose label holds this text
  python benchmarks/attention_peers.py --peers SDPA --json benchmarks/results/h200-attention-peers.json

needs torch with CUDA; FlashInfer is optional (pip install flashinfer-python). FlashInfer compiles kernels when they
are first used, which needs nvcc and takes minutes, unless flashinfer-jit-cache is installed too.
"""

_HEAD_DIM = 128
_SHORTEST_MIXED = 64
_PROGRAM_BYTES = 2 << 30
_MAX_CALLS = 64
_PAST_L2 = 4
_READ_COLUMNS = 4096
_ROUNDS = 7
_SAMPLE_MS = 20.0
_WARM_UP_MS = 300.0
_PAGE_OF_UNPAGED = 64  # FlashInfer's batch decode knows pages only: here they follow each other
_WORKSPACE_BYTES = 128 << 20


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape of fdpp_jax.bench.attention.TABLE, which a test compares with this file's."""

    batch: int
    num_heads: int
    num_kv_heads: int
    capacity: int
    lengths: str | int = "full"
    page_size: int | None = None
    kv_dtype: str | None = None
    scales: str | None = None

    def live_lengths(self) -> tuple[int, ...]:
        """Live keys of each sequence."""
        if self.lengths != "mixed":
            return (self.capacity if self.lengths == "full" else int(self.lengths),) * self.batch
        seeded = random.Random(0)
        octaves = math.log2(self.capacity / _SHORTEST_MIXED)
        between = [round(_SHORTEST_MIXED * 2 ** (octaves * seeded.random())) for _ in range(self.batch - 2)]
        lengths = [_SHORTEST_MIXED, self.capacity, *between]
        seeded.shuffle(lengths)
        return tuple(lengths)

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        return 2 * self.num_kv_heads * _HEAD_DIM * (2 if self.kv_dtype is None else 1)

    @property
    def live_bytes(self) -> int:
        """Bytes of the live keys and values."""
        return sum(self.live_lengths()) * self.token_bytes

    @property
    def label(self) -> str:
        """As in `fdpp-jax bench attention`."""
        parts = [str(self.batch), f"{self.num_heads}/{self.num_kv_heads}", str(self.capacity)]
        if self.lengths == "mixed":
            parts.append(f"lengths {_SHORTEST_MIXED}..{self.capacity}")
        elif self.lengths != "full":
            parts.append(f"length {self.lengths}")
        if self.page_size is not None:
            parts.append(f"pages of {self.page_size}")
        if self.kv_dtype is not None:
            parts.append(f"{self.kv_dtype} a {self.scales}")
        return ", ".join(parts)


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


class RefusedError(Exception):
    """This kernel does not take this case; the message says why."""


Run = Callable[[int], Any]  # calls the kernel on one of the sets


# The kernels: each takes a case, the query [B, N, H] and sets of flat keys and values, and gives a function to time.


def _sdpa(case: Case, query: Any, sets: list[Any], *, backend: str | None) -> Run:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if case.page_size is not None or case.kv_dtype is not None:
        raise RefusedError("no paged and no quantised cache")
    lengths = case.live_lengths()
    longest, mask = max(lengths), None
    if min(lengths) < longest:
        if backend == "FLASH_ATTENTION":
            raise RefusedError("lengths need a mask, which the flash backend does not take")
        lengths_of = torch.tensor(lengths, device="cuda")
        mask = (torch.arange(longest, device="cuda") < lengths_of[:, None])[:, None, None]  # [B, 1, 1, S]
    cache_shape = (case.batch, case.num_kv_heads, case.capacity, _HEAD_DIM)
    # One length for all: a slice, which a CUDA graph of a growing cache could not have.
    caches = [[buffer.view(cache_shape)[:, :, :longest] for buffer in pair] for pair in sets]
    query = query[:, :, None]  # [B, N, 1, H]
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention,
        attn_mask=mask,
        enable_gqa=case.num_heads != case.num_kv_heads,
    )

    def run(index: int) -> Any:
        if backend is None:
            return attend(query, *caches[index])
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return attend(query, *caches[index])

    return run


def _flashinfer_single(case: Case, query: Any, sets: list[Any], *, use_tensor_cores: bool) -> Run:
    import flashinfer

    if case.batch != 1 or case.page_size is not None or case.kv_dtype is not None:
        raise RefusedError("one sequence of a contiguous bfloat16 cache only")
    (length,) = case.live_lengths()
    caches = [[buffer.view(case.capacity, case.num_kv_heads, _HEAD_DIM)[:length] for buffer in pair] for pair in sets]

    def run(index: int) -> Any:
        return flashinfer.single_decode_with_kv_cache(
            query[0], *caches[index], kv_layout="NHD", use_tensor_cores=use_tensor_cores
        )

    return run


def _paged(case: Case, sets: list[Any]) -> tuple[Any, list[Any], int]:
    """A page table [B, pages] on the CPU, the sets as pools of pages, and the size of a page."""
    import torch

    if case.kv_dtype == "int8":
        raise RefusedError("no int8 cache")
    page_size = case.page_size or _PAGE_OF_UNPAGED
    num_pages = case.batch * case.capacity // page_size
    if case.page_size is None:
        pages = torch.arange(num_pages)
    else:
        pages = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0))
    pools = [tuple(buffer.view(num_pages, page_size, case.num_kv_heads, _HEAD_DIM) for buffer in pair) for pair in sets]
    return pages.view(case.batch, -1).int(), pools, page_size


def _flashinfer_batch(case: Case, query: Any, sets: list[Any], *, use_tensor_cores: bool) -> Run:
    import flashinfer
    import torch

    page_table, pools, page_size = _paged(case, sets)
    lengths = torch.tensor(case.live_lengths(), dtype=torch.int32)
    live_pages = (lengths + page_size - 1) // page_size
    indices = torch.cat([row[:live] for row, live in zip(page_table, live_pages.tolist(), strict=True)])
    indptr = torch.cat([torch.zeros(1, dtype=torch.int32), live_pages.cumsum(0).int()])
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=use_tensor_cores)
    wrapper.plan(
        indptr.cuda(),
        indices.cuda(),
        (lengths - (live_pages - 1) * page_size).cuda(),
        case.num_heads,
        case.num_kv_heads,
        _HEAD_DIM,
        page_size,
        q_data_type=query.dtype,
        kv_data_type=pools[0][0].dtype,
    )
    # The scale of the values would be a launch of its own in some versions; a model can fold it into its weights.
    scale = {} if case.kv_dtype is None else dict(k_scale=1.0)

    def run(index: int) -> Any:
        return wrapper.run(query, pools[index], **scale)

    return run


def _flashinfer_xqa(case: Case, query: Any, sets: list[Any]) -> Run:
    import flashinfer.decode
    import torch

    page_table, pools, _ = _paged(case, sets)
    lengths = case.live_lengths()
    arguments = dict(
        workspace_buffer=torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda"),
        block_tables=page_table.cuda(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32).to(torch.uint32).cuda(),
        max_seq_len=max(lengths),
        bmm1_scale=_HEAD_DIM**-0.5,
        bmm2_scale=1.0,
        kv_layout="NHD",
    )

    def run(index: int) -> Any:
        return flashinfer.decode.xqa_batch_decode_with_kv_cache(query=query, kv_cache=pools[index], **arguments)

    return run


_PEERS: dict[str, Callable[[Case, Any, list[Any]], Run]] = {
    "torch SDPA": functools.partial(_sdpa, backend=None),
    "torch SDPA, flash": functools.partial(_sdpa, backend="FLASH_ATTENTION"),
    "torch SDPA, cuDNN": functools.partial(_sdpa, backend="CUDNN_ATTENTION"),
    "FlashInfer single": functools.partial(_flashinfer_single, use_tensor_cores=False),
    "FlashInfer single, tensor cores": functools.partial(_flashinfer_single, use_tensor_cores=True),
    "FlashInfer batch": functools.partial(_flashinfer_batch, use_tensor_cores=False),
    "FlashInfer batch, tensor cores": functools.partial(_flashinfer_batch, use_tensor_cores=True),
    "FlashInfer XQA": _flashinfer_xqa,
}


def _read_floor() -> dict[str, Callable[[Any], Any]]:
    """Ways to read a matrix whole; the fastest is the floor."""
    import torch

    ones = torch.ones(_READ_COLUMNS, dtype=torch.bfloat16, device="cuda")
    return {
        "sum": lambda x: x.sum(dim=1, dtype=torch.float32),
        "amax": lambda x: x.amax(dim=1),
        "mv": lambda x: x.mv(ones),
    }


# Timing.


class _Graph:
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
            self._outs = [run(index % num_sets) for index in range(self._num_calls)]
        self._replay_ms(1)
        if not self._outs[0].isfinite().all():
            raise FloatingPointError("the result is not finite")
        self._replays = max(1, min(64, math.ceil(_SAMPLE_MS / self._replay_ms(1))))

    def sample(self) -> float:
        """Seconds a call."""
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

    size = case.batch * case.capacity * case.num_kv_heads * _HEAD_DIM
    dtype = torch.float8_e4m3fn if case.kv_dtype == "fp8" else torch.bfloat16
    first = [torch.randn(size, device="cuda", dtype=torch.bfloat16).to(dtype) for _ in range(2)]
    return [first, *([buffer.clone() for buffer in first] for _ in range(num_sets - 1))]


def _measure(case: Case, names: list[str]) -> dict[str, Any]:
    """The record of one shape."""
    import torch

    record = dataclasses.asdict(case) | {"label": case.label, "bytes": case.live_bytes}
    if case.kv_dtype == "int8":
        return record | {"time_us": {}, "failures": dict.fromkeys(names, "no int8 cache")}
    rows = case.live_bytes // (2 * _READ_COLUMNS)
    matrix = torch.randn(rows, _READ_COLUMNS, device="cuda", dtype=torch.bfloat16)
    num_floor_sets = _num_sets(matrix.nbytes)
    matrices = [matrix, *(matrix.clone() for _ in range(num_floor_sets - 1))]
    floors = {}
    for way, read in _read_floor().items():
        floors[way] = _Graph(lambda index, read=read: read(matrices[index]), num_floor_sets, matrix.nbytes)

    num_sets = _num_sets(case.live_bytes)
    sets = _sets(case, num_sets)
    query = torch.randn(case.batch, case.num_heads, _HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    graphs, failures = {}, {}
    for name in names:
        try:
            graphs[name] = _Graph(_PEERS[name](case, query, sets), num_sets, case.live_bytes)
        except RefusedError as refusal:
            failures[name] = str(refusal)
        except Exception as error:  # whatever a peer raises is its row
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    next(iter(floors.values())).warm_up()
    timed = {f"floor, {way}": graph for way, graph in floors.items()} | graphs
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(_ROUNDS):
        for name, graph in timed.items():
            samples[name].append(graph.sample() * 1e6)
    medians = {name: statistics.median(times) for name, times in samples.items()}
    floors_us = {way: medians[f"floor, {way}"] * case.live_bytes / matrix.nbytes for way in floors}
    times_us = {name: medians.get(name) for name in names}
    return record | {
        "read_floor_us": min(floors_us.values()),
        "floors_us": floors_us,
        "time_us": times_us,
        "failures": failures,
    }


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


def main(argv: list[str] | None = None) -> int:
    """Runs the script; 2 where nothing can be measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="shapes whose label holds TEXT (B, N/K, S, ...)")
    parser.add_argument(
        "--peers", metavar="TEXT", default="", help=f"kernels whose name holds TEXT: {'; '.join(_PEERS)}"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the numbers, with device, versions and date, after each shape"
    )
    args = parser.parse_args(argv)

    def fail(why: str) -> int:
        say(f"attention_peers: error: {why}", sys.stderr)
        return 2

    if importlib.util.find_spec("torch") is None:
        return fail("torch is not installed")
    cases = [case for case in TABLE if args.only in case.label]
    names = [name for name in _PEERS if args.peers in name]
    if not cases or not names:
        return fail(f"no shape's label holds {args.only!r}" if names else f"no kernel's name holds {args.peers!r}")
    import torch

    if not torch.cuda.is_available():
        return fail("torch finds no CUDA device")
    if importlib.util.find_spec("flashinfer") is None:
        say("attention_peers: flashinfer is not installed: its kernels are left out", sys.stderr)
        names = [name for name in names if not name.startswith("FlashInfer")]
        if not names:
            return 2
    result = {**provenance(), "attention_peers": []}
    for case in cases:
        record = _measure(case, names)
        torch.cuda.empty_cache()
        say(_line(record))
        for name, why in record["failures"].items():
            say(f"  {name} does not run: {why}")
        result["attention_peers"].append(record)
        if args.json is not None:
            pathlib.Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
