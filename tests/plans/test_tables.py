"""Tables of measured matmuls: their format, whose row answers a shape, and that every plan is legal; no GPU."""

import dataclasses
import functools
import itertools
import json
import pathlib

import pytest
from tuning_case import DEVICE, FLAT, H200, RUN, SHAPE, any_time, empty_directories, entry, tune, write

from fdpp_jax import models
from fdpp_jax.bench import tuning
from fdpp_jax.heuristics import plan_matmul
from fdpp_jax.plans import device, tables
from fdpp_jax.plans.backends import BACKENDS, by_name, only
from fdpp_jax.plans.hopper_matmul import FlatMatmulConfig, GemvConfig
from fdpp_jax.plans.shapes import MatmulShape
from fdpp_jax.plans.tables import Sweep, Table

ALL_WEIGHTS = tuning.distinct([w for name, config in models.PRESETS.items() for w in tuning.weights_of(name, config)])


@pytest.fixture(autouse=True)
def directories(tmp_path, monkeypatch):
    return empty_directories(tmp_path, monkeypatch)


# Lookup.


@pytest.mark.parametrize(("m", "measured"), [(1, 1), (2, 8), (8, 8), (9, 64), (64, 64)])
def test_a_measured_weight_answers_with_the_next_higher_number_of_rows(directories, m, measured):
    rows = {1: FlatMatmulConfig(1, 64, 64, 2), 8: FLAT, 64: FlatMatmulConfig(2, 64, 128, 2)}
    write(directories["shipped"], *(entry(rows_, config=config) for rows_, config in rows.items()))
    plan = plan_matmul(dataclasses.replace(SHAPE, m=m), H200)
    assert (plan.implementation, plan.config) == ("flat", rows[measured])
    assert plan.reason == f"tuned on NVIDIA H200, 2026-11-23: exact, M = {measured} (flat 20.0 us, xla 30.0 us)"


def test_one_entry_answers_both_orders(directories):
    path = write(directories["shipped"], entry())
    plans = [plan_matmul(dataclasses.replace(SHAPE, w_order=w_order), H200) for w_order in ("kn", "nk")]
    assert plans[0] == plans[1]
    assert plans[0].config == FLAT
    assert "w_order" not in path.read_text()


def test_xla_where_it_was_the_faster_one(directories):
    write(directories["shipped"], entry(config=None), entry(128, config=None))
    for m in (5, 100):
        plan = plan_matmul(dataclasses.replace(SHAPE, m=m), H200)
        assert (plan.implementation, plan.config) == ("xla", None)
        assert "exact" in plan.reason
    assert plan_matmul(SHAPE, H200, "flat").config == FLAT  # where the caller names it all the same


@pytest.mark.parametrize(
    "shape",
    [
        dataclasses.replace(SHAPE, m=9),  # more rows than were measured
        dataclasses.replace(SHAPE, dtype="float16"),
        dataclasses.replace(SHAPE, k=2 * 4096 + 16),
        dataclasses.replace(SHAPE, n=12288 // 2 - 16),
        dataclasses.replace(SHAPE, m=0),
        dataclasses.replace(SHAPE, k=4100),
    ],
)
def test_the_rule_where_nothing_near_was_measured(directories, shape):
    before = plan_matmul(shape, H200)
    write(directories["user"], entry())
    assert plan_matmul(shape, H200) == before
    assert "tuned" not in before.reason


def test_the_nearest_weight_answers_for_those_that_were_not_measured(directories):
    near, far = FlatMatmulConfig(2, 64, 64, 4), FlatMatmulConfig(4, 64, 64, 4)
    write(directories["shipped"], entry(k=4096, n=4096, config=far), entry(k=4096, n=11008, config=near))
    for k, n, config, name in [
        (4096, 12288, near, "4096x11008"),
        (8192, 22016, near, "4096x11008"),  # a factor of 2 in each is near enough
        (5120, 5120, far, "4096x4096"),
        (2048, 2048, far, "4096x4096"),
    ]:
        plan = plan_matmul(MatmulShape(8, k, n), H200)
        assert plan.config == config
        assert plan.reason.startswith(f"tuned on NVIDIA H200, 2026-11-23: nearest {name}, M = 8 (")


def test_what_the_nearest_one_has_must_be_legal_here(directories):
    write(directories["shipped"], entry(k=512, n=512, config=FlatMatmulConfig(65, 64, 64, 4)))
    assert "nearest 512x512" in plan_matmul(MatmulShape(8, 1024, 1024), H200).reason
    assert plan_matmul(MatmulShape(8, 256, 256), H200).reason.startswith("rule: ")  # has 4 blocks of K, not 8


def test_an_exact_entry_that_cannot_run_is_an_error(directories):
    path = write(directories["user"], entry(64), entry(config=FlatMatmulConfig(4, 96, 64, 4)))
    with pytest.raises(ValueError, match=r"h200\.json: entries\[1\]\.configs\.flat cannot run: block_n must be one of"):
        plan_matmul(SHAPE, H200)
    write(path.parent, dataclasses.replace(entry(), implementation="gemv", configs={"gemv": GemvConfig(64, 64, 4, 1)}))
    with pytest.raises(ValueError, match=r"time_us\.gemv is missing"):
        plan_matmul(SHAPE, H200)


def test_the_user_s_table_wins_weight_by_weight(directories):
    shipped, user = FlatMatmulConfig(1, 64, 64, 4), FlatMatmulConfig(2, 64, 64, 4)
    write(directories["shipped"], entry(config=shipped), entry(64, config=shipped), entry(n=4096, config=shipped))
    path = write(directories["user"], entry(config=user), entry(n=6144, config=user))
    assert plan_matmul(SHAPE, H200).config == user
    assert plan_matmul(dataclasses.replace(SHAPE, m=64), H200).reason.startswith("rule")  # or: nearest, of near enough
    assert plan_matmul(dataclasses.replace(SHAPE, n=4096), H200).config == shipped  # exact before the user's nearest
    assert plan_matmul(dataclasses.replace(SHAPE, n=5632), H200).config == user
    path.unlink()
    assert plan_matmul(SHAPE, H200).config == shipped


def test_a_changed_file_is_read_again(directories):
    assert plan_matmul(SHAPE, H200).reason.startswith("rule: ")
    for config in (FLAT, FlatMatmulConfig(1, 64, 128, 2)):
        write(directories["user"], entry(config=config))
        assert plan_matmul(SHAPE, H200).config == config


def test_only_devices_with_kernels_have_tables(directories):
    for arch in ("sm_75", "cpu"):
        old = dataclasses.replace(device.by_name("A100"), kind=f"old {arch}", arch=arch)
        path = write(directories["user"], entry(), kind=old.kind)
        path.write_text("no JSON")
        assert "no kernel for" in plan_matmul(SHAPE, old).reason
    assert plan_matmul(SHAPE, "H100").reason.startswith("rule: ")


def test_where_tables_lie(monkeypatch):
    monkeypatch.setenv("FDPP_TUNED_DIR", "~/tables")
    assert tables.user_directory() == pathlib.Path("~/tables").expanduser()
    monkeypatch.setenv("FDPP_TUNED_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert tables.user_directory() == pathlib.Path("/cache/fdpp_jax/tuned")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tables.user_directory() == pathlib.Path("~/.cache/fdpp_jax/tuned").expanduser()
    assert tables.file_name("H200") == "h200.json"
    assert [tables.name_for(only(name, H200)) for name in (None, "mosaic_gpu", "triton")] == [
        "h200.json",
        "h200.json",
        "h200-triton.json",
    ]
    assert tables.name_for(only("triton", device.by_name("A100"))) == "a100.json"
    assert tables.file_name("NVIDIA H200 MIG 1g.18gb") == "nvidia-h200-mig-1g-18gb.json"


def test_on_hopper_triton_has_a_table_of_its_own(directories):
    gpu = only("triton", H200)
    table, _ = tune([tuning.Weight(4096, 12288, "qkv")], any_time, gpu)
    tables.save(table, directories["user"] / "h200-triton.json")
    assert plan_matmul(SHAPE, H200).reason.startswith("rule: ")
    assert plan_matmul(SHAPE, gpu).reason.startswith("tuned on NVIDIA H200, 2026-11-23: exact, M = 8")
    by_rule = by_name("triton").matmul.config(SHAPE, H200, "flat")
    (found,) = (entry for entry in table.entries if entry.shape.m == SHAPE.m)
    assert found.configs["flat"].arch == by_rule.arch
    assert found.configs["flat"] != by_rule
    for implementation in ("triton", "flat"):
        assert plan_matmul(SHAPE, gpu, implementation).config == found.configs["flat"]
    assert plan_matmul(SHAPE, H200, "triton").config == found.configs["flat"]


# The format.


def test_a_table_reads_as_it_was_written_one_entry_a_line(directories):
    later = dataclasses.replace(RUN, date="2026-12-01", commit=None)
    table = Table(DEVICE, (entry(), entry(64, run=later)), (Sweep(SHAPE, {"xla": 3.0, "64 x 64": 2.5}, RUN),))
    path = directories["user"] / "h200.json"
    tables.save(table, path)
    assert tables.load(path, H200) == table
    lines = path.read_text().splitlines()
    assert sum('"floor_us"' in line for line in lines) == 2
    assert [path.name for path in path.parent.iterdir()] == ["h200.json"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", 2, "expected format to be 1, got 2"),
        ("format", None, "expected format to be 1, got None"),
        ("device", [], r"expected device to be an object, got \[\]"),
        ("device.kind", "H100", "expected device.kind to be 'H200', got 'H100'"),
        ("device.jax_kind", ..., "device.jax_kind is missing"),
        ("runs.0", 3, r"expected runs\[0\] to be an object, got 3"),
        ("runs.0.versions.jax", 12, r"expected runs\[0\].versions.jax to be text, got 12"),
        ("runs.0.commit", 1, r"expected runs\[0\].commit to be text or null, got 1"),
        ("entries", ..., "entries is missing"),
        ("entries.0.m", 0, r"expected entries\[0\].m to be a positive integer, got 0"),
        ("entries.1.k", "4096", r"expected entries\[1\].k to be a positive integer, got '4096'"),
        ("entries.1.n", True, r"expected entries\[1\].n to be a positive integer, got True"),
        ("entries.1.m", 8, r"entries\[1\] must be of another m, k, n or dtype than entries\[0\]"),
        ("entries.0.dtype", "float32", r"expected entries\[0\].dtype to be one of bfloat16, float16, got 'float32'"),
        (
            "entries.0.run",
            1,
            r"expected entries\[0\].run to be an integer of at least 0, below 1, the number of runs, got 1",
        ),
        (
            "entries.0.run",
            -1,
            r"expected entries\[0\].run to be an integer of at least 0, below 1, the number of runs, got -1",
        ),
        (
            "entries.0.implementation",
            "cuda",
            r"expected entries\[0\].implementation to be one of gemv, flat, xla, got 'cuda'",
        ),
        ("entries.0.implementation", "gemv", r"entries\[0\].time_us.gemv is missing"),
        ("entries.0.floor_us", float("nan"), r"expected entries\[0\].floor_us to be a positive number, got nan"),
        ("entries.0.time_us.xla", -1.0, r"expected entries\[0\].time_us.xla to be a positive number, got -1.0"),
        ("entries.0.time_us.cuda", 1.0, r"entries\[0\].time_us.cuda is unknown; expected gemv, flat, xla"),
        ("entries.0.configs.flat", ..., r"entries\[0\].configs.flat is missing, the config of the chosen"),
        ("entries.0.configs.flat.block_n", ..., r"entries\[0\].configs.flat.block_n is missing"),
        (
            "entries.0.configs.flat.num_ctas",
            1.5,
            r"expected entries\[0\].configs.flat.num_ctas to be a positive integer, got 1.5",
        ),
        (
            "entries.0.configs.flat.warps",
            4,
            r"entries\[0\].configs.flat.warps is unknown; expected num_ctas, block_n, block_k",
        ),
        ("entries.0.configs.xla", {}, r"entries\[0\].configs.xla is unknown; expected gemv, flat"),
        ("sweeps.0.time_us", 4, r"expected sweeps\[0\].time_us to be an object, got 4"),
    ],
)
def test_a_malformed_table_is_an_error_that_names_file_and_field(directories, field, value, message):
    path = directories["user"] / "h200.json"
    tables.save(Table(DEVICE, (entry(), entry(64)), (Sweep(SHAPE, {"xla": 3.0}, RUN),)), path)
    content = json.loads(path.read_text())
    *parents, last = [int(name) if name.isdigit() else name for name in field.split(".")]
    target = functools.reduce(lambda part, name: part[name], parents, content)
    if value is ...:
        del target[last]
    else:
        target[last] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"user/h200\.json is not a table of tuned matmuls: {message}.*tune --fresh"):
        plan_matmul(SHAPE, H200)


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"'])
def test_a_file_of_anything_else_is_an_error(directories, text):
    write(directories["user"]).write_text(text)
    with pytest.raises(ValueError, match=r"h200\.json is not a table of tuned matmuls: "):
        plan_matmul(SHAPE, H200)


# Every plan is legal.


def check_plan(shape, gpu):
    plan = plan_matmul(shape, gpu)
    assert plan.reason
    assert "\n" not in plan.reason
    assert (plan.implementation == "xla") == (plan.config is None)
    if plan.config is not None:
        op = by_name(plan.backend).matmul
        assert isinstance(plan.config, op.configs[plan.implementation])
        assert op.refuse_config(shape, gpu, plan.algorithm, plan.config) is None
    return plan


OF_EACH_ARCH = {device.by_name(name).arch: name for name in device.names()}.values()


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in OF_EACH_ARCH else pytest.mark.slow) for x in device.names()]
)
def test_every_rule_is_legal(name):
    gpu = device.by_name(name)
    for weight, m in itertools.product(ALL_WEIGHTS, [*range(1, 66), 128, 129, 256]):  # more than 64 rows are XLA's
        plan = check_plan(weight.shape(m, "bfloat16"), gpu)
        assert (plan.implementation == "xla") == (not gpu.is_gpu or m > 64)


@pytest.mark.parametrize("name", [pytest.param("H100", marks=pytest.mark.slow), "H200"])
def test_every_tuned_plan_is_legal(directories, name):
    gpu = device.by_name(name)
    table, _ = tune(ALL_WEIGHTS[::2], any_time, gpu)
    tables.save(table, directories["user"] / tables.file_name(name))
    reasons = set()
    for weight, m in itertools.product(ALL_WEIGHTS, range(1, 257)):
        plan = check_plan(weight.shape(m, "bfloat16"), gpu)
        reasons.add((plan.implementation, plan.reason.partition(": ")[2].split(",")[0].split(" ")[0]))
    found = {(implementation, how) for implementation in ("gemv", "flat", "xla") for how in ("exact", "nearest")}
    assert found <= reasons


def test_shipped_tables_are_legal_and_every_entry_is_found(monkeypatch):
    monkeypatch.undo()  # the real ones
    known = [device.by_name(name) for name in device.names()]
    known += [only(b.name, gpu) for gpu in known for b in BACKENDS if b.architectures and b.runs_on(gpu)]
    gpus = {tables.name_for(gpu): gpu for gpu in known}
    for path in sorted(tables.SHIPPED_DIRECTORY.glob("*.json")):
        gpu = gpus[path.name]
        for found in tables.load(path, gpu).entries:
            assert "exact" in check_plan(found.shape, gpu).reason
        for weight, m in itertools.product(ALL_WEIGHTS, range(1, 257)):
            check_plan(weight.shape(m, "bfloat16"), gpu)
