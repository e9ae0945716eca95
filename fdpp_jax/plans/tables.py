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
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from fdpp_jax.json_fields import INDEX, LIST, OBJECT, POSITIVE, SIZE, TEXT, Kind, equal_to, one_of, read_field
from fdpp_jax.plans.backends import with_kernels
from fdpp_jax.plans.device import Device
from fdpp_jax.plans.shapes import MatmulImplementation, MatmulShape, WeightOrder

FORMAT = 1
SHIPPED_DIRECTORY = pathlib.Path(__file__).parent / "tuned"
# A weight answers for another that is at most so many times as deep and as wide, or as shallow and as narrow.
NEAR = 2.0
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
    configs: Mapping[str, Any]
    run: Run
    where: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """All configs of the flat kernel, and XLA, on one weight: microseconds by the config's text, and "xla"."""

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


def name_for(device: Device) -> str:
    """The name of a device's table: "h200.json"; "h200-triton.json" of kernels that are no first choice there."""
    first = with_kernels(dataclasses.replace(device, only_backend=None), "matmul")
    kernels = with_kernels(device, "matmul")
    return file_name(device.kind if kernels is None or kernels is first else f"{device.kind} {kernels.name}")


def lookup(shape: MatmulShape, device: Device) -> Match | None:
    """The measured row for a matmul: of its own weight, else of the nearest, else None.

    Of a weight's entries it is the one of the smallest measured M that is at least the shape's. The nearest weight has
    the same dtype, K and N within a factor of `NEAR` each, and the least distance in (log K, log N). The user's table
    wins over the shipped one weight by weight. Files are read again when they change.

    Raises:
      ValueError: A table is malformed; names the file and the field.
    """
    weights = _weights(device, tuple(file_stamp(path) for path in _paths(device)))
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


def load(path: pathlib.Path, device: Device) -> Table:
    """Reads what `save` wrote for that kind of device, which has kernels.

    Raises:
      ValueError: The file is malformed or of another device; names it, the field, what was expected and what it has.
      OSError: There is no such file.
    """
    backend = with_kernels(device, "matmul")
    assert backend is not None
    assert backend.matmul is not None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        read_field(content, "format", equal_to(FORMAT))
        figures = read_field(content, "device", OBJECT)
        read_field(figures, "kind", equal_to(device.kind), "device.")
        read_field(figures, "jax_kind", TEXT, "device.")
        runs = [_run(run, f"runs[{i}].") for i, run in enumerate(read_field(content, "runs", LIST))]
        entries = tuple(
            _entry(entry, runs, backend.matmul.configs, f"entries[{i}].", f"{path}: entries[{i}]")
            for i, entry in enumerate(read_field(content, "entries", LIST))
        )
        seen: dict[MatmulShape, int] = {}
        for i, entry in enumerate(entries):
            if (first := seen.setdefault(entry.shape, i)) != i:
                raise ValueError(f"entries[{i}] must be of another m, k, n or dtype than entries[{first}]")
        sweeps = tuple(
            _sweep(sweep, runs, f"sweeps[{i}].") for i, sweep in enumerate(read_field(content, "sweeps", LIST))
        )
    except ValueError as error:
        hint = "mend or remove it, or measure again with fdpp-jax tune --fresh"
        raise ValueError(f"{path} is not a table of tuned matmuls: {error} ({hint})") from error
    return Table(figures, entries, sweeps)


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


def _paths(device: Device) -> tuple[pathlib.Path, ...]:
    """The shipped table, then the user's, which wins."""
    return tuple(directory / name_for(device) for directory in (SHIPPED_DIRECTORY, user_directory()))


def file_stamp(path: pathlib.Path) -> FileStamp | None:
    """Changes when the file does; None where there is none."""
    if not path.is_file():
        return None
    stat = path.stat()
    return path, stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=8)
def _weights(device: Device, stamps: tuple[FileStamp | None, ...]) -> dict[WeightKey, tuple[str, tuple[Entry, ...]]]:
    """JAX's name of the device, and the entries by rows, of each weight in the files, of which later ones win."""
    weights: dict[WeightKey, tuple[str, tuple[Entry, ...]]] = {}
    for stamp in stamps:
        if stamp is None:
            continue
        table = load(stamp[0], device)
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


def _known_keys(content: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in content:
        if name not in known:
            raise ValueError(f"{where}{name} is unknown; expected {', '.join(known)}")


def _run(content: Any, where: str) -> Run:
    versions = read_field(content, "versions", OBJECT, where)
    for name in versions:
        read_field(versions, name, TEXT, f"{where}versions.")
    date = read_field(content, "date", TEXT, where)
    return Run(date, versions, read_field(content, "commit", TEXT.or_null, where))


def _shape_and_run(content: Any, runs: Sequence[Run], where: str) -> tuple[MatmulShape, Run]:
    m, k, n = (read_field(content, name, SIZE, where) for name in ("m", "k", "n"))
    dtype = read_field(content, "dtype", one_of("bfloat16", "float16"), where)
    known = Kind(
        f"{INDEX.text}, below {len(runs)}, the number of runs", lambda run: INDEX.holds(run) and run < len(runs)
    )
    return MatmulShape(m, k, n, dtype, W_ORDER), runs[read_field(content, "run", known, where)]


def _times(content: Any, where: str) -> dict[str, float]:
    times = read_field(content, "time_us", OBJECT, where)
    return {name: read_field(times, name, POSITIVE, f"{where}time_us.") for name in times}


def _entry(
    content: Any, runs: Sequence[Run], config_types: Mapping[str, type | None], where: str, in_file: str
) -> Entry:
    shape, run = _shape_and_run(content, runs, where)
    implementation: MatmulImplementation = read_field(content, "implementation", one_of(*_IMPLEMENTATIONS), where)
    times = _times(content, where)
    _known_keys(times, _IMPLEMENTATIONS, f"{where}time_us.")
    configs = read_field(content, "configs", OBJECT, where)
    _known_keys(configs, tuple(config_types), f"{where}configs.")
    if implementation not in times:
        raise ValueError(f"{where}time_us.{implementation} is missing, the time of the chosen implementation")
    if implementation != "xla" and implementation not in configs:
        raise ValueError(f"{where}configs.{implementation} is missing, the config of the chosen implementation")
    return Entry(
        shape=shape,
        implementation=implementation,
        floor_us=read_field(content, "floor_us", POSITIVE, where),
        time_us=times,
        configs={name: _config(configs, name, config_types[name], f"{where}configs.") for name in configs},
        run=run,
        where=in_file,
    )


def _config(configs: Any, name: str, config_type: Any, where: str) -> Any:
    content = read_field(configs, name, OBJECT, where)
    kinds = {field.name: TEXT if field.type is str else SIZE for field in dataclasses.fields(config_type)}
    _known_keys(content, tuple(kinds), f"{where}{name}.")
    return config_type(**{field: read_field(content, field, kind, f"{where}{name}.") for field, kind in kinds.items()})


def _sweep(content: Any, runs: Sequence[Run], where: str) -> Sweep:
    shape, run = _shape_and_run(content, runs, where)
    return Sweep(shape, _times(content, where), run)
