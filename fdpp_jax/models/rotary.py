"""Rotary position embeddings: what config.json says of them, angles by position, and the turn itself in float32."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fdpp_jax.json_fields import NUMBER, OBJECT, POSITIVE, SIZE, TEXT, Kind, field_problems

# What each type reads beside rope_theta. original_max_position_embeddings says nothing to those that do not read it.
_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_KINDS: dict[str, Kind] = {
    "rope_type": TEXT,
    "rope_theta": POSITIVE,
    "partial_rotary_factor": NUMBER,
    "factor": POSITIVE,
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    "original_max_position_embeddings": SIZE,
}
# Where transformers 4 and 5 have the settings, and which of them may stand beside that.
_PLACES = ("rope_scaling", "rope_parameters")
_BESIDE = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, "original_max_position_embeddings": None}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a checkpoint stretches its rotary frequencies; field names as in Hugging Face's rope_scaling.

    "linear" uses `factor` alone. "llama3" divides long wavelengths by `factor`, keeps short ones, and
    blends in between.
    """

    rope_type: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def _settings(hf: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The rotary settings by one place and what stands beside it, with defaults and without nulls."""
    settings: dict[str, Any] = dict(_BESIDE)
    for stated in ({key: hf.get(key) for key in _BESIDE}, hf.get(place) or {}):
        settings |= {key: value for key, value in stated.items() if value is not None}
    kind = settings.pop("type", "default")
    return {"rope_type": kind} | {key: value for key, value in settings.items() if value is not None}


def _stated(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of a config.json that does not contradict itself."""
    return _settings(hf, next((place for place in _PLACES if hf.get(place)), _PLACES[0]))


def rope_theta(hf: Mapping[str, Any]) -> float:
    """The base of the rotary frequencies."""
    return float(_stated(hf)["rope_theta"])


def rope_scaling(hf: Mapping[str, Any]) -> RopeScaling | None:
    """How the rotary frequencies are stretched; None: not at all."""
    rope = _stated(hf)
    if rope["rope_type"] == "default":
        return None
    if rope["rope_type"] == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    return RopeScaling(
        "llama3",
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=rope.get(
            "original_max_position_embeddings", hf.get("max_position_embeddings", 2048)
        ),
    )


def rope_problems(hf: Mapping[str, Any]) -> list[str]:
    """Why the rotary settings cannot be run; that they are objects is the matter of `config.common_problems`.

    transformers 4 reads rope_theta and rope_scaling, transformers 5 lets rope_scaling replace rope_parameters and what
    stands inside go before what stands beside. So settings that differ mean two models, and are refused.
    """
    places = [place for place in _PLACES if hf.get(place)]
    for place in places:
        if layers := [key for key, value in hf[place].items() if OBJECT.holds(value)]:
            return [f"expected {place} of one kind for all layers, got objects {', '.join(layers)}"]
    if problems := field_problems(_stated(hf), _KINDS):
        return problems
    if problems := [problem for place in places for problem in _contradictions(hf, place)]:
        return problems
    if len(places) == 2 and _settings(hf, places[0]) != _settings(hf, places[1]):
        return [f"expected rope_scaling and rope_parameters to say the same, got {hf[places[0]]} and {hf[places[1]]}"]
    return _unread_problems(_stated(hf))


def _contradictions(hf: Mapping[str, Any], place: str) -> list[str]:
    """Which settings of a place differ from those that stand beside it, and its `type` from its rope_type."""
    inside = hf[place]
    pairs = [("type", "rope_type", inside.get("rope_type"), inside.get("type"))]
    pairs += [(key, key, hf.get(key), inside.get(key)) for key in _BESIDE]
    return [
        f"expected {place}.{key} to be {other} {expected!r}, got {got!r}"
        for key, other, expected, got in pairs
        if None not in (expected, got) and expected != got
    ]


def _unread_problems(rope: Mapping[str, Any]) -> list[str]:
    """What of the settings, of the right kinds, nothing here computes."""
    rope_type = rope["rope_type"]
    if rope_type not in _NEEDED:
        return [f"expected a rope_type out of {', '.join(_NEEDED)}, got {rope_type!r}"]
    needed = _NEEDED[rope_type]
    problems = [f"rope_type {rope_type!r} needs {key}, which is missing" for key in needed if key not in rope]
    problems += [
        f"rope_type {rope_type!r} does not read {key}, got {value!r}"
        for key, value in rope.items()
        if key not in (*needed, "rope_type", *_BESIDE)
    ]
    if (partial := rope["partial_rotary_factor"]) != 1.0:
        problems.append(f"expected partial_rotary_factor 1.0, got {partial}")
    if rope_type == "llama3" and not problems and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        problems.append(f"expected high_freq_factor above low_freq_factor {low}, got {high}")
    return problems


class Rotary(Protocol):
    """What a config says of its rotary embeddings."""

    def __hash__(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def rope_theta(self) -> float: ...

    @property
    def rope_scaling(self) -> RopeScaling | None: ...


def rotation_at(config: Rotary, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, 1, H / 2] float32 of the rotary angles at positions [B, T]."""
    angles = positions[:, :, None, None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (x[i], x[i + H / 2]) of x [B, T, N, H] by the rotary angles, in float32."""
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


def stored_frequencies(config: Rotary) -> tuple[np.ndarray, ...]:
    """The inverse frequencies that a checkpoint may store: after its scaling, or before."""
    return inverse_frequencies(config), _plain_frequencies(config.head_dim, config.rope_theta)


def _plain_frequencies(head_dim: int, rope_theta: float) -> np.ndarray:
    """Rotary angle per position of each pair, [H / 2] float32, before a scaling."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1.0) / np.float32(rope_theta) ** exponents


@functools.cache
def inverse_frequencies(config: Rotary) -> np.ndarray:
    """Rotary angle per position of each pair, [H / 2] float32, after the checkpoint's scaling."""
    frequencies = _plain_frequencies(config.head_dim, config.rope_theta)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / np.float32(scaling.factor)
    # How often each pair turns within the original context decides: 1 keeps the frequency, 0 divides it.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((keep + (1 - keep) / scaling.factor) * frequencies).astype(np.float32)
