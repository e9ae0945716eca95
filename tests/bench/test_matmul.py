"""The bench of matmuls on tiny shapes."""

import jax
import jax.numpy as jnp
import pytest
from bench_case import check_report

from fdpp_jax.bench.matmul import bench_matmul, matmul_candidates
from fdpp_jax.plans import device
from fdpp_jax.plans.shapes import MatmulShape

pytestmark = pytest.mark.slow  # many small programs to compile


@pytest.mark.parametrize("w_order", ["kn", "nk"])
def test_matmul(tmp_path, w_order):
    report = bench_matmul(MatmulShape(8, 64, 128, w_order=w_order))
    assert f"stored {[64, 128] if w_order == 'kn' else [128, 64]}" in report.title
    record = check_report(report, ["jnp.dot", "read floor"], tmp_path / "record.json")
    assert record["bytes"] == 64 * 128 * 2
    assert record["matmul"]["w_order"] == w_order


def test_the_matmuls_of_a_gpu_lower():
    """The flat kernel as planned, and without each thing that the paper adds to it."""
    h100 = device.by_name("H100")  # of which no table is shipped
    shape = MatmulShape(8, 4096, 4096, w_order="nk")
    candidates = matmul_candidates(shape, h100)
    ablations = ["flat, rows padded to 64", "flat, two stages", "flat, K unsplit"]
    assert list(candidates) == ["ours, flat (planned)", *ablations, "jnp.dot"]
    x, w = jax.ShapeDtypeStruct((8, 4096), jnp.bfloat16), jax.ShapeDtypeStruct(shape.w_shape, jnp.bfloat16)
    for name in ablations:
        lowered = jax.jit(candidates[name].step).trace(x, w).lower(lowering_platforms=("cuda",))
        assert lowered.as_text().count("custom_call @mosaic_gpu") == 1
        assert lowered.out_info.shape == (8, 4096)
