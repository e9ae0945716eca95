"""flat_matmul: answers, transformations and errors, on whatever device there is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import fdpp_jax

DTYPES = ["float32", "bfloat16", "float16"]


@pytest.mark.parametrize("leading", [(), (3,), (2, 2)])
@pytest.mark.parametrize("w_order", ["kn", "nk"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_agrees_with_float64(dtype, w_order, leading):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (*leading, 256)).astype(dtype)
    w = jax.random.normal(keys[1], (256, 128)).astype(dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    matmul = functools.partial(fdpp_jax.flat_matmul, w_order=w_order)
    w = w if w_order == "kn" else w.T
    out = jax.jit(matmul)(x, w)
    assert out.dtype == dtype
    assert oracle.relative_error(out, expected) < oracle.TOLERANCE[dtype]
    out = matmul(x, w, out_dtype=jnp.float32)
    assert out.dtype == jnp.float32
    assert oracle.relative_error(out, expected) < 2e-6


@pytest.mark.parametrize("w_order", ["kn", "nk"])
@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0)])
def test_matmul_under_vmap_and_grad(mapped, w_order):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (5, 3, 64) if mapped[0] == 0 else (3, 64), jnp.bfloat16)
    w = jax.random.normal(keys[1], (5, 64, 32) if mapped[1] == 0 else (64, 32), jnp.bfloat16)
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    w = w if w_order == "kn" else w.mT
    flat_matmul = functools.partial(fdpp_jax.flat_matmul, w_order=w_order)
    out = jax.jit(jax.vmap(flat_matmul, mapped))(x, w)
    assert oracle.relative_error(out, expected) < oracle.TOLERANCE["bfloat16"]

    def grads(matmul):
        return jax.grad(lambda x, w: (jax.vmap(matmul, mapped)(x, w).astype(jnp.float32) ** 2).sum(), (0, 1))(x, w)

    def dot(x, w):
        return jnp.dot(x, w if w_order == "kn" else w.T)

    for ours, theirs in zip(grads(flat_matmul), grads(dot), strict=True):
        assert oracle.relative_error(ours, theirs) < 2 * oracle.TOLERANCE["bfloat16"]


@pytest.mark.parametrize(
    ("x", "w", "keywords", "message"),
    [
        ((2, 8), (9, 4), {}, r"x \[..., K\] and w \[K, N\]"),
        ((2, 8), (8,), {}, r"x \[..., K\] and w \[K, N\]"),
        ((2, 8), (8, 4), {"w_order": "nk"}, r"w \[N, K\]; got x.shape=\(2, 8\) and w.shape=\(8, 4\) with w_order='nk'"),
        ((2, 8), (4, 8), {"w_order": "kn"}, r"w \[K, N\]; got .* with w_order='kn'"),
        ((2, 8), (8,), {"w_order": "nk"}, r"w \[N, K\]; got"),
        ((2, 8), (8, 4), {"w_order": "NK"}, "w_order must be one of kn, nk; got 'NK'"),
        ((2, 8), (8, 4), {"w_order": None}, "w_order must be one of kn, nk; got None"),
        ((2, 8), (8, 4), {"implementation": "fast"}, "gemv, flat, xla; got 'fast'"),
    ],
)
def test_matmul_says_what_is_wrong(x, w, keywords, message):
    with pytest.raises(ValueError, match=message):
        fdpp_jax.flat_matmul(jnp.zeros(x), jnp.zeros(w), **keywords)
    with pytest.raises(ValueError, match="one floating-point dtype"):
        fdpp_jax.flat_matmul(jnp.zeros((2, 8)), jnp.zeros((8, 4), jnp.bfloat16))


def test_operands_that_are_no_arrays():
    with pytest.raises(ValueError, match=r"^x must be an array \[\.\.\., K\]; got list$"):
        fdpp_jax.flat_matmul([[1.0]], jnp.zeros((1, 4)))
    with pytest.raises(ValueError, match=r"^w must be an array \[N, K\]; got NoneType$"):
        fdpp_jax.flat_matmul(jnp.zeros((2, 8)), None, w_order="nk")


@pytest.mark.gpu
@pytest.mark.parametrize("w_order", ["kn", "nk"])
@pytest.mark.parametrize("implementation", ["gemv", "flat", "xla"])
def test_named_matmuls_agree_on_the_gpu(implementation, w_order):
    x = jax.random.normal(jax.random.key(0), (1, 512), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (512, 208), jnp.bfloat16)
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    w = w if w_order == "kn" else w.T
    out = fdpp_jax.flat_matmul(x, w, w_order=w_order, out_dtype=jnp.float32, implementation=implementation)
    assert oracle.relative_error(out, expected) < 2e-6
