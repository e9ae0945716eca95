"""Every feature of the attention op: against float64, and through the recompute, with a kernel and without.

The kernel here is a stand-in (`kernel_calls`): what is tested is how the op calls it. The kernel itself has its own
tests.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from attention_case import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, call_arguments, expected_of, op, oracle_arguments, run

import fdpp_jax
from fdpp_jax import UnifiedMax, heuristics
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions, attention_shape

RECOMPUTES = ["kernel", "launch", "cond"]


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
    (
        UnifiedMax.bound(),
        dict(query_length=2, has_offset=True, is_causal=True, page_size=16, has_sinks=True, starts=(33, 0, 5, 64)),
    ),
    (UnifiedMax(1.0), dict(kv_dtype="int8", scales="token", has_lengths=False, starts=(33, 0, 63, 64))),
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


@pytest.mark.parametrize("recompute", [None, *RECOMPUTES])
@pytest.mark.parametrize("with_kernel", [False, True], ids=["reference", "kernel"])
def test_log_sum_is_that_of_the_rows_whatever_the_policy(request, with_kernel, recompute):
    if with_kernel:
        request.getfixturevalue("kernel_calls")
    arrays, arguments = call_arguments(
        3, query_length=2, dtype="bfloat16", page_size=16, has_offset=True, has_sinks=True, is_causal=True
    )
    expected = oracle.attention_and_log_sum(*arrays, **oracle_arguments(arguments))
    live = jnp.array([2, 2, 1, 0])
    dead = (jnp.arange(2) >= live[:, None])[..., None]
    for softmax in (None, *(UnifiedMax(jnp.array(phi), recompute) for phi in ([1.0] * 8, [-150.0, 150.0] + 6 * [1.0]))):
        out, log_sum = run(arrays, arguments, softmax, return_residual=True, query_seq_lengths=live)
        assert log_sum.dtype == jnp.float32
        assert oracle.relative_error(out, np.where(dead[..., None], 0.0, expected[0])) < oracle.TOLERANCE["bfloat16"]
        np.testing.assert_allclose(log_sum, np.where(dead, -np.inf, expected[1]), rtol=1e-5, atol=1e-5)


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
