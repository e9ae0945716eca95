"""flat_matmul and gemv in Triton: compiled for every GPU, and run on Hopper by its own code and by sm_80's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import matmul_case
import numpy as np
import oracle
import pytest
import triton_case
from jax.sharding import PartitionSpec as P
from matmul_case import in_both_orders, operands
from triton_case import needs_plugin

from fdpp_jax.plans import device, triton_matmul
from fdpp_jax.plans.shapes import MatmulShape, in_order
from fdpp_jax.plans.triton_matmul import FlatMatmulConfig, GemvConfig
from fdpp_jax.triton.flat_matmul import flat_matmul
from fdpp_jax.triton.gemv import gemv

KERNELS = {"flat": flat_matmul, "gemv": gemv}
DEVICES = [device.by_name(name) for name in device.names() if device.by_name(name).arch in triton_case.ARCHITECTURES]
ONE_OF_EACH_ARCH = list({gpu.arch: gpu for gpu in DEVICES}.values())


def _compiled(shape, algorithm, config):
    call = functools.partial(KERNELS[algorithm], config=config, out_dtype=shape.dtype, w_order=shape.w_order)
    x, w = (
        jax.ShapeDtypeStruct(size, shape.dtype)
        for size in ((shape.m, shape.k), in_order(shape.w_order, shape.k, shape.n))
    )
    (found,) = triton_case.calls_of(call, x, w)
    return triton_case.compiled(found)


@pytest.mark.parametrize(
    ("gpu", "m", "algorithm", "w_order", "n"),
    [
        pytest.param(
            gpu,
            *case,
            id="-".join(map(str, (gpu.arch, *case))),
            marks=() if gpu.arch in ("sm_80", "gfx90a") else pytest.mark.slow,
        )
        for gpu in ONE_OF_EACH_ARCH
        for case in [
            (1, "gemv", "nk", 4096),
            (8, "flat", "nk", 4096),
            (8, "flat", "kn", 1024),
            (64, "flat", "nk", 4104),
        ]
        if case[0] != 64 or gpu.arch in ("sm_80", "gfx90a")
    ],
)
def test_the_rule_s_kernels_compile(gpu, m, algorithm, w_order, n):
    shape = MatmulShape(m, 4096, n, w_order=w_order)
    config = triton_matmul.rule_config(shape, gpu, algorithm)
    compiled = _compiled(shape, algorithm, config)
    compiled.check_fits()
    assert compiled.shared_bytes <= config.smem_bytes(shape)
    assert compiled.has_matrix_products == (algorithm == "flat")
    if algorithm == "flat" and gpu.is_nvidia:
        assert compiled.has_async_copies


@needs_plugin
def test_results_vary_within_shard_map_as_operands_do():
    over = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    config = FlatMatmulConfig("sm_80", 16, 256, 4, 2, 4, 4)
    call = functools.partial(flat_matmul, config=config, out_dtype="bfloat16", w_order="nk")
    x, w = jax.ShapeDtypeStruct((8, 512), "bfloat16"), jax.ShapeDtypeStruct((256, 512), "bfloat16")
    specs = P(), P("a")

    def in_loop(x, w):
        return jax.lax.fori_loop(0, 2, lambda _, carry: call(x, w), jnp.zeros_like(call(x, w)))

    traced = jax.jit(jax.shard_map(in_loop, mesh=over, in_specs=specs, out_specs=P(None, "a"))).trace(x, w)
    assert traced.out_info.shape == (8, 256)
    assert "triton_kernel_call" in traced.lower(lowering_platforms=("cuda",)).as_text()
    with pytest.raises(ValueError, match="out_specs"):
        jax.eval_shape(jax.shard_map(call, mesh=over, in_specs=specs, out_specs=P()), x, w)


# On a GPU.


def _own(kernel):
    """As Mosaic GPU's kernels are called."""

    def call(x, w, *, interpret, **options):
        assert interpret is None
        return kernel(x, w, **options)

    return call


# The tensor cores truncate the sum in each step of 16 along K, of which one accumulator takes up to 64 here.
check = functools.partial(matmul_case.check, of_sum=4e-6)


by_both_codes = pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
TILES = [(16, 256, 4, 1, 4, 4), (32, 128, 2, 2, 4, 3), (64, 64, 1, 4, 4, 5), (128, 64, 1, 1, 4, 3)]
GEMV_TILES = [(8, 512, 1, 4, 1), (16, 256, 2, 4, 3), (64, 64, 4, 4, 1)]


@pytest.mark.gpu
@by_both_codes
@in_both_orders
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 16, 17, 33, 64])
def test_flat_rows(m, dtype, w_order, arch):
    for tiles in TILES:
        check(_own(flat_matmul), m, 1024, 384, dtype, w_order, FlatMatmulConfig(arch, *tiles))
    check(_own(flat_matmul), m, 1024, 384, dtype, w_order, FlatMatmulConfig(arch, *TILES[0]), out_dtype=dtype)


@pytest.mark.gpu
@by_both_codes
@in_both_orders
@pytest.mark.parametrize(("k", "n"), [(512, 128), (336, 128), (256, 208), (272, 224), (1000, 1032), (72, 8), (33, 21)])
def test_sizes(k, n, w_order, arch):
    for tiles in TILES:
        config = FlatMatmulConfig(arch, *tiles)
        splits = min(config.split_k, -(-k // config.block_k))
        check(_own(flat_matmul), 5, k, n, "bfloat16", w_order, dataclasses.replace(config, split_k=splits))
    for tiles in GEMV_TILES:
        config = GemvConfig(arch, *tiles)
        splits = min(config.split_k, -(-k // config.block_k))
        check(_own(gemv), 1, k, n, "bfloat16", w_order, dataclasses.replace(config, split_k=splits))


@pytest.mark.gpu
@by_both_codes
@pytest.mark.parametrize(("m", "k", "n"), [(8, 4096, 4096), (1, 4096, 1024), (64, 11008, 1024), (9, 1024, 8192)])
def test_gives_the_same_each_time(m, k, n, arch):
    """200 calls in memory where counters and sums of earlier ones lie."""
    x, w = operands(m, k, n, "bfloat16")
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    configs = [(flat_matmul, FlatMatmulConfig(arch, 64, 64, 1, 8, 4, 4))]
    if m == 1:
        configs.append((gemv, GemvConfig(arch, 16, 256, 8, 4, 1)))
    for kernel, config in configs:
        call = jax.jit(functools.partial(kernel, config=config, out_dtype="float32", w_order="nk"))
        outs = [call(x, w.T) for _ in range(200)]
        assert oracle.relative_error(outs[0], expected) < 1e-4
        assert all((out == outs[0]).all() for out in outs[1:])
