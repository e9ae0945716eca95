"""Tables of measured matmuls: their format, where they lie, and which of their rows answers a shape.

`fdpp-jax tune` writes a table, `heuristics.plan_matmul` reads it; docs/tuning.md shows one. A device has up to two: the
one that the package ships and the user's own, which wins. Plain Python: no arrays, no GPU.
"""

import bisect
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

from fdpp_jax.config import FlatMatmulConfig, GemvConfig, MatmulImplementation, MatmulShape, WeightOrder

FORMAT = 1
SHIPPED_DIRECTORY = pathlib.Path(__file__).parent / "tuned"
# A weight answers for another that is at most so many times as deep and as wide, or as shallow and as narrow.
NEAR = 2.0
_CONFIG_TYPES: dict[str, type[FlatMatmulConfig] | type[GemvConfig]] = {"flat": FlatMatmulConfig, "gemv": GemvConfig}
_IMPLEMENTATIONS = get_args(MatmulImplementation)

# The order that models store, and that tables are measured in. They answer for the other, too.
W_ORDER: WeightOrder = "nk"

type WeightKey = tuple[int, int, str]  # k, n, dtype; whatever the order
type FileStamp = tuple[pathlib.Path, int, int]  # path, time of the last change in ns, bytes


@dataclasses.dataclass(frozen=True)
class Run:
    """Where numbers are from: ISO date, versions by package, and the commit where it is known."""

    date: str
    versions: Mapping[str, str]
    commit: str | None


@dataclasses.dataclass(frozen=True)
class Entry:
    """One measured matmul.

    Attributes:
      shape: What was measured.
      implementation: The fastest.
      floor_us: Of reading the weight's bytes, microseconds.
      time_us: Of each implementation, with its best config, microseconds.
      configs: The best config of each kernel.
      run: Where it is from.
      where: "h200.json: entries[3]", for errors; empty where it comes from no file.
    """

    shape: MatmulShape
    implementation: MatmulImplementation
    floor_us: float
    time_us: Mapping[str, float]
    configs: Mapping[str, FlatMatmulConfig | GemvConfig]
    run: Run
    where: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """All configs of the flat kernel, and XLA, on one weight: microseconds by `config_text`, and "xla"."""

    shape: MatmulShape
    time_us: Mapping[str, float]
    run: Run


@dataclasses.dataclass(frozen=True)
class Table:
    """What was measured on one kind of device.

    Attributes:
      device: Fields of Device, and "jax_kind", JAX's name for it.
      entries: One for each weight and number of rows.
      sweeps: One for each weight.
    """

    device: Mapping[str, Any]
    entries: tuple[Entry, ...] = ()
    sweeps: tuple[Sweep, ...] = ()

    def of_weight(self, k: int, n: int, dtype: str) -> tuple[Entry, ...]:
        """Its entries, by rows."""
        return _by_weight(self.entries).get((k, n, dtype), ())

    def replaced(self, entries: Sequence[Entry], sweep: Sweep) -> "Table":
        """This table with one weight's measurements in place of those it had."""
        key = weight_key(sweep.shape)
        kept = tuple(entry for entry in self.entries if weight_key(entry.shape) != key)
        sweeps = tuple(old for old in self.sweeps if weight_key(old.shape) != key)
        return Table(self.device, (*kept, *entries), (*sweeps, sweep))


@dataclasses.dataclass(frozen=True)
class Match:
    """The entry that answers a shape, JAX's name of the device it is from, and whether K and N are the shape's."""

    entry: Entry
    jax_kind: str
    is_exact: bool

    @property
    def reason(self) -> str:
        """ "tuned on NVIDIA H200, 2026-11-23: nearest 4096x12288, M = 8 (flat 27.1 us, xla 28.3 us)"."""
        shape, entry = self.entry.shape, self.entry
        which = "exact" if self.is_exact else f"nearest {shape.k}x{shape.n}"
        times = ", ".join(f"{name} {us:.1f} us" for name, us in sorted(entry.time_us.items(), key=lambda item: item[1]))
        return f"tuned on {self.jax_kind}, {entry.run.date[:10]}: {which}, M = {shape.m} ({times})"


def weight_key(shape: MatmulShape) -> WeightKey:
    """K, N and dtype: which weight it is, in either order."""
    return shape.k, shape.n, shape.dtype


def config_text(config: FlatMatmulConfig | GemvConfig) -> str:
    """ "64 x 256, 5 stages, 132 CTAs", or of gemv "64 x 128, 5 stages, split 2"."""
    shares = f"split {config.split_k}" if isinstance(config, GemvConfig) else f"{config.num_ctas} CTAs"
    return f"{config.block_n} x {config.block_k}, {config.num_stages} stages, {shares}"


def cache_directory() -> pathlib.Path:
    """Where what can be made again is kept: fdpp_jax in the user's cache directory (XDG)."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fdpp_jax"


def user_directory() -> pathlib.Path:
    """Where the user's own tables lie: FDPP_TUNED_DIR, else tuned in the cache directory."""
    named = os.environ.get("FDPP_TUNED_DIR")
    if named:
        return pathlib.Path(named).expanduser()
    return cache_directory() / "tuned"


def file_name(device_kind: str) -> str:
    """ "h200.json" of "H200", "nvidia-h100-pcie.json" of "NVIDIA H100 PCIe"."""
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-") + ".json"


def lookup(shape: MatmulShape, device_kind: str) -> Match | None:
    """The measured row for a matmul: of its own weight, else of the nearest, else None.

    Of a weight's entries it is the one of the smallest measured M that is at least the shape's. The nearest weight has
    the same dtype, K and N within a factor of `NEAR` each, and the least distance in (log K, log N). The user's table
    wins over the shipped one weight by weight. Files are read again when they change.

    Raises:
      ValueError: A table is malformed; names the file and the field.
    """
    weights = _weights(device_kind, tuple(file_stamp(path) for path in _paths(device_kind)))
    key = weight_key(shape)
    if key in weights:
        jax_kind, entries = weights[key]
        entry = _at_least(entries, shape.m)
        if entry is not None:
            return Match(entry, jax_kind, is_exact=True)
    near: list[tuple[float, WeightKey, Entry, str]] = []
    for (k, n, dtype), (jax_kind, entries) in weights.items():
        distances = abs(math.log(k / shape.k)), abs(math.log(n / shape.n))
        entry = _at_least(entries, shape.m)
        if dtype == shape.dtype and max(distances) <= math.log(NEAR) and entry is not None:
            near.append((math.hypot(*distances), (k, n, dtype), entry, jax_kind))
    if not near:
        return None
    _, _, entry, jax_kind = min(near, key=lambda candidate: candidate[:2])
    return Match(entry, jax_kind, is_exact=False)


def load(path: pathlib.Path, device_kind: str) -> Table:
    """Reads what `save` wrote for that kind of device.

    Raises:
      ValueError: The file is malformed or of another device; names it, the field, what was expected and what it has.
      OSError: There is no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = _field(content, "format", int)
        if found != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {found}")
        device = _field(content, "device", dict)
        for name in ("kind", "jax_kind"):
            _field(device, name, str, "device.")
        if device["kind"] != device_kind:
            raise ValueError(f"device.kind must be {device_kind!r}, got {device['kind']!r}")
        runs = [_run(run, f"runs[{i}].") for i, run in enumerate(_field(content, "runs", list))]
        entries = tuple(
            _entry(entry, runs, f"entries[{i}].", f"{path}: entries[{i}]")
            for i, entry in enumerate(_field(content, "entries", list))
        )
        seen: dict[MatmulShape, int] = {}
        for i, entry in enumerate(entries):
            if (first := seen.setdefault(entry.shape, i)) != i:
                raise ValueError(f"entries[{i}] must be of another m, k, n or dtype than entries[{first}]")
        sweeps = tuple(_sweep(sweep, runs, f"sweeps[{i}].") for i, sweep in enumerate(_field(content, "sweeps", list)))
    except ValueError as error:
        hint = "mend or remove it, or measure again with fdpp-jax tune --fresh"
        raise ValueError(f"{path} is not a table of tuned matmuls: {error} ({hint})") from error
    return Table(device, entries, sweeps)


def save(table: Table, path: pathlib.Path) -> None:
    """Writes a table, one entry a line; a reader finds the old file or the new one, never a part."""
    runs: list[Run] = []
    for run in [entry.run for entry in table.entries] + [sweep.run for sweep in table.sweeps]:
        if run not in runs:
            runs.append(run)
    entries = [
        _shape_fields(entry.shape)
        | dict(implementation=entry.implementation, floor_us=entry.floor_us, time_us=dict(entry.time_us))
        | dict(configs={name: dataclasses.asdict(config) for name, config in entry.configs.items()})
        | dict(run=runs.index(entry.run))
        for entry in table.entries
    ]
    sweeps = [
        _shape_fields(sweep.shape) | dict(time_us=dict(sweep.time_us), run=runs.index(sweep.run))
        for sweep in table.sweeps
    ]
    sections = dict(runs=[dataclasses.asdict(run) for run in runs], entries=entries, sweeps=sweeps)
    lines = [f'"format": {FORMAT}', f'"device": {json.dumps(dict(table.device))}']
    for name, parts in sections.items():
        body = ",\n    ".join(json.dumps(part, allow_nan=False) for part in parts)
        lines.append(f'"{name}": [\n    {body}\n  ]' if parts else f'"{name}": []')
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text("{\n  " + ",\n  ".join(lines) + "\n}\n", encoding="utf-8")
    partial.replace(path)


def _shape_fields(shape: MatmulShape) -> dict[str, Any]:
    return {name: getattr(shape, name) for name in ("m", "k", "n", "dtype")}


def _paths(device_kind: str) -> tuple[pathlib.Path, ...]:
    """The shipped table, then the user's, which wins."""
    return tuple(directory / file_name(device_kind) for directory in (SHIPPED_DIRECTORY, user_directory()))


def file_stamp(path: pathlib.Path) -> FileStamp | None:
    """Changes when the file does; None where there is none."""
    if not path.is_file():
        return None
    stat = path.stat()
    return path, stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=8)
def _weights(device_kind: str, stamps: tuple[FileStamp | None, ...]) -> dict[WeightKey, tuple[str, tuple[Entry, ...]]]:
    """JAX's name of the device, and the entries by rows, of each weight in the files, of which later ones win."""
    weights: dict[WeightKey, tuple[str, tuple[Entry, ...]]] = {}
    for stamp in stamps:
        if stamp is None:
            continue
        table = load(stamp[0], device_kind)
        weights |= {key: (table.device["jax_kind"], entries) for key, entries in _by_weight(table.entries).items()}
    return weights


def _by_weight(entries: Sequence[Entry]) -> dict[WeightKey, tuple[Entry, ...]]:
    weights: dict[WeightKey, tuple[Entry, ...]] = {}
    for entry in sorted(entries, key=lambda entry: entry.shape.m):
        key = weight_key(entry.shape)
        weights[key] = (*weights.get(key, ()), entry)
    return weights


def _at_least(entries: Sequence[Entry], m: int) -> Entry | None:
    index = bisect.bisect_left(entries, m, key=lambda entry: entry.shape.m)
    return entries[index] if index < len(entries) else None


def _field(content: Any, name: str, kind: type | tuple[type, ...], where: str = "") -> Any:
    """One field of a JSON object, or ValueError that names it."""
    if not isinstance(content, dict):
        raise ValueError(f"{where.rstrip('.') or 'the file'} must be an object, got {reprlib.repr(content)}")
    if name not in content:
        raise ValueError(f"{where}{name} is missing")
    value = content[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise ValueError(f"{where}{name} must be of type {expected}, got {reprlib.repr(value)}")
    return value


def _one_of(content: Any, name: str, choices: Sequence[str], where: str) -> str:
    value = _field(content, name, str, where)
    if value not in choices:
        raise ValueError(f"{where}{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def _positive(content: Any, name: str, where: str, kind: type | tuple[type, ...] = int) -> Any:
    value = _field(content, name, kind, where)
    if not 0 < value < math.inf:
        raise ValueError(f"{where}{name} must be positive, got {value}")
    return value


def _known_keys(content: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in content:
        if name not in known:
            raise ValueError(f"{where}{name} is unknown; expected {', '.join(known)}")


def _run(content: Any, where: str) -> Run:
    versions = _field(content, "versions", dict, where)
    for name in versions:
        _field(versions, name, str, f"{where}versions.")
    return Run(_field(content, "date", str, where), versions, _field(content, "commit", (str, type(None)), where))


def _shape_and_run(content: Any, runs: Sequence[Run], where: str) -> tuple[MatmulShape, Run]:
    m, k, n = (_positive(content, name, where) for name in ("m", "k", "n"))
    dtype = _one_of(content, "dtype", ("bfloat16", "float16"), where)
    run = _field(content, "run", int, where)
    if not 0 <= run < len(runs):
        raise ValueError(f"{where}run must be below {len(runs)}, the number of runs, got {run}")
    return MatmulShape(m, k, n, dtype, W_ORDER), runs[run]


def _times(content: Any, where: str) -> dict[str, float]:
    times = _field(content, "time_us", dict, where)
    return {name: _positive(times, name, f"{where}time_us.", (int, float)) for name in times}


def _entry(content: Any, runs: Sequence[Run], where: str, in_file: str) -> Entry:
    shape, run = _shape_and_run(content, runs, where)
    implementation = _one_of(content, "implementation", _IMPLEMENTATIONS, where)
    times = _times(content, where)
    _known_keys(times, _IMPLEMENTATIONS, f"{where}time_us.")
    configs = _field(content, "configs", dict, where)
    _known_keys(configs, tuple(_CONFIG_TYPES), f"{where}configs.")
    if implementation not in times:
        raise ValueError(f"{where}time_us.{implementation} is missing, the time of the chosen implementation")
    if implementation != "xla" and implementation not in configs:
        raise ValueError(f"{where}configs.{implementation} is missing, the config of the chosen implementation")
    return Entry(
        shape=shape,
        implementation=cast(MatmulImplementation, implementation),
        floor_us=_positive(content, "floor_us", where, (int, float)),
        time_us=times,
        configs={name: _config(configs, name, f"{where}configs.") for name in configs},
        run=run,
        where=in_file,
    )


def _config(configs: Any, name: str, where: str) -> FlatMatmulConfig | GemvConfig:
    content = _field(configs, name, dict, where)
    names = [field.name for field in dataclasses.fields(_CONFIG_TYPES[name])]
    _known_keys(content, names, f"{where}{name}.")
    return _CONFIG_TYPES[name](**{field: _positive(content, field, f"{where}{name}.") for field in names})


def _sweep(content: Any, runs: Sequence[Run], where: str) -> Sweep:
    shape, run = _shape_and_run(content, runs, where)
    return Sweep(shape, _times(content, where), run)
