"""Hugging Face checkpoints into our model, tensor by tensor.

What is on disk is compared with what the config promises from the shards' headers, before a single weight
moves. Then one tensor at a time goes through host memory; parts are fused on the device.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx

from fdpp_jax import device_memory
from fdpp_jax.json_fields import OBJECT, TEXT, field_problems, read_optional_field
from fdpp_jax.models.config import DecoderConfig
from fdpp_jax.models.decoder import CausalLM, Implied
from fdpp_jax.models.families import causal_lm, config_from_hf
from fdpp_jax.models.layers import Embedding, Linear
from fdpp_jax.progress import bar

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Beginnings of the names of files that are no weights of the model, or its weights in another format.
_OTHERS = ("adapter_", "optimizer", "consolidated", "training_args", "scheduler")
# Of stored rotary frequencies: bfloat16's, and below float16's normal numbers.
_ROUNDING, _ROUNDING_BELOW = 1e-2, 1e-6
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_CONVERT = (
    "python -c \"import transformers as t; t.AutoModelForCausalLM.from_pretrained('DIR', torch_dtype='auto')"
    ".save_pretrained('DIR', safe_serialization=True)\""
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "merges.txt", "chat_template.jinja")
# Mistral publishes its weights a second time, in a format of its own.
_HUB_IGNORED = ("*/*", "consolidated*.safetensors")
_SMALLER = "Take a smaller model, a narrower dtype, or a device with more memory"
_MODEL_DTYPES = ("bfloat16", "float16", "float32")
_TENSOR_DTYPES = ("BF16", "F16", "F32", "F64")
_NUMBER = re.compile(r"0|[1-9][0-9]*")
_MAX_LISTED = 10
# What git leaves in the place of a large file until git-lfs brings it.
_POINTER = b"version https://git-lfs.github.com/spec/"


def bundled_path() -> pathlib.Path:
    """Directory of the tiny LLaMA checkpoint that comes with the package."""
    return pathlib.Path(__file__).parent / "tiny"


def load(
    path_or_hub_id: str | pathlib.Path, dtype: jax.typing.DTypeLike = jnp.bfloat16, *, progress: bool | None = None
) -> CausalLM:
    """Loads a checkpoint in Hugging Face format.

    Args:
      path_or_hub_id: A directory with config.json and weights, or a hub id such as "org/name". The weights are
        model.safetensors, else the shards that model.safetensors.index.json names, else all *.safetensors but adapters
        and the like.
      dtype: dtype of weights, activations and KV cache: bfloat16, float16 or float32.
      progress: Whether to show a progress bar on stderr. None: where stderr is a terminal.

    Returns:
      The model, on the default device.

    Raises:
      ValueError: Neither a directory nor a reachable hub id, an unsupported config, or shards and tensors that are
        missing, truncated, misshaped, too many, or other than the config implies. All problems of a checkpoint are
        listed at once.
      MemoryError: The device has too little memory.
    """
    if jnp.dtype(dtype).name not in _MODEL_DTYPES:
        raise ValueError(f"expected a dtype out of {', '.join(_MODEL_DTYPES)}, got {jnp.dtype(dtype).name}")
    directory = resolve(path_or_hub_id)
    config = read_config(directory)
    model = nnx.eval_shape(lambda: causal_lm(config, dtype=dtype, rngs=nnx.Rngs(0)))
    modules = {_name(path): module for path, module in nnx.iter_modules(model)}
    parameters = [(_name(path), value) for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    owners = {name: modules[name.rpartition(".")[0]] for name, _ in parameters}
    sources = {name: _sources(name, value.shape, owners[name]) for name, value in parameters}
    expected = {name: shape for parts in sources.values() for name, shape in parts.items()}
    num_bytes = sum(value.size for _, value in parameters) * jnp.dtype(dtype).itemsize
    explained = device_memory.explained(lambda: {"the weights take": num_bytes}, _SMALLER)
    with explained, contextlib.ExitStack() as stack:
        stored = _open_shards(directory, expected, model, stack)
        title = f"Loading {directory.name}"
        update = stack.enter_context(bar(title, len(parameters), is_shown=progress))
        for done, (name, parameter) in enumerate(parameters, start=1):
            parts = [stored[source].read() for source in sources[name]]
            fused = _fuse(parts, jnp.dtype(dtype))
            if isinstance(owner := owners[name], Linear):
                fused = owner.in_our_order(fused)
            parameter.set_value(fused.block_until_ready())
            update(done=done)
    model.checkpoint = directory.absolute()
    return model


def random_model(config: DecoderConfig, dtype: jax.typing.DTypeLike = jnp.bfloat16, seed: int = 0) -> CausalLM:
    """A model with random weights, made on the default device one tensor at a time: for benches.

    Args:
      config: The model's shapes, for example out of PRESETS.
      dtype: dtype of weights, activations and KV cache.
      seed: Of the weights.
    """
    return causal_lm(config, dtype=dtype, rngs=nnx.Rngs(seed))


def resolve(path_or_hub_id: str | pathlib.Path) -> pathlib.Path:
    """The checkpoint's local directory; a hub id is downloaded first, or found in the hub's cache.

    Raises:
      ValueError: Neither a directory nor a reachable hub id.
    """
    path = pathlib.Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"expected a checkpoint's directory, got the file {path}")
    if not _HUB_ID.fullmatch(str(path_or_hub_id)):
        raise ValueError(f"no directory {path}, and a hub id would look like 'org/name'")
    import huggingface_hub  # takes a while, and most loads are local

    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                str(path_or_hub_id), allow_patterns=list(_HUB_FILES), ignore_patterns=list(_HUB_IGNORED)
            )
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"no directory {path}, and the hub did not deliver '{path_or_hub_id}': {error}") from error


def read_json(directory: pathlib.Path, name: str) -> dict[str, Any]:
    """The object in one of the checkpoint's JSON files.

    Raises:
      ValueError: The file is missing or malformed.
    """
    path = directory / name
    if not path.is_file():
        raise ValueError(f"expected {name} in {directory}, found {list_files(directory)}")
    refuse_pointers(directory, [name])
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object in {path}, got {type(content).__name__}")
    return content


def read_optional_json(directory: pathlib.Path, name: str) -> dict[str, Any]:
    """As `read_json`, but empty where there is no such file."""
    return read_json(directory, name) if (directory / name).is_file() else {}


def read_config(directory: pathlib.Path) -> DecoderConfig:
    """What the checkpoint's config.json describes.

    Raises:
      ValueError: The file is missing or malformed, or of no model that we have.
    """
    return config_from_hf(read_json(directory, "config.json"))


def fingerprint(directory: pathlib.Path) -> str:
    """16 hex digits that tell a checkpoint's weights from others: a hash of 64 bytes amid each tensor, and its name.

    Raises:
      ValueError: There are no shards, or one is missing or malformed.
    """
    tensors = {}
    names = _shard_names(directory)[1]
    refuse_pointers(directory, names)
    for name in names:
        try:
            with (directory / name).open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(size, (directory / name).stat().st_size)))
                header.pop("__metadata__", None)
                for tensor, entry in header.items():
                    begin, end = entry["data_offsets"]
                    middle = (begin + end) // 2
                    file.seek(8 + size + middle)
                    tensors[tensor] = file.read(min(64, end - middle))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{directory / name} is not a shard of safetensors: {error}") from error
    content = b"".join(tensor.encode() + sample for tensor, sample in sorted(tensors.items()))
    return hashlib.sha256(content).hexdigest()[:16]


def list_files(directory: pathlib.Path) -> str:
    """What a directory holds, or the beginning of it, for an error message."""
    return _listed(sorted(entry.name for entry in directory.iterdir())) or "an empty directory"


def refuse_pointers(directory: pathlib.Path, names: Iterable[str]) -> None:
    """Raises where a git-lfs pointer stands in the place of a file; a file that is missing is none.

    Raises:
      ValueError: One of the files is a pointer.
    """
    pointers = [name for name in names if _is_pointer(directory / name)]
    if pointers:
        raise ValueError(
            f"expected the files themselves in {directory}, got git-lfs pointers for {_listed(pointers)}: "
            f"`git lfs pull` there gets them"
        )


def _is_pointer(path: pathlib.Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _listed(names: list[str]) -> str:
    """The names, or the first of them and how many there are more."""
    num_more = len(names) - _MAX_LISTED
    return ", ".join([*names[:_MAX_LISTED], f"{num_more} more"] if num_more > 0 else names)


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _sources(name: str, shape: tuple[int, ...], module: nnx.Module) -> dict[str, tuple[int, ...]]:
    """The checkpoint's tensors (name to shape) that make up one of our parameters, in the order of our rows."""
    if not isinstance(module, Linear) or not module.parts:
        return {name: shape}
    *parents, _, parameter = name.split(".")
    return {_name((*parents, part, parameter)): (size, *shape[1:]) for part, size in module.parts}


@functools.partial(jax.jit, static_argnames="dtype")
def _fuse(parts: list[jax.Array], dtype: jnp.dtype) -> jax.Array:
    """The rows of all parts, one after the other, in our dtype."""
    return jnp.concatenate([part.astype(dtype) for part in parts])


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor of the checkpoint: the open shard that holds it, the shard's name and the tensor's own."""

    shard: Any
    file: str
    name: str

    @property
    def shape(self) -> list[int]:
        return self.shard.get_slice(self.name).get_shape()

    @property
    def dtype(self) -> str:
        return self.shard.get_slice(self.name).get_dtype()

    def read(self) -> jax.Array:
        return self.shard.get_tensor(self.name)


def _open_shards(
    directory: pathlib.Path,
    expected: Mapping[str, tuple[int, ...]],
    model: CausalLM,
    stack: contextlib.ExitStack,
) -> dict[str, _Stored]:
    """Opens the shards and returns what they hold, by the model's names.

    Raises:
      ValueError: Lists every shard and tensor that is not as the config and the index promise.
    """
    weight_map, names = _shard_names(directory)
    refuse_pointers(directory, names)
    found: dict[str, _Stored] = {}
    broken: set[str] = set()
    problems = []
    for name in names:
        if not (directory / name).is_file():
            broken.add(name)
            problems.append(f"shard {name} is missing (the index names {len(names)})")
            continue
        try:
            shard = stack.enter_context(safetensors.safe_open(directory / name, framework="numpy"))
        except (safetensors.SafetensorError, OSError) as error:
            broken.add(name)
            problems.append(f"shard {name} cannot be read, truncated perhaps: {error}")
            continue
        for tensor in shard.keys():  # noqa: SIM118
            if tensor in found:
                problems.append(f"tensor {tensor} is in two files, {found[tensor].file} and {name}")
            found[tensor] = _Stored(shard, name, tensor)
    own_names = _own_names({*weight_map, *found}, expected, model)
    stored = {own_names[name]: tensor for name, tensor in found.items()}
    files = {own_names[name]: file for name, file in weight_map.items()}
    missing, misshaped, mistyped, unknown, contradicting = [], [], [], [], []
    for name, shape in expected.items():
        if name not in stored:
            # What lies in a broken shard is not missing besides.
            if not broken or (files and files.get(name) not in broken):
                missing.append((name, f" {list(shape)} is missing"))
            continue
        tensor = stored[name]
        if tuple(tensor.shape) != shape:
            misshaped.append((tensor.name, f": expected shape {list(shape)}, got {tensor.shape}"))
        if tensor.dtype not in _TENSOR_DTYPES:
            mistyped.append((tensor.name, f": expected one of {', '.join(_TENSOR_DTYPES)}, got {tensor.dtype}"))
    implied = model.implied_tensors
    for name in stored.keys() - expected.keys():
        tensor = stored[name]
        ending = next((ending for ending in implied if name.endswith(ending)), None)
        if ending is None:
            unknown.append((tensor.name, f" {tensor.shape} is unknown to the config"))
        elif why := _contradiction(tensor.read(), implied[ending], model, stored):
            contradicting.append((tensor.name, f" differs from {why}, by which the config replaces it"))
    problems += [
        line for kind in (missing, misshaped, mistyped, unknown, contradicting) for line in _tensor_lines(kind)
    ]
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(f"{directory} is not the checkpoint its config.json describes:\n{listed}")
    return stored


def _own_names(names: Collection[str], expected: Collection[str], model: CausalLM) -> dict[str, str]:
    """From a checkpoint's names of tensors to the model's.

    A checkpoint of the model without its head, and OPT as published in some sizes, lack the first part of the names,
    which is "model." for most families. As in transformers, they lack it everywhere or nowhere.
    """
    path = next(path for path, module in nnx.iter_modules(model) if module is model.embedding)
    prefix = f"{path[0]}."
    if any(name.startswith(prefix) for name in names):
        return {name: name for name in names}
    return {name: name if name in expected else prefix + name for name in names}


def _contradiction(found: jax.Array, implied: Implied, model: CausalLM, stored: Mapping[str, _Stored]) -> str | None:
    """What the config implies in the place of a tensor, where the tensor is not equal to that."""
    if isinstance(implied, Embedding):
        source = next(f"{_name(path)}.weight" for path, module in nnx.iter_modules(model) if module is implied)
        if source not in stored:  # which is an error of its own
            return None
        return None if np.array_equal(found, stored[source].read()) else stored[source].name
    numbers = np.asarray(found, np.float32)
    is_one = any(
        numbers.shape == other.shape and np.allclose(numbers, other, rtol=_ROUNDING, atol=_ROUNDING_BELOW)
        for other in implied
    )
    return None if is_one else "the rotary settings' own"


def _shard_names(directory: pathlib.Path) -> tuple[Mapping[str, str], list[str]]:
    """The index's map from tensor to shard (empty without an index), and the names of all shards.

    model.safetensors goes before an index, and an index before all that is there, as in transformers.
    """
    if (directory / _WHOLE).is_file():
        return {}, [_WHOLE]
    if (directory / _INDEX).is_file():
        weight_map = read_optional_field(read_json(directory, _INDEX), "weight_map", OBJECT, directory / _INDEX)
        if not weight_map:
            raise ValueError(f"expected a weight_map from tensors to shards in {directory / _INDEX}, got {weight_map}")
        if problems := field_problems(weight_map, dict.fromkeys(weight_map, TEXT)):
            raise ValueError(f"{directory / _INDEX} is malformed:\n" + "\n".join(f"  - {p}" for p in problems))
        return weight_map, sorted(set(weight_map.values()))
    names = sorted(path.name for path in directory.glob("*.safetensors") if not path.name.startswith(_OTHERS))
    if names:
        return {}, names
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLED)
    refuse_pointers(directory, pickled)
    if pickled:
        raise ValueError(
            f"expected *.safetensors in {directory}, found {', '.join(pickled)}: a pickle may run any program, so none "
            f"is read.\nConvert it once, where torch is installed: {_CONVERT}"
        )
    raise ValueError(f"expected *.safetensors in {directory}, found {list_files(directory)}")


def _tensor_lines(problems: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each name and what is wrong with it; names that differ in a number alone, a layer's say, share one."""
    names: dict[str, list[str]] = {}
    for name, what in problems:
        names.setdefault(what, []).append(name)
    return sorted(f"tensor {name}{what}" for what, alike in names.items() for name in _collapse(alike))


def _collapse(names: Iterable[str]) -> list[str]:
    """layers.0.up, layers.1.up and layers.3.up as layers.0..1,3.up; so for each number in a name."""
    rows = {tuple(name.split(".")) for name in names}
    for place in range(max(map(len, rows))):
        numbers: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = {}
        for row in tuple(rows):
            if place < len(row) and _NUMBER.fullmatch(row[place]):
                numbers.setdefault((row[:place], row[place + 1 :]), []).append(int(row[place]))
                rows.remove(row)
        rows |= {(*before, _runs(found), *after) for (before, after), found in numbers.items()}
    return [".".join(row) for row in rows]


def _runs(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 as 0..2,5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
