"""`fdpp-jax tune` with a fake timer."""

import dataclasses
import json

import cli_case
import jax
import pytest
from tuning_case import H200, SHAPE, any_time, empty_directories, make_timer, write

from fdpp_jax import cli
from fdpp_jax.bench import tuning
from fdpp_jax.heuristics import plan_matmul
from fdpp_jax.plans import device, tables
from fdpp_jax.plans.shapes import MatmulShape


@pytest.fixture(autouse=True)
def directories(tmp_path, monkeypatch):
    return empty_directories(tmp_path, monkeypatch)


@pytest.fixture
def on_h200(monkeypatch):
    """Tunes as if on an H200, with any_time; the value is a list of what was measured."""
    measured = []

    def us(weight, job):
        if job.m == 128:
            measured.append((weight.k, weight.n))
        return any_time(weight, job)

    monkeypatch.setattr(device, "current", lambda: H200)
    monkeypatch.setattr(tuning, "weight_timer", make_timer(us))
    return measured


def run(capsys, *argv):
    """Exit code, stdout and stderr of fdpp-jax tune."""
    return cli_case.run(capsys, "tune", *argv)


def test_tune_writes_the_user_s_table_and_goes_on_from_it(capsys, directories, on_h200):
    path = directories["user"] / "h200.json"
    code, out, err = run(capsys, "--weights", "4096x12288", "--weights", "4096x4096", "--weights", "4096x4096")
    assert code == 0, err
    assert on_h200 == [(4096, 12288), (4096, 4096)]
    assert f"wrote {path}" in out
    assert "weight 4096x4096: M1 " in err
    for expected in ("Fastest by rows, bfloat16", "jnp.dot / best", "What a static choice costs", "the rule's config"):
        assert expected in out
    assert "exact" in plan_matmul(SHAPE, H200).reason
    content = json.loads(path.read_text())
    assert content["device"]["num_sms"] == 132
    assert content["runs"][0]["versions"]["jax"] == jax.__version__

    code, out, err = run(capsys, "--weights", "4096x12288", "--model", "llama-3-8b")
    assert code == 0
    assert "has 2 of 6 weights; --fresh measures them again" in err
    assert on_h200[2:] == [(4096, 6144), (4096, 28672), (14336, 4096), (4096, 128256)]
    code, out, _ = run(capsys, "--model", "llama-3-8b")
    assert (code, len(on_h200)) == (0, 6)
    assert "nothing was measured" in out
    assert "llama-3-8b head 4096x128256" in out
    assert run(capsys, "--weights", "4096x4096", "--fresh")[0] == 0
    assert on_h200[6:] == [(4096, 4096)]
    assert "nearest 4096x4096" in plan_matmul(dataclasses.replace(SHAPE, n=6144), H200).reason


def test_tune_measures_the_backend_that_is_named(capsys, directories, on_h200):
    code, out, err = run(capsys, "--implementation", "triton", "--weights", "4096x4096")
    assert code == 0, err
    path = directories["user"] / "h200-triton.json"
    assert f"wrote {path}" in out
    content = json.loads(path.read_text())
    assert content["device"]["only_backend"] == "triton"
    assert {config["arch"] for entry in content["entries"] for config in entry["configs"].values()} == {"sm_80"}
    code, out, _ = run(capsys, "--implementation", "triton", "--weights", "4096x4096")
    assert (code, on_h200) == (0, [(4096, 4096)])
    assert "nothing was measured" in out
    assert not (directories["user"] / "h200.json").exists()


@pytest.mark.parametrize(
    ("name", "implementation", "why"),
    [
        ("A100", "mosaic_gpu", "'mosaic_gpu' cannot run here: it has no kernel for sm_80"),
        ("cpu", "triton", "'triton' cannot run here: it has no kernel for cpu"),
    ],
)
def test_tune_of_a_backend_without_kernels(capsys, monkeypatch, name, implementation, why):
    monkeypatch.setattr(device, "current", lambda: device.by_name(name))
    code, out, err = run(capsys, "--implementation", implementation)
    assert (code, out, err) == (2, "", f"fdpp-jax: error: implementation={why}\n")


def test_where_triton_is_the_plan_its_table_is_the_device_s(capsys, monkeypatch, directories):
    monkeypatch.setattr(device, "current", lambda: device.by_name("A100"))
    monkeypatch.setattr(tuning, "weight_timer", make_timer(any_time))
    for flags in ([], ["--implementation", "triton"]):
        code, out, _ = run(capsys, "--weights", "4096x4096", *flags)
        assert code == 0
    assert "nothing was measured" in out
    assert [path.name for path in directories["user"].iterdir()] == ["a100.json"]
    assert "exact" in plan_matmul(MatmulShape(8, 4096, 4096), "A100").reason


def test_tune_has_four_models_by_default(capsys, on_h200, tmp_path):
    assert run(capsys, "--output", tmp_path / "elsewhere", "--dtype", "float16")[0] == 0
    assert len(on_h200) == 19
    assert plan_matmul(MatmulShape(8, 4096, 4096), H200).reason.startswith("rule: ")
    table = tables.load(tmp_path / "elsewhere" / "h200.json", H200)
    assert {found.shape.dtype for found in table.entries} == {"float16"}


def test_a_used_up_budget_says_what_is_missing(capsys, on_h200):
    code, out, _ = run(capsys, "--budget", 1e-9, "--weights", "4096x4096", "--weights", "64x64")
    assert (code, on_h200) == (0, [])
    assert out == (
        "nothing was measured\nthe budget of 1e-09 min is used up, the same command goes on; missing:\n"
        "  weight 4096x4096\n  weight 64x64\n"
    )


def test_ctrl_c_keeps_what_was_measured(capsys, monkeypatch, directories, on_h200):
    def interrupted(weight, dtype):
        if weight.n == 64:
            raise KeyboardInterrupt
        return make_timer(any_time)(weight, dtype)

    monkeypatch.setattr(tuning, "weight_timer", interrupted)
    code, out, err = run(capsys, "--weights", "4096x4096", "--weights", "64x64")
    assert (code, out) == (130, "")
    assert "fdpp-jax: interrupted: 1 of 2 weights were measured; the same command goes on" in err
    assert len(tables.load(directories["user"] / "h200.json", H200).entries) == len(tuning.ROWS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--budget", "0"], "--budget must be positive, got 0"),
        (["--budget", "nan"], "--budget must be positive, got nan"),
        (["--weights", "4096x100"], "there is nothing to tune in weight 4096x100: the kernel takes K and N that are"),
        (["--model", "nope"], "unknown model 'nope'"),
    ],
)
def test_tune_refuses(capsys, on_h200, argv, message):
    code, out, err = run(capsys, *argv)
    assert (code, out, on_h200) == (2, "", [])
    assert err.startswith(f"fdpp-jax: error: {message}")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(arch="cpu", kind="cpu"), "no kernel for cpu"),
        (dict(arch="sm_75"), "no kernel for sm_75"),
        (dict(why_no_triton="what to install"), "what to install"),
    ],
)
def test_tune_needs_a_gpu_with_kernels(capsys, monkeypatch, changes, why):
    monkeypatch.setattr(device, "current", lambda: dataclasses.replace(device.by_name("A100"), **changes))
    code, out, err = run(capsys)
    assert (code, out) == (2, "")
    assert err == f"fdpp-jax: error: there is nothing to tune here: {why}\n"


def test_a_malformed_table_stops_tune_unless_it_starts_over(capsys, directories, on_h200):
    path = write(directories["user"])
    path.write_text("{}")
    code, _, err = run(capsys, "--weights", "64x64")
    assert code == 2
    assert "h200.json is not a table of tuned matmuls: format is missing" in err
    assert run(capsys, "--weights", "64x64", "--fresh")[0] == 0
    assert tables.load(path, H200).entries


def test_wrong_sizes_are_argparse_s(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["tune", "--weights", "4096"])
    assert stop.value.code == 2
    assert "expected KxN such as 4096x12288, got '4096'" in capsys.readouterr().err
