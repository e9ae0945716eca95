"""Ops as citizens of JAX: derivatives in both modes, eager calls, and JAX's strict modes, on a CPU and as on Hopper."""

import contextlib
import functools
import gc
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import oracle
import pytest
from hopper_case import attention_arrays, bf16

import fdpp_jax
from fdpp_jax import UnifiedMax, heuristics
from fdpp_jax.plans.shapes import AttentionShape

PLATFORMS = ["cpu", "hopper"]


@pytest.fixture(params=PLATFORMS)
def calls(request):
    """Where the op runs: on this CPU, or as on a Hopper GPU; the calls of its kernels."""
    return request.getfixturevalue("hopper") if request.param == "hopper" else None


def attend(query, key, value, lengths, softmax=UnifiedMax(), **options):  # noqa: B008
    out = fdpp_jax.dot_product_attention(query, key, value, key_value_seq_lengths=lengths, softmax=softmax, **options)
    return out.astype(jnp.float32)


def plain(query, key, value, lengths):
    """Attention whose derivatives are JAX's own."""
    scores = jnp.einsum("btkgh,bskh->bkgts", query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3]), key)
    scores = jnp.where(jnp.arange(key.shape[1]) < lengths[:, None, None, None, None], scores / 8, -jnp.inf)
    return jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores), value).reshape(query.shape)


def check(ours, theirs, factor=3.0):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_less(oracle.relative_error(a, b), factor * oracle.TOLERANCE["bfloat16"]),
        ours,
        theirs,
    )


# ---- derivatives


@pytest.mark.parametrize("phi", [6.0, 300.0], ids=["safe", "recomputed"])
def test_forward_mode_of_attention(calls, phi):
    query, key, value, lengths = attention_arrays(batch=2, capacity=16, num_heads=2, num_kv_heads=1)
    tangents = bf16(5, *query.shape), bf16(6, *key.shape), bf16(7, *value.shape)
    ours = lambda *x: attend(*x, lengths, UnifiedMax(phi))  # noqa: E731
    theirs = lambda *x: plain(*(y.astype(jnp.float32) for y in x), lengths)  # noqa: E731
    primals = query, key, value
    check(jax.jit(lambda: jax.jvp(ours, primals, tangents))(), jax.jvp(theirs, primals, tangents))
    out, linear = jax.linearize(ours, *primals)
    check((out, linear(*tangents)), jax.jvp(theirs, primals, tangents))
    assert calls is None or calls


@pytest.mark.parametrize(
    "phi", [pytest.param(6.0, id="safe"), pytest.param(300.0, id="recomputed", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_both_modes_of_both_results(calls, phi, with_bias):
    query, key, value, lengths = attention_arrays(batch=2, capacity=16, num_heads=2, num_kv_heads=1)
    primals = query, key, value, bf16(4, 1, 2, 1, 16) if with_bias else jnp.linspace(-1.0, 1.0, 2)
    tangents = tuple(jnp.ones_like(x) * bf16(5, *x.shape) for x in primals)
    starts = jnp.array([1, 2])

    def ours(query, key, value, extra):
        extras = dict(bias=extra) if with_bias else dict(sinks=extra)
        extras |= dict(key_value_seq_starts=starts, return_residual=True, softmax=UnifiedMax(phi))
        out, log_sum = fdpp_jax.dot_product_attention(query, key, value, key_value_seq_lengths=lengths, **extras)
        return out.astype(jnp.float32), log_sum

    def theirs(*arrays):
        query, key, value, extra = (x.astype(jnp.float32) for x in arrays)
        scores = jnp.einsum("bnh,bsh->bns", query[:, 0], key[:, :, 0]) / 8
        if with_bias:
            scores += extra[:, :, 0]
        keys = jnp.arange(16)
        live = (keys >= starts[:, None]) & (keys < lengths[:, None])
        scores = jnp.where(live[:, None], scores, -jnp.inf)
        sinks = jnp.full((2, 2, 1), -jnp.inf) if with_bias else jnp.broadcast_to(extra[:, None], (2, 2, 1))
        log_sum = jax.nn.logsumexp(jnp.concatenate([scores, sinks], axis=-1), axis=-1)
        weights = jnp.exp(scores - log_sum[..., None])
        return jnp.einsum("bns,bsh->bnh", weights, value[:, :, 0])[:, None], log_sum[:, None]

    check(jax.jit(lambda: jax.jvp(ours, primals, tangents))(), jax.jvp(theirs, primals, tangents))
    loss = lambda f, *x: sum((y**2).sum() for y in f(*x))  # noqa: E731
    grads = [jax.jit(jax.grad(functools.partial(loss, f), argnums=(0, 1, 2, 3)))(*primals) for f in (ours, theirs)]
    check(*grads)
    assert calls is None or calls or with_bias


def test_jacobians_and_hessian_of_attention(calls):
    query, key, value, lengths = attention_arrays(batch=1, capacity=8, num_heads=1, num_kv_heads=1)
    ours = lambda f, x: f(attend(query + x, key, value, lengths))  # noqa: E731
    theirs = lambda f, x: f(plain(*((y.astype(jnp.float32)) for y in (query + x, key, value)), lengths))  # noqa: E731
    x = jnp.zeros(64, jnp.bfloat16)
    first = lambda out: out[0, 0, 0, :4]  # noqa: E731
    for jacobian in (jax.jacfwd, jax.jacrev):
        check(*(jax.jit(jacobian(functools.partial(f, first)))(x) for f in (ours, theirs)))
    total = lambda out: (out**2).sum()  # noqa: E731
    check(*(jax.jit(jax.hessian(functools.partial(f, total)))(x) for f in (ours, theirs)), factor=6)


def test_forward_mode_of_matmul(calls):
    x, w = bf16(0, 3, 64), bf16(1, 64, 32)
    tangents = bf16(2, 3, 64), bf16(3, 64, 32)
    matmul = functools.partial(fdpp_jax.flat_matmul, out_dtype=jnp.float32)
    dot = lambda x, w: jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32))  # noqa: E731
    check(jax.jit(lambda: jax.jvp(matmul, (x, w), tangents))(), jax.jvp(dot, (x, w), tangents))
    loss = lambda f, x: (f(x, w) ** 2).sum()  # noqa: E731
    for derivative in (jax.hessian, lambda f: jax.vmap(jax.grad(f))):
        check(*(jax.jit(derivative(functools.partial(loss, f)))(x) for f in (matmul, dot)))
    check(*(jax.jit(jax.jacfwd(functools.partial(f, x)))(w) for f in (matmul, dot)))
    assert calls is None or calls


def slope(f, *arrays):
    """A function's value and its tangent along the last of its arrays."""
    value, tangent = jax.linearize(lambda x: f(*arrays[:-1], x), arrays[-1])
    return value, tangent(arrays[-1])


MATMULS = {  # of a matmul; whether x and w are mapped; what is launched by the program for the GPU
    "vmap over x": (lambda f: jax.vmap(f, (0, None)), True, False, 1),
    "vmap over w": (lambda f: jax.vmap(f, (None, 0)), False, True, 0),
    "vmap over both": (jax.vmap, True, True, 0),
    "vmap over the last axis of x": (
        lambda f: lambda x, w: jax.vmap(f, (2, None), 1)(jnp.moveaxis(x, 0, 2), w),
        True,
        False,
        1,
    ),
    "linearize": (lambda f: functools.partial(slope, f), False, False, 1),
    "vmap of linearize": (lambda f: jax.vmap(functools.partial(slope, f), (0, None)), True, False, 1),
    "jacfwd": (lambda f: jax.jacfwd(lambda x, w: (f(x, w), f(x, w)), has_aux=True), False, False, 1),
    "grad": (lambda f: jax.grad(lambda *x: (f(*x) ** 2).sum(), (0, 1)), False, False, 1),
    "vmap of grad": (lambda f: jax.vmap(jax.grad(lambda *x: (f(*x) ** 2).sum()), (0, None)), True, False, 1),
    "hessian": (lambda f: jax.hessian(lambda *x: (f(*x) ** 2).sum()), False, False, 0),
}


@pytest.mark.parametrize("name", MATMULS)
def test_transformed_matmuls_on_hopper(request, name):
    transform, x_is_mapped, w_is_mapped, num_launches = MATMULS[name]
    x, w = bf16(0, *[5] * x_is_mapped, 3, 64), bf16(1, *[5] * w_is_mapped, 64, 32)
    ours = transform(functools.partial(fdpp_jax.flat_matmul, out_dtype=jnp.float32))
    theirs = transform(lambda x, w: jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32)))
    assert launches(ours, x, w) == num_launches
    request.getfixturevalue("hopper")
    check(jax.jit(ours)(x, w), theirs(x, w))


def launches(call, *arrays):
    """How often the program for the GPU launches kernels."""
    with fdpp_jax.target("H200"):
        text = jax.jit(call).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.while" not in text
    return text.count("custom_call @mosaic_gpu")


SQUARES = lambda f: lambda *x: (f(*x) ** 2).sum()  # noqa: E731
ONE = jnp.ones((), jnp.bfloat16)
GRADS = lambda f: jax.grad(SQUARES(f), (0, 1, 2))  # noqa: E731
ATTENTIONS = {  # of attention; T; whether the query is mapped, and the cache; the query [B, T, N] of the kernel
    "vmap of vmap": (lambda f: jax.vmap(jax.vmap(f, (0, None, None)), (None, 0, 0)), 3, True, True, (6, 3, 6)),
    "vmap of grad, queries": (lambda f: jax.vmap(GRADS(f), (0, None, None)), 3, True, False, (2, 3, 6)),
    "jacfwd": (
        lambda f: lambda *x: jax.jacfwd(lambda s: (f(x[0] * s, *x[1:]),) * 2, has_aux=True)(ONE),
        3,
        False,
        False,
        (2, 3, 2),
    ),
    "grad of vmap, prompt": (lambda f: GRADS(jax.vmap(f)), 20, True, True, (6, 20, 2)),
    "vmap of linearize, prompt": (lambda f: jax.vmap(functools.partial(slope, f)), 20, True, True, (6, 20, 2)),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name.startswith(("vmap of vmap", "vmap of grad", "grad")) else ())
        for name in ATTENTIONS
    ],
)
def test_transformed_causal_calls_on_hopper(request, name):
    """Whatever is around it, a call is one launch for all that is mapped."""
    transform, query_length, query_is_mapped, cache_is_mapped, query_shape = ATTENTIONS[name]
    query = bf16(0, *[3] * query_is_mapped, 2, query_length, 2, 64)
    key, value = bf16(1, 2, *[3] * cache_is_mapped, 2, 32, 1, 64)
    lengths = jnp.array([query_length + 2, 31])

    def ours(*arrays):
        return attend(*arrays, lengths, is_causal=True, query_offset=lengths - query_length)

    def theirs(*arrays):
        query, key, value = (x.astype(jnp.float32) for x in arrays)
        scores = jnp.einsum("btnh,bsh->bnts", query, key[:, :, 0]) / 8
        last = (lengths - query_length)[:, None] + jnp.arange(query_length)  # [B, T]
        scores = jnp.where(jnp.arange(32) <= last[:, None, :, None], scores, -jnp.inf)
        return jnp.einsum("bnts,bsh->btnh", jax.nn.softmax(scores), value[:, :, 0])

    assert launches(transform(ours), query, key, value) == 1
    calls = request.getfixturevalue("hopper")
    check(jax.jit(transform(ours))(query, key, value), transform(theirs)(query, key, value))
    assert calls[-1][0] == (*query_shape, 64)


@pytest.mark.parametrize("softmax", [None, UnifiedMax(300.0)], ids=["online", "recomputed"])
def test_derivatives_of_both_results_are_those_of_finite_differences(softmax):
    query, (key, value) = (
        np.random.default_rng(0).standard_normal(x, np.float32) for x in ((2, 3, 2, 8), (2, 2, 5, 1, 8))
    )
    lengths, sinks = jnp.array([5, 4]), np.array([0.3, -0.5], np.float32)
    arguments = dict(key_value_seq_lengths=lengths, is_causal=True, query_offset=lengths - 3, softmax=softmax)

    @jax.jit
    def call(query, key, value, sinks):
        return fdpp_jax.dot_product_attention(query, key, value, sinks=sinks, return_residual=True, **arguments)

    jax.test_util.check_grads(call, (query, key, value, sinks), order=1, modes=("fwd", "rev"), atol=5e-3, rtol=5e-3)


def test_only_what_is_asked_for_is_differentiated(calls):
    """The gradient of a query reads no gradient of the cache, and one under a scan keeps no weights of softmax."""
    query, key, value, lengths = attention_arrays(capacity=48)

    def loss(query):
        step = lambda carry, _: (attend(carry, key, value, lengths).astype(query.dtype), None)  # noqa: E731
        return jax.lax.scan(step, query, length=3)[0].astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss)).lower(query).as_text()
    assert "3x4x4x2x1x48xf32" not in text  # [steps, B, K, G, T, S]


# ---- eager calls


def test_eager_calls_are_lowered_once(calls):
    arrays = attention_arrays(batch=3)
    count = 0

    def listen(name, *_, **__):
        nonlocal count
        count += "jaxpr_to_mlir_module" in name or "backend_compile" in name

    x, w = bf16(0, 3, 64), bf16(1, 64, 32)

    def call(phi):
        attend(*arrays, UnifiedMax(phi))
        attend(*arrays, UnifiedMax.bound())
        fdpp_jax.flat_matmul(x, w)

    call(1.0)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for phi in (1.0, 2.0):
            call(phi)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert count == 0


# ---- strict modes


@contextlib.contextmanager
def config(**values):
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@contextlib.contextmanager
def checking_leaks():
    """Each check collects garbage: of what the test makes, not of all that the process holds."""
    gc.freeze()
    try:
        with jax.checking_leaks():
            yield
    finally:
        gc.unfreeze()


MODES = {
    "no promotion": lambda: config(jax_numpy_rank_promotion="raise", jax_numpy_dtype_promotion="strict"),
    "leaks": checking_leaks,
    "nans": lambda: config(jax_debug_nans=True),
    "transfers": lambda: jax.transfer_guard("disallow"),
    "no jit": jax.disable_jit,
}


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.slow if mode == "no jit" else ()) for mode in MODES]
)
def test_strict_modes(calls, mode):
    """Also where the answer is recomputed, which starts from NaN."""
    if mode == "transfers" and calls is not None:
        pytest.skip("the stand-in of the kernel makes constants")
    arrays = attention_arrays(batch=2)
    lengths = arrays[3]
    x, w = bf16(0, 2, 64), bf16(1, 64, 32)
    sinks, norms = jnp.zeros(8), jnp.full((2, 4), 50.0)
    bias, mask, starts = bf16(2, 8, 1, 32), lengths[:, None, None, None] > 0, jnp.array([0, 1])
    grad = jax.grad(lambda query, *rest: attend(query, *rest, UnifiedMax(1.0)).sum())

    def results():
        outs = [attend(*arrays, softmax) for softmax in (None, UnifiedMax(1.0), UnifiedMax.bound())]
        outs += [attend(*arrays, softmax, sinks=sinks, key_max_norm=norms) for softmax in (UnifiedMax.bound("cond"),)]
        outs += [attend(*arrays, None, local_window_size=4, logits_soft_cap=2.0, query_offset=lengths)]
        outs += [attend(*arrays, bias=bias, mask=mask, key_value_seq_starts=starts)]
        outs += [attend(*arrays, UnifiedMax.bound(), key_value_seq_starts=starts)]
        outs += fdpp_jax.dot_product_attention(*arrays[:3], key_value_seq_starts=starts, return_residual=True)
        outs += [fdpp_jax.flat_matmul(x, w)]
        if mode != "transfers":
            outs += [grad(*arrays), jax.vmap(fdpp_jax.flat_matmul, (0, None))(x, w)]
        if mode not in ("nans", "no jit"):
            outs += [attend(*arrays, UnifiedMax(300.0, "cond"))]
        return outs

    with MODES[mode](), warnings.catch_warnings():
        warnings.simplefilter("error")
        # What is traced may leak. Outside of jit, this mode traces and compiles each operation anew.
        outs = jax.jit(results)() if mode == "leaks" else results()
    assert all(np.isfinite(np.asarray(out, np.float32)).all() for out in outs)


def test_scale_may_be_traced(calls):
    query, key, value, lengths = attention_arrays()
    traced = jax.jit(lambda *arrays: attend(*arrays, scale=1 / jnp.sqrt(query.shape[-1])))
    check(traced(query, key, value, lengths), attend(query, key, value, lengths))
    for softmax in (None, UnifiedMax.bound()):
        call = functools.partial(attend, query, key, value, lengths, softmax)
        out = jax.jit(jax.vmap(lambda scale, call=call: call(scale=scale)))(jnp.array([0.125, 0.5]))
        check(out[1], attend(query, key, value, lengths, scale=0.5))


def test_a_plan_says_that_a_traced_scale_has_no_kernel():
    shape = AttentionShape(2, 1, 64, 8, 4, 64, has_traced_scale=True)
    assert "known before the call is traced" in heuristics.plan_attention(shape, "H200").reason
    with pytest.raises(NotImplementedError, match="known before the call is traced"):
        heuristics.plan_attention(shape, "H200", "mosaic_gpu")


def test_arrays_without_a_batch(calls):
    query, key, value, _ = attention_arrays(batch=1)
    for lengths in (None, jnp.array([7]), jnp.array(7)):
        out = jax.jit(attend)(query[0], key[0], value[0], lengths)
        assert out.shape == query.shape[1:]
        check(out, attend(query, key, value, None if lengths is None else jnp.array([7]))[0])


@pytest.mark.parametrize("softmax", [None, UnifiedMax.bound()], ids=["online", "bound"])
def test_arguments_without_a_batch(calls, softmax):
    query, key, value, _ = attention_arrays(batch=1)
    of_scores = dict(bias=bf16(4, 8, 1, 32), mask=jnp.arange(32)[None, None] % 3 > 0)
    of_sequence = dict(key_value_seq_lengths=jnp.array(20), key_value_seq_starts=jnp.array(3))
    of_sequence |= dict(query_offset=jnp.array(19), query_seq_lengths=jnp.array(1), key_max_norm=jnp.full(4, 20.0))
    call = functools.partial(fdpp_jax.dot_product_attention, return_residual=True, softmax=softmax)
    for arguments in ({}, of_scores):
        with_batch = {name: x[None] for name, x in (arguments | of_sequence).items()}
        expected = call(query, key, value, is_causal=True, **with_batch)
        one = query[0], key[0], value[0]
        outs = call(*one, is_causal=True, **arguments, **of_sequence)
        assert [x.shape for x in outs] == [(1, 8, 64), (1, 8)]
        check(outs, tuple(x[0] for x in expected))


def test_float64_is_refused():
    code = """
import jax, jax.numpy as jnp, fdpp_jax
x = jnp.zeros((1, 1, 1, 64))
for call in (lambda: fdpp_jax.dot_product_attention(x, x, x), lambda: fdpp_jax.flat_matmul(x, x[0, 0].T),
             lambda: fdpp_jax.flat_matmul(x.astype("f4"), x[0, 0].T.astype("f4"), out_dtype="f8")):
    try:
        call()
    except NotImplementedError as error:
        print(error)
fdpp_jax.dot_product_attention(*[x.astype("bfloat16")] * 3, softmax=fdpp_jax.UnifiedMax(jnp.array(6.0)))
"""
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={"JAX_ENABLE_X64": "1", "PATH": ""}
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("float32 or narrower") == 3


def test_cudnn_is_a_name(hopper):
    query, key, value, lengths = attention_arrays()
    with pytest.raises(NotImplementedError, match="cuDNN lets NaN beyond the lengths through"):
        attend(query, key, value, lengths, implementation="cudnn")
