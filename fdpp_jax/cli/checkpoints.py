"""From what `--model` names to a checkpoint or a model's shapes, and how commands run a checkpoint."""

import pathlib
import tempfile
from typing import TYPE_CHECKING

from fdpp_jax.cli.arguments import BUNDLED
from fdpp_jax.cli.output import report

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
    """Keeps compiled programs for the next run: where the user has told JAX to, else in our own cache.

    Raises:
      ValueError: The user's place cannot be written. Our own is left alone then, with a warning.
    """
    import jax

    from fdpp_jax.plans import tables

    named = jax.config.jax_compilation_cache_dir
    if not jax.config.jax_enable_compilation_cache or (named is not None and "://" in named):  # a bucket
        return
    directory = tables.cache_directory() / "xla" if named is None else pathlib.Path(named)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        why = f"expected a directory for compiled programs that can be written, got {directory}: {error.strerror}"
        if named is not None:
            raise ValueError(f"{why}; JAX_COMPILATION_CACHE_DIR names it") from error
        report(f"warning: {why}; nothing is kept")
    else:
        if named is None:
            jax.config.update("jax_compilation_cache_dir", str(directory))
