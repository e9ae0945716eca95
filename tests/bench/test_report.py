"""What every bench says before it begins."""

import pytest

from fdpp_jax import device_memory
from fdpp_jax.bench import report
from fdpp_jax.plans import device


@pytest.mark.parametrize(
    ("name", "warning"), [("cpu", "bench: warning: no GPU: these are numbers of cpu, of no kernel\n"), ("H200", "")]
)
def test_numbers_without_a_gpu_come_with_a_warning(capsys, name, warning):
    report.begin(device.by_name(name), "arrays", 8)
    assert capsys.readouterr().err == warning


@pytest.mark.parametrize("capacity", [8, None])  # None: nobody says how much there is
def test_what_may_fit_is_not_refused(monkeypatch, capacity):
    monkeypatch.setattr(device_memory, "_capacity_bytes", lambda: capacity)
    report.begin(device.by_name("H200"), "arrays", 8)


def test_what_fits_no_memory_is_refused_without_a_warning(capsys, monkeypatch):
    monkeypatch.setattr(device_memory, "_capacity_bytes", lambda: 24 * 10**9)
    with pytest.raises(MemoryError, match=r"expected arrays that fit the device's memory \(24 GB\), got 2 TB"):
        report.begin(device.by_name("cpu"), "arrays", 2 * 10**12)
    assert not capsys.readouterr().err
