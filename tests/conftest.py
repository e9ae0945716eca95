"""Marker `gpu`: skipped, with the reason, where the device cannot run Mosaic kernels."""

import atexit
import gc
import json
import os
import pathlib
import shutil
import tempfile

# Several test processes may share one GPU. JAX reads this when its backend starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Most of the suite's time on a CPU is XLA compiling programs that run once: a third less without LLVM's optimisations.
if shutil.which("nvidia-smi") is None:
    _QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    # For tests of sharding. All others run on the first device.
    _DEVICES = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{_QUICK} {_DEVICES} {os.environ.get('XLA_FLAGS', '')}".rstrip()
# What the commands compile in processes of their own is not kept for the user, nor taken from there.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
# Tests plan by the rules and the shipped tables, whatever the user has measured.
os.environ["FDPP_TUNED_DIR"] = str(pathlib.Path(__file__).parent / "no_tables_of_the_user")

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("no_timing", deadline=None)
hypothesis.settings.load_profile("no_timing")

# Of what a worker compiles, much it has compiled before: the same operations and shapes, behind another `jax.jit`. Each
# worker has a directory of its own, since JAX writes entries in place, where another worker may read them half written.
if shutil.which("nvidia-smi") is None:
    _COMPILED = tempfile.mkdtemp(prefix="fdpp_jax_tests_")
    atexit.register(shutil.rmtree, _COMPILED, ignore_errors=True)
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", _COMPILED)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# The programs of thousands of tests are many objects, which Python would look through again and again for garbage.
gc.set_threshold(50_000, 20, 100)


def _missing_gpu() -> str | None:
    """Why tests marked gpu cannot run here, or None if they can."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if capability == "9.0":
        return None
    return f"needs an NVIDIA GPU with compute capability 9.0, got {device.device_kind} ({capability=})"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    reason = _missing_gpu() if gpu_items else None
    if reason is not None:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def one_layer_checkpoint(tmp_path_factory):
    """The bundled model's first layer and its tokenizer: texts without the programs of five layers to compile."""
    from safetensors.flax import load_file, save_file

    from fdpp_jax.models import bundled_path

    directory = shutil.copytree(bundled_path(), tmp_path_factory.mktemp("one_layer"), dirs_exist_ok=True)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}), encoding="utf-8")
    weights = load_file(directory / "model.safetensors")
    kept = {name: x for name, x in weights.items() if ".layers." not in name or ".layers.0." in name}
    save_file(kept, directory / "model.safetensors")
    return directory


@pytest.fixture
def fresh_interpreter():
    """Nothing of a kernel that was interpreted stays for the next test."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    yield
    gpu_callbacks.reset_gpu_interpret_mode_state()


@pytest.fixture
def hopper(request, monkeypatch):
    """What a Hopper GPU would run, on the CPU: see `hopper_case`."""
    from hopper_case import hopper_on_cpu

    with hopper_on_cpu(request.node.name, monkeypatch) as calls:
        yield calls
