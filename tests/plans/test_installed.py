"""Which packages are here, told by their metadata."""

import importlib.metadata

import pytest

from fdpp_jax.plans import installed


@pytest.fixture
def versions(monkeypatch):
    """What is installed, as a dictionary to fill."""
    found = {}

    def version(name):
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(installed, "refuse_triton", installed.refuse_triton.__wrapped__)
    return found


@pytest.mark.parametrize(
    ("bridge", "compiler"),
    [("0.3.1", "3.6.0"), ("0.3.1", "3.9.0"), ("0.4.1", "3.7.0"), ("0.4.1", "3.9.0+git1"), ("1.0", "4.0")],
)
def test_versions_that_work(versions, bridge, compiler):
    versions |= {"jax-triton": bridge, "triton": compiler}
    assert installed.refuse_triton() is None


@pytest.mark.parametrize(
    ("arch", "works"),
    [("sm_80", True), ("sm_90", True), ("sm_120", True), ("sm_100", False), ("sm_103", False), ("gfx90a", False)],
)
def test_what_triton_3_6_cannot_compile(versions, arch, works):
    versions |= {"jax-triton": "0.3.1", "triton": "3.7.0"}
    assert installed.refuse_triton(arch) is None
    versions["triton"] = "3.6.0"
    expected = f"Triton 3.6 cannot compile all kernels for {arch}: pip install 'fdpp-jax[triton]'"
    assert installed.refuse_triton(arch) == (None if works else expected)


@pytest.mark.parametrize(
    ("found", "here"),
    [
        ({}, "no jax-triton and no triton"),
        ({"triton": "3.6.0"}, "no jax-triton and triton 3.6.0"),
        ({"jax-triton": "0.4.1"}, "jax-triton 0.4.1 and no triton"),
        ({"jax-triton": "0.4.1", "triton": "3.6.0"}, "jax-triton 0.4.1 and triton 3.6.0"),
        ({"jax-triton": "0.3.1", "triton": "3.5.1"}, "jax-triton 0.3.1 and triton 3.5.1"),
        ({"jax-triton": "0.3.0", "triton": "3.6.0"}, "jax-triton 0.3.0 and triton 3.6.0"),
    ],
)
def test_what_is_missing_is_said_and_what_to_install(versions, found, here):
    versions |= found
    refusal = installed.refuse_triton()
    assert refusal is not None
    assert refusal.endswith(f"got {here}: pip install 'fdpp-jax[triton]'")
    assert "\n" not in refusal
