"""A call of the attention op at random: its arguments, which are the oracle's too, and what the oracle says."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle

import fdpp_jax

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, CAPACITY = 8, 4, 64, 64


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
    starts=None,
    **options,
):
    """(query, key, value), keyword arguments: of dot_product_attention and of the oracle."""
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((len(lengths), query_length, NUM_HEADS, HEAD_DIM), np.float32)
    key, value = rng.standard_normal((2, len(lengths), CAPACITY, NUM_KV_HEADS, HEAD_DIM), np.float32)
    if has_lengths:
        dead = np.arange(CAPACITY) >= np.array(lengths)[:, None]
        key[dead] = value[dead] = np.nan
    if starts is not None:
        dead = np.arange(CAPACITY) < np.array(starts)[:, None]
        key[dead] = value[dead] = np.nan
    query, key, value = (jnp.asarray(x.astype(jnp.dtype(dtype))) for x in (query, key, value))
    arguments = dict(options)
    if has_lengths:
        arguments["key_value_seq_lengths"] = jnp.asarray(lengths)
    if starts is not None:
        arguments["key_value_seq_starts"] = jnp.asarray(starts)
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
        *pools, arguments["page_table"] = oracle.paged(0, caches, live, page_size, starts or 0)
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


def oracle_arguments(arguments):
    names = {"key_value_seq_lengths": "lengths", "key_value_seq_starts": "starts"}
    return {names.get(name, name): x for name, x in arguments.items()}


def expected_of(arrays, arguments):
    return oracle.attention(*arrays, **oracle_arguments(arguments))
