"""The decode kernel in Triton on a GPU, as native code and as an A100 would get it; and compiled for every GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_case
from decode_case import are_equal, check, check_log_sum
from triton_decode_case import CASES, DRAFT, FLOAT8, HEAD, INT8, RECOMPUTED, TOKEN, Case, tiles

from fdpp_jax.plans import device, triton_attention
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions, attention_shape
from fdpp_jax.plans.shapes import AttentionShape
from fdpp_jax.triton.decode_attention import attend

ARCHS = ("sm_80", "sm_90")


def _for_arch(case, arch):
    if case.kv_dtype == "float8_e4m3fn" and arch == "sm_80":
        pytest.skip("sm_80 has no float8")
    return dataclasses.replace(case, config=dataclasses.replace(case.config, arch=arch))


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("phi", [1.5, None])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64(case, phi, arch):
    case, lengths = CASES[case]
    _for_arch(case, arch).check(lengths, phi)


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", RECOMPUTED)
def test_rows_outside_the_window_are_redone(case, arch):
    case, lengths = RECOMPUTED[case]
    _for_arch(case, arch).check_recompute(lengths)


# Shapes of models, for which the rule plans the config.
MODELS = {
    "all heads": Case(3, 700, 32, 32, 128, tiles(64, 1, 2)),
    "few sequences": Case(8, 1500, 32, 8, 128, tiles(64, 1, 2), page_size=64),
    "many sequences": Case(1500, 48, 4, 2, 64, tiles(64, 1, 2)),
    "one sequence": Case(1, 12000, 16, 2, 128, tiles(64, 1, 2), has_sinks=True),
    "head dim 256": Case(2, 700, 64, 4, 256, tiles(64, 1, 2), 4, **DRAFT),
}


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", MODELS)
def test_the_rule_s_config_is_right_and_the_same_each_time(kind, arch):
    """With the config that the rule plans: an error that comes and goes is a race."""
    case = _planned(MODELS[kind], arch)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, case.capacity + 1, case.batch)
    inputs = case.inputs(0, lengths)
    expected, log_sum = case.expected(inputs)
    center = np.where(np.isfinite(log_sum), log_sum, 0.0).mean(axis=1)
    phi = center + np.where(rng.random(center.shape) < 0.02, 300.0, 0.0)
    for given in (phi, None):
        outs = [case.run(inputs, given, recompute=given is not None) for _ in range(20)]
        check(case, outs[0], expected)
        assert are_equal(outs)


def _planned(case, arch):
    gpu = dataclasses.replace(device.by_name("H200"), arch=arch)
    return dataclasses.replace(case, config=triton_attention.decode_attention_config(case.shape, gpu))


# ---- everything at random


def random_case(seed, arch):
    """A static shape that the oracle computes quickly, and what becomes of rows outside the window."""
    rng = np.random.default_rng(seed)

    def choice(*values):
        return values[rng.integers(len(values))]

    while True:
        mode = choice("online", "kernel", "kernel", "flag")
        kv_dtype = choice(None, None, "int8", *(("float8_e4m3fn",) if arch != "sm_80" else ()))
        num_kv_heads = choice(1, 2, 3, 4, 8)
        group, query_length = choice(1, 1, 2, 4, 7, 8, 16), choice(1, 1, 1, 2, 4, 16)
        config = tiles(
            choice(16, 32, 64, 128),
            choice(1, 2, 3, 5, 8, 21, 64),
            choice(1, 2, 3, 4),
            choice("kernel", "kernel", "launch"),
            uses_dot=group * query_length > 1 or choice(True, False),
        )
        case = Case(
            batch=choice(1, 2, 3, 7, 40),
            capacity=choice(40, 64, 200, 511, 770, 1500),
            num_heads=num_kv_heads * group,
            num_kv_heads=num_kv_heads,
            head_dim=choice(16, 48, 64, 80, 96, 128, 192, 256),
            config=dataclasses.replace(config, arch=arch, num_warps=choice(2, 4, 8)),
            query_length=query_length,
            dtype="bfloat16" if kv_dtype else choice("bfloat16", "float16"),
            is_causal=choice(True, False),
            local_window_size=choice(None, None, (100, 0), (700, 3)),
            logits_soft_cap=choice(None, None, 5.0),
            has_sinks=choice(True, False),
            page_size=choice(None, None, 16, 32, 64, 128, 256),
            kv_dtype=kv_dtype,
            scales=kv_dtype and choice("head", "token"),
        )
        size = case.batch * case.capacity * case.num_kv_heads * case.head_dim  # of the oracle's work
        fits = size <= 400_000 and case.config.smem_bytes(case.shape) <= 160 * 1024
        few_registers = triton_attention.padded_rows(group * query_length) * case.head_dim <= 2048 * config.num_warps
        if fits and few_registers and triton_attention.refuse(case.shape, device.by_name("H200")) is None:
            return case, mode


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("seed", range(40))
def test_random_inputs_are_right_and_the_same_each_time(seed, arch):
    """Eight inputs of one compiled kernel each."""
    case, mode = random_case(seed, arch)
    rng = np.random.default_rng(seed)
    for i in range(8):
        lengths = rng.choice([0, 1, case.capacity, *rng.integers(case.capacity + 1, size=3)], case.batch)
        lengths[rng.integers(case.batch)] = rng.integers(1, case.capacity + 1)  # a scale of heads needs a key
        if seed % 3 == 0:
            starts = rng.integers(np.maximum(lengths, 1)) * (np.arange(case.batch) % 4 > 0)
            case = dataclasses.replace(case, starts=tuple(starts.tolist()))
        inputs = case.inputs((seed, i), lengths, rng.choice([0.1, 1.0, 4.0, 30.0]))
        expected, log_sum = case.expected(inputs)
        phi = np.where(np.isfinite(log_sum), log_sum, 0.0).mean(axis=1)  # [B, N]
        is_aside = rng.random(phi.shape) < rng.choice([0.0, 0.1, 1.0])
        phi += rng.uniform(-1, 1, phi.shape) + is_aside * rng.choice([-300, -70, 70, 300], phi.shape)
        if seed % 2:  # one for all rows
            phi = rng.choice(phi.reshape(-1))
        phi = None if mode == "online" else phi
        resolution = case.resolution(log_sum, phi)
        outs = [case.run(inputs, phi, recompute=mode == "kernel") for _ in range(5)]
        assert are_equal(outs)
        out = np.asarray(outs[0], np.float64)
        if mode == "flag":
            leaves_window, is_near = case.leaves_window(log_sum, phi)
            is_nan = np.isnan(out).any(axis=-1)
            assert ((is_nan == leaves_window) | is_near).all()
            check(case, out[~is_nan], expected[~is_nan], 2.0, resolution[~is_nan])
        else:
            check(case, out, expected, 2.0, resolution)
        if phi is None:  # phi lets weights of float16 be subnormal
            found = case.run(inputs, phi, return_residual=True)[1]
            check_log_sum(case, inputs, found, log_sum)


# ---- compiled without a GPU

COMPILED = {
    "mha": AttentionShape(1, 1, 4096, 32, 32, 128),
    "gqa of a draft": AttentionShape(8, 4, 4096, 32, 8, 128, is_causal=True, has_query_offset=True),
    "64 rows of head dim 256, pages": AttentionShape(2, 16, 4096, 16, 4, 256, "float16", page_size=16, is_online=True),
    "small pages": AttentionShape(1, 1, 4096, 32, 8, 64, page_size=64),  # as many tiles on their way as fit
    "int8": AttentionShape(4, 1, 4096, 32, 8, 128, kv_dtype="int8", scales="token", has_sinks=True, has_starts=True),
}
# Every architecture takes some ten seconds a kernel: the first shape everywhere, the others on one of each maker's.
COMPILED_FOR = [("mha", name) for name in ("A100", "A10", "B200", "MI300X")] + [
    (shape, name) for shape in COMPILED for name in ("A100", "MI210") if (shape, name) != ("mha", "A100")
]


def _operands(shape):
    cache = shape.batch, shape.capacity, shape.num_kv_heads, shape.head_dim
    if shape.page_size is not None:
        cache = shape.batch * shape.capacity // shape.page_size, shape.page_size, *cache[2:]
    of_shape = jax.ShapeDtypeStruct
    numbers = of_shape((shape.batch,), jnp.int32)
    keys = of_shape(cache, shape.kv_dtype or shape.dtype)
    scales = None
    if shape.scales is not None:
        scales = of_shape(cache[:3] if shape.scales == "token" else cache[2:3], jnp.float32)
    return AttentionArrays(
        of_shape((shape.batch, shape.query_length, shape.num_query_heads, shape.head_dim), shape.dtype),
        keys,
        keys,
        lengths=numbers,
        phi=None if shape.is_online else of_shape((), jnp.float32),
        query_offset=numbers if shape.has_query_offset else None,
        sinks=of_shape((shape.num_query_heads,), jnp.float32) if shape.has_sinks else None,
        page_table=of_shape((shape.batch, shape.capacity // shape.page_size), jnp.int32) if shape.page_size else None,
        key_scale=scales,
        value_scale=scales,
        starts=numbers if shape.has_starts else None,
    )


QUICK = ("mha", "A100"), ("gqa of a draft", "MI210")


@pytest.mark.parametrize(
    ("shape", "name"), [pytest.param(*x, marks=() if x in QUICK else pytest.mark.slow) for x in COMPILED_FOR]
)
def test_compiles_within_the_gpu_s_shared_memory(shape, name):
    shape, gpu = COMPILED[shape], device.by_name(name)
    triton_case.skip_unless_compiled_for(gpu.arch)
    config = triton_attention.decode_attention_config(shape, gpu)
    arrays, options = _operands(shape), AttentionOptions(shape.head_dim**-0.5, shape.is_causal)
    assert attention_shape(arrays, options, is_online=shape.is_online) == shape
    calls = triton_case.calls_of(functools.partial(attend, options=options, config=config, recompute=True), arrays)
    expected = ["decode_attention", "merge_shares"][: 1 + (config.combine == "launch")]
    assert [call.kernel.__name__ for call in calls] == expected
    kernels = [triton_case.compiled(call) for call in calls]
    for kernel in kernels:
        kernel.check_fits()
        assert kernel.shared_bytes <= config.smem_bytes(shape)
    assert kernels[0].has_matrix_products == config.uses_dot
    assert not gpu.is_nvidia or kernels[0].has_async_copies


def test_log_sums_that_nobody_asks_for_cost_nothing():
    """INT8 and FLOAT8 caches, too."""
    for changes in (dict(), dict(**INT8, **TOKEN), dict(**FLOAT8, **HEAD)):
        shape = AttentionShape(2, 1, 256, 8, 2, 64, **changes)
        config = triton_attention.decode_attention_config(shape, device.by_name("L4"))
        call = functools.partial(attend, options=AttentionOptions(0.125), config=config)
        (found,) = triton_case.calls_of(call, _operands(shape))
        assert found.results[1].shape == (1,)
