"""Marker `gpu`: skipped, with the reason, where the device cannot run Mosaic kernels."""

import os
import pathlib
import shutil

# Several test processes may share one GPU. JAX reads this when its backend starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Most of the suite's time on a CPU is XLA compiling programs that run once: a third less without LLVM's optimisations.
if shutil.which("nvidia-smi") is None:
    _QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    # For tests of sharding. All others run on the first device.
    _DEVICES = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{_QUICK} {_DEVICES} {os.environ.get('XLA_FLAGS', '')}".rstrip()
# What the commands compile is not kept for the user, nor taken from there.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
# Tests plan by the rules and the shipped tables, whatever the user has measured.
os.environ["FDPP_TUNED_DIR"] = str(pathlib.Path(__file__).parent / "no_tables_of_the_user")

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("no_timing", deadline=None)
hypothesis.settings.load_profile("no_timing")


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
