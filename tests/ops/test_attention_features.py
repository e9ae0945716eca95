"""Every feature of the attention op: against float64, through the recompute, vmap and grad, with a kernel and without.

The kernel here is a stand-in with the kernel's signature that asks the float64 oracle: what is tested is how the op
calls it. The kernel itself has its own tests.
"""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import fdpp_jax
from fdpp_jax import UnifiedMax, heuristics, unified_max
from fdpp_jax.pallas import run as pallas_run
from fdpp_jax.plans import device
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions, attention_shape

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
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((len(lengths), query_length, NUM_HEADS, HEAD_DIM), np.float32)
    key, value = rng.standard_normal((2, len(lengths), CAPACITY, NUM_KV_HEADS, HEAD_DIM), np.float32)
    if has_lengths:
        dead = np.arange(CAPACITY) >= np.array(lengths)[:, None]
        key[dead] = value[dead] = np.nan
    query, key, value = (jnp.asarray(x.astype(jnp.dtype(dtype))) for x in (query, key, value))
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
def kernel_calls(request, monkeypatch):
    """Makes this an H200 whose decode kernel is a stand-in; the list of its traced calls."""
    calls = []

    def attend(
        arrays, options, config, *, recompute=False, prior=None, redone=None, starts_early=False, interpret=None
    ):
        assert interpret is None
        assert not (recompute or prior is not None) or config.combine == "kernel"
        query, key, phi = arrays.query, arrays.key, arrays.phi
        calls.append(
            dict(shape=query.shape, phi=phi, config=config, recompute=recompute, prior=prior, starts_early=starts_early)
        )

        def compute(phi, prior, redone, arrays):
            arrays = jax.tree.map(np.asarray, arrays)
            out, log_sum = oracle.attention_and_log_sum(**arrays, **dataclasses.asdict(options))
            failed = np.zeros(log_sum.shape, bool) if prior is None else np.isnan(prior).any(axis=-1)  # [B, T, N]
            if phi is not None:
                low, high = np.log(unified_max.window(query.dtype, capacity))
                log_den = log_sum - np.broadcast_to(phi, (len(out), out.shape[2]))[:, None]
                failed |= np.isfinite(log_sum) & ~((log_den >= low) & (log_den <= high))
                if not recompute:
                    out[failed] = np.nan
            out = out.astype(query.dtype)
            out = out if prior is None else np.where(np.isnan(prior), out, prior)
            by_head = failed.any(axis=1).reshape(len(out), key.shape[2], -1)  # [B, K, G]
            return out if redone is None else (out, np.where(by_head.any(axis=2), 1, redone))

        capacity, arrays = arrays.capacity, arrays._asdict()
        del arrays["phi"], arrays["scale"]
        result = jax.ShapeDtypeStruct(query.shape, query.dtype)
        result = result if redone is None else (result, jax.ShapeDtypeStruct(redone.shape, redone.dtype))
        return jax.pure_callback(compute, result, phi, prior, redone, arrays)

    ours, theirs = (inspect.signature(f).parameters for f in (attend, pallas_run.attend))
    assert list(ours) == list(theirs)
    monkeypatch.setattr(pallas_run, "attend", attend)
    monkeypatch.setattr(device, "lowered_for", lambda platform, planned: planned)
    # A device of the test's own: what JAX has compiled with another test's stand-in is not taken.
    with device.target(dataclasses.replace(device.by_name("H200"), kind=request.node.name)):
        yield calls


COMBINATIONS = [
    (
        UnifiedMax(1.0),
        dict(has_offset=True, local_window_size=(20, 0), has_sinks=True, page_size=16, kv_dtype="int8", scales="token"),
    ),
    (
        UnifiedMax.bound(),
        dict(
            query_length=3,
            has_offset=True,
            is_causal=True,
            local_window_size=(7, 2),
            logits_soft_cap=2.0,
            has_sinks=True,
            page_size=32,
        ),
    ),
    (
        UnifiedMax(100.0),  # every row is recomputed
        dict(
            query_length=3,
            has_lengths=False,
            logits_soft_cap=2.0,
            scale=0.3,
            page_size=16,
            kv_dtype="float8_e4m3fn",
            scales="head",
        ),
    ),
    (UnifiedMax.bound(), dict(has_offset=True, is_causal=True, kv_dtype="float8_e4m3fn", scales="token")),
    (None, dict(query_length=20, is_causal=True, has_sinks=True, kv_dtype="int8", scales="head")),
    (None, dict(query_length=20, has_offset=True, has_lengths=False, local_window_size=(7, 2))),
]


@pytest.mark.parametrize("cell", range(len(COMBINATIONS)))
def test_combined_features_agree_with_float64(cell):
    softmax, features = COMBINATIONS[cell]
    arrays, arguments = call_arguments(cell, **features)
    out = run(arrays, arguments, softmax)
    assert oracle.relative_error(out, expected_of(arrays, arguments)) < oracle.TOLERANCE["float32"]


@pytest.mark.parametrize(("dtype", "kv_dtype"), [("bfloat16", None), ("float16", "float8_e4m3fn")])
def test_16_bit_queries(dtype, kv_dtype):
    arrays, arguments = call_arguments(
        1, dtype=dtype, kv_dtype=kv_dtype, scales=kv_dtype and "token", page_size=16, has_sinks=True
    )
    out = run(arrays, arguments, UnifiedMax())
    assert out.dtype == dtype
    assert oracle.relative_error(out, expected_of(arrays, arguments)) < oracle.TOLERANCE[dtype]


@pytest.mark.parametrize("softmax", [None, UnifiedMax.bound()])
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


def test_dead_queries_give_zeros_and_may_be_nan(kernel_calls):
    (query, key, value), arguments = call_arguments(0, query_length=3, dtype="bfloat16")
    live = jnp.array([3, 0, 1, 3])
    dead = (jnp.arange(3) >= live[:, None])[:, :, None, None]
    expected = np.where(dead, 0.0, expected_of((query, key, value), arguments))
    for implementation in ("mosaic_gpu", "xla"):
        poisoned = (jnp.where(dead, jnp.nan, query), key, value)
        options = dict(query_seq_lengths=live, **arguments)
        out = run(poisoned, options, UnifiedMax.bound(), implementation=implementation)
        assert oracle.relative_error(out, expected) < oracle.TOLERANCE["bfloat16"]
        assert not np.asarray(out)[np.broadcast_to(dead, out.shape)].any()


# ---- recompute


@pytest.mark.parametrize(
    ("recompute", "with_kernel"), [(None, False), *((recompute, True) for recompute in (None, *RECOMPUTES))]
)
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


def test_a_sum_of_values_that_overflows_is_recomputed_too():
    """Its denominator is inside the window: weights of 1e16 meet values of 1e30."""
    (query, key, value), arguments = call_arguments(0, lengths=(64, 3))
    value = 1e30 * abs(value)
    out = run((query, key, value), arguments, UnifiedMax(-37.0))
    assert oracle.relative_error(out, expected_of((query, key, value), arguments)) < oracle.TOLERANCE["float32"]


@pytest.mark.parametrize("recompute", [None, *RECOMPUTES])
def test_recompute_is_where_it_was_asked_for(kernel_calls, recompute):
    arrays, arguments = call_arguments(0, dtype="bfloat16")
    attend = functools.partial(op, softmax=UnifiedMax(1.0, recompute))
    text = jax.jit(attend).lower(*arrays, **arguments).as_text()
    first, *others = kernel_calls
    assert first["phi"].shape == ()
    shape = attention_shape(AttentionArrays(*arrays), AttentionOptions(1.0), is_online=True)
    planned = heuristics.plan_attention(shape, "H200")
    assert planned.recompute == "kernel"
    assert first["config"] == planned.config
    assert first["recompute"] == (recompute in (None, "kernel"))
    assert [(call["phi"], call["prior"] is not None) for call in others] == {
        "launch": [(None, True)],
        "cond": [(None, False)],
    }.get(recompute, [])
    assert text.count("stablehlo.case") == (recompute == "cond")
    assert all(call["config"] == first["config"] for call in others)
    assert not first["starts_early"]


def test_online_softmax_is_one_call(kernel_calls):
    arrays, arguments = call_arguments(0, dtype="float16")
    jax.jit(op).lower(*arrays, **arguments)
    (call,) = kernel_calls
    assert call["phi"] is None
    assert not call["recompute"]


@pytest.mark.parametrize("with_kernel", [False, True], ids=["reference", "kernel"])
def test_the_unchecked_op_leaves_rows_outside_the_window_nan(request, with_kernel):
    calls = request.getfixturevalue("kernel_calls") if with_kernel else []
    arrays, arguments = call_arguments(0, dtype="bfloat16")
    arrays = tuple(jnp.nan_to_num(x) for x in arrays)
    softmax = UnifiedMax(jnp.array([-150.0] + 7 * [1.0]))
    implementation = None if with_kernel else "xla"
    arrays = AttentionArrays(*arrays, lengths=arguments["key_value_seq_lengths"])
    op = functools.partial(
        fdpp_jax.ops.unchecked_decode_attention,
        options=AttentionOptions(HEAD_DIM**-0.5),
        implementation=implementation,
        starts_early=True,
    )
    call = jax.jit(op)
    out, redone = call(arrays, softmax=softmax)
    assert redone is None
    assert len(calls) == with_kernel
    assert all(call["starts_early"] for call in calls)
    is_nan = np.isnan(np.asarray(out, np.float32)).all(axis=-1)[:, 0]  # [B, N]
    np.testing.assert_array_equal(is_nan[:, 0], [True, True, False, True])  # the third has no key
    assert not is_nan[:, 1:].any()
    # Asked to mark what is redone, the kernel redoes it, unless the policy says where else.
    expected = np.asarray(call(arrays)[0], np.float32)
    for recompute in (None, *RECOMPUTES):
        softmax = UnifiedMax(softmax.phi, recompute)
        earlier = jnp.full((4, NUM_KV_HEADS), 7, jnp.int32)
        out, redone = call(arrays, softmax=softmax, redone=earlier)
        if not with_kernel or recompute == "cond":
            np.testing.assert_array_equal(np.isnan(np.asarray(out, np.float32)).all(axis=-1)[:, 0], is_nan)
            assert redone is None
        else:
            np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=0.02, atol=0.02)
            np.testing.assert_array_equal(redone[:, 0], [1, 1, 7, 1])
            assert (redone[:, 1:] == 7).all()


def test_a_given_key_norm_saves_reading_the_keys(kernel_calls):
    arrays, arguments = call_arguments(0, dtype="bfloat16", kv_dtype="int8", scales="head", page_size=16)
    norms = jnp.linalg.norm(arrays[1].astype(jnp.float32), axis=-1).max(axis=(0, 1)) * arguments["key_scale"]
    given = jnp.broadcast_to(norms, (4, NUM_KV_HEADS))  # all pages: at least those of the live keys
    texts = {}
    for name, key_max_norm in (("computed", None), ("given", given)):
        call = functools.partial(op, key_max_norm=key_max_norm, softmax=UnifiedMax.bound())
        texts[name] = jax.jit(call).lower(*arrays, **arguments).as_text()
        assert kernel_calls[-1]["phi"].shape == (4, NUM_HEADS)
    pool = f"tensor<{'x'.join(map(str, arrays[1].shape))}xf32>"  # the keys in float32
    assert texts["computed"].count(pool) > texts["given"].count(pool)


# ---- transformations


MAPPED = {
    "contiguous": ({}, {"query", "key", "value", "key_value_seq_lengths", "query_offset", "phi"}),
    "one cache": ({}, {"query", "key_value_seq_lengths", "rows of phi"}),
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
    "sinks": ({}, {"query", "sinks", "phi"}),
}


@pytest.mark.parametrize(("case", "with_kernel"), [*((case, True) for case in MAPPED), ("pools", False)])
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
        is_mapped_by_row = "rows of phi" in mapped or (case != "sinks" and "phi" in mapped)
        assert calls[-1]["phi"].ndim == (2 if is_mapped_by_row else 0)


@pytest.mark.parametrize(
    ("features", "softmax"),
    [
        (dict(has_offset=True, query_length=3, is_causal=True, has_sinks=True), UnifiedMax.bound("cond")),
        (dict(kv_dtype="int8", scales="token", logits_soft_cap=3.0, page_size=16), UnifiedMax(1.0, "launch")),
    ],
    ids=["draft", "int8 pages"],
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
