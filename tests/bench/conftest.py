"""Timed programs are short here: no test asks how fast anything is."""

import pytest

from fdpp_jax.bench import clock


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(clock, "_MAX_STEPS", 2)
    monkeypatch.setattr(clock, "REPEATS", 1)
    monkeypatch.setattr(clock, "_SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(clock, "_WARM_UP_SECONDS", 0.0)
