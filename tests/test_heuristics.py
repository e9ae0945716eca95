"""The face of planning: tables first, then the backends in order, for any named device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toy_backend

import fdpp_jax
from fdpp_jax import UnifiedMax, heuristics
from fdpp_jax.heuristics import plan_attention, plan_layer, plan_matmul
from fdpp_jax.plans import backends, device, hopper_attention, hopper_matmul, tables, xla
from fdpp_jax.plans.shapes import AttentionShape, LayerShape, MatmulShape

H200 = device.by_name("H200")


DECODE = AttentionShape(batch=1, query_length=1, capacity=4096, num_query_heads=32, num_kv_heads=32, head_dim=128)
LAYER = LayerShape(1, 4096, 11008, num_query_heads=32, num_kv_heads=32, head_dim=128)


@pytest.fixture(autouse=True, scope="module")
def _rules_only(tmp_path_factory):
    """The rules, whatever tables are shipped; tests/plans/test_tables.py is about these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "SHIPPED_DIRECTORY", tmp_path_factory.mktemp("no_tables"))
        yield


def test_what_the_kernels_take_is_not_refused():
    assert hopper_matmul.refuse(MatmulShape(1, 4096, 4096), H200, "gemv") is None
    assert hopper_matmul.refuse(MatmulShape(1, 4096, 4096), H200, "flat") is None
    assert xla.BACKEND.matmul.refuse(MatmulShape(4096, 9, 9, "float32"), H200, "dot") is None
    assert hopper_attention.refuse(DECODE, H200) is None


@pytest.mark.parametrize("name", device.names())
def test_every_gpu_has_kernels(name):
    plans = plan_attention(DECODE, name), plan_matmul(MatmulShape(8, 4096, 4096), name)
    kernels = {"sm_90": "mosaic_gpu", "cpu": "xla"}.get(device.by_name(name).arch, "triton")
    assert {plan.backend for plan in plans} == {kernels}
    assert [plan.algorithm for plan in plans] == (["reference", "dot"] if name == "cpu" else ["decode", "flat"])
    if name == "cpu":
        assert plans[1].reason == "no kernel for cpu"


@pytest.mark.parametrize("name", ["A100", "B200", "MI250"])
def test_a_device_that_runs_without_triton_says_what_is_missing(name):
    running = dataclasses.replace(device.by_name(name), why_no_triton="pip install it")
    for plan in (plan_attention(DECODE, running), plan_matmul(MatmulShape(8, 4096, 4096), running)):
        assert plan.backend == "xla"
        assert "pip install it" in plan.reason
        assert "Mosaic" not in plan.reason
    with pytest.raises(NotImplementedError, match=r"'triton' cannot run this call: pip install it$"):
        plan_attention(DECODE, running, "triton")


def test_on_hopper_triton_is_named_or_asked_second():
    assert plan_attention(DECODE, "H200").backend == "mosaic_gpu"
    named = plan_attention(DECODE, "H200", "triton")
    assert (named.backend, named.algorithm) == ("triton", "decode")
    assert plan_matmul(MatmulShape(8, 4096, 4096), "H200", "triton").backend == "triton"
    assert plan_attention(dataclasses.replace(DECODE, head_dim=72), "H200").backend == "triton"


def test_one_backend_s_kernels_alone_are_planned_where_it_is_asked_for():
    triton = backends.only("triton", H200)
    assert plan_attention(DECODE, triton) == dataclasses.replace(
        plan_attention(DECODE, H200, "triton"), reason=plan_attention(DECODE, triton).reason
    )
    for m in (1, 8):
        for implementation in (None, "triton", "flat", "gemv")[: 4 if m == 1 else 3]:
            plan = plan_matmul(MatmulShape(m, 4096, 4096), triton, implementation)
            assert plan.backend == "triton"
            assert implementation in (None, "triton", plan.algorithm)
    assert plan_layer(LAYER, H200).algorithm == "fused"
    layer = plan_layer(LAYER, triton)
    assert (layer.backend, layer.algorithm) == ("triton", "fused")
    wide = plan_attention(dataclasses.replace(DECODE, head_dim=512), triton)
    assert wide.backend == "xla"
    assert "head dims 8, 16, ... 256, got H = 512" in wide.reason
    with pytest.raises(ValueError, match="implementation must be one of triton, decode, prefill, xla, "):
        plan_attention(DECODE, triton, "mosaic_gpu")
    mosaic = backends.only("mosaic_gpu", H200)
    assert plan_matmul(MatmulShape(8, 4096, 4100), H200).backend == "xla"
    assert plan_matmul(MatmulShape(8, 4096, 4104), H200).backend == "triton"
    assert plan_matmul(MatmulShape(8, 4096, 4104), mosaic).backend == "xla"
    assert backends.only(None, H200) is H200


@pytest.mark.parametrize(
    ("name", "on", "error", "message"),
    [
        ("xla", "H200", ValueError, "implementation must be one of mosaic_gpu, triton; got 'xla'"),
        ("mosaic_gpu", "A100", NotImplementedError, "'mosaic_gpu' cannot run here: it has no kernel for sm_80"),
        ("triton", "cpu", NotImplementedError, "'triton' cannot run here: it has no kernel for cpu"),
    ],
)
def test_a_backend_without_kernels_cannot_be_asked_for(name, on, error, message):
    with pytest.raises(error, match=message):
        backends.only(name, device.by_name(on))


@pytest.mark.parametrize("name", ["H200", "A100", "RTX 4090", "B200"])
def test_what_cudnn_computes_without_a_unified_max_is_left_to_it(name):
    prompt = dataclasses.replace(DECODE, query_length=2048, has_lengths=False, is_causal=True, is_online=True)
    assert plan_attention(prompt, name).algorithm == "cudnn"
    assert plan_attention(dataclasses.replace(prompt, is_online=False), name).algorithm == "prefill"
    assert plan_attention(prompt, name, "prefill").algorithm == "prefill"


def test_a_gpu_without_kernels_says_so():
    old = dataclasses.replace(device.by_name("A10"), kind="T4", arch="sm_75")
    assert plan_matmul(MatmulShape(8, 4096, 4096), old).reason == "no kernel for sm_75"
    assert plan_attention(DECODE, old).reason.endswith("no kernel for sm_75")


@pytest.mark.parametrize("name", ["H200", "A100", "cpu"])
@pytest.mark.parametrize(
    ("plan", "shape", "wrong", "message"),
    [
        (plan_attention, DECODE, {"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
        (plan_attention, DECODE, {"num_kv_heads": -1}, "num_kv_heads must be at least 1, got -1"),
        (plan_attention, DECODE, {"num_kv_heads": 5}, "num_kv_heads must divide num_query_heads, got 5 and 32"),
        (plan_attention, DECODE, {"num_query_heads": -32}, "num_query_heads must be at least 0, got -32"),
        (plan_attention, DECODE, {"head_dim": 0}, "head_dim must be at least 1, got 0"),
        (plan_attention, DECODE, {"page_size": 0}, "page_size must be at least 1, got 0"),
        *((plan_attention, DECODE, {x: -1}, f"{x} must be at least 0, got -1") for x in ("batch", "capacity")),
        (plan_attention, DECODE, {"query_length": -1}, "query_length must be at least 0, got -1"),
        *((plan_matmul, MatmulShape(8, 4096, 64), {x: -1}, f"{x} must be at least 0, got -1") for x in "mkn"),
        *((plan_layer, LAYER, {x: -1}, f"{x} must be at least 0, got -1") for x in ("batch", "vocab_size")),
        *((plan_layer, LAYER, {x: 0}, f"{x} must be at least 1, got 0") for x in ("hidden_size", "intermediate_size")),
        *((plan_layer, LAYER, {x: 0}, f"{x} must be at least 1, got 0") for x in ("num_query_heads", "head_dim")),
        (plan_layer, LAYER, {"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
        (plan_layer, LAYER, {"num_kv_heads": 5}, "num_kv_heads must divide num_query_heads, got 5 and 32"),
    ],
)
def test_sizes_that_no_call_has(name, plan, shape, wrong, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        plan(dataclasses.replace(shape, **wrong), name)


@pytest.mark.parametrize("name", ["H200", "A100", "cpu"])
def test_empty_calls_have_plans(name):
    for axis in ("batch", "query_length", "capacity", "num_query_heads"):
        assert plan_attention(dataclasses.replace(DECODE, **{axis: 0}), name).backend == "xla"
    for axis in "mkn":
        assert plan_matmul(dataclasses.replace(MatmulShape(8, 4096, 64), **{axis: 0}), name).backend == "xla"
    assert plan_layer(dataclasses.replace(LAYER, batch=0), name).backend == "xla"


def test_unknown_device_is_an_error():
    with pytest.raises(ValueError, match="unknown device 'H300'"):
        plan_matmul(MatmulShape(8, 64, 64), "H300")


@pytest.mark.parametrize(
    ("shape", "implementation", "algorithm"),
    [
        (DECODE, "mosaic_gpu", "decode"),
        (DECODE, "xla", "reference"),
        (dataclasses.replace(DECODE, has_lengths=False), "xla", "cudnn"),
        (dataclasses.replace(DECODE, has_lengths=False), "reference", "reference"),
        (dataclasses.replace(DECODE, has_lengths=False), "cudnn", "cudnn"),
        (DECODE, "decode", "decode"),
    ],
)
def test_a_name_is_that_of_a_backend_or_of_an_algorithm(shape, implementation, algorithm):
    plan = plan_attention(shape, "H200", implementation)
    assert (plan.backend, plan.algorithm) == ("mosaic_gpu" if algorithm == "decode" else "xla", algorithm)
    assert (plan.config is None) == (algorithm != "decode")
    assert ("named by the caller" in plan.reason) == (implementation != "mosaic_gpu")


@pytest.mark.parametrize(
    ("m", "implementation", "backend", "algorithm"),
    [
        (1, "gemv", "mosaic_gpu", "gemv"),
        (1, "flat", "mosaic_gpu", "flat"),
        (1, "mosaic_gpu", "mosaic_gpu", "flat"),
        (8, "mosaic_gpu", "mosaic_gpu", "flat"),
        (8, "xla", "xla", "dot"),
    ],
)
def test_a_matmul_is_named_by_algorithm_or_backend(m, implementation, backend, algorithm):
    plan = plan_matmul(MatmulShape(m, 4096, 4096), "H200", implementation)
    assert (plan.backend, plan.algorithm, plan.reason) == (backend, algorithm, "named by the caller")
    assert (plan.config is None) == (backend == "xla")


def test_what_several_backends_refuse_alike_is_said_once():
    reason = heuristics.plan_attention(dataclasses.replace(DECODE, has_mask=True), "H200").reason
    assert reason.count("the decode kernel takes no mask as an array") == 1


def test_what_is_named_and_refuses_says_why():
    for implementation, shape, why in (
        ("mosaic_gpu", dataclasses.replace(DECODE, head_dim=72), "takes head dims"),
        ("triton", dataclasses.replace(DECODE, head_dim=300), "takes head dims"),
    ):
        with pytest.raises(NotImplementedError, match=f"'{implementation}' cannot run this call: .*{why}"):
            plan_attention(shape, "H200", implementation)
    with pytest.raises(NotImplementedError, match=r"Mosaic GPU's kernels are for sm_90, got sm_80$"):
        plan_attention(DECODE, "A100", "mosaic_gpu")
    with pytest.raises(NotImplementedError, match="cuDNN lets NaN beyond the lengths through"):
        plan_attention(DECODE, "H200", "cudnn")
    for name in ("cuda", 5):
        with pytest.raises(ValueError, match=f"must be one of mosaic_gpu, gemv, flat, triton, xla, dot; got {name!r}"):
            plan_matmul(MatmulShape(8, 4096, 4096), "H200", name)


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        (
            dict(query_length=64, has_mask=True),
            "the prefill kernel takes no mask as an array: lengths, causal masks and windows are its own",
        ),
        (dict(query_length=64, has_traced_scale=True), "kernels take a scale that is known before the call is traced"),
        (dict(query_length=17, head_dim=72), "the prefill kernel takes head dims (64, 80, 96, 128, 256), got H = 72"),
        (dict(query_length=16, has_bias=True), "the decode kernel takes no bias"),
        (dict(query_length=0), "the decode kernel takes 1 to 16 queries, got T = 0"),
    ],
)
def test_a_backend_that_is_named_refuses_by_the_kernel_that_is_meant(shape, why):
    with pytest.raises(NotImplementedError) as refused:
        plan_attention(dataclasses.replace(DECODE, **shape), "H200", "mosaic_gpu")
    assert str(refused.value) == f"implementation='mosaic_gpu' cannot run this call: {why}"


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        (MatmulShape(100, 4096, 4096), "flat takes 1 to 64 rows, got M = 100"),
        (MatmulShape(8, 4096, 4096, "float32"), "the kernel takes bfloat16 or float16, got float32"),
        (MatmulShape(1, 4096, 4090), "the kernel takes K and N that are multiples of 16, got K = 4096, N = 4090"),
    ],
)
def test_a_backend_that_is_named_refuses_a_matmul_by_the_kernel_that_is_meant(shape, why):
    with pytest.raises(NotImplementedError) as refused:
        plan_matmul(shape, "H200", "mosaic_gpu")
    assert str(refused.value) == f"implementation='mosaic_gpu' cannot run this call: {why}"


def test_a_table_is_of_the_backend_that_has_matmuls(monkeypatch):
    only_attention = dataclasses.replace(toy_backend.BACKEND, architectures=("sm_90",), matmul=None)
    monkeypatch.setattr(backends, "BACKENDS", (only_attention, *backends.BACKENDS))
    assert backends.with_kernels(H200, "matmul") is backends.MOSAIC_GPU
    assert backends.with_kernels(H200, "attention") is only_attention
    assert backends.with_kernels(device.by_name("cpu"), "matmul") is None


@pytest.fixture
def _toy_first(monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", (toy_backend.BACKEND, *backends.BACKENDS))
    heuristics.plan_attention.cache_clear()
    yield
    heuristics.plan_attention.cache_clear()


@pytest.mark.usefixtures("_toy_first")
def test_backends_are_asked_in_their_order():
    assert plan_attention(DECODE, "A100").backend == "toy"
    assert plan_attention(DECODE, "H200").backend == "mosaic_gpu"
    assert plan_attention(dataclasses.replace(DECODE, query_length=2), "A100").backend == "triton"
    refused = plan_attention(dataclasses.replace(DECODE, query_length=2, has_bias=True), "A100")
    assert refused.backend == "xla"
    assert "the toy takes one query; the decode kernel takes no bias" in refused.reason
    assert plan_attention(DECODE, "A100", "toy").reason == "a toy"
    for implementation in (None, "toy", "flat"):  # Mosaic GPU has an algorithm of that name, too
        plan = plan_matmul(MatmulShape(8, 4096, 4096), "A100", implementation)
        assert (plan.backend, plan.algorithm, plan.config) == ("toy", "flat", toy_backend.ToyConfig())
    refused = plan_matmul(MatmulShape(320, 4096, 4096), "A100")
    assert refused.reason.startswith("no toy for sm_80 and M = 320; rule: M = 320")
    assert plan_matmul(MatmulShape(8, 4096, 4096), "H200", "flat").backend == "mosaic_gpu"


@pytest.mark.usefixtures("_toy_first")
def test_a_new_backend_is_a_record_and_a_module(monkeypatch):
    """The op runs it, with its recompute, gradient and vmap, and nothing else had to change."""
    monkeypatch.setattr(device, "lowered_for", lambda platform, planned: planned)  # what is lowered for the CPU
    with device.target(dataclasses.replace(device.by_name("A100"), kind="toy")):
        _check_toy_ops()


def _check_toy_ops():
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.standard_normal((2, 1, 4, 64), np.float32))
    key, value = jnp.asarray(rng.standard_normal((2, 2, 16, 2, 64), np.float32))

    def attend(query, phi=200.0):
        softmax = None if phi is None else UnifiedMax(phi)
        return fdpp_jax.dot_product_attention(query, key, value, softmax=softmax)

    toy_backend.calls.clear()
    out = attend(query)
    assert toy_backend.calls
    assert oracle.relative_error(out, oracle.attention(query, key, value)) < oracle.TOLERANCE["float32"]
    np.testing.assert_allclose(jax.vmap(attend)(query[None])[0], out, atol=1e-6)
    ours, theirs = (jax.grad(lambda query, phi=phi: attend(query, phi).sum())(query) for phi in (1.0, None))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    toy_backend.calls.clear()
    x, w = query[:, 0, 0], key[0, :, 0].T
    np.testing.assert_allclose(fdpp_jax.flat_matmul(x, w), x @ w, atol=1e-5)
    assert [plan.algorithm for plan in toy_backend.calls] == ["flat"]


def test_the_last_backend_refuses_nothing():
    last = backends.BACKENDS[-1]
    assert last.name == "xla"
    assert last.architectures == ()
    for op in (last.attention, last.matmul, last.layer):
        assert op.refuse(None, H200, None) is None
