"""Scores of attention, recorded by head while attention is computed, and their file format.

Attention goes block by block over the keys with online softmax, so no [T, T] matrix stands in memory; each block's
scores are counted in bins as they pass.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdpp_jax.json_fields import INDEX, LIST, NUMBER, Kind, read_field
from fdpp_jax.plans.shapes import round_up

# Bins over -1000 .. 1000 nats; what lies beyond counts in the outermost. Lowest and highest values are exact anyway.
LOWEST_NATS = -1000.0
BIN_NATS = 0.5
_NUM_BINS = 4000
_BLOCK_KEYS = 256

_COUNTS = Kind(
    "a list of integers of at least 0, some above 0",
    lambda value: isinstance(value, list) and all(type(count) is int and count >= 0 for count in value) and any(value),
)

type _Array = Any  # np.ndarray on the host, jax.Array on the device


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Distribution:
    """How one quantity is distributed, by layer and head.

    Attributes:
      counts: [L, N, bins] int64, bins of half a nat from -1000 on.
      low: [L, N] float32, the exact minimum.
      high: [L, N] float32, the exact maximum.
    """

    counts: _Array
    low: _Array
    high: _Array

    def central_range(self, share: float = 0.9999) -> tuple[np.ndarray, np.ndarray]:
        """What holds all but (1 - share) / 2 at either end, to a bin: (low, high), [L, N] each."""
        cumulative = self.counts.cumsum(axis=-1)
        total = cumulative[..., -1:]
        tail = total * ((1 - share) / 2)
        first = (cumulative > tail).argmax(axis=-1)
        last = (cumulative >= total - tail).argmax(axis=-1)
        low, high = LOWEST_NATS + BIN_NATS * first, LOWEST_NATS + BIN_NATS * (last + 1)
        return np.clip(low, self.low, self.high), np.clip(high, self.low, self.high)

    def pooled(self, axes: tuple[int, ...]) -> "Distribution":
        """That of all layers (axis 0) or heads (axis 1) together, as axes of 1."""
        return Distribution(
            self.counts.sum(axis=axes, keepdims=True),
            self.low.min(axis=axes, keepdims=True),
            self.high.max(axis=axes, keepdims=True),
        )

    def densest_range(self, width: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The range of at most width nats that leaves the fewest values out.

        Where all of them fit, it is exact; else it has whole bins, and of equally good ranges is the middle one.

        Returns:
          (low, high, number of values left out), [L, N] each.
        """
        low, high = self.low.astype(np.float64), self.high.astype(np.float64)
        left_out = np.zeros(low.shape, np.int64)
        num_bins = max(1, int(width / BIN_NATS))
        for at in zip(*np.nonzero(high - low > width), strict=True):
            counts = self.counts[at].copy()
            total = counts.sum()
            counts[[0, -1]] = 0  # the outermost bins have no end
            sums = np.concatenate([[0], counts.cumsum()])
            inside = sums[num_bins:] - sums[:-num_bins]  # of the bins from each on
            best = np.flatnonzero(inside == inside.max())
            start = best[len(best) // 2]
            left_out[at] = total - inside[start]
            bins = start + np.flatnonzero(counts[start : start + num_bins])
            if bins.size:
                low[at] = max(low[at], LOWEST_NATS + BIN_NATS * bins[0])
                high[at] = min(high[at], LOWEST_NATS + BIN_NATS * (bins[-1] + 1))
        return low, high, left_out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Stats:
    """What was recorded, by layer and head.

    Attributes:
      scores: Every scaled score.
      row_max: The largest score of each row.
      log_den: ln sum e^score of each row: ln of the denominator for phi = 0, which the safe window tests.
    """

    scores: Distribution
    row_max: Distribution
    log_den: Distribution


_QUANTITIES = tuple(field.name for field in dataclasses.fields(Stats))


def attend_and_record(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    live: jax.Array,
    *,
    scale: float | None = None,
    local_window_size: tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
) -> tuple[jax.Array, Stats]:
    """Causal attention, and what the rows of the live queries looked like.

    Args:
      query: [B, T, N, H].
      key: [B, T, K, H].
      value: As key.
      live: [B, T] bool, the queries to record.
      scale: Factor on the scores; 1 / sqrt(H) by default.
      local_window_size: As in `ops.dot_product_attention`.
      logits_soft_cap: As in `ops.dot_product_attention`.

    Returns:
      [B, T, N, H], and stats of one layer, without the axis L; counts are uint32.
    """
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    block = min(_BLOCK_KEYS, length)
    padding = [(0, 0), (0, round_up(length, block) - length), (0, 0), (0, 0)]
    keys, values = (
        jnp.pad(x, padding).reshape(batch, -1, block, num_kv_heads, head_dim).swapaxes(0, 1) for x in (key, value)
    )  # [blocks, B, block, K, H]
    query = query.reshape(batch, length, num_kv_heads, -1, head_dim)  # [B, T, K, G, H]
    # XLA multiplies float32 in TF32 on GPUs unless asked not to.
    precision = jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else None
    query_pos = jnp.arange(length)[:, None]
    live = live[:, None, :, None]  # [B, 1, T, 1]

    def step(carry: Any, inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, None]:
        row_max, den, num, seen = carry
        start, key, value = inputs
        scores = jnp.einsum("btkgh,bskh->bkgts", query, key, precision=precision, preferred_element_type=jnp.float32)
        scores = scores.reshape(batch, num_heads, length, block) * scale  # [B, N, T, block]
        if logits_soft_cap is not None:
            scores = logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
        key_pos = start + jnp.arange(block)
        mask = key_pos <= query_pos  # [T, block]; it hides the padding too
        if local_window_size is not None:
            left, right = local_window_size
            mask &= (key_pos >= query_pos - left) & (key_pos <= query_pos + right)
        seen = _merged(seen, _observe(scores, mask & live))
        scores = jnp.where(mask, scores, -jnp.inf)
        new_max = jnp.maximum(row_max, scores.max(axis=-1))
        shift = jnp.where(jnp.isneginf(new_max), 0.0, new_max)  # no key yet
        keep = jnp.exp(row_max - shift)
        weights = jnp.exp(scores - shift[..., None])
        grouped = weights.reshape(batch, num_kv_heads, -1, length, block)
        out = jnp.einsum("bkgts,bskh->bkgth", grouped, value.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        num = num * keep[..., None] + out.reshape(num.shape)
        return (new_max, den * keep + weights.sum(axis=-1), num, seen), None

    rows = batch, num_heads, length
    nothing = Distribution(
        counts=jnp.zeros((num_heads, _NUM_BINS), jnp.uint32),
        low=jnp.full(num_heads, jnp.inf),
        high=jnp.full(num_heads, -jnp.inf),
    )
    carry = jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros((*rows, head_dim)), nothing
    (row_max, den, num, seen), _ = jax.lax.scan(step, carry, (jnp.arange(len(keys)) * block, keys, values))
    log_den = row_max + jnp.log(den)
    stats = Stats(seen, _observe(row_max[..., None], live), _observe(log_den[..., None], live))
    return (num / den[..., None]).swapaxes(1, 2).astype(value.dtype), stats


def _observe(values: jax.Array, mask: jax.Array) -> Distribution:
    """The distribution, by head, of values [B, N, T, S] where mask."""
    num_heads = values.shape[1]
    mask = jnp.broadcast_to(mask, values.shape)
    bins = jnp.clip(jnp.floor((values - LOWEST_NATS) / BIN_NATS), 0, _NUM_BINS - 1).astype(jnp.int32)
    bins += jnp.arange(num_heads)[:, None, None] * _NUM_BINS
    bins = jnp.where(mask, bins, num_heads * _NUM_BINS)  # dropped
    counts = jnp.zeros(num_heads * _NUM_BINS, jnp.uint32).at[bins.reshape(-1)].add(1, mode="drop")
    return Distribution(
        counts=counts.reshape(num_heads, _NUM_BINS),
        low=jnp.where(mask, values, jnp.inf).min(axis=(0, 2, 3)),
        high=jnp.where(mask, values, -jnp.inf).max(axis=(0, 2, 3)),
    )


def _merged(a: Distribution, b: Distribution) -> Distribution:
    return Distribution(a.counts + b.counts, jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high))


def add(total: Stats | None, new: Stats) -> Stats:
    """The sum of what was recorded, as numpy arrays with counts in int64; new may come from the device."""

    def added(name: str) -> Distribution:
        b: Distribution = jax.tree.map(np.asarray, getattr(new, name))
        counts = b.counts.astype(np.int64)
        if total is None:
            return Distribution(counts, b.low, b.high)
        a: Distribution = getattr(total, name)
        return Distribution(a.counts + counts, np.minimum(a.low, b.low), np.maximum(a.high, b.high))

    return Stats(*map(added, _QUANTITIES))


def to_json(stats: Stats) -> list[dict[str, Any]]:
    """By layer, then by quantity, then by head: {low, high, first_bin, counts}, without empty bins at the ends."""

    def head(distribution: Distribution, at: tuple[int, int]) -> dict[str, Any]:
        counts = distribution.counts[at]
        first, last = np.flatnonzero(counts)[[0, -1]].tolist()
        return {
            "low": float(distribution.low[at]),
            "high": float(distribution.high[at]),
            "first_bin": first,
            "counts": counts[first : last + 1].tolist(),
        }

    num_layers, num_heads = stats.scores.low.shape
    return [
        {name: [head(getattr(stats, name), (layer, n)) for n in range(num_heads)] for name in _QUANTITIES}
        for layer in range(num_layers)
    ]


def from_json(content: Mapping[str, Any], num_rows: int) -> Stats:
    """What `to_json` gave, out of the field "layers"; each head must have num_rows rows.

    Raises:
      ValueError: Malformed; names the field.
    """
    layers = read_field(content, "layers", LIST)
    if not layers:
        raise ValueError("layers is empty")
    stats = Stats(*(_distribution(layers, name) for name in _QUANTITIES))
    for name in ("row_max", "log_den"):
        sums = getattr(stats, name).counts.sum(axis=-1)  # [L, N]
        for layer, n in np.argwhere(sums != num_rows):
            raise ValueError(
                f"layers[{layer}].{name}[{n}].counts must add up to num_tokens = {num_rows}, got {sums[layer, n]}"
            )
    return stats


def _distribution(layers: list[Any], name: str) -> Distribution:
    heads_of = [read_field(layer, name, LIST, f"layers[{i}].") for i, layer in enumerate(layers)]
    num_heads = len(read_field(layers[0], _QUANTITIES[0], LIST, "layers[0]."))
    shape = len(layers), num_heads
    counts = np.zeros((*shape, _NUM_BINS), np.int64)
    low, high = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for layer, heads in enumerate(heads_of):
        if not heads or len(heads) != num_heads:
            raise ValueError(f"layers[{layer}].{name} must hold {max(num_heads, 1)} heads, got {len(heads)}")
        for n, head in enumerate(heads):
            where = f"layers[{layer}].{name}[{n}]."
            low[layer, n], high[layer, n] = (read_field(head, end, NUMBER, where) for end in ("low", "high"))
            first, bins = read_field(head, "first_bin", INDEX, where), read_field(head, "counts", _COUNTS, where)
            if first + len(bins) > _NUM_BINS:
                raise ValueError(f"{where}first_bin and {len(bins)} counts must lie in {_NUM_BINS} bins, got {first}")
            if not low[layer, n] <= high[layer, n]:
                raise ValueError(f"{where}low must not exceed high, got {low[layer, n]} and {high[layer, n]}")
            counts[layer, n, first : first + len(bins)] = bins
    return Distribution(counts, low, high)
