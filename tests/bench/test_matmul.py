"""The bench of matmuls on tiny shapes."""

import jax
import jax.numpy as jnp
import pytest
from bench_case import check_report
from triton_case import needs_plugin

from fdpp_jax.bench.matmul import bench_matmul, matmul_candidates
from fdpp_jax.plans import backends, device
from fdpp_jax.plans.shapes import MatmulShape


@pytest.mark.parametrize("w_order", ["kn", "nk"])
def test_matmul(tmp_path, w_order):
    report = bench_matmul(MatmulShape(8, 64, 128, w_order=w_order))
    assert f"stored {[64, 128] if w_order == 'kn' else [128, 64]}" in report.title
    record = check_report(report, ["jnp.dot", "read floor"], tmp_path / "record.json")
    assert record["bytes"] == 64 * 128 * 2
    assert record["matmul"]["w_order"] == w_order


@pytest.mark.parametrize(("named", "timed"), [(None, "mosaic_gpu"), ("triton", "triton")])
def test_ours_are_the_kernels_of_the_backend_that_is_named(two_backends, named, timed):
    report = bench_matmul(MatmulShape(8, 64, 128), implementation=named)
    assert [row[0] for row in report.rows] == ["ours, flat (planned)", "jnp.dot", "read floor"]
    assert f"{timed} flat: by {timed}" in report.title
    assert report.record["matmul"]["implementation"] == named
    assert (report.record["plan"]["backend"], report.record["plan"]["implementation"]) == (timed, "flat")
    assert two_backends() == {timed}
    with pytest.raises(NotImplementedError, match="implementation='triton' cannot run this call: triton takes 16 rows"):
        bench_matmul(MatmulShape(17, 64, 128), implementation="triton")


@needs_plugin
def test_on_hopper_triton_s_kernels_are_named_or_take_what_mosaic_refuses():
    h200 = device.by_name("H200")
    one, triton = MatmulShape(1, 4096, 4096, w_order="nk"), backends.only("triton", h200)
    assert list(matmul_candidates(one, triton)) == ["ours, gemv (planned)", "ours, flat", "jnp.dot"]
    odd = MatmulShape(8, 4096, 4104, w_order="nk")
    for running in (h200, triton):
        candidates = matmul_candidates(odd, running)
        assert list(candidates) == ["ours, flat (planned)", "jnp.dot"]
        x, w = jax.ShapeDtypeStruct((8, 4096), jnp.bfloat16), jax.ShapeDtypeStruct(odd.w_shape, jnp.bfloat16)
        with device.target(running):
            step = candidates["ours, flat (planned)"].step
            lowered = jax.jit(step).trace(x, w).lower(lowering_platforms=("cuda",))
        assert "triton_kernel_call" in lowered.as_text()


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
