"""Tuning with a fake timer; no GPU, nothing depends on a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from triton_case import needs_plugin
from tuning_case import DEVICE, FLAT, H200, RUN, SHAPE, any_time, empty_directories, entry, make_timer, tune

from fdpp_jax import models
from fdpp_jax.bench import tuning
from fdpp_jax.bench.tuning import Job, Weight
from fdpp_jax.cli import tune as tune_command
from fdpp_jax.plans import backends, device
from fdpp_jax.plans.hopper_matmul import FlatMatmulConfig, GemvConfig, candidates, rule_config
from fdpp_jax.plans.shapes import MatmulShape
from fdpp_jax.plans.tables import Sweep, Table


@pytest.fixture(autouse=True)
def directories(tmp_path, monkeypatch):
    return empty_directories(tmp_path, monkeypatch)


BEST, SECOND = FlatMatmulConfig(132, 64, 128, 8), FlatMatmulConfig(264, 64, 128, 5)


def tiles(config):
    """All but the stages, which depend on the rows, too."""
    return config.num_ctas, config.block_n, config.block_k


def paper(weight, job):
    """gemv wins one row, flat up to 16, XLA beyond; the best tiles are BEST, then SECOND."""
    if job.implementation == "gemv":
        return 11.0 + job.config.split_k / 100
    if job.implementation == "xla":
        return 20.0
    order = [tiles(BEST), tiles(SECOND)]
    rank = order.index(tiles(job.config)) if tiles(job.config) in order else 2
    return 12.0 + rank + (20.0 if job.m > 16 else 0.0)


def test_switch_points_and_the_best_config_of_each():
    weight = Weight(4096, 12288, "qkv")
    table, _ = tune([weight], paper)
    entries = table.of_weight(4096, 12288, "bfloat16")
    assert tuple(found.shape.m for found in entries) == tuning.ROWS
    assert [found.implementation for found in entries] == ["gemv"] + 4 * ["flat"] + 3 * ["xla"]
    assert tuning.switch_points(entries) == (2, 17)
    assert entries[0].configs["gemv"].split_k == 1
    assert entries[0].time_us == {"gemv": 11.01, "flat": 12.0, "xla": 20.0}
    assert {found.configs["flat"] for found in entries[:5]} == {BEST}
    assert "flat" not in entries[-1].configs
    assert (entries[3].floor_us, entries[3].run) == (10.0, RUN)
    only_xla, _ = tune([weight], lambda weight, job: 1.0 if job.implementation == "xla" else 2.0)
    assert tuning.switch_points(only_xla.of_weight(4096, 12288, "bfloat16")) == (1, 1)


def test_a_kernel_that_fails_is_left_out_and_told_of():
    broken = BEST

    def us(weight, job):
        return None if job.config == broken else paper(weight, job)

    (step,) = tuning.tune([Weight(4096, 12288, "qkv")], "bfloat16", H200, Table(DEVICE), RUN, make_timer=make_timer(us))
    assert step.failures == ("M = 8, flat 64 x 128, 8 stages, 132 CTAs: XlaRuntimeError: no",)
    assert step.table.of_weight(4096, 12288, "bfloat16")[3].configs["flat"] == SECOND


def test_configs_are_swept_for_every_weight():
    weights = [w for name in tune_command._DEFAULT_MODELS for w in tuning.weights_of(name, models.PRESETS[name])]
    shapes = [MatmulShape(8, weight.k, weight.n) for weight in weights]
    assert len(set.intersection(*({*candidates(shape, H200, "flat")} for shape in shapes))) == 5


def test_a_budget_stops_before_the_weight_that_would_exceed_it():
    weights = [Weight(4096, 4096 * i, f"w{i}") for i in range(1, 6)]
    now = [100.0]
    seconds = {"w1": 10.0, "w2": 20.0, "w3": 5.0, "w4": 5.0, "w5": 5.0}

    def us(weight, job):
        if job.m == 128:  # once a weight
            now[0] += seconds[weight.label]
        return any_time(weight, job)

    def done(budget):
        now[0] = 100.0
        return tune(weights, us, clock=lambda: now[0], deadline=100.0 + budget)[1]

    assert done(0) == []
    assert done(1) == ["w1"]  # how long one takes is not known before
    assert done(20) == ["w1"]  # w2 may take as long as w1
    assert done(20.5) == ["w1", "w2"]  # and takes longer
    assert done(50) == ["w1", "w2"]
    assert done(50.5) == ["w1", "w2", "w3"]
    assert done(1000) == [weight.label for weight in weights]


def test_what_was_measured_by_the_same_versions_is_done():
    weights = [Weight(4096, 4096, "o"), Weight(4096, 12288, "qkv")]
    table, _ = tune(weights[:1], any_time)
    later = dataclasses.replace(RUN, date="2027-01-01", commit="def")
    newer = dataclasses.replace(RUN, versions=RUN.versions | {"jax": "0.12.0"})
    assert tuning.pending(weights, "bfloat16", table, later) == weights[1:]
    assert tuning.pending(weights, "bfloat16", table, newer) == weights
    assert tuning.pending(weights, "float16", table, RUN) == weights
    parts = Table(DEVICE, table.entries[:-1], table.sweeps)
    assert tuning.pending(weights, "bfloat16", parts, RUN) == weights


def test_a_weight_measured_again_replaces_what_was_there():
    weight = Weight(4096, 4096, "o")
    table, _ = tune([weight, Weight(4096, 12288, "qkv")], paper)
    newer = dataclasses.replace(RUN, date="2027-01-01")
    (step,) = tuning.tune([weight], "bfloat16", H200, table, newer, make_timer=make_timer(any_time))
    assert len(step.table.entries) == len(table.entries)
    assert len(step.table.sweeps) == 2
    assert all(found.run == newer for found in step.table.of_weight(4096, 4096, "bfloat16"))
    assert all(found.run == RUN for found in step.table.of_weight(4096, 12288, "bfloat16"))


def test_static_costs():
    shapes = MatmulShape(8, 4096, 512), SHAPE  # of 64 and of 132 CTAs
    rule = {s: rule_config(s, H200, "flat").text for s in shapes}
    sweeps = (
        Sweep(shapes[0], {"a": 10.0, "b": 20.0, "xla": 15.0, rule[shapes[0]]: 10.0}, RUN),
        Sweep(shapes[1], {"a": 40.0, "b": 10.0, "only here": 5.0, "xla": 15.0, rule[shapes[1]]: 20.0}, RUN),
    )
    entries = (entry(), entry(64), entry(n=4096, config=None))  # XLA takes 1.5, 1.5, 1 times the best, flat 1, 1, 2
    single, rules, flat, xla = tuning.static_costs(Table(DEVICE, entries, sweeps), H200, "bfloat16")
    assert (single.choice, single.worst, single.where) == ("flat, b, M = 8", 2.0, "[8, 4096] @ [4096, 512]")
    assert single.geomean == pytest.approx(2.0)
    assert (rules.choice, rules.worst) == ("flat, the rule's config, M = 8", 4.0)
    assert rules.geomean == pytest.approx(2.0)
    assert (flat.choice, flat.worst) == ("flat with its best config, M = 8..64", 2.0)
    assert (xla.choice, xla.worst) == ("xla with its best config, M = 8..64", 1.5)
    assert xla.geomean == pytest.approx(1.5 ** (2 / 3))
    assert tuning.static_costs(Table(DEVICE), H200, "bfloat16") == []


def test_weights_of_models():
    weights = tuning.weights_of("llama-3-8b", models.PRESETS["llama-3-8b"])
    assert [(weight.k, weight.n) for weight in weights] == [
        (4096, 6144),
        (4096, 4096),
        (4096, 28672),
        (14336, 4096),
        (4096, 128256),
    ]
    assert str(weights[0]) == "llama-3-8b qkv 4096x6144"
    assert str(tuning.weights_of("x", models.PRESETS["llama-3.2-1b"])[-1]) == "x head 2048x128256"  # tied
    assert weights[0].shape(8, "float16") == MatmulShape(8, 4096, 6144, "float16", "nk")
    both = weights + tuning.weights_of("llama-2-7b", models.PRESETS["llama-2-7b"])
    assert len(tuning.distinct(both)) == 9
    assert tuning.distinct(both)[:5] == weights


@pytest.mark.slow
def test_the_timer_times_xla_on_a_cpu_and_raises_what_xla_does():
    measured = tuning.weight_timer(Weight(128, 64, "w"), "bfloat16")([Job(1, "xla"), Job(8, "xla")], 1)
    assert set(measured.time_us) == {Job(1, "xla"), Job(8, "xla")}
    assert min(measured.floor_us, *measured.time_us.values()) > 0
    failing = Job(8, "flat", FlatMatmulConfig(1, 64, 64, 2))  # no GPU here
    if jax.default_backend() == "cpu":
        measured = tuning.weight_timer(Weight(128, 64, "w"), "bfloat16")([failing], 1)
        assert list(measured.failures) == [failing]


@needs_plugin
def test_what_is_timed_is_the_backend_s_that_is_named(monkeypatch):
    """Each job runs with the device that is tuned as the target."""
    monkeypatch.setattr(device, "current", lambda: H200)
    steps = []

    def make(weight, dtype):
        def measure(jobs, rounds):
            for job in jobs:
                x = {job.m: jax.ShapeDtypeStruct((job.m, weight.k), jnp.bfloat16)}
                w = jax.ShapeDtypeStruct((weight.n, weight.k), jnp.bfloat16)
                if job.config is not None and not steps:
                    steps.append(str(jax.jit(functools.partial(tuning._step, job)).trace(x, w).jaxpr))
            return tuning.Measured(10.0, {job: any_time(weight, job) for job in jobs})

        return measure

    gpu = backends.only("triton", H200)
    list(tuning.tune([Weight(4096, 4096, "o")], "bfloat16", gpu, Table(DEVICE), RUN, make_timer=make))
    assert "triton_kernel_call" in steps[0]


@pytest.mark.parametrize("job", [Job(8, "flat", FLAT), Job(1, "gemv", GemvConfig(64, 128, 3, 2)), Job(128, "xla")])
def test_what_is_timed_lowers_for_cuda(monkeypatch, job):
    monkeypatch.setattr(device, "current", lambda: device.by_name("H200"))
    x = {job.m: jax.ShapeDtypeStruct((job.m, 1024), jnp.bfloat16)}
    w = jax.ShapeDtypeStruct((512, 1024), jnp.bfloat16)  # [N, K]
    lowered = jax.jit(functools.partial(tuning._step, job)).trace(x, w).lower(lowering_platforms=("cuda",))
    assert ("mosaic_gpu" in lowered.as_text()) == (job.config is not None)
