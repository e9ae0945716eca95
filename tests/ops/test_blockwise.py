"""Attention in blocks, and its gradients: against the float64 oracle, and where the reference takes its turn."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from attention_case import call_arguments, op, oracle_arguments
from hopper_case import collectives, mesh, put

from fdpp_jax import UnifiedMax, heuristics
from fdpp_jax.ops import blockwise
from fdpp_jax.plans import device, xla
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions

ALL_SEE = (41, 27, 33, 64)  # lengths with which each of the last queries sees a key
CASES = {
    "all keys": dict(has_lengths=False),
    "causal pages": dict(is_causal=True, has_offset=True, page_size=16, lengths=ALL_SEE),
    "window": dict(starts=(9, 0, 0, 40), lengths=(41, 1, 0, 64), local_window_size=(20, 3), logits_soft_cap=2.0),
    "sinks, bias, mask": dict(lengths=ALL_SEE, has_sinks=True, logits_soft_cap=5.0, bias=(4, 8, 27, 64), mask=(64,)),
    "int8, one bias": dict(kv_dtype="int8", scales="token", lengths=ALL_SEE, bias=(1, 8, 1, 64), mask=(8, 27, 1)),
}


def _plan_anew():
    jax.clear_caches()
    heuristics.plan_attention.cache_clear()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks of 8 queries and 24 keys: many, and last ones that are not whole."""
    monkeypatch.setattr(blockwise, "_block_sizes", lambda num_heads, query_length, capacity: (8, min(24, capacity)))
    monkeypatch.setattr(xla, "MAX_SCORE_BYTES", 1000)
    _plan_anew()
    yield
    _plan_anew()


def _case(name, dtype="float32"):
    features = dict(CASES[name])
    forms = {extra: features.pop(extra) for extra in ("bias", "mask") if extra in features}
    arrays, arguments = call_arguments(0, query_length=27, dtype=dtype, **features)
    rng = np.random.default_rng(1)
    for extra, shape in forms.items():
        x = rng.standard_normal(shape, np.float32)
        arguments[extra] = jnp.asarray(np.where(x < -2, -np.inf, x) if extra == "bias" else x < 1)
    return dict(zip(("query", "key", "value"), arrays, strict=True)) | arguments


def _split(given):
    """The arrays that have a gradient, and all else."""
    is_float = {k: isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating) for k, x in given.items()}
    return tuple({k: x for k, x in given.items() if is_float[k] == wanted} for wanted in (True, False))


def _loss(results, weights, xp):
    out, log_sum = results
    return (out * weights[0]).sum() + xp.where(xp.isneginf(log_sum), 0.0, log_sum * weights[1]).sum()


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_the_oracles(name):
    """NaN in what no query sees is in none of them."""
    floats, fixed = _split(_case(name))
    if "key_scale" in floats:  # its gradient is a product with the keys
        floats |= {k: jnp.nan_to_num(x) for k, x in floats.items() if "scale" in k}
    rng = np.random.default_rng(2)
    weights = [rng.standard_normal(floats["query"].shape[:n], np.float32) for n in (4, 3)]

    def loss(floats):
        results = op(**fixed, **floats, return_residual=True)
        return _loss(results, weights, jnp), results

    grads, results = jax.jit(jax.grad(loss, has_aux=True))(floats)
    expected = oracle.attention_and_log_sum(**oracle_arguments(fixed | floats))
    assert oracle.relative_error(results[0], expected[0]) < oracle.TOLERANCE["float32"]
    np.testing.assert_allclose(results[1], expected[1], rtol=1e-5, atol=1e-5)
    for k, x in floats.items():
        direction = rng.standard_normal(x.shape) * np.isfinite(x)
        ends = []
        for step in (1e-4, -1e-4):
            moved = np.asarray(x, np.float64) + step * direction
            with np.errstate(invalid="ignore"):
                results = oracle.attention_and_log_sum(**oracle_arguments(fixed | floats | {k: moved}))
            ends.append(_loss(results, weights, np))
        assert jnp.isfinite(grads[k]).all(), k
        np.testing.assert_allclose(np.vdot(grads[k], direction), (ends[0] - ends[1]) / 2e-4, rtol=1e-4, atol=1e-3)


def test_bfloat16():
    """Weights and gradients of scores are rounded once."""
    given = _case("window", "bfloat16") | {"scale": jnp.float32(0.3)}
    floats, fixed = _split(given)
    exact = {k: jnp.nan_to_num(x).astype(jnp.float32) for k, x in floats.items()}

    def loss(floats):
        out = op(**fixed, **floats)
        return (out.astype(jnp.float32) ** 2).sum(), out

    (ours, out), (theirs, expected) = (jax.jit(jax.grad(loss, has_aux=True))(x) for x in (floats, exact))
    assert oracle.relative_error(out, expected) < oracle.TOLERANCE["bfloat16"]
    for k, grad in theirs.items():
        assert ours[k].dtype == floats[k].dtype
        assert oracle.relative_error(ours[k], grad) < 2 * oracle.TOLERANCE["bfloat16"], k


def test_what_is_not_asked_for_is_not_computed():
    """And norms of keys, which do not change the answer, have a gradient of zero."""
    (query, key, value), _ = call_arguments(0, query_length=27, has_lengths=False)
    norm = jnp.full((4, 4), 20.0)

    def loss(query, norm):
        return op(query, key, value, key_max_norm=norm, softmax=UnifiedMax.bound()).sum()

    traced = jax.jit(jax.grad(loss, (0, 1))).trace(query, norm)
    assert not jax.jit(jax.grad(loss, (0, 1)))(query, norm)[1].any()
    text = traced.lower().as_text()
    assert "4x27x8x64xf32" in text  # of the query
    # The results' two products. The gradient's: the same, then scores, their gradients, and those of the query.
    assert text.count("stablehlo.dot_general") == 2 + 5


def test_few_queries_of_many_heads_are_in_blocks_too():
    """With which a group has more rows than 64: their scores are no small part of the cache."""
    (query, key, value), _ = call_arguments(0, query_length=9, has_lengths=False)
    given = query, key[:, :, :1], value[:, :, :1]
    for softmax in (None, UnifiedMax(phi=2.0)):
        out = jax.jit(lambda *arrays, softmax=softmax: op(*arrays, softmax=softmax))
        assert "while" in out.lower(*given).as_text()
        assert oracle.relative_error(out(*given), oracle.attention(*given)) < oracle.TOLERANCE["float32"]


def _has_all_scores(text):
    """Whether a program has float32 [..., T, S]."""
    return "x27x64xf32" in text


def test_no_array_has_all_scores(monkeypatch):
    (query, key, value), _ = call_arguments(0, query_length=27, has_lengths=False)
    loss = lambda *arrays: op(*arrays, is_causal=True).sum()  # noqa: E731
    assert not _has_all_scores(jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(query, key, value).as_text())
    monkeypatch.setattr(xla, "MAX_SCORE_BYTES", 4 * 4 * 8 * 27 * 64)
    _plan_anew()
    text = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(query, key, value).as_text()
    assert _has_all_scores(text)
    assert "while" not in text


def test_the_gradient_behind_the_prefill_kernel():
    (query, key, value), _ = call_arguments(0, query_length=27, has_lengths=False, dtype="bfloat16")

    def loss(*arrays):
        return op(*arrays, logits_soft_cap=3.0, softmax=UnifiedMax()).astype(jnp.float32).sum()

    with device.target("H200"):
        traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(query, key, value)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert not _has_all_scores(text)


@pytest.mark.parametrize("softmax", [None, UnifiedMax()], ids=str)
def test_calls_that_vmap_makes_are_one(softmax, monkeypatch):
    """Also where one of them alone would be small."""
    monkeypatch.setattr(xla, "MAX_SCORE_BYTES", 4 * 4 * 8 * 27 * 64)
    _plan_anew()
    (query, key, value), arguments = call_arguments(0, query_length=27)
    queries = jnp.stack([query, -query])
    attend = lambda query: op(query, key, value, softmax=softmax, **arguments)  # noqa: E731
    mapped = jax.jit(jax.vmap(attend))
    assert not _has_all_scores(mapped.lower(queries).as_text())
    expected = oracle.attention(-query, key, value, **oracle_arguments(arguments))
    assert oracle.relative_error(mapped(queries)[1], expected) < oracle.TOLERANCE["float32"]
    monkeypatch.setattr(xla, "MAX_SCORE_BYTES", 2 * 4 * 4 * 8 * 27 * 64)
    _plan_anew()
    assert softmax is not None or _has_all_scores(jax.jit(jax.vmap(attend)).lower(queries).as_text())


ARRAYS = "query", "key", "value"


def _mapped_loss(attend, axes):
    """grad of vmap, over several axes the innermost last."""
    for axis in reversed(axes):
        attend = jax.vmap(attend, axis)
    return lambda *arrays: (attend(*arrays) ** 2).sum()


def _looped_loss(attend, axes):
    """The same without vmap."""
    if not axes:
        return lambda *arrays: (attend(*arrays) ** 2).sum()
    axis, *inner = axes

    def loss(*arrays):
        size = next(x.shape[a] for x, a in zip(arrays, axis, strict=True) if a is not None)
        one = lambda i: [x if a is None else jnp.take(x, i, a) for x, a in zip(arrays, axis, strict=True)]  # noqa: E731
        return sum(_looped_loss(attend, inner)(*one(i)) for i in range(size))

    return loss


@pytest.mark.parametrize(
    "axes",
    [
        pytest.param([(0, 0, 0, 0)], id="all", marks=pytest.mark.slow),
        pytest.param([(2, None, 1, 0)], id="shared key"),
        pytest.param([(None, 3, None, None)], id="key alone"),
        pytest.param([(0, 0, None, 0), (1, 0, 2, None)], id="two maps", marks=pytest.mark.slow),
    ],
)
def test_the_gradient_of_a_mapped_call(axes, monkeypatch):
    """In blocks too, though one call alone would be small."""
    monkeypatch.setattr(xla, "MAX_SCORE_BYTES", 4 * 4 * 8 * 27 * 64)
    _plan_anew()
    given, _ = call_arguments(0, query_length=27, has_lengths=False)
    arrays = [*given, jnp.asarray([41, 27, 33, 64])]
    for axis in reversed(axes):
        arrays = [
            x if a is None else jnp.stack([x, x // 2 if x.ndim == 1 else -x if x.ndim % 2 else x / 2, x], a)
            for x, a in zip(arrays, axis, strict=True)
        ]

    def attend(query, key, value, lengths):
        return op(query, key, value, key_value_seq_lengths=lengths, is_causal=True)

    grads = jax.jit(jax.grad(_mapped_loss(attend, axes), (0, 1, 2)))
    assert not _has_all_scores(grads.lower(*arrays).as_text())
    monkeypatch.undo()
    _plan_anew()
    expected = jax.grad(_looped_loss(attend, axes), (0, 1, 2))(*arrays)
    for name, ours, theirs in zip(ARRAYS, grads(*arrays), expected, strict=True):
        assert oracle.relative_error(ours, theirs) < 2 * oracle.TOLERANCE["float32"], name


@pytest.mark.parametrize("lengths", [None, ALL_SEE], ids=["all keys", "lengths"])
def test_the_mapped_gradient_counts_all_scores(lengths, monkeypatch):
    """Also of vmap of grad; blocks shrink with the number of calls, and one loop serves all of them."""
    (query, key, value), _ = call_arguments(0, query_length=27, has_lengths=False)
    arrays = [jnp.stack([x, x]) for x in (query, key, value)]
    if lengths is not None:
        arrays.append(jnp.asarray([lengths, lengths[::-1]]))
    monkeypatch.setattr(xla, "MAX_SCORE_BYTES", 4 * 4 * 8 * 27 * 64)
    seen = []
    monkeypatch.setattr(blockwise, "_block_sizes", lambda *sizes: seen.append(sizes) or (8, 24))
    _plan_anew()
    loss = lambda q, k, v, *n: op(q, k, v, key_value_seq_lengths=n[0] if n else None).sum()  # noqa: E731
    text = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2)))).lower(*arrays).as_text()
    assert not _has_all_scores(text)
    assert seen == [(2 * 4 * 8, 27, 64)]
    conditions = [part.split("stablehlo.return")[0] for part in text.split(" cond {")[1:]]
    assert conditions
    assert not any("reduce" in condition for condition in conditions)  # whether any of the calls goes on


def test_the_reference_is_not_held_until_its_gradient(monkeypatch):
    """A gradient computes scores again, so that those of all layers are not held at once."""
    monkeypatch.undo()
    x = jax.ShapeDtypeStruct((1, 512, 4, 64), jnp.float32)

    def held(num_layers):
        def loss(x):
            for _ in range(num_layers):
                x = x + op(x, x, x)
            return x.sum()

        return jax.jit(jax.grad(loss)).lower(x).compile().memory_analysis().temp_size_in_bytes

    scores = 4 * 4 * 512 * 512
    assert held(6) - held(2) < scores


def test_other_derivatives_say_what_they_hold():
    (query, key, value), _ = call_arguments(0, query_length=27, has_lengths=False)
    attend = lambda query: op(query, key, value)  # noqa: E731
    message = r"holds all scores \[4, 8, 27, 64\] of attention at once, 221184 bytes: derivatives in forward mode"
    with pytest.warns(UserWarning, match=message):
        jax.jit(lambda query: jax.jvp(attend, (query,), (query,))[1]).lower(query)
    queries = jnp.stack([query] * 3)
    with pytest.warns(UserWarning, match=r"scores \[12, 8, 27, 64\] of attention at once, 663552 bytes"):
        jax.jit(jax.vmap(lambda query: jax.jvp(attend, (query,), (query,))[1])).lower(queries)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(jax.grad(lambda query: attend(query).sum())).lower(query)
        jax.jit(jax.grad(lambda query: jax.vmap(attend)(query).sum())).lower(queries)


def test_shards_exchange_no_arrays():
    (query, key, value), arguments = call_arguments(
        0, query_length=27, lengths=ALL_SEE, has_offset=True, has_sinks=True, is_causal=True
    )
    key, value = jnp.nan_to_num(key), jnp.nan_to_num(value)

    def loss(query, key, value, lengths, sinks):
        given = dict(key_value_seq_lengths=lengths, query_offset=lengths - 27, sinks=sinks, is_causal=True)
        return (op(query, key, value, **given) ** 2).sum()

    arrays = query, key, value, arguments["key_value_seq_lengths"], arguments["sinks"]
    specs = *[("a", None, "b")] * 3, ("a",), ("b",)
    over = mesh()
    sharded = [put(over, x, *spec) for x, spec in zip(arrays, specs, strict=True)]
    grads = jax.jit(jax.grad(loss, (0, 1, 2, 4)))
    compiled = grads.lower(*sharded).compile()
    # Which blocks a query of any sequence sees; the gradient of the sinks, which all sequences share.
    assert collectives(compiled) == {"all-reduce": 3}
    for ours, theirs in zip(compiled(*sharded), grads(*arrays), strict=True):
        assert oracle.relative_error(ours, theirs) < 2 * oracle.TOLERANCE["float32"]


def test_block_sizes(monkeypatch):
    monkeypatch.undo()
    sizes = blockwise._block_sizes
    assert sizes(8, 300, 5000) == (300, 1024)
    assert sizes(32, 16384, 16384) == (512, 1024)
    assert sizes(8 * 32, 4096, 4096) == (256, 256)
    assert sizes(4096 * 32, 4096, 4096) == (64, 64)


@pytest.mark.gpu
def test_gradients_of_a_long_prompt_are_cudnns(monkeypatch):
    """With blocks as they are."""
    monkeypatch.undo()
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (1, 8192, 16, 128), (1, 8192, 8, 128), (1, 8192, 8, 128), (1, 8192, 16, 128)
    *given, grad = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
    cudnn = lambda *x: jax.nn.dot_product_attention(*x, is_causal=True, implementation="cudnn")  # noqa: E731
    expected = jax.jit(lambda *x: jax.vjp(cudnn, *x)[1](grad))(*given)
    names = ("query", "key", "value")

    def ours(*x):
        return blockwise.gradients(AttentionArrays(*x), AttentionOptions(128**-0.5, is_causal=True), names, [grad])

    compiled = jax.jit(ours).lower(*given).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 30  # of 4 GiB of scores
    found = compiled(*given)
    for name, theirs in zip(names, expected, strict=True):
        assert oracle.relative_error(found[name], theirs) < 2 * oracle.TOLERANCE["bfloat16"], name
