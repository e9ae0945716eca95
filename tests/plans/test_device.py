"""Device: named figures, and what is made of the devices that JAX reports."""

import types

import jax
import pytest

from fdpp_jax.plans import device
from fdpp_jax.plans.device import by_name, current, from_jax, resolve


def _gpu(device_kind, compute_capability, core_count=None):
    """Stand-in for a jax.Device; without `core_count` where JAX does not say."""
    fields = {"platform": "gpu", "device_kind": device_kind, "compute_capability": compute_capability}
    if core_count is not None:
        fields["core_count"] = core_count
    return types.SimpleNamespace(**fields)


@pytest.fixture(autouse=True)
def _with_triton(monkeypatch):
    """What runs Triton kernels is here, whatever is installed."""
    monkeypatch.setattr(device.installed, "refuse_triton", lambda arch: None)


def test_names_are_those_promised():
    data_centre = {"A100", "A100-40GB", "A30", "A10", "A40", "L40S", "L4", "H100", "H200", "B200"}
    geforce, amd = {"RTX 3090", "RTX 4090", "RTX 5090"}, {"MI210", "MI250", "MI250X", "MI300X"}
    assert set(device.names()) == data_centre | geforce | amd | {"cpu"}


@pytest.mark.parametrize("name", device.names())
def test_figures_are_plausible(name):
    known = by_name(name)
    assert known.kind == name
    assert known.num_sms > 0
    assert known.read_gbps > 0
    assert known.l2_bytes > known.smem_bytes >= 0
    assert known.is_gpu == (name != "cpu")
    assert known.is_nvidia == (known.compute_capability > 0)
    if known.is_gpu:
        assert 64 * 1024 <= known.smem_bytes <= 227 * 1024
        assert 50 < known.ridge < 500


def test_lower_case_is_understood():
    assert by_name("a100") is by_name("A100")
    assert resolve("h200") is resolve(by_name("H200"))


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown device 'V100'; known are A100, A100-40GB, .*MI300X, cpu"):
        by_name("V100")


def test_ridge_is_flop_per_byte():
    assert by_name("A100").ridge == pytest.approx(312e12 / 2039e9)


def test_two_blocks_share_an_sm():
    # Hopper: 228 KiB an SM, 1 KiB of it reserved for each block.
    assert by_name("H200").smem_bytes_shared(1) == 227 * 1024
    assert by_name("H200").smem_bytes_shared(2) == 113 * 1024


@pytest.mark.parametrize(
    ("device_kind", "capability", "core_count", "name"),
    [
        ("NVIDIA H200", "9.0", 132, "H200"),
        ("NVIDIA H200", "9.0", None, "H200"),
        ("NVIDIA H100 80GB HBM3", "9.0", 132, "H100"),
        ("NVIDIA A100-SXM4-80GB", "8.0", 108, "A100"),
        ("NVIDIA A100 80GB PCIe", "8.0", 108, "A100"),
        ("NVIDIA A100-SXM4-40GB", "8.0", 108, "A100-40GB"),
        ("NVIDIA A100-PCIE-40GB", "8.0", None, "A100-40GB"),
        ("NVIDIA A30", "8.0", 56, "A30"),
        ("NVIDIA A10", "8.6", 72, "A10"),
        ("NVIDIA A40", "8.6", 84, "A40"),
        ("NVIDIA GeForce RTX 3090", "8.6", 82, "RTX 3090"),
        ("NVIDIA L4", "8.9", 58, "L4"),
        ("NVIDIA L40S", "8.9", 142, "L40S"),
        ("NVIDIA GeForce RTX 4090", "8.9", 128, "RTX 4090"),
        ("NVIDIA GeForce RTX 5090", "12.0", 170, "RTX 5090"),
        ("NVIDIA B200", "10.0", 148, "B200"),
        ("AMD Instinct MI300X", "gfx942:sramecc+:xnack-", 304, "MI300X"),
        ("AMD Instinct MI210", "gfx90a", 104, "MI210"),
        ("AMD Instinct MI250", "gfx90a:sramecc+:xnack-", 104, "MI250"),
        ("AMD Instinct MI250X", "gfx90a:sramecc+:xnack-", 110, "MI250X"),
        ("AMD Instinct MI250X / MI250", "gfx90a:sramecc+:xnack-", 104, "MI250"),
        ("AMD Instinct MI250X / MI250", "gfx90a:sramecc+:xnack-", 110, "MI250X"),
    ],
)
def test_reported_gpu_is_recognised(device_kind, capability, core_count, name):
    assert from_jax(_gpu(device_kind, capability, core_count)) is by_name(name)


@pytest.mark.parametrize(
    ("device_kind", "capability", "core_count", "arch", "base"),
    [
        ("NVIDIA H100 PCIe", "9.0", 114, "sm_90", "H100"),
        ("NVIDIA H200 MIG 1g.18gb", "9.0", 16, "sm_90", "H200"),
        ("NVIDIA GH200 480GB", "9.0", 132, "sm_90", "H100"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "8.9", 76, "sm_89", "RTX 4090"),
        ("NVIDIA L40", "8.9", 140, "sm_89", "L40S"),
        ("NVIDIA RTX A6000", "8.6", 84, "sm_86", "A10"),
        ("Tesla T4", "7.5", 40, "sm_75", "A10"),
        ("NVIDIA B300", "10.3", 160, "sm_103", "B200"),
        ("NVIDIA RTX PRO 6000 Blackwell", "12.0", 188, "sm_120", "RTX 5090"),
        ("AMD Instinct MI325X", "gfx942", 304, "gfx942", "MI300X"),
        ("AMD Radeon", "gfx1100", 96, "gfx1100", "MI210"),
        ("A GPU that says nothing", "", 10, "sm_0", "A10"),
    ],
)
def test_other_gpu_is_scaled_from_the_nearest(device_kind, capability, core_count, arch, base):
    made = from_jax(_gpu(device_kind, capability, core_count))
    nearest = by_name(base)
    assert (made.kind, made.arch, made.num_sms) == (device_kind, arch, core_count)
    assert made.smem_bytes == nearest.smem_bytes
    assert made.read_gbps == pytest.approx(nearest.read_gbps * core_count / nearest.num_sms)
    assert made.ridge == pytest.approx(nearest.ridge)


def test_names_match_as_words():
    assert from_jax(_gpu("NVIDIA A10G", "8.6", 80)).kind == "NVIDIA A10G"
    assert from_jax(_gpu("NVIDIA A100-SXM4-80GB", "8.0")).kind == "A100"


def test_what_triton_lacks_is_known_of_the_device_that_runs(monkeypatch):
    monkeypatch.setattr(device.installed, "refuse_triton", lambda arch: "no triton")
    for kind, capability, core_count in (("NVIDIA A10", "8.6", 72), ("NVIDIA A10G", "8.6", 80)):
        assert from_jax(_gpu(kind, capability, core_count)).why_no_triton == "no triton"
    assert by_name("A10").why_no_triton is None  # which may be another machine's
    assert current().why_no_triton == (None if current().arch == "cpu" else "no triton")


def test_cpu_device():
    made = from_jax(jax.devices("cpu")[0])
    assert (made.kind, made.arch) == ("cpu", "cpu")
    assert not made.is_gpu
    assert made.smem_bytes == 0


def test_current_follows_the_default_device():
    assert current() == from_jax(jax.devices()[0])
    with jax.default_device(jax.devices("cpu")[0]):
        assert current().arch == "cpu"
    with jax.default_device("cpu"):
        assert current().arch == "cpu"


@pytest.mark.gpu
def test_current_on_hopper():
    assert current().arch == "sm_90"
    assert current().num_sms == jax.devices()[0].core_count
