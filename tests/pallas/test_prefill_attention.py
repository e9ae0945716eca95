"""The prefill kernel against float64: masks, lengths, caches of all kinds, sinks, caps, both directions of failure."""

import dataclasses
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


def config_of(case):
    return PrefillAttentionConfig(case.block_kv, 2, case.packs_group, case.heads_together, case.num_ctas)


def run(case, arrays, phi, **options):
    """The kernel; interpreted, where there is no GPU, without races."""
    interpret = None if ON_GPU else plgpu.InterpretGPUParams(detect_races=True)
    arrays = arrays._replace(phi=None if phi is None else jnp.float32(phi))
    with mock.patch.object(shared_memory.GPUSharedMemory, "reset_per_cluster_state", _keep_clocks):
        return jax.block_until_ready(
            prefill_attention(arrays, case.options, config_of(case), interpret=interpret, **options)
        )


def in_turn(case, num_ctas):
    """The case, where so many CTAs take all tiles."""
    return dataclasses.replace(case, num_ctas=num_ctas)


def check(case, phi, seed=0, arrays=None):
    """Right in all rows, and in their log-sum-exps; recomputed where they leave the window."""
    arrays = case.arrays(seed) if arrays is None else arrays
    prefill_case.check(case, run(case, arrays, phi, recompute=True), case.expected(arrays))


@pytest.mark.gpu if ON_GPU else pytest.mark.slow
@pytest.mark.parametrize(("name", "phi"), [*((name, 6.0) for name in CASES), ("causal", None), ("chunk", None)])
def test_against_float64(name, phi):
    check(CASES[name], phi)


@pytest.mark.gpu if ON_GPU else pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_ctas"),  # interpreted, every other case by two or three CTAs in turn
    [(name, n) for i, name in enumerate(CASES) for n in (2, 3) if ON_GPU or (i % 2 == 0 and n == 2 + i // 2 % 2)],
)
def test_ctas_that_take_tiles_in_turn(name, num_ctas):
    check(in_turn(CASES[name], num_ctas), None if name == "causal" else 6.0)


@pytest.mark.gpu if ON_GPU else pytest.mark.slow
@pytest.mark.parametrize(("tile", "score", "head_dim"), [(0, -200.0, 64), (1, 200.0, 256), (3, 200.0, 64)])
def test_one_tile_of_a_cta_that_leaves_the_window_is_redone(tile, score, head_dim):
    case = in_turn(Case(query_length=400, num_heads=1, is_causal=False, capacity=70, head_dim=head_dim), 1)
    arrays = case.arrays()
    number = case.query_length // 128 - tile  # the last rows are the first tile
    fails = np.arange(case.query_length) // 128 == number
    query = arrays.query.at[0, :, 0, 0].set(jnp.where(fails, score, 0.0).astype(case.dtype))
    key = arrays.key.at[..., 0].set(head_dim**0.5)  # each score of these rows is near `score`
    arrays = arrays._replace(query=query, key=key)
    out, _ = run(case, arrays, 6.0)
    np.testing.assert_array_equal(np.isnan(np.asarray(out, np.float32)).any(axis=(0, 2, 3)), fails)
    check(case, 6.0, arrays=arrays)


@pytest.mark.parametrize("num_ctas", [None, 4, 2])
def test_only_ctas_that_take_turns_claim_tiles(num_ctas):
    """The counter is an operand that the kernel changes, so XLA makes a new one for each call."""
    case = in_turn(Case(), num_ctas)  # 4 tiles

    def call(arrays):
        return prefill_attention(arrays._replace(phi=jnp.float32(6.0)), case.options, config_of(case), recompute=True)

    text = jax.jit(call).trace(case.arrays()).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert text.count("output_operand_alias<") == (num_ctas == 2)


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
