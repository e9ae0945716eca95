"""The clock: programs, their buffers, and steps that run one after the other."""

import itertools
import time

import jax.numpy as jnp
import pytest

from fdpp_jax.bench import clock
from fdpp_jax.bench.clock import Candidate
from fdpp_jax.plans import device


def test_what_is_not_finite_is_not_timed():
    sets = clock.copies(jnp.zeros(8), 2)
    candidates = {"bad": Candidate(lambda x, w: x / w), "good": Candidate(lambda x, w: x + w)}
    timings = clock.time_kernels(candidates, jnp.ones(8), sets, 32)
    assert list(timings.seconds) == ["good"]
    assert "not finite" in str(timings.failures["bad"])


def test_copies_are_buffers_of_their_own():
    sets = clock.copies({"key": jnp.arange(8.0)}, 3)
    assert len({buffers["key"].unsafe_buffer_pointer() for buffers in sets}) == 3


@pytest.mark.parametrize("set_bytes", [1 << 10, 1 << 20])
def test_small_sets_do_not_make_endless_programs(monkeypatch, set_bytes):
    monkeypatch.setattr(clock, "_MAX_STEPS", 128)
    assert clock.num_sets(set_bytes, device.by_name("H200")) == 128


@pytest.mark.parametrize("set_bytes", [4 << 20, 17 << 20, 1 << 30, 16 << 30])
def test_a_timed_program_reads_past_the_last_cache(monkeypatch, set_bytes):
    monkeypatch.setattr(clock, "_MAX_STEPS", 128)
    h200 = device.by_name("H200")
    sets = clock.num_sets(set_bytes, h200)
    assert sets >= 2
    assert sets * set_bytes >= 4 * h200.l2_bytes


def test_what_records_the_command_buffer_does_not_shorten_the_samples(monkeypatch):
    monkeypatch.setattr(clock, "_SAMPLE_SECONDS", 0.02)
    executions = itertools.count(1)

    def compiled(x, sets):
        time.sleep(0.1 if next(executions) == 2 else 0.001)
        return (jnp.zeros(()),)

    program = clock._Program(compiled, None, (), 1)
    started = time.perf_counter()
    program.sample()
    assert time.perf_counter() - started >= 0.01


def test_a_program_is_long_and_in_whole_rounds(monkeypatch):
    monkeypatch.setattr(clock, "_MAX_STEPS", 128)
    h200 = device.by_name("H200")
    for set_bytes, num_sets, num_steps in (
        (17 << 20, 12, 120),
        (64 << 20, 4, 128),
        (512 << 20, 2, 16),
        (4 << 30, 2, 8),
    ):
        assert clock.num_sets(set_bytes, h200) == num_sets
        assert clock._num_steps(set_bytes, num_sets, h200) == num_steps


@pytest.mark.parametrize("chain", [None, lambda x, out: out])
def test_steps_run_one_after_the_other(chain):
    sets = [jnp.array([1.0]), jnp.array([10.0])]
    lowered = clock._lower(lambda x, w: x + w, jnp.array([0.5]), sets, 4, chain)
    outs = [out.item() for out in lowered.compile()(jnp.array([0.5]), sets)]
    assert outs == ([1.5 + 10.5 + 1.5 + 10.5, 10.5] if chain is None else [22.5])
