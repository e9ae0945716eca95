"""flat_matmul and gemv in Triton: tiles and splits for every shape and device, and a reason for each refusal."""

import dataclasses
import itertools

import hypothesis
import pytest
import tuning_case
from hypothesis import strategies as st

from fdpp_jax import models
from fdpp_jax.bench import tuning
from fdpp_jax.heuristics import plan_matmul
from fdpp_jax.plans import backends, device, tables, triton, triton_matmul
from fdpp_jax.plans.backend import Backend
from fdpp_jax.plans.shapes import MatmulShape
from fdpp_jax.plans.triton_matmul import FlatMatmulConfig, GemvConfig

A100, B200, H200, MI250 = (device.by_name(name) for name in ("A100", "B200", "H200", "MI250"))
DEVICES = [gpu for gpu in map(device.by_name, device.names()) if gpu.arch in triton.ARCHITECTURES]
ROWS = (1, 2, 8, 9, 16, 17, 33, 64)
WEIGHTS = tuning.distinct([w for name, config in models.PRESETS.items() for w in tuning.weights_of(name, config)])
by_device = pytest.mark.parametrize("gpu", DEVICES, ids=lambda gpu: gpu.kind)


def _shapes(rows):
    return [
        MatmulShape(m, weight.k, weight.n, w_order=w_order)
        for weight in WEIGHTS
        for m in rows
        for w_order in ("kn", "nk")
    ]


def _algorithms(shape):
    return ("gemv", "flat") if shape.m == 1 else ("flat",)


@by_device
def test_every_weight_of_a_model_has_a_legal_config(gpu):
    for shape in _shapes(ROWS):
        assert triton_matmul.refuse(shape, gpu, None) is None
        for algorithm in _algorithms(shape):
            config = triton_matmul.rule_config(shape, gpu, algorithm)
            assert triton_matmul.refuse_config(shape, gpu, algorithm, config) is None


@by_device
def test_candidates_are_few_legal_and_have_the_rule_s(gpu):
    for shape in _shapes((1, 8)):
        for algorithm in _algorithms(shape):
            configs = triton_matmul.candidates(shape, gpu, algorithm)
            assert configs[0] == triton_matmul.rule_config(shape, gpu, algorithm)
            assert len(set(configs)) == len(configs) <= 16
            assert len({config.text for config in configs}) == len(configs)
            assert all(triton_matmul.refuse_config(shape, gpu, algorithm, config) is None for config in configs)


@by_device
def test_candidates_of_few_rows_fit_more(gpu):
    few = MatmulShape(8, 4096, 12288, w_order="nk")
    for config in triton_matmul.candidates(few, gpu, "flat"):
        for m in (9, 16, 64):
            more = dataclasses.replace(few, m=m)
            fitted = triton_matmul.fit(more, gpu, config)
            assert dataclasses.replace(fitted, num_stages=config.num_stages) == config
            smallest = dataclasses.replace(config, num_stages=2)
            if smallest.smem_bytes(more) <= gpu.smem_bytes:
                assert triton_matmul.refuse_config(more, gpu, "flat", fitted) is None


@pytest.mark.parametrize("algorithm", ["flat", "gemv"])
def test_the_order_of_w_decides_the_tile(algorithm):
    """A tile's long side lies along memory."""
    shape = MatmulShape(1, 4096, 4096, w_order="nk")
    config = triton_matmul.rule_config(shape, A100, algorithm)
    assert config.block_k > 4 * config.block_n
    other = triton_matmul.rule_config(dataclasses.replace(shape, w_order="kn"), A100, algorithm)
    assert other.block_n >= 64


@pytest.mark.parametrize(
    ("gpu", "shape", "algorithm", "reason"),
    [
        (A100, MatmulShape(2, 64, 64), "gemv", "gemv takes one row, got M = 2"),
        (A100, MatmulShape(65, 64, 64), "flat", "flat takes 1 to 64 rows, got M = 65"),
        (A100, MatmulShape(0, 64, 64), None, "flat takes 1 to 64 rows, got M = 0"),
        (A100, MatmulShape(65, 4096, 4096), None, "rule: M = 65 > 64 fills cuBLAS's tiles (memory-bound: intensity"),
        (MI250, MatmulShape(65, 4096, 4096), None, "rule: M = 65 > 64 fills hipBLASLt's tiles (memory-bound"),
        (A100, MatmulShape(8, 64, 68), "flat", "multiples of 8, got K = 64, N = 68"),
        (A100, MatmulShape(1, 68, 64), "gemv", "multiples of 8, got K = 68, N = 64"),
        (A100, MatmulShape(8, 64, 64, "float32"), "flat", "bfloat16 or float16, got float32"),
        (device.by_name("cpu"), MatmulShape(8, 64, 64), None, "no kernel for cpu"),
    ],
)
def test_refused_matmul_says_why(gpu, shape, algorithm, reason):
    assert reason in triton_matmul.refuse(shape, gpu, algorithm)


_FLAT = FlatMatmulConfig("sm_80", 64, 64, 2, 2, 4, 3)
_GEMV = GemvConfig("sm_80", 16, 256, 1, 4, 1)


@pytest.mark.parametrize(
    ("gpu", "config", "reason"),
    [
        (A100, _FLAT, None),
        (H200, _FLAT, None),  # what is compiled for an older GPU runs, too
        (A100, dataclasses.replace(_FLAT, arch="sm_90"), "A100 runs no code for sm_90"),
        (B200, dataclasses.replace(_FLAT, arch="sm_90"), "B200 runs no code for sm_90"),  # sm_90a's is for Hopper alone
        (A100, dataclasses.replace(_FLAT, arch="gfx90a"), "A100 runs no code for gfx90a"),
        (MI250, _FLAT, "MI250 runs no code for sm_80"),
        (A100, dataclasses.replace(_FLAT, arch="sm_75"), "A100 runs no code for sm_75"),
        (A100, dataclasses.replace(_FLAT, block_n=48), "block_n must be one of (4, 8, 16, 32, 64, 128, 256), got 48"),
        (A100, dataclasses.replace(_FLAT, block_n=8), "block_n must be at least 16, got 8"),
        (
            A100,
            dataclasses.replace(_FLAT, block_k=2048),
            "block_k must be one of (32, 64, 128, 256, 512, 1024), got 2048",
        ),
        (A100, dataclasses.replace(_FLAT, num_warps=3), "num_warps must be one of (1, 2, 4, 8), got 3"),
        (A100, dataclasses.replace(_FLAT, num_stages=1), "num_stages must lie in 2..8, got 1"),
        (A100, dataclasses.replace(_FLAT, num_stages=9), "num_stages must lie in 2..8, got 9"),
        (A100, dataclasses.replace(_FLAT, split_k=5), "split_k must lie in 1..4 (K = 256), got 5"),
        (A100, dataclasses.replace(_FLAT, k_groups=3), "k_groups must divide 4 warps, and be at most 4, got 3"),
        (
            A100,
            dataclasses.replace(_FLAT, k_groups=8, num_warps=8),
            "k_groups must divide 8 warps, and be at most 4, got 8",
        ),
        (
            device.by_name("A10"),
            dataclasses.replace(_FLAT, block_n=256, block_k=256, split_k=1),
            "the tiles need 270592 bytes of shared memory, a program gets 101376",
        ),
        (A100, _GEMV, "gemv takes one row, got M = 8"),
    ],
)
def test_a_config_that_cannot_run_is_refused(gpu, config, reason):
    algorithm = "gemv" if isinstance(config, GemvConfig) else "flat"
    assert triton_matmul.refuse_config(MatmulShape(8, 256, 256, w_order="nk"), gpu, algorithm, config) == reason


def test_a_tile_of_gemv_that_registers_cannot_hold_is_refused():
    shape = MatmulShape(1, 4096, 4096, w_order="nk")
    assert triton_matmul.refuse_config(shape, A100, "gemv", _GEMV) is None
    reason = triton_matmul.refuse_config(shape, A100, "gemv", dataclasses.replace(_GEMV, block_n=64))
    assert reason == "4 warps hold at most 8192 elements, got 64 x 256"


_MATMUL = st.builds(
    MatmulShape,
    m=st.integers(1, 64),
    k=st.integers(1, 4000).map(lambda value: 8 * value),
    n=st.integers(1, 20_000).map(lambda value: 8 * value),
    w_order=st.sampled_from(["kn", "nk"]),
)


@hypothesis.given(_MATMUL, st.sampled_from(DEVICES))
def test_any_matmul_config_is_legal(shape, gpu):
    for algorithm in _algorithms(shape):
        config = triton_matmul.rule_config(shape, gpu, algorithm)
        assert triton_matmul.refuse_config(shape, gpu, algorithm, config) is None
        if config.split_k > 1:
            assert -(-shape.k // config.block_k) >= 4 * config.split_k
    assert triton_matmul.OP.plan(shape, gpu, "").reason.startswith(f"rule: M = {shape.m}, ")


# Tables.


@pytest.fixture
def only_triton(monkeypatch, tmp_path):
    """Triton's matmuls beside XLA's; where the tables lie."""
    only = Backend("triton", triton.ARCHITECTURES, "fdpp_jax.triton.run", matmul=triton_matmul.OP)
    monkeypatch.setattr(backends, "BACKENDS", (only, backends.by_name("xla")))
    return tuning_case.empty_directories(tmp_path, monkeypatch)


@by_device
def test_a_device_is_tuned_and_plans_by_its_table(only_triton, gpu):
    weights = [tuning.Weight(4096, 4096, "o"), tuning.Weight(4096, 32000, "head")]
    table, done = tuning_case.tune(weights, tuning_case.any_time, gpu)
    assert done == ["o", "head"]
    path = only_triton["user"] / tables.file_name(gpu.kind)
    tables.save(table, path)
    assert tables.load(path, gpu) == table
    for weight, m in itertools.product(weights, (1, 3, 8, 64)):
        for w_order in ("nk", "kn"):
            plan = plan_matmul(MatmulShape(m, weight.k, weight.n, w_order=w_order), gpu)
            assert plan.reason.startswith("tuned on ")
            assert plan.backend in ("triton", "xla")


def test_a_table_of_another_backend_s_configs_says_what_to_do(only_triton):
    path = tuning_case.write(only_triton["user"], tuning_case.entry())
    with pytest.raises(ValueError, match=r"entries\[0\]\.configs\.flat\.num_ctas is unknown.* fdpp-jax tune --fresh"):
        tables.load(path, H200)


def test_a_table_s_architecture_is_text(only_triton):
    entry = tuning_case.entry(config=dataclasses.replace(_FLAT, arch=80))
    path = tuning_case.write(only_triton["user"], entry)
    with pytest.raises(ValueError, match=r"entries\[0\]\.configs\.flat\.arch to be text, got 80"):
        tables.load(path, H200)
