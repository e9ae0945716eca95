"""The prefill kernel as it is planned: compiled for every GPU, and run on Hopper by its own code and by an A100's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import prefill_case
import pytest
import triton_case
from prefill_case import CASES, Case, random_cases

from fdpp_jax.plans import device
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions, attention_shape
from fdpp_jax.plans.triton_prefill import prefill_attention_config
from fdpp_jax.triton.prefill_attention import prefill_attention

DEVICES = {
    found.arch: found for found in map(device.by_name, device.names()) if found.arch in triton_case.ARCHITECTURES
}
BY_BOTH_CODES = ("H200", "A100")
HEAD_DIMS = (40, 64, 72, 80, 96, 128, 256)


def compiled(running, head_dim, dtype=jnp.bfloat16, kv_dtype=None, page_size=None, is_online=False, **options):
    """The kernel of a long prompt, as the device's plan has it; and the plan's bytes of shared memory."""
    given = AttentionOptions(head_dim**-0.5, is_causal=True, **options)
    pool = (2, 4096, 8) if page_size is None else (2 * 4096 // page_size, page_size, 8)
    types = dict(
        query=((2, 4096, 32, head_dim), dtype),
        key=((*pool, head_dim), kv_dtype or dtype),
        value=((*pool, head_dim), kv_dtype or dtype),
        lengths=((2,), jnp.int32),
        phi=None if is_online else ((), jnp.float32),
        page_table=None if page_size is None else ((2, 4096 // page_size), jnp.int32),
        key_scale=None if kv_dtype is None else ((8,), jnp.float32),
        value_scale=None if kv_dtype is None else ((8,), jnp.float32),
    )
    arrays = AttentionArrays(**{name: x and jax.ShapeDtypeStruct(*x) for name, x in types.items()})
    shape = attention_shape(arrays, given, is_online=is_online)
    config = prefill_attention_config(shape, running)
    call = functools.partial(prefill_attention, options=given, config=config, recompute=True)
    (found,) = triton_case.calls_of(call, arrays)
    assert found.arch == running.arch
    return triton_case.compiled(found), config.smem_bytes(shape)


def check_compiled(running, **case):
    """That it fits, by the formula too. What AMD's scalar registers do not hold goes to vector registers."""
    triton_case.skip_unless_compiled_for(running.arch)
    kernel, smem_bytes = compiled(running, **case)
    if running.is_nvidia:
        kernel.check_fits()
    else:
        assert ".private_segment_fixed_size: 0\n" in kernel.assembly
    assert kernel.has_matrix_products
    assert kernel.shared_bytes <= smem_bytes <= running.smem_bytes
    return kernel


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=() if arch == "sm_120" else pytest.mark.slow) for arch in DEVICES]
)
def test_a_causal_prompt_compiles(arch):
    running = DEVICES[arch]
    kernel = check_compiled(running, head_dim=128)
    assert kernel.has_async_copies == running.is_nvidia
    assert ("wgmma.mma_async" in kernel.assembly) == (arch == "sm_90")


OTHER_CALLS = [
    dict(head_dim=128, is_online=True),
    dict(head_dim=64, dtype=jnp.float16, page_size=16),
    dict(head_dim=256, logits_soft_cap=50.0, local_window_size=(4095, 0)),
    dict(head_dim=128, kv_dtype=jnp.int8),
    dict(head_dim=96, page_size=64),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "case"),
    [  # each on every other architecture, since it takes seconds
        pytest.param(arch, case, id="-".join([*(f"{name}_{x}" for name, x in case.items()), arch]))
        for i, case in enumerate(OTHER_CALLS)
        for j, arch in enumerate(DEVICES)
        if (i + j) % 2 == 0
    ],
)
def test_other_calls_compile(arch, case):
    check_compiled(DEVICES[arch], **case)


# On a GPU.


def run(case, arrays, phi, name, **settings):
    """The kernel as it is planned for a device: out and log-sum-exp."""
    shape = attention_shape(arrays, case.options, is_online=phi is None)
    config = dataclasses.replace(
        prefill_attention_config(shape, device.by_name(name)),
        packs_group=case.packs_group,
        heads_together=case.heads_together,
    )
    arrays = arrays._replace(phi=None if phi is None else jnp.float32(phi))
    return jax.block_until_ready(prefill_attention(arrays, case.options, config, **settings))


def check(case, phi, name, seed=0):
    """Right in all rows; recomputed where they leave the window."""
    if name == "A100" and case.kv_dtype == "float8_e4m3fn":
        case = dataclasses.replace(case, kv_dtype="int8")
    arrays = case.arrays(seed)
    prefill_case.check(case, run(case, arrays, phi, name, recompute=True), case.expected(arrays))


@pytest.mark.gpu
@pytest.mark.parametrize("name", BY_BOTH_CODES)
@pytest.mark.parametrize(("case", "phi"), [*((x, 6.0) for x in CASES), *((x, None) for x in CASES)])
def test_against_float64(case, phi, name):
    check(CASES[case], phi, name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BY_BOTH_CODES)
@pytest.mark.parametrize("phi", [90.0, -90.0])
def test_rows_that_leave_the_window_are_nan_until_they_are_redone(phi, name):
    case = Case(query_length=300, capacity=400, num_heads=1, offset=(100,))
    for result in run(case, case.arrays(), phi, name):
        assert np.isnan(np.asarray(result, np.float32)).all()
    check(case, phi, name)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(90))
def test_random_cases(seed):
    name = BY_BOTH_CODES[seed % 2]
    for case, phi in zip(random_cases(seed, HEAD_DIMS), (6.0, 30.0, -40.0, 6.0), strict=True):
        check(case, None if seed % 8 < 2 else phi, name, seed)
