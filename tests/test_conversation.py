"""Generation behind a cache: what one call has left serves the next, and the tokens are those of the whole prompts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from generation_case import CONFIG, PROMPTS, SOFTMAXES, drain, loud_model, plain_loop

from fdpp_jax import decode_loop
from fdpp_jax.generation import generate, stream
from fdpp_jax.models import KVCache, LlamaForCausalLM, load, load_tokenizer
from fdpp_jax.prompts import PromptCache
from fdpp_jax.unified_max import UnifiedMax

FIRST = [[5, 1, 9], list(range(7))]
SECOND = [[11, 12, 13, 14], [3]]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return loud_model()


def whole(first, result, second):
    """The prompts of a call without a cache."""
    return [list(a) + b + list(c) for a, b, c in zip(first, result.token_lists, second, strict=True)]


@pytest.mark.parametrize(
    ("softmax", "prefill_chunk_size"),
    [pytest.param("online", None, marks=pytest.mark.slow), ("unified", 3), ("bound", 2)],
)
def test_a_call_goes_on_where_the_last_one_ended(model, softmax, prefill_chunk_size):
    options = dict(softmax=SOFTMAXES[softmax], prefill_chunk_size=prefill_chunk_size)
    first = generate(model, FIRST, max_new_tokens=6, return_cache=True, **options)
    assert first.cached_tokens.tolist() == [0, 0]
    assert first.cache.tokens == whole(FIRST, first, [[], []])
    assert first.cache.kv.lengths.tolist() == [8, 12]  # the last token was drawn, and did not run
    second = generate(model, SECOND, max_new_tokens=9, cache=first.cache, **options)
    prompts = whole(FIRST, first, SECOND)
    assert second.tokens.tolist() == [plain_loop(prompt, 9) for prompt in prompts]
    assert second.cached_tokens.tolist() == [8, 12]
    assert second.prompts == [first.token_lists[row][-1:] + SECOND[row] for row in range(2)]
    third = generate(model, np.array([[1], [2]]), max_new_tokens=5, cache=second.cache, **options)
    assert third.tokens.tolist() == [plain_loop(p, 5) for p in whole(prompts, second, [[1], [2]])]


def test_rows_that_ended_go_on_from_their_end(model):
    """What they ran on, until the last row had ended, is none of theirs."""
    expected = [plain_loop(prompt, 20) for prompt in PROMPTS]
    ends = (expected[0][3], expected[1][6])
    options = dict(max_new_tokens=20, return_cache=True, softmax=UnifiedMax.bound())
    _, first = drain(stream(model, PROMPTS, eos_ids=ends, chunk_size=4, **options))
    assert len(set(first.lengths.tolist())) == 2
    shorter, longer = sorted(first.lengths.tolist())
    assert sorted(first.cache.kv.lengths.tolist()) == [PROMPTS.shape[1] + shorter, PROMPTS.shape[1] + longer - 1]
    second = generate(model, SECOND, max_new_tokens=5, cache=first.cache, softmax=UnifiedMax.bound())
    assert second.tokens.tolist() == [plain_loop(prompt, 5) for prompt in whole(PROMPTS, first, SECOND)]


def test_a_cache_serves_many_calls(model):
    first = generate(model, FIRST, max_new_tokens=2, return_cache=True)
    kept = [np.array(x) for x in first.cache.kv.keys]
    for second in ([[1], [2]], [[4] * 20, [2]], [[1], [2]]):
        result = generate(model, second, max_new_tokens=4, cache=first.cache)
        assert result.tokens.tolist() == [plain_loop(prompt, 4) for prompt in whole(FIRST, first, second)]
    for x, y in zip(first.cache.kv.keys, kept, strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_cache_that_is_too_small_grows_and_a_larger_one_stays(model):
    config = dataclasses.replace(CONFIG, max_position_embeddings=256)
    longer = LlamaForCausalLM(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    nnx.update(longer, nnx.state(model))
    first = generate(longer, FIRST, max_new_tokens=30, return_cache=True)
    second = generate(longer, SECOND, max_new_tokens=30, cache=first.cache)
    prompts = whole(FIRST, first, SECOND)
    assert (first.cache_capacity, second.cache_capacity) == (64, 128)
    assert second.token_lists == generate(longer, prompts, max_new_tokens=30).token_lists
    cache, new = second.cache.matched(prompts)  # of more slots than these need
    third = generate(longer, new, max_new_tokens=3, cache=cache)
    assert third.cache_capacity == 128
    assert third.tokens.tolist() == second.tokens[:, :3].tolist()


def test_another_softmax_behind_a_cache(model):
    """A bound wants norms that the cache does not have."""
    first = generate(model, FIRST, max_new_tokens=4, softmax=None, return_cache=True)
    assert first.cache.kv.key_max_norms == ()
    for softmax in SOFTMAXES.values():
        result = generate(model, SECOND, max_new_tokens=6, cache=first.cache, softmax=softmax)
        assert result.tokens.tolist() == [plain_loop(prompt, 6) for prompt in whole(FIRST, first, SECOND)]
        assert result.recomputed_steps == 0


def test_same_shapes_compile_nothing(model):
    first = generate(model, FIRST, max_new_tokens=4, return_cache=True)
    generate(model, SECOND, max_new_tokens=6, cache=first.cache)
    misses = decode_loop._compile.cache_info().misses
    result = generate(model, [[7], [8, 9]], max_new_tokens=5, cache=first.cache, softmax=None)
    assert decode_loop._compile.cache_info().misses == misses
    assert result.compile_seconds == 0.0


@pytest.mark.parametrize(
    ("prompts", "cached", "rest"),
    [
        ([[5, 1, 9], [0, 1, 2, 3]], [2, 3], [[9], [3]]),  # of all that the cache has, the last token runs again
        ([[5, 1, 9, 9, 9], [7, 1]], [3, 0], [[9, 9], [7, 1]]),
        ([[5], [0, 1, 2, 3, 4, 5, 6, 60]], [0, 7], [[5], [60]]),
    ],
)
def test_whole_prompts_are_divided_into_cached_and_new(model, prompts, cached, rest):
    first = generate(model, FIRST, max_new_tokens=1, return_cache=True)
    cache, new = first.cache.matched(prompts)
    assert (cache.kv.lengths.tolist(), new) == (cached, rest)
    assert cache.tokens == [prompt[:n] for prompt, n in zip(prompts, cached, strict=True)]
    result = generate(model, new, max_new_tokens=6, cache=cache)
    assert result.tokens.tolist() == [plain_loop(prompt, 6) for prompt in prompts]
    assert result.cached_tokens.tolist() == cached


def test_tokens_that_were_drawn_and_did_not_run_are_matched_as_new(model):
    first = generate(model, FIRST, max_new_tokens=3, return_cache=True)
    prompts = whole(FIRST, first, SECOND)
    cache, new = first.cache.matched(prompts)
    assert cache.kv.lengths.tolist() == [5, 9]
    assert new == [prompt[n:] for prompt, n in zip(prompts, (5, 9), strict=True)]


def test_texts_go_on_without_special_tokens(one_layer_checkpoint):
    model, tokenizer = load(one_layer_checkpoint), load_tokenizer(one_layer_checkpoint)
    first = generate(model, "def ", max_new_tokens=4, eos_ids=[], return_cache=True)
    second = generate(model, "return ", max_new_tokens=4, eos_ids=[], cache=first.cache)
    new = tokenizer.encode("return ", add_special_tokens=False)
    assert len(new) < len(tokenizer.encode("return "))
    assert second.cache.tokens[0] == first.prompts[0] + first.token_lists[0] + new + second.token_lists[0]
    chunks, streamed = drain(stream(model, "return ", max_new_tokens=4, eos_ids=[], cache=first.cache, chunk_size=64))
    assert "".join(chunk.texts[0] for chunk in chunks) == second.texts[0] == streamed.texts[0]


def test_a_result_without_a_cache_says_so(model):
    with pytest.raises(ValueError, match="this result has no cache: generate with return_cache=True"):
        _ = generate(model, FIRST, max_new_tokens=1).cache


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": [[1]]}, "expected as many prompts as the cache has rows, 2, got 1"),
        ({"tokens": [[1], []]}, "expected prompts of at least one token, got none for prompt 1"),
        ({"max_new_tokens": 39}, r"prompt of 10 tokens with the cache's and max_new_tokens=39 need 49 positions"),
        ({"cache": KVCache.create(CONFIG, 2, 16, "float32")}, "cache must be the cache of a GenerationResult, got KV"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size must be at least 1, got 0"),
        ({"prefill_chunk_size": 2.0}, r"prefill_chunk_size must be an integer of at least 1, got 2\.0"),
        ({"prefill_chunk_size": "3"}, "prefill_chunk_size must be an integer of at least 1, got '3'"),
        ({"prefill_chunk_size": True}, "prefill_chunk_size must be an integer of at least 1, got True"),
    ],
)
def test_bad_input(model, arguments, message):
    first = generate(model, FIRST, max_new_tokens=2, return_cache=True)
    arguments = {"tokens": SECOND, "max_new_tokens": 4, "cache": first.cache} | arguments
    with pytest.raises(ValueError, match=message):
        stream(model, **arguments)


def test_a_cache_of_another_model(model):
    kv = KVCache.create(CONFIG, 2, 16, "bfloat16")
    expected = (
        r"cache must be of this model, 2 layers of float32\[2, 16, 2, 8\]; got 2 layers of bfloat16\[2, 16, 2, 8\]"
    )
    with pytest.raises(ValueError, match=expected):
        stream(model, SECOND, cache=PromptCache(kv, [[], []]))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1]], "expected as many prompts as the cache has rows, 2, got 1"),
        ([[1], []], "expected prompts of at least one token, got none for prompt 1"),
        ([[1], [2.0]], r"tokens must be integers \[B, T\], got float64 of shape \(2, 1\)"),
        ([1, 2], r"tokens must be integers \[B, T\], got int64 of shape \(2,\)"),
        ([[1, [2]], [3, 4]], r"tokens must be lists of integers, got \[1, \[2\]\] for prompt 0"),
        ([], "expected at least one prompt, got none"),
        (None, r"tokens must be integers \[B, T\], got object of shape \(\)"),
        ("def ", "expected prompts of tokens, which a tokenizer makes of texts, got texts"),
        (["def ", "class "], "expected prompts of tokens, which a tokenizer makes of texts, got texts"),
        (["def ", [1]], "expected prompts that are all texts or all tokens, got list and str"),
    ],
)
def test_prompts_that_a_cache_cannot_match(model, prompts, message):
    cache = generate(model, FIRST, max_new_tokens=1, return_cache=True).cache
    with pytest.raises(ValueError, match=message):
        cache.matched(prompts)
    if not str(message).startswith("expected prompts of tokens"):
        with pytest.raises(ValueError, match=message):
            stream(model, prompts, cache=cache)


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_whole_prompts_may_be_arrays(model, as_array):
    cache = generate(model, FIRST, max_new_tokens=1, return_cache=True).cache
    expected, rest = cache.matched([[5, 1, 9, 8], [0, 1, 3]])
    padded = as_array([[5, 1, 9, 8], [0, 1, 3, 2]])
    for prompts, lengths in (
        (padded, as_array([4, 3])),
        (padded.tolist(), [4, 3]),
        ([as_array([5, 1, 9, 8]), as_array([0, 1, 3])], None),
        (((5, 1, 9, 8), (0, 1, 3)), None),
    ):
        found, new = cache.matched(prompts, lengths)
        assert (found.tokens, new) == (expected.tokens, rest) == ([[5, 1, 9], [0, 1]], [[8], [3]])
        assert {type(token) for row in (*found.tokens, *new) for token in row} == {int}
        assert found.kv.lengths.tolist() == [3, 2]
    whole = cache.matched(padded)
    assert whole[1] == [[8], [3, 2]]
    with pytest.raises(ValueError, match=r"prompt_lengths must be within 1\.\.4 \(the width of tokens\), got \[5, 3\]"):
        cache.matched(padded, [5, 3])
