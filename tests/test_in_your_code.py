"""Attention in code of others' styles: unbatched vmap, left pads, caches in parts, tensor parallelism."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hopper_case import bf16, collectives, mesh, put
from jax.sharding import PartitionSpec as P

import fdpp_jax
from fdpp_jax import UnifiedMax

CAPACITY, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 4, 64
TOLERANCE = oracle.TOLERANCE["bfloat16"]
pytestmark = [
    pytest.mark.usefixtures("fresh_interpreter"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]


@pytest.fixture(params=["cpu", "hopper"])
def calls(request):
    """Where the code runs: on this CPU, or as on a Hopper GPU; the calls of its kernels."""
    return request.getfixturevalue("hopper") if request.param == "hopper" else None


def tokens_of(seed, length):
    """Queries, keys and values of a sequence's tokens, [T, heads, H]."""
    return tuple(bf16(3 * seed + i, length, n, HEAD_DIM) for i, n in enumerate((NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)))


def causal(query, key, value):
    """Attention of a whole sequence in float64."""
    lengths = np.array([len(key)])
    return oracle.attention(query[None], key[None], value[None], lengths, is_causal=True)[0]


# ---- a module of one sequence, under vmap


def test_a_module_without_a_batch_is_mapped(calls):
    """As equinox's modules are written: [T, N, H] of one sequence, with its own length and mask."""

    def module(query, key, value, length):
        arguments = dict(key_value_seq_lengths=length, softmax=UnifiedMax())
        return fdpp_jax.dot_product_attention(query, key, value, **arguments)

    query, (key, value) = bf16(0, 3, 1, NUM_HEADS, HEAD_DIM), bf16(1, 2, 3, CAPACITY, NUM_KV_HEADS, HEAD_DIM)
    lengths = jnp.array([32, 7, 1])
    out = jax.jit(jax.vmap(module))(query, key, value, lengths)
    assert calls is None or calls[-1][0] == query.shape  # one launch
    assert oracle.relative_error(out[:, 0], oracle.attention(query[:, 0], key, value, lengths)) < TOLERANCE

    def masked(query, key, value, mask):
        return fdpp_jax.dot_product_attention(query, key, value, mask=mask[None, None])

    masks = jnp.arange(CAPACITY) % 3 > jnp.arange(3)[:, None] - 1
    out = jax.jit(jax.vmap(masked))(query, key, value, masks)
    expected = oracle.attention(query, key, value, mask=masks[:, None, None])
    assert oracle.relative_error(out, expected) < TOLERANCE


# ---- a loop over a dict of caches, with prompts padded on the left


def test_a_loop_over_prompts_padded_on_the_left(calls):
    """All sequences write their next key at the same place; a sequence begins behind its pads."""
    prompts, num_steps, width = (5, 2, 9), 4, 9
    sequences = [tokens_of(i, prompt + num_steps) for i, prompt in enumerate(prompts)]
    starts = jnp.array([width - prompt for prompt in prompts])

    def padded(which):
        rows = [
            jnp.pad(tokens[which][:prompt], ((width - prompt, 0), (0, 0), (0, 0)), constant_values=jnp.nan)
            for tokens, prompt in zip(sequences, prompts, strict=True)
        ]
        return jnp.pad(jnp.stack(rows), ((0, 0), (0, CAPACITY - width), (0, 0), (0, 0)), constant_values=jnp.nan)

    cache = dict(key=padded(1), value=padded(2), end=jnp.int32(width), start=starts)
    steps = [jnp.stack([x[i][p:] for x, p in zip(sequences, prompts, strict=True)], axis=1) for i in range(3)]

    @jax.jit
    def step(cache, token):
        query, key, value = (x[:, None] for x in token)
        cache = cache | dict(
            key=jax.lax.dynamic_update_slice_in_dim(cache["key"], key, cache["end"], axis=1),
            value=jax.lax.dynamic_update_slice_in_dim(cache["value"], value, cache["end"], axis=1),
            end=cache["end"] + 1,
        )
        out = fdpp_jax.dot_product_attention(
            query,
            cache["key"],
            cache["value"],
            key_value_seq_starts=cache["start"],
            key_value_seq_lengths=jnp.full(len(prompts), cache["end"]),
            softmax=UnifiedMax(),
        )
        return cache, out[:, 0]

    _, outs = jax.lax.scan(step, cache, steps)
    assert calls is None or calls
    for i, (tokens, prompt) in enumerate(zip(sequences, prompts, strict=True)):
        assert oracle.relative_error(outs[:, i], causal(*tokens)[prompt:]) < TOLERANCE


# ---- a cache in two parts


def test_a_loop_over_a_cache_of_the_prompt_and_one_of_what_follows(calls):
    """The parts are of other sizes; their states are merged by their log-sum-exp."""
    prompts, num_steps = (16, 3), 4
    sequences = [tokens_of(i, prompt + num_steps) for i, prompt in enumerate(prompts)]

    def prefilled(which):
        rows = [tokens[which][:prompt] for tokens, prompt in zip(sequences, prompts, strict=True)]
        return jnp.stack([jnp.pad(x, ((0, 16 - len(x)), (0, 0), (0, 0))) for x in rows])

    prompt_key, prompt_value = prefilled(1), prefilled(2)
    steps = [jnp.stack([x[i][p:] for x, p in zip(sequences, prompts, strict=True)], axis=1) for i in range(3)]
    attend = functools.partial(fdpp_jax.dot_product_attention, softmax=UnifiedMax(), return_residual=True)

    @jax.jit
    def step(carry, token):
        key, value, index = carry
        query, new_key, new_value = (x[:, None] for x in token)
        key = jax.lax.dynamic_update_slice_in_dim(key, new_key, index, axis=1)
        value = jax.lax.dynamic_update_slice_in_dim(value, new_value, index, axis=1)
        of_prompt = attend(query, prompt_key, prompt_value, key_value_seq_lengths=jnp.array(prompts))
        of_rest = attend(query, key, value, key_value_seq_lengths=jnp.full(2, index + 1))
        out, _ = fdpp_jax.merge_attention_states(*of_prompt, *of_rest)
        return (key, value, index + 1), out[:, 0]

    rest = jnp.zeros((2, num_steps, NUM_KV_HEADS, HEAD_DIM), jnp.bfloat16)
    _, outs = jax.lax.scan(step, (rest, rest, jnp.int32(0)), steps)
    assert calls is None or {call[1][1] for call in calls} == {16, num_steps}
    for i, (tokens, prompt) in enumerate(zip(sequences, prompts, strict=True)):
        assert oracle.relative_error(outs[:, i], causal(*tokens)[prompt:]) < 2 * TOLERANCE


# ---- a block over 8 devices


def block(x, cache, weights, reduce=lambda x: x):
    """A decode step's attention and MLP; `reduce` sums over devices that have a share of heads and columns."""
    key, value, lengths = cache
    query = fdpp_jax.flat_matmul(x, weights["q"]).reshape(len(x), 1, -1, HEAD_DIM)
    out = fdpp_jax.dot_product_attention(query, key, value, key_value_seq_lengths=lengths, softmax=UnifiedMax())
    x = x + reduce(fdpp_jax.flat_matmul(out.reshape(len(x), -1), weights["o"]))
    hidden = jax.nn.silu(fdpp_jax.flat_matmul(x, weights["in"]))
    return x + reduce(fdpp_jax.flat_matmul(hidden, weights["out"]))


def test_a_tensor_parallel_block_is_that_of_one_device(calls):
    width, batch = 128, 4
    shapes = dict(q=(width, NUM_HEADS * HEAD_DIM), o=(NUM_HEADS * HEAD_DIM, width), out=(4 * width, width))
    shapes["in"] = width, 4 * width
    weights = {name: bf16(i, *shape) / 16 for i, (name, shape) in enumerate(shapes.items())}
    x, (key, value) = bf16(7, batch, width), bf16(8, 2, batch, CAPACITY, NUM_KV_HEADS, HEAD_DIM)
    arguments = x, (key, value, jnp.array([32, 1, 17, 8])), weights
    cache_spec = P("a", None, "b")
    weight_specs = dict(q=P(None, "b"), o=P("b"), out=P("b")) | {"in": P(None, "b")}
    specs = P("a"), (cache_spec, cache_spec, P("a")), weight_specs
    over = mesh()
    expected = jax.jit(block)(*arguments)
    sharded = jax.tree.map(lambda x, spec: put(over, x, *spec), arguments, specs)
    reduced = functools.partial(block, reduce=lambda x: jax.lax.psum(x, "b"))
    manual = jax.shard_map(reduced, mesh=over, in_specs=specs, out_specs=P("a"))
    for step in (block, manual):
        compiled = jax.jit(step).lower(*sharded).compile()
        found = collectives(compiled)
        if calls is None:  # XLA asks all devices, too, whether a row has left the window
            assert set(found) == {"all-reduce"}
        else:
            assert found == {"all-reduce": 2}
            assert (2, 1, 2, HEAD_DIM) in [call[0] for call in calls]
        assert oracle.relative_error(compiled(*sharded), expected) < 2 * TOLERANCE
