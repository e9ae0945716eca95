"""The attention op under vmap and grad: with a stand-in for the kernel (`kernel_calls`), and without."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from attention_case import NUM_HEADS, call_arguments, expected_of, op, oracle_arguments

import fdpp_jax
from fdpp_jax import UnifiedMax

MAPPED = {
    "contiguous": ({}, {"query", "key", "value", "key_value_seq_lengths", "query_offset", "phi"}),
    "starts": ({"starts": (9, 0, 0, 50)}, {"query", "key", "value", "key_value_seq_starts", "key_value_seq_lengths"}),
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
        is_mapped_by_row = "rows of phi" in mapped or "phi" in mapped
        assert calls[-1]["phi"].ndim == (2 if is_mapped_by_row else 0)


MAPPED_OVER_ONE_CACHE = {  # what is mapped, how often, the capacity, features; the kernel's query [B, T, N]
    "rows": ({"query", "phi"}, 3, 64, {}, (4, 1, 24)),
    "rows of a draft": ({"query", "sinks"}, 3, 64, dict(query_length=3, is_causal=True, has_offset=True), (4, 3, 24)),
    "one call": ({"query"}, 1, 40, {}, (4, 1, 8)),
    "more than there are rows": ({"query", "phi"}, 35, 64, {}, (8, 1, 144)),
    "more than there are rows, by token": ({"query"}, 33, 64, dict(kv_dtype="int8", scales="token"), (8, 1, 136)),
    "more than there are rows, no pages": ({"query"}, 35, 40, {}, (4, 1, 144)),
    "lengths": ({"query", "key_value_seq_lengths"}, 3, 64, {}, (12, 1, 8)),
    "lengths, no pages": ({"key_value_seq_lengths"}, 3, 40, {}, (4, 1, 8)),
}


@pytest.mark.parametrize("case", MAPPED_OVER_ONE_CACHE)
def test_a_cache_that_is_not_mapped_is_not_copied(kernel_calls, case):
    """Beams, and what else shares its keys."""
    mapped, size, capacity, features, query_shape = MAPPED_OVER_ONE_CACHE[case]
    arrays, arguments = call_arguments(0, lengths=(31, 3, 0, 40), dtype="bfloat16", has_sinks=True, **features)
    arguments |= dict(zip(("query", "key", "value"), arrays, strict=True))
    arguments |= {name: x[:, :capacity] for name, x in arguments.items() if name in ("key", "value")}
    static = {name: arguments.pop(name) for name in ("is_causal",) if name in arguments}
    arguments["phi"] = jnp.float32(1.0)
    changes = dict(query=lambda x, i: x * (1 + i / 8), key_value_seq_lengths=lambda x, i: jnp.maximum(x - i, 0))
    changes |= dict(sinks=lambda x, i: x + i, phi=lambda x, i: x + 100 * (i % 2))
    each = [{name: changes[name](x, i) if name in mapped else x for name, x in arguments.items()} for i in range(size)]
    stacked = {name: jnp.stack([one[name] for one in each]) if name in mapped else x for name, x in arguments.items()}

    def attend(arguments):
        arguments = dict(arguments)
        softmax = UnifiedMax(arguments.pop("phi"))
        return op(**arguments, **static, return_residual=True, softmax=softmax)

    axes = {name: 0 if name in mapped else None for name in stacked}
    out, log_sum = jax.jit(jax.vmap(attend, (axes,)))(stacked)
    assert (out.shape, log_sum.shape) == ((size, *arrays[0].shape), (size, *arrays[0].shape[:3]))
    for i in {0, 1, size - 1} & set(range(size)):
        one = oracle_arguments({name: x for name, x in each[i].items() if name != "phi"} | static)
        expected = oracle.attention_and_log_sum(**one)
        assert oracle.relative_error(out[i], expected[0]) < oracle.TOLERANCE["bfloat16"]
        np.testing.assert_allclose(log_sum[i], expected[1], rtol=1e-5, atol=1e-5)
    assert kernel_calls[-1]["shape"][:3] == query_shape
    assert np.prod(kernel_calls[-1]["key"]) == arguments["key"].size


EVERYTHING = {"query", "key", "value", "key_value_seq_lengths"}
DRAFT = dict(query_length=4, is_causal=True, has_offset=True)
PROMPT = dict(query_length=20, is_causal=True, has_offset=True)
FULL = dict(lengths=(64,) * 4)
MAPPED_ON_HOPPER = {  # what is mapped, features, the kernel's query [B, T, N]; launches where they are counted
    "draft, queries": ({"query"}, DRAFT, (4, 4, 24), 1),
    "draft, everything": (EVERYTHING | {"query_offset"}, DRAFT, (12, 4, 8), None),
    "draft, live queries": ({"query_seq_lengths"}, DRAFT, (4, 4, 24), None),
    "prompt, queries": ({"query"}, PROMPT, (4, 20, 24), None),
    "prompt, everything": (EVERYTHING | {"query_offset"}, PROMPT, (12, 20, 8), 1),
    "sinks": ({"sinks"}, {}, (4, 1, 24), None),
    "rows of phi": ({"phi"}, dict(phi=np.linspace(-90.0, 1.0, NUM_HEADS)), (4, 1, 24), None),
    "phi of each row": ({"phi"}, dict(phi=np.linspace(-90.0, 1.0, 4 * NUM_HEADS).reshape(4, -1)), (4, 1, 24), None),
    "norms of a bound": ({"key_max_norm"}, {}, (12, 1, 8), None),
    "starts": ({"key_value_seq_starts"}, dict(starts=(9, 0, 0, 50)), (12, 1, 8), None),
    "page tables": ({"page_table"}, dict(page_size=16) | FULL, (12, 1, 8), None),
    "pools": (EVERYTHING | {"page_table"}, dict(page_size=16) | FULL, (12, 1, 8), None),
    "queries of int8": ({"query"}, dict(kv_dtype="int8", scales="head"), (4, 1, 24), None),
    "int8": (EVERYTHING, dict(kv_dtype="int8", scales="head"), (12, 1, 8), 1),
}


@pytest.mark.parametrize("case", MAPPED_ON_HOPPER)
def test_mapped_calls_stay_one_kernel_on_hopper(request, case):
    """Each of three calls is right, and the program for the GPU has the kernel's launches and no other products."""
    mapped, features, query_shape, num_launches = MAPPED_ON_HOPPER[case]
    features = dict(features)
    phi = jnp.asarray(features.pop("phi", 1.0), jnp.float32)
    arrays, arguments = call_arguments(0, dtype="bfloat16", has_sinks="sinks" in mapped, **features)
    arguments |= dict(zip(("query", "key", "value"), arrays, strict=True))
    is_causal = arguments.pop("is_causal", False)
    if "key_max_norm" not in mapped:
        arguments["phi"] = phi
    else:
        arguments["key_max_norm"] = jnp.full((4, 4), 12.0)
    if "query_seq_lengths" in mapped:
        arguments["query_seq_lengths"] = jnp.array([4, 3, 2, 1])
    changes = dict(query=lambda x, i: x * (1 + i / 8), sinks=lambda x, i: x + i, phi=lambda x, i: x + 100 * (i % 2))
    changes |= dict(page_table=lambda x, i: jnp.roll(x, i, axis=0), key_scale=lambda x, i: x * (1 + i / 4))
    changes |= dict(key_value_seq_starts=lambda x, i: x + i, key_max_norm=lambda x, i: x + i)
    changes |= dict.fromkeys(("query_seq_lengths", "query_offset"), lambda x, i: x - i)
    changes["key_value_seq_lengths"] = lambda x, i: jnp.maximum(x - i, 0)
    changes |= dict.fromkeys(("key", "value"), lambda x, i: x if x.dtype == jnp.int8 else x * (1 - i / 8))
    each = [{name: changes[name](x, i) if name in mapped else x for name, x in arguments.items()} for i in range(3)]
    stacked = {name: jnp.stack([one[name] for one in each]) if name in mapped else x for name, x in arguments.items()}

    def attend(arguments):
        arguments = dict(arguments)
        softmax = UnifiedMax(arguments.pop("phi")) if "phi" in arguments else UnifiedMax.bound()
        return op(**arguments, is_causal=is_causal, softmax=softmax, return_residual=True)

    mapped_attend = jax.vmap(attend, ({name: 0 if name in mapped else None for name in stacked},))
    if num_launches is not None:
        with fdpp_jax.target("H200"):
            text = jax.jit(mapped_attend).trace(stacked).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("custom_call @mosaic_gpu") == num_launches
        assert "dot_general" not in text
        assert "stablehlo.while" not in text
    calls = request.getfixturevalue("hopper")
    out, log_sum = jax.jit(mapped_attend)(stacked)
    assert calls[-1][0][:3] == query_shape
    for i, one in enumerate(each):
        live = np.arange(out.shape[2]) < np.reshape(one.pop("query_seq_lengths", out.shape[2]), (-1, 1))  # [B, T]
        names = "phi", "key_max_norm"
        arguments = oracle_arguments({name: x for name, x in one.items() if name not in names})
        expected, expected_log_sum = oracle.attention_and_log_sum(**arguments, is_causal=is_causal)
        expected = np.where(live[..., None, None], expected, 0)
        assert oracle.relative_error(out[i], expected) < oracle.TOLERANCE["bfloat16"]
        expected_log_sum = np.where(live[..., None], expected_log_sum, -np.inf)
        np.testing.assert_allclose(log_sum[i], expected_log_sum, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("features", "softmax"),
    [
        (dict(has_offset=True, query_length=3, is_causal=True, has_sinks=True), UnifiedMax.bound("cond")),
        (dict(kv_dtype="int8", scales="token", logits_soft_cap=3.0, page_size=16), UnifiedMax(1.0, "launch")),
        (dict(starts=(33, 9, 5, 0), has_sinks=True), UnifiedMax(1.0)),
    ],
    ids=["draft", "int8 pages", "starts"],
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
