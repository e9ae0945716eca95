"""Where phi comes from: the scores of a model over a data set, and the phi that keeps their rows in the safe window.

Every live query position counts as a decode step: its scores are scaled (natural-log units), capped and masked as
in decoding.

Source: FlashDecoding++ (arXiv 2311.01282), section 3. The paper fits phi to the scores. The safe test looks at the
rows' denominators (see `unified_max`), and so does the choice of phi here.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdpp_jax import device_memory, score_stats, unified_max
from fdpp_jax._version import __version__
from fdpp_jax.json_fields import OBJECT, SIZE, TEXT, equal_to, one_of, read_field
from fdpp_jax.models.config import DecoderConfig
from fdpp_jax.models.decoder import CausalLM
from fdpp_jax.models.loading import fingerprint, read_config, read_json, resolve
from fdpp_jax.plans.tables import FileStamp, file_stamp
from fdpp_jax.score_stats import BIN_NATS, LOWEST_NATS, Stats
from fdpp_jax.unified_max import UnifiedMax

Level = Literal["model", "layer", "head"]
LEVELS: tuple[Level, ...] = get_args(Level)

FILE_NAME = "fdpp_calibration.json"
_FORMAT = 1
_FIELDS = {
    "dtype": one_of("bfloat16", "float16", "float32"),
    "max_keys": SIZE,
    "num_sequences": SIZE,
    "num_tokens": SIZE,
    "versions": OBJECT,
    "data": TEXT,
    "weights": TEXT,
    "date": TEXT,
}
# Of the recorded rows, in line with the paper's scores of which more than 99.99 % lie in range. A step of 1,024 rows
# is then redone one time in ten at most, which is what `generate` puts up with.
_MAX_RECOMPUTE_RATE = 1e-4
# Two pieces of 512 tokens. Where none of n rows is outside, 3 / n of all rows still may be (95 %): 0.3 % of a head's.
MIN_TOKENS = 1024
_LOWER = "Lower the batch or the length of its texts"


@dataclasses.dataclass(frozen=True, eq=False)
class Judgement:
    """Whether one phi, or one a layer or a head, keeps the recorded rows in the safe window.

    Attributes:
      level: What has a phi of its own.
      phi: The phi that leaves the fewest rows outside, with the most room on both sides of the others: [] ("model"),
        [L] ("layer") or [L, N] ("head").
      margin_nats: Room between the rows inside and either end of the window, where it is least. Negative where too
        many rows are outside: half of what the window lacks for all of them.
      recompute_rate: Share of the recorded rows that this phi leaves outside, to a bin. A decode step has L * N rows a
        sequence, and counts as redone if one of them is.
      reason: The figures behind it, in one line.
    """

    level: Level
    phi: np.ndarray
    margin_nats: float
    recompute_rate: float
    reason: str

    @property
    def fits(self) -> bool:
        """Whether all recorded rows are in the window, but for one in 10,000 at most."""
        return self.margin_nats >= 0


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Scores of a model over a data set.

    Attributes:
      stats: numpy arrays by layer and head.
      dtype: The model's.
      max_keys: Keys a row can have at most: the model's max_position_embeddings.
      num_sequences: Sequences recorded.
      num_tokens: Query positions recorded, and so the rows of each head.
      versions: Of the packages that recorded it.
      data: What was recorded, in words.
      weights: `models.loading.fingerprint` of the checkpoint; empty: of no checkpoint.
      date: ISO date; None: the day of saving.
    """

    stats: Stats
    dtype: str
    max_keys: int
    num_sequences: int
    num_tokens: int
    versions: Mapping[str, str]
    data: str = ""
    weights: str = ""
    date: str | None = None

    @property
    def num_layers(self) -> int:
        """L."""
        return self.stats.scores.low.shape[0]

    @property
    def num_heads(self) -> int:
        """Query heads, N."""
        return self.stats.scores.low.shape[1]

    def window(self, dtype: jax.typing.DTypeLike | None = None, capacity: int | None = None) -> tuple[float, float]:
        """The safe range of ln den - phi, in nats; arguments as in `judge`."""
        dtype, capacity = self.dtype if dtype is None else dtype, self.max_keys if capacity is None else capacity
        den_min, den_max = unified_max.window(dtype, capacity)
        return math.log(den_min), math.log(den_max)

    def judge(
        self, level: Level = "model", *, dtype: jax.typing.DTypeLike | None = None, capacity: int | None = None
    ) -> Judgement:
        """The best phi, and whether it will do.

        Args:
          level: What gets a phi of its own: "model", "layer" or "head".
          dtype: Of the values in decoding, which decides the window; None: the model's.
          capacity: Keys a row can have at most, which counts in float16; None: max_keys.

        Raises:
          ValueError: An unknown level.
        """
        if level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
        bottom, top = self.window(dtype, capacity)
        axes: tuple[int, ...] = {"model": (0, 1), "layer": (1,), "head": ()}[level]
        rows = self.stats.log_den.pooled(axes)  # [L or 1, N or 1]
        low, high, left_out = rows.densest_range(top - bottom)
        num_outside, num_rows = int(left_out.sum()), int(rows.counts.sum())
        margin = (top - bottom - (high - low)) / 2
        room = float(margin.min())
        span = rows.high.astype(np.float64) - rows.low
        if num_outside > _MAX_RECOMPUTE_RATE * num_rows:
            room = (top - bottom - float(span.max())) / 2
        layer, head = worst = np.unravel_index(span.argmax(), span.shape)
        place = {"model": "", "layer": f"layer {layer}: ", "head": f"layer {layer}, head {head}: "}[level]
        outside = f"{num_outside:,} of {num_rows:,} rows ({num_outside / num_rows:.2g})"
        if room < 0:
            verdict = f"{-2 * room:.1f} too few, the best phi leaves {outside} outside"
        elif num_outside:
            verdict = f"{outside} will be redone, the others have {room:.1f} to spare at either end"
        else:
            verdict = f"{room:.1f} to spare at either end"
        if self.num_tokens < MIN_TOKENS:
            share = min(1, 3 / self.num_tokens)
            verdict += (
                f"; of only {self.num_tokens} tokens, so up to {100 * share:.2g} % of a head's rows may lie outside"
            )
        return Judgement(
            level,
            ((low + high) / 2 - (bottom + top) / 2).squeeze(axis=axes),
            room,
            num_outside / num_rows,
            f"{place}ln den from {rows.low[worst]:.1f} to {rows.high[worst]:.1f} spans {span[worst]:.1f} nats, the "
            f"window of {jnp.dtype(dtype or self.dtype).name} {top - bottom:.1f}: {verdict}",
        )

    def unified_max(
        self, level: Level = "model", *, dtype: jax.typing.DTypeLike | None = None, capacity: int | None = None
    ) -> UnifiedMax | None:
        """The policy with the phi of `judge`, or None (online softmax) where that does not fit; arguments as there.

        With "layer" and "head" phi has an axis of layers, [L, 1, 1] and [L, 1, N]: for `CausalLM.decode`.
        """
        judgement = self.judge(level, dtype=dtype, capacity=capacity)
        if not judgement.fits:
            return None
        if level == "model":
            return UnifiedMax(float(judgement.phi))
        return UnifiedMax(jnp.asarray(judgement.phi, jnp.float32).reshape(self.num_layers, 1, -1))

    def save(self, path: str | pathlib.Path) -> None:
        """Writes it as JSON, which is called fdpp_calibration.json beside a checkpoint."""
        content = {
            "format": _FORMAT,
            "dtype": self.dtype,
            "max_keys": self.max_keys,
            "num_sequences": self.num_sequences,
            "num_tokens": self.num_tokens,
            "versions": dict(self.versions),
            "data": self.data,
            "weights": self.weights,
            "date": self.date or datetime.date.today().isoformat(),
            "lowest_bin_nats": LOWEST_NATS,
            "bin_nats": BIN_NATS,
            "layers": score_stats.to_json(self.stats),
        }
        pathlib.Path(path).write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "Calibration":
        """Reads what `save` wrote.

        Raises:
          ValueError: The file is missing or malformed; names it and the field.
        """
        path = pathlib.Path(path)
        content = read_json(path.parent, path.name)
        try:
            for name, expected in dict(format=_FORMAT, lowest_bin_nats=LOWEST_NATS, bin_nats=BIN_NATS).items():
                read_field(content, name, equal_to(expected))
            fields = {name: read_field(content, name, kind) for name, kind in _FIELDS.items()}
            return cls(score_stats.from_json(content, fields["num_tokens"]), **fields)
        except ValueError as error:
            raise ValueError(f"{path} is not a calibration: {error}") from error


def calibrate(
    model: CausalLM,
    batches: Iterable[Any],
    *,
    progress: Callable[[Calibration], None] | None = None,
    resume: Calibration | None = None,
    min_tokens: int = MIN_TOKENS,
) -> Calibration:
    """Records the attention scores of a model over a data set, for a unified max that fits them.

    One program is compiled for each shape of tokens. The order of the batches does not matter, nor does a break
    between two of them.

    Args:
      model: The model.
      batches: Of tokens [B, T] integers, or of pairs of these, right-padded, and lengths [B] integers in 0..T. The
        arrays may be sharded over devices.
      progress: Called after each batch with all that has been recorded so far.
      resume: A calibration of this model to add to; batches are then those that it has not seen.
      min_tokens: Live tokens that there must be, those of resume included. A phi that fits few rows may not fit the
        next text; `judge` says so of fewer than 1,024.

    Returns:
      What was recorded; `.unified_max()` is the policy for it.

    Raises:
      ValueError: There are fewer than min_tokens, an argument does not fit the model, or the model's scores are not
        finite.
      MemoryError: The device has too little memory for a batch.
    """
    config = model.config
    shape = (config.num_hidden_layers, config.num_attention_heads, model.dtype.name, config.max_position_embeddings)
    if resume is not None and (resume.num_layers, resume.num_heads, resume.dtype, resume.max_keys) != shape:
        got = (resume.num_layers, resume.num_heads, resume.dtype, resume.max_keys)
        raise ValueError(f"resume must be of this model: (layers, heads, dtype, max_keys) = {shape}, got {got}")
    graphdef, weights = nnx.split(model)
    model_bytes = sum(x.nbytes for x in jax.tree.leaves(weights))
    total = resume
    for batch in batches:
        tokens, lengths, live = _check_batch(batch, model)
        if not live.any():
            continue
        with device_memory.explained(lambda: {"the weights take": model_bytes}, _LOWER):
            new = score_stats.add(None, _record(graphdef, weights, tokens, lengths))
        _check_finite(new)
        if total is None:
            total = Calibration(new, model.dtype.name, config.max_position_embeddings, 0, 0, _versions())
        else:
            total = dataclasses.replace(total, stats=score_stats.add(total.stats, new))
        total = dataclasses.replace(
            total,
            num_sequences=total.num_sequences + int(live.any(axis=1).sum()),
            num_tokens=total.num_tokens + int(live.sum()),
            date=None,
        )
        if progress is not None:
            progress(total)
    if total is None:
        raise ValueError("batches hold no token: there is nothing to calibrate on")
    check_tokens(total.num_tokens, min_tokens, "min_tokens")
    return total


def check_tokens(num_tokens: int, min_tokens: int, flag: str) -> None:
    """Raises unless there is enough to calibrate on.

    Args:
      num_tokens: How many there are.
      min_tokens: How many there must be.
      flag: The name of min_tokens to the caller, for the error.

    Raises:
      ValueError: There are fewer.
    """
    if num_tokens < min_tokens:
        raise ValueError(
            f"expected at least {min_tokens} tokens, got {num_tokens}: a phi that fits these may not fit the next "
            f"text; give more text, or a lower {flag}"
        )


def _check_batch(batch: Any, model: CausalLM) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """tokens [B, T], lengths [B] and which tokens are live, [B, T] on the host."""
    tokens, lengths = batch if isinstance(batch, tuple) else (batch, None)
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer) or tokens.size == 0:
        raise ValueError(f"tokens must be integers [B, T], got {tokens.dtype} of shape {tokens.shape}")
    count, width = tokens.shape
    lengths = jnp.full(count, width, jnp.int32) if lengths is None else jnp.asarray(lengths)
    if lengths.shape != (count,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"lengths must be integers [{count}], got {lengths.dtype} of shape {lengths.shape}")
    on_host = np.asarray(lengths)
    if on_host.min() < 0 or on_host.max() > width:
        raise ValueError(f"lengths must be within 0..{width} (the width of tokens), got {on_host.tolist()}")
    vocab_size, limit = model.config.vocab_size, model.config.max_position_embeddings
    if width > limit:
        raise ValueError(f"{width} tokens a sequence need as many positions, the model has {limit}")
    if count * width**2 >= 2**32:
        raise ValueError(f"{count} sequences of {width} tokens have more scores a head than 32 bits can count")
    live = np.arange(width) < on_host[:, None]
    ids = np.asarray(tokens)[live]
    unknown = ids[(ids < 0) | (ids >= vocab_size)]
    if unknown.size:
        raise ValueError(f"tokens must be within 0..{vocab_size - 1}, got {int(unknown[0])}")
    return tokens, lengths, live


@functools.partial(jax.jit, static_argnums=0)
def _record(graphdef: nnx.GraphDef, weights: nnx.State, tokens: jax.Array, lengths: jax.Array) -> Stats:
    model = nnx.merge(graphdef, weights)
    positions = jnp.arange(tokens.shape[1])
    live = positions < lengths[:, None]  # [B, T]
    by_layer: dict[int, Stats] = {}

    def attend(layer: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        options = model.config.attention_options(layer)
        out, by_layer[layer] = score_stats.attend_and_record(query, key, value, live, **options)
        return out

    model.hidden_states(tokens, positions[None], attend)
    return jax.tree.map(lambda *layers: jnp.stack(layers), *(by_layer[layer] for layer in sorted(by_layer)))


def _check_finite(stats: Stats) -> None:
    finite = np.isfinite([stats.scores.low, stats.scores.high, stats.log_den.high]).all(axis=0)  # [L, N]
    if not finite.all():
        layer, head = np.argwhere(~finite)[0]
        raise ValueError(f"the model's scores are not finite in layer {layer}, head {head}")


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    return {"fdpp-jax": __version__} | packages


def find(path_or_hub_id: str | pathlib.Path) -> Calibration | None:
    """The calibration beside a checkpoint, or None where there is none.

    Args:
      path_or_hub_id: As for `models.load`.

    Raises:
      ValueError: The file is malformed or of another model, or there is no such checkpoint.
    """
    directory = resolve(path_or_hub_id)
    path = directory / FILE_NAME
    if not path.is_file():
        return None
    found = Calibration.load(path)
    config = read_config(directory)
    expected, got = (config.num_hidden_layers, config.num_attention_heads), (found.num_layers, found.num_heads)
    if got != expected:
        raise ValueError(f"{path} must be of the model beside it: (layers, heads) = {expected}, got {got}")
    if found.weights and found.weights != (weights := fingerprint(directory)):
        raise ValueError(
            f"{path} must be of the weights beside it, {weights}, got {found.weights}: calibrate anew or remove it"
        )
    return found


def load_for(
    path_or_hub_id: str | pathlib.Path,
    *,
    level: Level = "model",
    dtype: jax.typing.DTypeLike | None = None,
    capacity: int | None = None,
) -> UnifiedMax | None:
    """The calibrated policy of a checkpoint; None without a calibration, or where no phi fits it.

    Args:
      path_or_hub_id: As for `models.load`.
      level: As in `Calibration.judge`, and so are the others.

    Raises:
      ValueError: As `find`.
    """
    found = find(path_or_hub_id)
    return None if found is None else found.unified_max(level, dtype=dtype, capacity=capacity)


def choose_softmax(
    config: DecoderConfig, checkpoint: pathlib.Path, dtype: jax.typing.DTypeLike
) -> tuple[UnifiedMax | None, str]:
    """What decodes a checkpoint if nothing is asked for, and why: calibrated, or else what its family is known for.

    Every call of `generate` asks: the file is read again when it changes.

    Args:
      config: Of the model.
      checkpoint: Its directory.
      dtype: Of the run.

    Returns:
      The policy with one phi if that fits, else one for each layer, or head; None for online softmax. And the reason in
      one line.

    Raises:
      ValueError: The calibration beside the checkpoint is malformed or of another model.
    """
    stamp = file_stamp(checkpoint / FILE_NAME)
    return _choose_softmax(config, checkpoint, jnp.dtype(dtype).name, stamp)


@functools.lru_cache(maxsize=8)
def _choose_softmax(
    config: DecoderConfig, checkpoint: pathlib.Path, dtype: str, stamp: FileStamp | None
) -> tuple[UnifiedMax | None, str]:
    found = None if stamp is None else find(checkpoint)  # which wants a directory that is still there
    if found is None:
        uncalibrated, why = config.uncalibrated_softmax(dtype)
        advice = f"no {FILE_NAME} beside the checkpoint, which `fdpp-jax calibrate` would write"
        taken = "online" if uncalibrated is None else f"unified, phi {uncalibrated.phi:g}"
        return uncalibrated, f"{taken}, {why}: {advice}"
    for level in LEVELS:
        judgement = found.judge(level, dtype=dtype)
        if judgement.fits:
            low, high = judgement.phi.min(), judgement.phi.max()
            taken = (
                f"phi {low:.2f}" if level == "model" else f"a phi each {level} ({low:.2f} .. {high:.2f}), none for all"
            )
            return found.unified_max(level, dtype=dtype), f"unified, {taken}, calibrated: {judgement.reason}"
    return None, f"online, since no phi fits {FILE_NAME}: {found.judge(dtype=dtype).reason}"


def plot(calibration: Calibration, axes: Any, *, dtype: jax.typing.DTypeLike | None = None) -> None:
    """Draws the ranges of scores and ln den by layer, and the safe window around the model's phi.

    Args:
      calibration: What was recorded.
      axes: matplotlib's Axes to draw on.
      dtype: As in `Calibration.judge`.
    """
    phi = float(calibration.judge("model", dtype=dtype).phi)
    bottom, top = calibration.window(dtype)
    layers = range(calibration.num_layers)
    axes.axhspan(phi + bottom, phi + top, color="tab:green", alpha=0.12, label="safe window of ln den")
    axes.axhline(phi, color="tab:green", label=f"phi = {phi:.1f}")
    for name, label, width, color in (("scores", "scores", 3, "lightsteelblue"), ("log_den", "ln den", 7, "tab:blue")):
        distribution = getattr(calibration.stats, name)
        low, high = distribution.low.min(axis=1), distribution.high.max(axis=1)
        axes.vlines(layers, low, high, color=color, linewidth=width, label=label)
    axes.set(xlabel="layer", ylabel="nats", xticks=layers[:: max(1, len(layers) // 16)])
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
