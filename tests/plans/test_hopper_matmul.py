"""flat_matmul and gemv on Hopper: tiles and splits for every shape, and a reason for each refusal."""

import dataclasses

import hypothesis
import pytest
from hypothesis import strategies as st

from fdpp_jax.heuristics import plan_matmul
from fdpp_jax.plans import device, hopper_matmul, tables
from fdpp_jax.plans.hopper_matmul import FlatMatmulConfig, GemvConfig
from fdpp_jax.plans.shapes import MatmulShape

H200 = device.by_name("H200")


@pytest.fixture(autouse=True, scope="module")
def _rules_only(tmp_path_factory):
    """The rules, whatever tables are shipped; tests/plans/test_tables.py is about these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "SHIPPED_DIRECTORY", tmp_path_factory.mktemp("no_tables"))
        yield


@pytest.mark.parametrize(
    ("m", "implementation", "config_type"),
    [
        (1, "flat", FlatMatmulConfig),  # measured on that GPU
        (2, "flat", FlatMatmulConfig),
        (7, "flat", FlatMatmulConfig),
        (8, "flat", FlatMatmulConfig),
        (9, "flat", FlatMatmulConfig),
        (64, "flat", FlatMatmulConfig),
        (65, "xla", type(None)),
        (4096, "xla", type(None)),
    ],
)
def test_rows_choose_the_matmul_on_an_h200(m, implementation, config_type):
    plan = plan_matmul(MatmulShape(m=m, k=4096, n=12288), "H200")
    assert plan.implementation == implementation
    assert isinstance(plan.config, config_type)
    assert plan.reason.startswith(f"rule: M = {m}")
    assert ("compute-bound" if m == 4096 else "memory-bound") in plan.reason


def test_one_row_is_gemv_where_nothing_was_measured():
    plan = plan_matmul(MatmulShape(m=1, k=4096, n=12288), "H100")
    assert plan.implementation == "gemv"
    assert isinstance(plan.config, GemvConfig)
    assert plan_matmul(MatmulShape(m=2, k=4096, n=12288), "H100").implementation == "flat"


@pytest.mark.parametrize(
    ("m", "k", "n", "tile", "num_ctas"),
    [
        (1, 4096, 12288, (64, 256), 132),
        (8, 4096, 4096, (64, 256), 132),  # 64 column blocks of 16 tiles
        (16, 4096, 128256, (64, 256), 132),
        (64, 4096, 12288, (64, 256), 132),
        (8, 4096, 512, (64, 256), 64),  # no more than eight CTAs a column block
        (8, 512, 512, (64, 256), 16),  # nor fewer tiles than CTAs
        (8, 128, 4096, (64, 128), 64),  # no tile is deeper than K
        (64, 64, 64, (64, 64), 1),
        (8, 16, 16, (64, 64), 1),
    ],
)
def test_flat_tiles_and_ctas(m, k, n, tile, num_ctas):
    config = plan_matmul(MatmulShape(m=m, k=k, n=n), "H200").config
    assert (config.block_n, config.block_k) == tile
    assert config.num_ctas == num_ctas


@pytest.mark.parametrize(
    ("k", "n", "block_n", "split_k"),
    [
        (4096, 12288, 64, 1),  # 192 column blocks
        (4096, 4096, 64, 4),  # 64 of them -> 256 CTAs, two on each of 132 SMs
        (4096, 22016, 128, 1),  # 344 narrow ones would need a second wave
        (11008, 4096, 64, 4),
        (4096, 32000, 128, 1),
        (4096, 1024, 64, 8),
        (1024, 1024, 64, 2),  # every split keeps four blocks of K
        (64, 64, 64, 1),
        (16, 16, 64, 1),
    ],
)
def test_gemv_tiles_and_splits(k, n, block_n, split_k):
    config = hopper_matmul.rule_config(MatmulShape(m=1, k=k, n=n), H200, "gemv")
    assert (config.block_n, config.split_k) == (block_n, split_k)
    assert config.block_n * config.block_k == 64 * 128


@pytest.mark.parametrize(
    ("shape", "implementation", "reason"),
    [
        (MatmulShape(2, 64, 64), "gemv", "gemv takes one row, got M = 2"),
        (MatmulShape(65, 64, 64), "flat", "flat takes 1 to 64 rows, got M = 65"),
        (MatmulShape(0, 64, 64), "flat", "flat takes 1 to 64 rows, got M = 0"),
        (MatmulShape(8, 64, 72), "flat", "multiples of 16, got K = 64, N = 72"),
        (MatmulShape(1, 72, 64), "gemv", "multiples of 16, got K = 72, N = 64"),
        (MatmulShape(8, 64, 72, w_order="nk"), "flat", "multiples of 16, got K = 64, N = 72"),
        (MatmulShape(1, 72, 64, w_order="nk"), "gemv", "multiples of 16, got K = 72, N = 64"),
        (MatmulShape(8, 64, 64, "float32"), "flat", "bfloat16 or float16, got float32"),
    ],
)
def test_refused_matmul_says_why(shape, implementation, reason):
    assert reason in hopper_matmul.refuse(shape, H200, implementation)
    plan = plan_matmul(shape, H200)
    assert (plan.backend, plan.algorithm) != ("mosaic_gpu", implementation)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (FlatMatmulConfig(4, 96, 64, 4), r"block_n must be one of (64, 128), got 96"),
        (FlatMatmulConfig(4, 64, 32, 4), r"block_k must be one of (64, 128, 256), got 32"),
        (FlatMatmulConfig(4, 64, 64, 1), "num_stages must lie in 2..8, got 1"),
        (FlatMatmulConfig(4, 64, 64, 9), "num_stages must lie in 2..8, got 9"),
        (FlatMatmulConfig(17, 64, 64, 4), "num_ctas must lie in 1..16 (4 column blocks), got 17"),
        (FlatMatmulConfig(0, 64, 64, 4), "num_ctas must lie in 1..16 (4 column blocks), got 0"),
        (FlatMatmulConfig(2, 128, 128, 8), "the tiles need 286720 bytes of shared memory, a CTA gets 232448"),
        (GemvConfig(64, 64, 4, 1), "gemv takes one row, got M = 8"),
    ],
)
def test_a_config_that_cannot_run_is_refused(config, reason):
    algorithm = "gemv" if isinstance(config, GemvConfig) else "flat"
    assert hopper_matmul.refuse_config(MatmulShape(8, 256, 256), H200, algorithm, config) == reason
    cpu, legal = device.by_name("cpu"), FlatMatmulConfig(4, 64, 64, 4)
    refusal = hopper_matmul.refuse_config(MatmulShape(8, 256, 256), cpu, "flat", legal)
    assert refusal == "Mosaic GPU's kernels are for sm_90, got cpu"


@pytest.mark.parametrize(("split_k", "reason"), [(4, None), (5, "split_k must lie in 1..4 (K = 256), got 5")])
def test_a_split_that_gemv_cannot_run_is_refused(split_k, reason):
    config = GemvConfig(64, 64, 4, split_k)
    assert hopper_matmul.refuse_config(MatmulShape(1, 256, 256), H200, "gemv", config) == reason


@pytest.mark.parametrize(("k", "n"), [(64, 64), (4096, 4096), (11008, 4096), (4096, 128256), (28672, 8192)])
def test_candidates_are_few_legal_and_have_the_rule_s(k, n):
    for m, algorithm in ((1, "gemv"), (8, "flat")):
        shape = MatmulShape(m, k, n)
        configs = hopper_matmul.candidates(shape, H200, algorithm)
        assert configs[0] == hopper_matmul.rule_config(shape, H200, algorithm)
        assert len(set(configs)) == len(configs) <= 9
        assert all(hopper_matmul.refuse_config(shape, H200, algorithm, config) is None for config in configs)


@pytest.mark.parametrize("m", [9, 16, 64])
def test_candidates_of_few_rows_fit_more(m):
    few, more = MatmulShape(8, 4096, 12288), MatmulShape(m, 4096, 12288)
    fitted = [hopper_matmul.fit(more, H200, config) for config in hopper_matmul.candidates(few, H200, "flat")]
    assert set(hopper_matmul.candidates(more, H200, "flat")) <= set(fitted)
    assert all(config.smem_bytes(more) <= H200.smem_bytes for config in fitted)


_HOPPER = st.sampled_from(["H100", "H200"])


_MATMUL = st.builds(
    MatmulShape,
    m=st.integers(1, 64),
    k=st.integers(1, 2000).map(lambda value: 16 * value),
    n=st.integers(1, 10_000).map(lambda value: 16 * value),
    w_order=st.sampled_from(["kn", "nk"]),
)


@hypothesis.given(_MATMUL, _HOPPER)
def test_any_matmul_config_fits_the_sm(shape, name):
    gpu = device.by_name(name)
    plan = plan_matmul(shape, gpu)
    config = plan.config
    other = dataclasses.replace(shape, w_order="nk" if shape.w_order == "kn" else "kn")
    assert plan_matmul(other, gpu).config == config
    num_units, num_tiles = -(-shape.n // config.block_n), -(-shape.k // config.block_k)
    assert hopper_matmul.refuse_config(shape, gpu, plan.algorithm, config) is None
    if isinstance(config, FlatMatmulConfig):
        assert config.num_ctas <= min(gpu.num_sms, num_units * num_tiles)
        return
    assert config.split_k in (1, 2, 4, 8)
    if config.split_k > 1:
        assert num_tiles // config.split_k >= 4
        assert num_units * config.split_k <= 2 * gpu.num_sms
