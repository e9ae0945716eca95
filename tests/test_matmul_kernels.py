"""flat_matmul and gemv against float64, interpreted on the CPU and as they are on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.config import FlatMatmulConfig, GemvConfig, in_order
from fdpp_jax.pallas.flat_matmul import flat_matmul
from fdpp_jax.pallas.gemv import gemv

ON_GPU = jax.default_backend() == "gpu"
in_both_orders = pytest.mark.parametrize("w_order", ["kn", "nk"])


pytestmark = pytest.mark.usefixtures("fresh_interpreter")


def operands(m, k, n, dtype):
    x_key, w_key = jax.random.split(jax.random.key(m + k + n))
    return jax.random.normal(x_key, (m, k)).astype(dtype), jax.random.normal(w_key, (k, n)).astype(dtype)


def run(kernel, x, w, w_order, config, out_dtype, detect_races=False):
    """x @ w, with w [K, N] stored in that order."""
    interpret = None if ON_GPU else plgpu.InterpretGPUParams(detect_races=detect_races)
    call = functools.partial(kernel, config=config, out_dtype=out_dtype, w_order=w_order, interpret=interpret)
    return jax.jit(call)(x, w if w_order == "kn" else w.T)


def check(kernel, m, k, n, dtype, w_order, config, out_dtype="float32"):
    x, w = operands(m, k, n, dtype)
    out = run(kernel, x, w, w_order, config, out_dtype)
    assert out.shape == (m, n)
    assert out.dtype == out_dtype
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    # Products of 16-bit numbers are exact in float32; what remains is the rounding of the sum and of the result.
    tolerance = 1e-6 if out_dtype == "float32" else oracle.TOLERANCE[out_dtype]
    assert oracle.relative_error(out, expected) < tolerance


@in_both_orders
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("m", [1, 7, 8, 9, 64])
def test_flat_rows(m, dtype, w_order):
    check(flat_matmul, m, 512, 128, dtype, w_order, FlatMatmulConfig(3, 64, 128, 3), out_dtype=dtype)


FLAT_SIZES = [  # k, n, (CTAs, block_n, block_k, stages)
    (512, 128, (1, 64, 128, 2)),  # one CTA has all
    (512, 128, (2, 64, 128, 2)),  # whole column blocks
    (512, 320, (3, 64, 64, 3)),  # a share has ends and a whole column block
    (1024, 64, (8, 64, 64, 2)),  # shares in the middle of a column block
    (640, 192, (7, 64, 64, 4)),
    (768, 256, (5, 128, 256, 2)),
    (336, 128, (3, 64, 64, 3)),  # K is no multiple of a block
    (256, 208, (4, 64, 64, 2)),  # N is no multiple of a block, nor of the widest swizzle
    (272, 224, (3, 128, 64, 2)),  # neither is
    (128, 144, (4, 128, 64, 2)),  # of the last block only the first of two halves is there
    (64, 64, (1, 128, 128, 2)),  # blocks larger than the matrix
    (16, 16, (1, 64, 64, 2)),
]


@in_both_orders
@pytest.mark.parametrize(("k", "n", "tiles"), FLAT_SIZES)
def test_flat_sizes_and_shares(k, n, tiles, w_order):
    check(flat_matmul, 5, k, n, "bfloat16", w_order, FlatMatmulConfig(*tiles))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "k", "n", "tiles"),
    [
        (8, 4096, 4096, (132, 64, 256, 5)),
        (1, 4096, 6144, (264, 64, 128, 5)),
        (16, 11008, 1024, (128, 64, 64, 8)),
        (33, 4096, 12288, (96, 128, 128, 4)),
        (64, 1024, 8192, (131, 64, 256, 3)),
    ],
)
def test_flat_gives_the_same_each_time(m, k, n, tiles):
    """200 calls in memory where flags and sums of earlier ones lie."""
    x, w = operands(m, k, n, "bfloat16")
    call = jax.jit(functools.partial(flat_matmul, config=FlatMatmulConfig(*tiles), out_dtype="float32"))
    outs = [call(x, w) for _ in range(200)]
    assert oracle.relative_error(outs[0], np.asarray(x, np.float64) @ np.asarray(w, np.float64)) < 1e-4
    assert all((out == outs[0]).all() for out in outs[1:])


RAGGED = [  # k, n, (block_n, block_k, stages, split_k)
    (512, 128, (64, 128, 2, 1)),
    (336, 128, (64, 64, 3, 2)),  # K is no multiple of a block
    (256, 208, (64, 64, 2, 1)),  # N is no multiple of a block, nor of the widest swizzle
    (272, 224, (128, 64, 2, 2)),  # neither is
    (128, 64, (64, 64, 4, 4)),  # more splits than K blocks
    (64, 64, (128, 128, 2, 1)),  # blocks larger than the matrix
    (16, 16, (64, 64, 2, 1)),
]


@in_both_orders
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("k", "n", "tiles"), RAGGED)
def test_gemv_ragged_sizes(k, n, tiles, dtype, w_order):
    check(gemv, 1, k, n, dtype, w_order, GemvConfig(*tiles), out_dtype=dtype)


@pytest.mark.skipif(ON_GPU, reason="the race detector is the interpreter's")
@in_both_orders
@pytest.mark.parametrize("kernel", [flat_matmul, gemv])
def test_has_no_race(kernel, w_order):
    x, w = operands(1, 640, 128, "bfloat16")
    config = FlatMatmulConfig(3, 64, 64, 2) if kernel is flat_matmul else GemvConfig(64, 64, 2, 2)
    out = run(kernel, x, w, w_order, config, "float32", detect_races=True)
    jax.block_until_ready(out)
    assert not gpu_callbacks.get_races().races_found
    assert oracle.relative_error(out, np.asarray(x, np.float64) @ np.asarray(w, np.float64)) < 1e-6


@pytest.mark.parametrize(("k", "n"), [(4096, 12288), (11008, 4096), (4096, 32000), (8192, 28672), (4096, 50272)])
@in_both_orders
@pytest.mark.parametrize("kernel", [flat_matmul, gemv])
def test_lowers_for_cuda(kernel, k, n, w_order):
    m = 8 if kernel is flat_matmul else 1
    config = FlatMatmulConfig(132, 64, 128, 5) if kernel is flat_matmul else GemvConfig(64, 128, 5, 2)
    call = functools.partial(kernel, config=config, out_dtype=jnp.bfloat16, w_order=w_order)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((m, k), in_order(w_order, k, n))]
    assert "mosaic_gpu" in jax.jit(call).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
