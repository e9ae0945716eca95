"""Attention of many queries: the prefill kernel with a unified max and with online softmax, beside jax.nn's cuDNN.

    python benchmarks/prefill_attention.py --json benchmarks/results/h200-prefill-attention.json

Times are medians on the host's clock over calls that take turns, eight in a row on two sets of arrays. The unified max
includes the second launch that redoes failed rows, of which there are none here.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import fdpp_jax
from fdpp_jax.bench.report import provenance

_CALLS, _ROUNDS = 8, 7


@dataclasses.dataclass(frozen=True)
class Shape:
    """One line of the table."""

    label: str
    query_length: int
    batch: int = 1
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    capacity: int | None = None
    is_causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    has_lengths: bool = False

    @property
    def num_keys(self) -> int:
        """Keys per sequence; the queries are the last of them."""
        return self.capacity or self.query_length

    @property
    def is_plain(self) -> bool:
        """Whether cuDNN takes it."""
        return not (self.window or self.soft_cap or self.has_lengths or self.capacity)

    @property
    def flops(self) -> float:
        """Of both products, over the keys that each query sees."""
        position = np.arange(self.query_length) + self.num_keys - self.query_length
        last = position if self.is_causal else np.full_like(position, self.num_keys - 1)
        first = np.maximum(position - self.window + 1, 0) if self.window else 0
        return float(4 * self.batch * self.num_heads * self.head_dim * (last - first + 1).sum())


TABLE = (
    *(Shape(f"causal, {length}", length) for length in (1024, 4096, 8192, 16384)),
    Shape("not causal, 8192", 8192, is_causal=False),
    Shape("causal, 8 x 1024, 32/8 heads", 1024, batch=8, num_kv_heads=8),
    Shape("causal, 8192, head dim 64", 8192, head_dim=64),
    Shape("causal, 8192, 16/8 heads, head dim 256", 8192, num_heads=16, num_kv_heads=8, head_dim=256),
    Shape("the same, soft cap 50", 8192, num_heads=16, num_kv_heads=8, head_dim=256, soft_cap=50.0),
    Shape("window of 4096 in 8192, 32/8 heads", 8192, num_kv_heads=8, window=4096),
    Shape("causal, 8192, with lengths", 8192, has_lengths=True),
    Shape("512 queries over 32768 keys, 32/8 heads", 512, num_kv_heads=8, capacity=32768, has_lengths=True),
)


def _calls(shape: Shape) -> dict[str, object]:
    """A function of query, key and value by the name of what it times."""
    options: dict[str, object] = dict(is_causal=shape.is_causal, logits_soft_cap=shape.soft_cap)
    if shape.window:
        options["local_window_size"] = (shape.window - 1, 0)
    if shape.has_lengths:
        options["key_value_seq_lengths"] = jnp.full(shape.batch, shape.num_keys)
    if shape.capacity:
        options["query_offset"] = jnp.full(shape.batch, shape.num_keys - shape.query_length)

    def ours(softmax: fdpp_jax.UnifiedMax | None) -> object:
        def call(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return fdpp_jax.dot_product_attention(
                query, key, value, softmax=softmax, implementation="mosaic_gpu", **options
            )

        return jax.jit(call)

    found = {"unified max": ours(fdpp_jax.UnifiedMax()), "online softmax": ours(None)}
    if shape.is_plain:
        found["cudnn"] = jax.jit(
            lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=shape.is_causal, implementation="cudnn")
        )
    return found


def measure(shape: Shape) -> dict[str, float]:
    """Microseconds of each call."""

    def arrays(seed: int) -> list[jax.Array]:
        sizes = [(shape.query_length, shape.num_heads), *[(shape.num_keys, shape.num_kv_heads)] * 2]
        return [
            jax.random.normal(jax.random.key(seed + i), (shape.batch, length, heads, shape.head_dim), jnp.bfloat16)
            for i, (length, heads) in enumerate(sizes)
        ]

    sets, calls = [arrays(0), arrays(10)], _calls(shape)
    for call in calls.values():
        jax.block_until_ready(call(*sets[0]))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            started = time.perf_counter()
            outs = [call(*sets[i % 2]) for i in range(_CALLS)]
            jax.block_until_ready(outs)
            samples[name].append((time.perf_counter() - started) / _CALLS * 1e6)
    return {name: statistics.median(times) for name, times in samples.items()}


def main() -> None:
    """Prints a line a shape, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers, with device, versions and commit")
    args = parser.parse_args()
    rows = []
    for shape in TABLE:
        times = measure(shape)
        rows.append({"shape": dataclasses.asdict(shape), "time_us": times, "flops": shape.flops})
        cells = [f"{name} {us:.0f} us, {shape.flops / us / 1e6:.0f} Tflop/s" for name, us in times.items()]
        ratio = times["unified max"] / times["online softmax"]
        sys.stdout.write(f"{shape.label}: {'; '.join(cells)}; unified / online {ratio:.3f}\n")
        sys.stdout.flush()
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(provenance() | {"prefill_attention": rows}, file, indent=1)


if __name__ == "__main__":
    main()
