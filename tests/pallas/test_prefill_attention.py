"""The prefill kernel against float64: masks, lengths, caches of all kinds, sinks, caps, both directions of failure."""

import itertools
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import prefill_case
import pytest
from decode_case import ON_GPU, _keep_clocks
from jax._src.pallas.mosaic_gpu.interpret import shared_memory
from jax.experimental.pallas import mosaic_gpu as plgpu
from prefill_case import CASES, Case, random_cases

from fdpp_jax.pallas.prefill_attention import blocks, prefill_attention
from fdpp_jax.plans.hopper import HEAD_DIMS
from fdpp_jax.plans.hopper_prefill import PrefillAttentionConfig

pytestmark = [
    pytest.mark.usefixtures("fresh_interpreter"),
    # numpy, by which the interpreter multiplies, warns of what overflows on purpose.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]


def run(case, arrays, phi, **options):
    """The kernel; interpreted, where there is no GPU, without races."""
    interpret = None if ON_GPU else plgpu.InterpretGPUParams(detect_races=True)
    arrays = arrays._replace(phi=None if phi is None else jnp.float32(phi))
    config = PrefillAttentionConfig(case.block_kv, 2, case.packs_group, case.heads_together)
    with mock.patch.object(shared_memory.GPUSharedMemory, "reset_per_cluster_state", _keep_clocks):
        return jax.block_until_ready(prefill_attention(arrays, case.options, config, interpret=interpret, **options))


def check(case, phi, seed=0):
    """Right in all rows, and in their log-sum-exps; recomputed where they leave the window."""
    arrays = case.arrays(seed)
    prefill_case.check(case, run(case, arrays, phi, recompute=True), case.expected(arrays))


@pytest.mark.gpu if ON_GPU else pytest.mark.slow
@pytest.mark.parametrize(("name", "phi"), [*((name, 6.0) for name in CASES), ("causal", None), ("chunk", None)])
def test_against_float64(name, phi):
    check(CASES[name], phi)


@pytest.mark.parametrize("together", [1, 3, 8, 99])
def test_the_order_of_ctas(together):
    """Every block of rows once; the heads that are left over first; of each section the last rows first."""
    config = PrefillAttentionConfig(64, 2, heads_together=together)
    facts = types.SimpleNamespace(config=config, num_blocks=3, batch=2, row_heads=4)
    places = [tuple(map(int, blocks._place(jnp.int32(i), facts))) for i in range(24)]
    assert sorted(places) == list(itertools.product(range(2), range(4), range(3)))
    numbers = [number for *_, number in places]
    sections = {1: [1] * 8, 3: [2, 3, 3], 8: [8], 99: [8]}[together]
    assert numbers == [number for heads in sections for number in (2, 1, 0) for _ in range(heads)]


@pytest.mark.parametrize("phi", [90.0, -90.0])
def test_rows_that_leave_the_window_are_nan_until_they_are_redone(phi):
    case = Case(query_length=20, capacity=64, num_heads=1, offset=(44,))
    arrays = case.arrays()
    out, log_sum = run(case, arrays, phi)
    assert np.isnan(np.asarray(out, np.float32)).all()
    assert np.isnan(log_sum).all()
    check(case, phi)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(125))
def test_random_cases(seed):
    for case, phi in zip(random_cases(seed, HEAD_DIMS), (6.0, 30.0, -40.0, 6.0), strict=True):
        check(case, None if seed % 4 == 0 else phi, seed)
