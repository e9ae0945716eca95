"""Kernels compiled for every GPU that they are written for, none of which is here."""

import functools

import jax
import jax.numpy as jnp
import pytest
import triton_case
import triton_toy


@pytest.mark.parametrize("arch", triton_case.ARCHITECTURES)
def test_a_product_compiles(arch):
    x, w = jax.ShapeDtypeStruct((16, 512), jnp.bfloat16), jax.ShapeDtypeStruct((512, 256), jnp.bfloat16)
    num_stages = 2 if arch.startswith("gfx") else 3
    (call,) = triton_case.calls_of(functools.partial(triton_toy.product, arch=arch, num_stages=num_stages), x, w)
    assert call.grid == (4,)
    assert call.zeroed == (1,)
    compiled = triton_case.compiled(call)
    compiled.check_fits()
    assert compiled.has_matrix_products
    assert compiled.has_async_copies == arch.startswith("sm_")
    assert compiled.shared_bytes > 0
    assert compiled.num_registers > 16
