"""`fdpp-jax info`."""

import dataclasses
import json

import pytest
from cli_case import run

import fdpp_jax
from fdpp_jax.plans import device

_NAMES = ("decode attention", "prefill attention", "flat matmul", "gemv", "fused layer")
KERNELS = [f"{name} (mosaic_gpu)" for name in _NAMES] + [f"{name} (triton)" for name in _NAMES]
_NOT_ON_THE_A100 = "Mosaic GPU's kernels are for sm_90, got sm_80"
_NOT_ON_HOPPER = "triton's fused layer is for GPUs whose matmuls are triton's"


def test_info_names_versions_device_and_kernels(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0
    for expected in ("jaxlib", fdpp_jax.__version__, *KERNELS, "XLA (xla)"):
        assert expected in out


@pytest.mark.parametrize(
    ("running", "mosaic", "triton"),
    [
        ("H200", "yes", "yes"),
        ("A100", f"no: {_NOT_ON_THE_A100}", "yes"),
        (dataclasses.replace(device.by_name("A100"), why_no_triton="what to install"), None, "no: what to install"),
    ],
)
def test_info_says_which_kernels_run(capsys, monkeypatch, running, mosaic, triton):
    mosaic = mosaic or f"no: {_NOT_ON_THE_A100}"
    monkeypatch.setattr(device, "current", lambda: device.resolve(running))
    code, out, _ = run(capsys, "info")
    assert code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    available = [[kernel, mosaic if "mosaic" in kernel else triton] for kernel in KERNELS]
    if running == "H200":
        available[-1][1] = f"no: {_NOT_ON_HOPPER}"
    assert rows[-len(KERNELS) - 1 :] == [*available, ["XLA (xla)", "yes"]]


def test_info_as_json(capsys, monkeypatch):
    monkeypatch.setattr(device, "current", lambda: device.by_name("A100"))
    code, out, err = run(capsys, "info", "--json")
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert record["versions"]["fdpp-jax"] == fdpp_jax.__version__
    assert (record["device"]["kind"], record["device"]["arch"], record["device"]["num_sms"]) == ("A100", "sm_80", 108)
    assert [kernel["kernel"] for kernel in record["kernels"]] == KERNELS
    for kernel in record["kernels"]:
        reason = None if "triton" in kernel["kernel"] else _NOT_ON_THE_A100
        assert (kernel["available"], kernel["reason"]) == (reason is None, reason)
