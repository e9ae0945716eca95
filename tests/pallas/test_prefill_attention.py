"""The prefill kernel against float64: masks, lengths, first keys, sinks, caps, and both directions of failure."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from decode_case import ON_GPU, _keep_clocks
from jax._src.pallas.mosaic_gpu.interpret import shared_memory
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.pallas.prefill_attention import prefill_attention
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions
from fdpp_jax.plans.hopper import HEAD_DIMS
from fdpp_jax.plans.hopper_prefill import PrefillAttentionConfig

pytestmark = [
    pytest.mark.usefixtures("fresh_interpreter"),
    # numpy, by which the interpreter multiplies, warns of what overflows on purpose.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]
SMALL = PrefillAttentionConfig(64, 2)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and features of a call."""

    batch: int = 1
    query_length: int = 130
    capacity: int = 130
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 64
    dtype: str = "bfloat16"
    lengths: tuple[int, ...] | None = None
    starts: tuple[int, ...] | None = None
    offset: tuple[int, ...] | None = None
    has_sinks: bool = False
    is_causal: bool = True
    local_window_size: tuple[int, int] | None = None
    logits_soft_cap: float | None = None
    query_scale: float = 1.0
    config: PrefillAttentionConfig = SMALL

    def arrays(self, seed=0):
        """Random arrays, with NaN behind the lengths and before the starts."""
        rng = np.random.default_rng(seed)
        query = rng.standard_normal((self.batch, self.query_length, self.num_heads, self.head_dim), np.float32)
        key, value = rng.standard_normal((2, self.batch, self.capacity, self.num_kv_heads, self.head_dim), np.float32)
        position, lengths = np.arange(self.capacity), self.lengths or (self.capacity,) * self.batch
        dead = position >= np.array(lengths)[:, None]
        if self.starts is not None:
            dead |= position < np.array(self.starts)[:, None]
        key[dead] = value[dead] = np.nan
        dtype = jnp.dtype(self.dtype)
        given = dict(query=(query * self.query_scale).astype(dtype), key=key.astype(dtype), value=value.astype(dtype))
        for name, numbers in (("lengths", lengths), ("starts", self.starts), ("query_offset", self.offset)):
            if numbers is not None:
                given[name] = np.array(numbers, np.int32)
        if self.has_sinks:
            given["sinks"] = rng.uniform(-3, 6, self.num_heads).astype(np.float32)
        return AttentionArrays(**{name: jnp.asarray(x) for name, x in given.items()})

    @property
    def options(self):
        scale = self.head_dim**-0.5
        return AttentionOptions(scale, self.is_causal, self.local_window_size, self.logits_soft_cap, True)

    def expected(self, arrays):
        """The oracle's output, and its log-sum-exp."""
        given = {name: x for name, x in arrays._asdict().items() if x is not None}
        options = dataclasses.asdict(self.options)
        del options["return_residual"]
        return oracle.attention_and_log_sum(**given, **options)


def run(case, arrays, phi, **options):
    """The kernel; interpreted, where there is no GPU, without races."""
    interpret = None if ON_GPU else plgpu.InterpretGPUParams(detect_races=True)
    arrays = arrays._replace(phi=None if phi is None else jnp.float32(phi))
    with mock.patch.object(shared_memory.GPUSharedMemory, "reset_per_cluster_state", _keep_clocks):
        return jax.block_until_ready(
            prefill_attention(arrays, case.options, case.config, interpret=interpret, **options)
        )


def check(case, phi, seed=0):
    """Right in all rows, and in their log-sum-exps; recomputed where they leave the window."""
    arrays = case.arrays(seed)
    out, log_sum = run(case, arrays, phi, recompute=True)
    expected, expected_log_sum = case.expected(arrays)
    assert out.dtype == case.dtype
    assert np.isfinite(np.asarray(out, np.float32)).all()
    assert oracle.relative_error(out, expected) < oracle.TOLERANCE[case.dtype]
    np.testing.assert_allclose(log_sum, expected_log_sum, atol=4e-3, rtol=1e-5)


CASES = {
    "causal": Case(),
    "whole": Case(is_causal=False, query_length=40, capacity=200, num_kv_heads=2, dtype="float16"),
    "chunk": Case(batch=2, query_length=40, capacity=200, lengths=(150, 77), offset=(110, 37), has_sinks=True),
    "window": Case(query_length=140, capacity=140, local_window_size=(50, 0)),
    "starts": Case(batch=2, query_length=70, capacity=70, starts=(0, 66), logits_soft_cap=5.0),
    "no keys": Case(batch=2, query_length=17, capacity=64, lengths=(0, 9), offset=(0, -20)),
}


@pytest.mark.gpu if ON_GPU else pytest.mark.slow
@pytest.mark.parametrize(("name", "phi"), [*((name, 6.0) for name in CASES), ("causal", None), ("chunk", None)])
def test_against_float64(name, phi):
    check(CASES[name], phi)


@pytest.mark.parametrize("phi", [90.0, -90.0])
def test_rows_that_leave_the_window_are_nan_until_they_are_redone(phi):
    case = Case(query_length=20, capacity=64, num_heads=1, offset=(44,))
    arrays = case.arrays()
    out, log_sum = run(case, arrays, phi)
    assert np.isnan(np.asarray(out, np.float32)).all()
    assert np.isnan(log_sum).all()
    check(case, phi)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(60))
def test_random_cases(seed):
    rng = np.random.default_rng(seed)
    batch, num_kv_heads, head_dim = int(rng.integers(1, 4)), int(rng.integers(1, 3)), int(rng.choice(HEAD_DIMS))
    capacity, query_length = int(rng.integers(1, 700)), int(rng.integers(17, 400))
    starts = rng.integers(0, capacity + 1, batch) if seed % 3 == 0 else None
    case = Case(
        batch=batch,
        query_length=query_length,
        capacity=capacity,
        num_heads=num_kv_heads * int(rng.choice([1, 2, 4])),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=str(rng.choice(["bfloat16", "float16"])),
        lengths=tuple(map(int, rng.integers(0, capacity + 1, batch))) if seed % 2 else None,
        starts=None if starts is None else tuple(map(int, starts)),
        offset=tuple(map(int, rng.integers(-20, capacity, batch))) if seed % 5 < 3 else None,
        has_sinks=seed % 4 == 0,
        is_causal=bool(rng.random() < 0.6),
        local_window_size=(int(rng.integers(0, 200)), int(rng.integers(0, 50))) if seed % 3 == 1 else None,
        logits_soft_cap=float(rng.choice([5.0, 30.0])) if seed % 5 == 0 else None,
        query_scale=float(rng.choice([1.0, 1.0, 8.0])),
        config=PrefillAttentionConfig(64 if head_dim > 128 else int(rng.choice([64, 128])), 2),
    )
    check(case, [None, 6.0, 30.0, -40.0][seed % 4], seed)
