"""A decode step of PyTorch on the shapes of `fdpp-jax bench decode`: random bfloat16 weights, greedy.

- "transformers": Hugging Face's LlamaForCausalLM as `generate` calls it, eager, with its growing cache
- "torch.compile": a LLaMA with a cache of fixed size, of which a whole step, argmax included, is compiled into one CUDA
  graph, as gpt-fast (github.com/pytorch-labs/gpt-fast) does it

Milliseconds a token, medians of several loops, beside the time to read weights and live cache in this process. Compare
ratios to that floor with those of `fdpp-jax bench decode`: absolute times drift between processes.

Each peer has a process of its own, and the token that it picks is compared with an eager step's, or one without a
cache, before it is timed. A peer that is not installed, crashes, hangs or answers wrongly is reported as such.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import attention_peers
from peer_process import FailedError, PeerProcess, check

_EXAMPLES = """\
examples:
  python benchmarks/e2e_peers.py                                   Llama-2-7B, one row, context 1024
  python benchmarks/e2e_peers.py --model llama-3-8b --batch 8
  python benchmarks/e2e_peers.py --json benchmarks/results/h200-e2e-peers.json
  python benchmarks/e2e_peers.py --model tiny --device cpu         only to see that it runs

needs torch; transformers is optional.
"""

_LOOPS = 5
_FLOOR_BYTES = 1 << 30
_EPS = 1e-5
_TOLERANCE = 0.05  # of the largest logit: a token this close to the best one is as good in bfloat16


@dataclasses.dataclass(frozen=True)
class Shape:
    """A LLaMA; a test compares those of fdpp_jax.models.PRESETS."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        """Of queries, keys and values."""
        return self.hidden_size // self.num_heads

    @property
    def qkv_size(self) -> int:
        """Columns of queries, keys and values."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def bytes_read(self, live_keys: int) -> int:
        """Of a step: all weights but the embedding, in 16 bits, and so many keys and values."""
        layer = self.hidden_size * (self.qkv_size + self.hidden_size + 3 * self.intermediate_size)
        keys = 2 * self.num_kv_heads * self.head_dim * live_keys
        return 2 * (self.num_layers * (layer + keys) + self.hidden_size * self.vocab_size)


MODELS = {
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": Shape(5120, 13824, 40, 40, 40, 32000),
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128256, 500000.0),
    "tiny": Shape(64, 96, 2, 4, 2, 128),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed: `steps` tokens of each of `batch` rows, up to `context` live ones."""

    shape: Shape
    batch: int
    context: int
    steps: int
    device: str

    @property
    def bytes_read(self) -> int:
        """Of a step in the middle."""
        return self.shape.bytes_read(self.batch * (self.context - self.steps // 2))


Loop = Callable[[], float]  # decodes the steps, and returns the seconds that took
Error = Callable[[], float]  # of one step's tokens, from `_gap`


def _gap(logits: Any, tokens: Any) -> float:
    """How far below the best the logits [B, V] of tokens [B] lie, relative to the largest."""
    logits = logits.float()
    below = logits.amax(-1) - logits.gather(-1, tokens[:, None])[:, 0]
    return (below / logits.abs().amax(-1)).max().item()


def _transformers(case: Case) -> tuple[Loop, Error]:
    import torch
    import transformers

    shape = case.shape
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=case.context,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(case.device):
            model = transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    prompt = torch.randint(shape.vocab_size, (case.batch, case.context - case.steps), device=case.device)

    def loop() -> float:
        cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
        tokens = prompt[:, :1]
        _synchronize(case.device)
        started = time.perf_counter()
        for _ in range(case.steps):
            tokens = model(tokens, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        _synchronize(case.device)
        return time.perf_counter() - started

    def error() -> float:
        cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
        tokens = prompt[:, :1]
        cached = model(tokens, past_key_values=cache, use_cache=True).logits[:, -1]
        whole = model(torch.cat([prompt, tokens], 1), use_cache=False, logits_to_keep=1).logits[:, -1]
        return _gap(whole, cached.argmax(-1))

    return loop, error


def _compiled(case: Case) -> tuple[Loop, Error]:
    import torch
    import torch._inductor.config
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch._inductor.config.coordinate_descent_tuning = True  # as gpt-fast: slower to compile, faster to run
    model = _llama(case)
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True)

    def start() -> tuple[Any, Any]:
        tokens = torch.arange(case.batch, device=case.device) % case.shape.vocab_size
        return tokens, torch.tensor([case.context - case.steps], device=case.device)

    def loop() -> float:
        tokens, position = start()
        _synchronize(case.device)
        started = time.perf_counter()
        with sdpa_kernel(SDPBackend.MATH):  # the compiler's own code for one query is faster than a call
            for _ in range(case.steps):
                tokens = step(tokens, position).clone()  # the graph's next replay overwrites its result
                position = position + 1
        _synchronize(case.device)
        return time.perf_counter() - started

    def error() -> float:
        with sdpa_kernel(SDPBackend.MATH):
            tokens = step(*start()).clone()
            return _gap(model.logits(*start()), tokens)

    return loop, error


def _llama(case: Case) -> Any:
    """A torch.nn.Module: tokens [B] that stand at position [1] -> the next tokens [B]. Its cache starts full of noise.

    Weights are parameters and caches buffers, which a CUDA graph reads and writes where they lie.
    """
    import torch
    from torch import nn
    from torch.nn.functional import linear, scaled_dot_product_attention, silu

    shape, batch = case.shape, case.batch
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    normal = functools.partial(torch.randn, device=case.device, dtype=torch.bfloat16)

    def weight(rows: int, columns: int) -> Any:
        return nn.Parameter(normal(rows, columns) * columns**-0.5, requires_grad=False)

    def gain() -> Any:
        return nn.Parameter(torch.ones(shape.hidden_size, device=case.device, dtype=torch.bfloat16), False)

    def normed(x: Any, gain: Any) -> Any:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPS)).to(x.dtype) * gain

    def rotated(x: Any, cos: Any, sin: Any) -> Any:
        low, high = x.float().chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first_norm, self.qkv = gain(), weight(shape.qkv_size, shape.hidden_size)
            self.o = weight(shape.hidden_size, shape.hidden_size)
            self.second_norm, self.gate_up = gain(), weight(2 * shape.intermediate_size, shape.hidden_size)
            self.down = weight(shape.hidden_size, shape.intermediate_size)
            for name in ("keys", "values"):
                self.register_buffer(name, normal(batch, kv_heads, case.context, head_dim))

        def forward(self, hidden: Any, position: Any, cos: Any, sin: Any, mask: Any) -> Any:
            qkv = linear(normed(hidden, self.first_norm), self.qkv).view(batch, -1, 1, head_dim)
            query, key, value = qkv.split([heads, kv_heads, kv_heads], 1)
            self.keys[:, :, position] = rotated(key, cos, sin)
            self.values[:, :, position] = value
            attended = scaled_dot_product_attention(
                rotated(query, cos, sin), self.keys, self.values, attn_mask=mask, enable_gqa=heads != kv_heads
            )
            hidden = hidden + linear(attended.reshape(batch, -1), self.o)
            gate, up = linear(normed(hidden, self.second_norm), self.gate_up).chunk(2, -1)
            return hidden + linear(silu(gate) * up, self.down)

    class Llama(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = (weight(shape.vocab_size, shape.hidden_size) for _ in range(2))
            self.layers, self.norm = nn.ModuleList(Layer() for _ in range(shape.num_layers)), gain()
            exponents = torch.arange(head_dim // 2, device=case.device) / (head_dim // 2)
            self.register_buffer("frequencies", shape.rope_theta**-exponents)
            self.register_buffer("slots", torch.arange(case.context, device=case.device))

        def forward(self, tokens: Any, position: Any) -> Any:
            return self.logits(tokens, position).argmax(-1)

        def logits(self, tokens: Any, position: Any) -> Any:
            hidden = self.embedding[tokens]
            angles = position * self.frequencies
            mask = (self.slots <= position)[None, None, None]  # [1, 1, 1, S]
            for layer in self.layers:
                hidden = layer(hidden, position, angles.cos(), angles.sin(), mask)
            return linear(normed(hidden, self.norm), self.head)

    return Llama()


_PEERS: dict[str, Callable[[Case], tuple[Loop, Error]]] = {"transformers": _transformers, "torch.compile": _compiled}


def _synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _read_floor(num_bytes: int, device: str) -> float:
    """Seconds that reading so many bytes takes."""
    import torch

    on_gpu = device == "cuda"
    size = (_FLOOR_BYTES if on_gpu else _FLOOR_BYTES >> 6) // 2
    sets = [torch.randn(size // 4096, 4096, device=device, dtype=torch.bfloat16) for _ in range(2)]

    def read() -> float:
        started = time.perf_counter()
        for index in range(20):
            sets[index % 2].sum(dim=1, dtype=torch.float32)
        _synchronize(device)
        return (time.perf_counter() - started) / 20

    return statistics.median([read() for _ in range(2 + _LOOPS)][2:]) * num_bytes / (2 * size)


class _Peer:
    """A peer, in the process that it has to itself."""

    def __init__(self, name: str) -> None:
        self._name = name

    def measure(self, case: Case) -> float:
        """Milliseconds a step."""
        import torch

        torch.manual_seed(0)
        with torch.no_grad():
            loop, error = _PEERS[self._name](case)
            check(error(), _TOLERANCE)
            loop()  # compiles
            return 1e3 * statistics.median(loop() for _ in range(_LOOPS)) / case.steps


def measure(case: Case, floor_s: float, peers: dict[str, PeerProcess]) -> dict[str, Any]:
    """The record of one case: of each peer the milliseconds a step, or why there are none."""
    times: dict[str, float | None] = {}
    failures: dict[str, str] = {}
    for name, peer in peers.items():
        attention_peers.say(f"e2e_peers: {name}", sys.stderr)
        times[name] = None
        with peer:  # a model of one peer must leave the GPU's memory to the next
            try:
                times[name] = peer.call("measure", case)
            except FailedError as why:
                failures[name] = str(why)
    return {
        "shape": dataclasses.asdict(case.shape),
        "decode": {"batch": case.batch, "context": case.context, "steps": case.steps, "dtype": "bfloat16"},
        "bytes": case.bytes_read,
        "read_floor_ms": 1e3 * floor_s,
        "ms_per_step": times,
        "failures": failures,
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the script; 2 where nothing can be measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="llama-2-7b", help="default: llama-2-7b")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="rows decoded together (default: 1)")
    parser.add_argument("--context", type=int, default=1024, metavar="N", help="live tokens at the end (default: 1024)")
    parser.add_argument("--steps", type=int, default=64, metavar="N", help="of one timed loop (default: 64)")
    parser.add_argument("--peers", metavar="TEXT", default="", help=f"whose name holds TEXT: {', '.join(_PEERS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers, with device, versions and commit")
    parser.add_argument("--timeout", type=float, default=900.0, metavar="S", help=attention_peers.TIMEOUT_HELP)
    args = parser.parse_args(argv)

    def fail(why: str) -> int:
        attention_peers.say(f"e2e_peers: error: {why}", sys.stderr)
        return 2

    names = [name for name in _PEERS if args.peers in name]
    if not names:
        return fail(f"no peer's name holds {args.peers!r}")
    if args.batch < 1 or args.steps < 1 or args.context <= args.steps:
        given = f"batch={args.batch}, steps={args.steps}, context={args.context}"
        return fail(f"expected a batch and steps of at least 1 and context above steps, got {given}")
    if importlib.util.find_spec("torch") is None:
        return fail("torch is not installed")
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        return fail("torch finds no CUDA device; --model tiny --device cpu shows that the script runs")
    case = Case(MODELS[args.model], args.batch, args.context, args.steps, args.device)
    peers = {name: PeerProcess(functools.partial(_Peer, name), args.timeout) for name in names}
    record = measure(case, _read_floor(case.bytes_read, case.device), peers)
    floor = record["read_floor_ms"]
    for name, milliseconds in record["ms_per_step"].items():
        if milliseconds is not None:
            attention_peers.say(f"{name} | {milliseconds:.3f} ms a token | {milliseconds / floor:.2f} x floor")
    for name, why in record["failures"].items():
        attention_peers.say(f"{name}: {why}")
    attention_peers.say(f"read floor | {floor:.3f} ms")
    if args.json is not None:
        result = {**attention_peers.provenance(args.device), "model": args.model, **record}
        pathlib.Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
