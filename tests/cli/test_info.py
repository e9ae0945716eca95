"""`fdpp-jax info`."""

import json

import pytest
from cli_case import run

import fdpp_jax
from fdpp_jax.plans import device

_NAMES = ("decode attention", "prefill attention", "flat matmul", "gemv", "fused layer")
KERNELS = [f"{name} (mosaic_gpu)" for name in _NAMES]


def test_info_names_versions_device_and_kernels(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0
    for expected in ("jaxlib", fdpp_jax.__version__, *KERNELS, "XLA (xla)"):
        assert expected in out


@pytest.mark.parametrize(("name", "available"), [("H200", "yes"), ("A100", "no: no kernel for sm_80 yet")])
def test_info_says_which_kernels_run(capsys, monkeypatch, name, available):
    monkeypatch.setattr(device, "current", lambda: device.by_name(name))
    code, out, _ = run(capsys, "info")
    assert code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert rows[-6:] == [[kernel, available] for kernel in KERNELS] + [["XLA (xla)", "yes"]]


def test_info_as_json(capsys, monkeypatch):
    monkeypatch.setattr(device, "current", lambda: device.by_name("A100"))
    code, out, err = run(capsys, "info", "--json")
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert record["versions"]["fdpp-jax"] == fdpp_jax.__version__
    assert (record["device"]["kind"], record["device"]["arch"], record["device"]["num_sms"]) == ("A100", "sm_80", 108)
    assert [kernel["kernel"] for kernel in record["kernels"]] == KERNELS
    assert all(
        (kernel["available"], kernel["reason"]) == (False, "no kernel for sm_80 yet") for kernel in record["kernels"]
    )
