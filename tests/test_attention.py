"""Every feature of the attention op: against float64, through the recompute, vmap and grad, with a kernel and without.

The kernel here is a stand-in with the kernel's signature that computes by the reference: what is tested is how
the op calls it. The kernel itself has its own tests.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import fdpp_jax
from fdpp_jax import UnifiedMax, device, reference
from fdpp_jax.config import AttentionShape
from fdpp_jax.heuristics import plan_attention
from fdpp_jax.pallas import decode_attention as kernel_module

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, CAPACITY = 8, 4, 64, 64
RECOMPUTES = ["kernel", "launch", "cond"]


def call_arguments(
    seed,
    *,
    lengths=(41, 1, 0, 64),
    query_length=1,
    dtype="float32",
    kv_dtype=None,
    scales=None,
    page_size=None,
    has_offset=False,
    has_sinks=False,
    has_lengths=True,
    **options,
):
    """(query, key, value), keyword arguments: of dot_product_attention and of the oracle."""
    query, key, value = oracle.attention_inputs(
        seed,
        batch=len(lengths),
        query_length=query_length,
        capacity=CAPACITY,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
        lengths=lengths if has_lengths else None,
    )
    arguments = dict(options)
    if has_lengths:
        arguments["key_value_seq_lengths"] = jnp.asarray(lengths)
    if has_offset:
        arguments["query_offset"] = jnp.asarray(lengths) - query_length
    if has_sinks:
        arguments["sinks"] = jnp.linspace(-3.0, 3.0, NUM_HEADS)
    if kv_dtype is not None:
        key, arguments["key_scale"] = oracle.quantised(key, kv_dtype, scales)
        value, arguments["value_scale"] = oracle.quantised(value, kv_dtype, scales)
    if page_size is not None:
        live = lengths if has_lengths else (CAPACITY,) * len(lengths)
        names = ["key_scale", "value_scale"] if scales == "token" else []
        caches = [key, value, *(arguments[name] for name in names)]
        *pools, arguments["page_table"] = oracle.paged(0, caches, live, page_size)
        key, value, *pools = pools
        arguments |= dict(zip(names, pools, strict=True))
    return (query, key, value), arguments


def run(arrays, arguments, softmax=None, **options):
    """The op under jit, as it is used: arrays are traced, all else is static."""
    traced = {name: x for name, x in arguments.items() if isinstance(x, jax.Array)}
    options |= {name: x for name, x in arguments.items() if name not in traced}
    call = jax.jit(lambda softmax, *arrays, **traced: op(*arrays, **traced, **options, softmax=softmax))
    return call(softmax, *arrays, **traced)


op = fdpp_jax.dot_product_attention


def expected_of(arrays, arguments):
    arguments = dict(arguments)
    return oracle.attention(*arrays, arguments.pop("key_value_seq_lengths", None), **arguments)


@pytest.fixture
def kernel_calls(monkeypatch):
    """Makes this an H200 whose decode kernel is a stand-in; the list of its traced calls."""
    calls = []

    def decode_attention(
        query,
        key,
        value,
        lengths,
        phi,
        *,
        scale,
        config,
        query_offset=None,
        is_causal=False,
        local_window_size=None,
        logits_soft_cap=None,
        sinks=None,
        page_table=None,
        key_scale=None,
        value_scale=None,
        recompute=False,
        prior=None,
        interpret=None,
    ):
        assert interpret is None
        assert not (recompute or prior is not None) or config.combine == "cluster"
        calls.append(dict(shape=query.shape, phi=phi, config=config, recompute=recompute, prior=prior))
        attend = functools.partial(
            reference.dot_product_attention,
            query,
            key,
            value,
            lengths,
            scale=scale,
            query_offset=query_offset,
            is_causal=is_causal,
            local_window_size=local_window_size,
            logits_soft_cap=logits_soft_cap,
            sinks=sinks,
            page_table=page_table,
            key_scale=key_scale,
            value_scale=value_scale,
        )
        out = attend(phi=phi)
        if recompute:
            out = jnp.where(jnp.isnan(out), attend(), out)
        return out if prior is None else jnp.where(jnp.isnan(prior), out, prior)

    ours, theirs = (inspect.signature(f).parameters for f in (decode_attention, kernel_module.decode_attention))
    assert list(ours) == list(theirs)
    monkeypatch.setattr(kernel_module, "decode_attention", decode_attention)
    monkeypatch.setattr(device, "current", lambda: device.by_name("H200"))
    return calls


def _features(seed):
    """A reproducible choice of every feature."""
    rng = np.random.default_rng(seed)
    scales = rng.choice([None, None, "head", "token"])
    return dict(
        query_length=int(rng.choice([1, 1, 3, 20])),
        has_lengths=bool(rng.integers(4)),
        has_offset=bool(rng.integers(2)),
        has_sinks=bool(rng.integers(2)),
        is_causal=bool(rng.integers(2)),
        local_window_size=[None, (7, 2), (20, 0)][rng.integers(3)],
        logits_soft_cap=[None, 2.0][rng.integers(2)],
        page_size=[None, 16, 32][rng.integers(3)],
        scale=[None, 0.3][rng.integers(2)],
        scales=scales,
        kv_dtype=None if scales is None else str(rng.choice(["int8", "float8_e4m3fn"])),
    )


@pytest.mark.parametrize("seed", range(12))
def test_any_combination_agrees_with_float64(seed):
    arrays, arguments = call_arguments(seed, **_features(seed))
    softmax = [None, UnifiedMax(1.0), UnifiedMax.bound(), UnifiedMax(100.0)][seed % 4]
    out = run(arrays, arguments, softmax)
    assert oracle.relative_error(out, expected_of(arrays, arguments)) < oracle.TOLERANCE["float32"]


@pytest.mark.parametrize(("dtype", "kv_dtype"), [("bfloat16", "int8"), ("float16", None), ("float16", "float8_e4m3fn")])
def test_16_bit_queries(dtype, kv_dtype):
    arrays, arguments = call_arguments(
        1, dtype=dtype, kv_dtype=kv_dtype, scales=kv_dtype and "token", page_size=16, has_sinks=True
    )
    out = run(arrays, arguments, UnifiedMax())
    assert out.dtype == dtype
    assert oracle.relative_error(out, expected_of(arrays, arguments)) < oracle.TOLERANCE[dtype]


@pytest.mark.parametrize("softmax", [None, UnifiedMax(), UnifiedMax.bound()])
def test_a_row_that_sees_no_key_is_zero_also_with_sinks(softmax):
    arrays, arguments = call_arguments(
        0, query_length=4, lengths=(0, 2, 64, 3), has_offset=True, has_sinks=True, is_causal=True
    )
    out = run(arrays, arguments, softmax)
    saw_a_key = np.arange(4) + np.asarray(arguments["query_offset"])[:, None] >= 0
    saw_a_key[0] = False
    np.testing.assert_array_equal(np.asarray(out).any(axis=(2, 3)), saw_a_key)


def test_a_draft_is_decoded_as_token_by_token():
    """is_causal with query_offset = lengths - T: each query is a decode step of its own."""
    arrays, arguments = call_arguments(2, query_length=3, lengths=(40, 7, 3, 64), has_offset=True, is_causal=True)
    query, key, value = arrays
    out = run(arrays, arguments)
    for t in range(3):
        lengths = np.asarray(arguments["key_value_seq_lengths"]) - 2 + t
        np.testing.assert_allclose(out[:, t], oracle.attention(query[:, t], key, value, lengths), atol=1e-5)


@pytest.mark.parametrize("query_length", [1, 3])
def test_dead_queries_give_zeros_and_may_be_nan(kernel_calls, query_length):
    (query, key, value), arguments = call_arguments(0, query_length=query_length, dtype="bfloat16")
    live = jnp.array([query_length, 0, 1, query_length])
    dead = (jnp.arange(query_length) >= live[:, None])[:, :, None, None]
    expected = np.where(dead, 0.0, expected_of((query, key, value), arguments))
    for implementation in ("mosaic_gpu", "xla"):
        poisoned = (jnp.where(dead, jnp.nan, query), key, value)
        options = dict(query_seq_lengths=live, **arguments)
        out = run(poisoned, options, UnifiedMax.bound(), implementation=implementation)
        assert oracle.relative_error(out, expected) < oracle.TOLERANCE["bfloat16"]
        assert not np.asarray(out)[np.broadcast_to(dead, out.shape)].any()


# ---- recompute


@pytest.mark.parametrize("with_kernel", [False, True], ids=["reference", "kernel"])
@pytest.mark.parametrize("recompute", [None, *RECOMPUTES])
def test_recompute_is_exact_wherever_it_is(request, with_kernel, recompute):
    if with_kernel:
        request.getfixturevalue("kernel_calls")
    (query, key, value), arguments = call_arguments(
        3, query_length=2, dtype="bfloat16", page_size=16, has_offset=True, has_sinks=True, is_causal=True
    )
    expected = expected_of((query, key, value), arguments)
    is_causal = arguments.pop("is_causal")
    call = jax.jit(functools.partial(op, is_causal=is_causal))
    # Nothing fails; overflow; underflow; both, and heads that do not fail.
    for phi in ([1.0] * 8, [-150.0] * 8, [150.0] * 8, [-150.0, 150.0] + 6 * [1.0]):
        out = call(query, key, value, **arguments, softmax=UnifiedMax(jnp.array(phi), recompute))
        assert oracle.relative_error(out, expected) < oracle.TOLERANCE["bfloat16"]
    assert call._cache_size() == 1


@pytest.mark.parametrize("recompute", [None, *RECOMPUTES])
def test_recompute_is_where_it_was_asked_for(kernel_calls, recompute):
    arrays, arguments = call_arguments(0, dtype="bfloat16")
    attend = functools.partial(op, softmax=UnifiedMax(1.0, recompute))
    text = str(jax.make_jaxpr(attend)(*arrays, **arguments))
    first, *others = kernel_calls
    assert first["phi"].shape == ()
    assert first["recompute"] == (recompute in (None, "kernel"))
    assert [(call["phi"], call["prior"] is not None) for call in others] == {
        "launch": [(None, True)],
        "cond": [(None, False)],
    }.get(recompute, [])
    assert text.count("cond[") == (recompute == "cond")
    assert all(call["config"] == first["config"] for call in others)


@pytest.mark.parametrize("recompute", [None, *RECOMPUTES])
def test_a_recompute_that_needs_a_cluster_is_planned_with_one(kernel_calls, recompute):
    shape = AttentionShape(1, 1, 16384, 4, 1, 64)
    plan = plan_attention(shape, "H200")
    assert (plan.config.combine, plan.recompute) == ("launch", "cond")
    query = jax.ShapeDtypeStruct((1, 1, 4, 64), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, 16384, 1, 64), jnp.bfloat16)
    jax.eval_shape(functools.partial(op, softmax=UnifiedMax(1.0, recompute)), query, key, key)
    for call in kernel_calls:
        if recompute in ("kernel", "launch"):
            assert call["config"].combine == "cluster"
            assert call["config"].num_splits <= 8
        else:
            assert call["config"] == plan.config


def test_online_softmax_is_one_call(kernel_calls):
    arrays, arguments = call_arguments(0, dtype="float16")
    jax.eval_shape(op, *arrays, **arguments)
    (call,) = kernel_calls
    assert call["phi"] is None
    assert not call["recompute"]


@pytest.mark.parametrize("with_kernel", [False, True], ids=["reference", "kernel"])
def test_the_unchecked_op_leaves_rows_outside_the_window_nan(request, with_kernel):
    if with_kernel:
        request.getfixturevalue("kernel_calls")
    arrays, arguments = call_arguments(0, dtype="bfloat16")
    arrays = tuple(jnp.nan_to_num(x) for x in arrays)
    softmax = UnifiedMax(jnp.array([-150.0] + 7 * [1.0]))
    out = fdpp_jax.ops.unchecked_decode_attention(*arrays, **arguments, softmax=softmax)
    is_nan = np.isnan(np.asarray(out, np.float32)).all(axis=-1)[:, 0]  # [B, N]
    np.testing.assert_array_equal(is_nan[:, 0], [True, True, False, True])  # the third has no key
    assert not is_nan[:, 1:].any()


def test_a_given_key_norm_saves_reading_the_keys(kernel_calls):
    arrays, arguments = call_arguments(0, dtype="bfloat16", kv_dtype="int8", scales="head", page_size=16)
    norms = jnp.linalg.norm(arrays[1].astype(jnp.float32), axis=-1).max(axis=(0, 1)) * arguments["key_scale"]
    given = jnp.broadcast_to(norms, (4, NUM_KV_HEADS))  # all pages: at least those of the live keys
    texts = {}
    for name, key_max_norm in (("computed", None), ("given", given)):
        call = functools.partial(op, key_max_norm=key_max_norm, softmax=UnifiedMax.bound())
        texts[name] = str(jax.make_jaxpr(call)(*arrays, **arguments))
        assert kernel_calls[-1]["phi"].shape == (4, NUM_HEADS)
    pool = f"f32[{','.join(map(str, arrays[1].shape))}]"  # the keys in float32
    assert texts["computed"].count(pool) > texts["given"].count(pool)


# ---- transformations


MAPPED = {
    "contiguous": ({}, {"query", "key", "value", "key_value_seq_lengths", "query_offset"}),
    "one cache": ({}, {"query", "key_value_seq_lengths"}),
    "pools": ({"page_size": 16}, {"query", "key", "value", "page_table", "key_value_seq_lengths"}),
    "one pool": ({"page_size": 16}, {"query", "page_table", "key_value_seq_lengths"}),
    "pools, one table": ({"page_size": 16}, {"key", "value"}),
    "scales of tokens": (
        {"kv_dtype": "int8", "scales": "token"},
        {"query", "key", "value", "key_scale", "value_scale"},
    ),
    "pools of tokens' scales": ({"kv_dtype": "int8", "scales": "token", "page_size": 16}, {"key", "value_scale"}),
    "one scale": ({"kv_dtype": "int8", "scales": "head"}, {"query", "key", "value"}),
    "scales of heads": ({"kv_dtype": "int8", "scales": "head"}, {"query", "key_scale"}),
    "sinks": ({}, {"query", "sinks"}),
    "phi": ({}, {"query", "phi"}),
    "phi of rows": ({}, {"query", "rows of phi"}),
}


@pytest.mark.parametrize(
    ("case", "with_kernel"), [*((case, True) for case in MAPPED), ("pools", False), ("scales of tokens", False)]
)
def test_vmap_is_a_loop(request, case, with_kernel):
    features, mapped = MAPPED[case]
    calls = request.getfixturevalue("kernel_calls") if with_kernel else []
    both = []
    for seed in range(2):
        arrays, arguments = call_arguments(seed, dtype="bfloat16", has_offset=True, has_sinks=True, **features)
        arguments |= dict(zip(("query", "key", "value"), arrays, strict=True))
        arguments["sinks"] += seed
        arguments["phi"] = jnp.float32(seed)
        arguments["rows of phi"] = jnp.linspace(-90.0 * seed, 1.0, NUM_HEADS)
        both.append({name: x if name in mapped else (both or [arguments])[0][name] for name, x in arguments.items()})

    def attend(arguments):
        phi, rows = arguments.pop("phi"), arguments.pop("rows of phi")
        return op(**arguments, local_window_size=(20, 0), softmax=UnifiedMax(rows if "rows of phi" in mapped else phi))

    axes = {name: 0 if name in mapped else None for name in both[0]}
    stacked = {name: jnp.stack([one[name] for one in both]) if name in mapped else x for name, x in both[0].items()}
    out = jax.jit(jax.vmap(attend, (axes,)))(stacked)
    for i, one in enumerate(both):
        arguments = {name: x for name, x in one.items() if "phi" not in name} | {"local_window_size": (20, 0)}
        expected = expected_of([arguments.pop(name) for name in ("query", "key", "value")], arguments)
        assert oracle.relative_error(out[i], expected) < oracle.TOLERANCE["bfloat16"]
    if with_kernel:  # the first trace is that of the call before it is mapped
        assert calls[-1]["shape"][0] == (4 if case in ("sinks", "scales of heads") else 8)
        assert calls[-1]["phi"].ndim == (2 if "phi" in case else 0)


@pytest.mark.parametrize(
    ("features", "softmax"),
    [
        (dict(has_offset=True, query_length=3, is_causal=True, has_sinks=True), UnifiedMax(1.0)),
        (dict(page_size=16, logits_soft_cap=3.0), UnifiedMax.bound("cond")),
        (dict(kv_dtype="int8", scales="token", has_sinks=True), UnifiedMax(1.0, "launch")),
        (dict(kv_dtype="int8", scales="head", page_size=16), None),
    ],
    ids=["draft", "pages", "int8", "int8 pages"],
)
def test_gradients_with_a_kernel_are_those_without(kernel_calls, features, softmax):
    arrays, arguments = call_arguments(0, lengths=(41, 9, 64, 1), dtype="bfloat16", **features)
    query, *cache = (x if x.dtype == jnp.int8 else jnp.nan_to_num(x) for x in arrays)
    arguments = {name: jnp.nan_to_num(x) if "scale" in name else x for name, x in arguments.items()}
    floats = {"query": query, **{name: arguments.pop(name) for name in ("sinks", "key_scale") if name in arguments}}
    if cache[0].dtype != jnp.int8:
        floats |= {"key": cache[0], "value": cache[1]}
    fixed = dict(zip(("key", "value"), cache, strict=True)) | arguments

    def loss(floats, implementation):
        out = op(**(fixed | floats), softmax=softmax, implementation=implementation)
        return (out.astype(jnp.float32) ** 2).sum()

    ours, theirs = (jax.jit(jax.grad(loss), static_argnums=1)(floats, name) for name in ("mosaic_gpu", "xla"))
    assert kernel_calls
    for name, grad in theirs.items():
        assert oracle.relative_error(grad, 0 * grad) > 0, name
        assert oracle.relative_error(ours[name], grad) < 2 * oracle.TOLERANCE["bfloat16"], name


def test_gradient_of_sinks_is_right():
    (query, key, value), arguments = call_arguments(0, lengths=(64,) * 4, has_sinks=True)

    grad = jax.jit(jax.grad(lambda sinks: op(query, key, value, sinks=sinks, softmax=UnifiedMax()).sum()))(
        arguments["sinks"]
    )
    step = 1e-3
    for n in (0, 7):
        ends = [oracle.attention(query, key, value, sinks=arguments["sinks"].at[n].add(h)).sum() for h in (step, -step)]
        np.testing.assert_allclose(grad[n], (ends[0] - ends[1]) / (2 * step), rtol=1e-3, atol=1e-5)
