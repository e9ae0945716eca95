"""From what `--model` names to a checkpoint or a model's shapes, and how commands run a checkpoint."""

import pathlib
from typing import TYPE_CHECKING

from fdpp_jax.cli.arguments import BUNDLED

if TYPE_CHECKING:
    from fdpp_jax.models import DecoderConfig
    from fdpp_jax.plans.device import Device


def checkpoint_directory(model: str | pathlib.Path | None) -> pathlib.Path:
    """The local directory of a checkpoint that has weights; None: the bundled one. A hub id is downloaded.

    Raises:
      ValueError: There is no such checkpoint, or it has no weights.
    """
    from fdpp_jax import models

    if isinstance(model, pathlib.Path):
        return model
    if model is None or model == BUNDLED:
        return models.bundled_path()
    if model in models.PRESETS:
        raise ValueError(f"{model} is a preset of shapes without weights; expected a directory or a hub id")
    return models.resolve(model)


def model_config(model: str | pathlib.Path) -> "DecoderConfig":
    """The shapes of a preset, of the bundled model or of a directory with a config.json.

    Raises:
      ValueError: There is no such model.
    """
    from fdpp_jax import models

    if isinstance(model, pathlib.Path):
        return models.loading.read_config(model)
    if model == BUNDLED:
        return models.loading.read_config(models.bundled_path())
    if model not in models.PRESETS:
        known = ", ".join([BUNDLED, *models.PRESETS])
        raise ValueError(f"unknown model {model!r}: neither a directory with a config.json nor one of {known}")
    return models.PRESETS[model]


def default_dtype(running: "Device") -> str:
    """The dtype of a checkpoint's run where --dtype is not given."""
    return "bfloat16" if running.is_gpu else "float32"


def keep_compiled() -> None:
    """Keeps compiled programs for the next run, unless the user has told JAX where to keep them."""
    import jax

    from fdpp_jax.plans import tables

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(tables.cache_directory() / "xla"))
