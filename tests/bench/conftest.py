"""Timed programs are short here: no test asks how fast anything is."""

import dataclasses

import pytest
import toy_backend

from fdpp_jax import heuristics
from fdpp_jax.bench import clock
from fdpp_jax.plans import backends, device
from fdpp_jax.plans.backend import AttentionPlan, MatmulPlan


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(clock, "_MAX_STEPS", 2)
    monkeypatch.setattr(clock, "REPEATS", 1)
    monkeypatch.setattr(clock, "_SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(clock, "_WARM_UP_SECONDS", 0.0)


def _toy(name):
    """A backend for the CPU, without pages in attention and more than 16 rows in matmuls."""

    def refuse(shape, device, algorithm):
        return None if shape.page_size is None else f"{name} takes no pages"

    def refuse_matmul(shape, device, algorithm):
        return None if shape.m <= 16 else f"{name} takes 16 rows"

    attention, matmul = toy_backend.BACKEND.attention, toy_backend.BACKEND.matmul
    return dataclasses.replace(
        toy_backend.BACKEND,
        name=name,
        architectures=("cpu",),
        attention=dataclasses.replace(
            attention, refuse=refuse, plan=lambda *_: AttentionPlan(name, "toy", None, f"by {name}")
        ),
        matmul=dataclasses.replace(
            matmul,
            refuse=refuse_matmul,
            plan=lambda *_: MatmulPlan(name, "flat", toy_backend.ToyConfig(), f"by {name}"),
        ),
    )


@pytest.fixture
def two_backends(monkeypatch):
    """The CPU has kernels of Mosaic GPU, and of Triton where it is named; the value: whose kernels were traced."""
    monkeypatch.setattr(backends, "BACKENDS", (_toy("mosaic_gpu"), _toy("triton"), backends.by_name("xla")))
    monkeypatch.setattr(device, "current", lambda: device.by_name("cpu"))
    heuristics.plan_attention.cache_clear()
    toy_backend.calls.clear()
    yield lambda: {plan.backend for plan in toy_backend.calls}
    heuristics.plan_attention.cache_clear()
