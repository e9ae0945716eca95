"""Generation against a plain loop over the whole sequence, and what the jitted loop promises."""

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calibration_case import calibration_of
from flax import nnx
from generation_case import CONFIG, PROMPTS, SOFTMAXES, drain, loud_model, plain_loop

from fdpp_jax import decode_loop, generation
from fdpp_jax.generation import generate, stream
from fdpp_jax.models import (
    LlamaForCausalLM,
    load,
    random_model,
)
from fdpp_jax.unified_max import UnifiedMax

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return loud_model()


@pytest.mark.parametrize("softmax", SOFTMAXES.values(), ids=SOFTMAXES)
def test_greedy_equals_the_plain_loop(model, softmax):
    result = generate(model, PROMPTS, max_new_tokens=20, softmax=softmax)
    assert result.tokens.tolist() == [plain_loop(prompt, 20) for prompt in PROMPTS]
    assert len(set(result.tokens[0].tolist())) > 3  # not one token for ever
    assert result.lengths.tolist() == [20, 20]
    assert (result.recomputed_steps, result.decode_steps) == (0, 19)
    assert result.prefill_seconds > 0
    assert result.decode_seconds > 0


def test_softmax_is_chosen_by_the_calibration_beside_the_checkpoint(model, tmp_path):
    assert (
        generate(model, PROMPTS, max_new_tokens=1).softmax_reason
        == "online: the model was not loaded from a checkpoint"
    )
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURES / "llama3_gqa" / name, tmp_path)
    loaded = load(tmp_path, dtype=jnp.float32)

    def run(**softmax):
        return generate(loaded, PROMPTS, max_new_tokens=8, **softmax)

    online = run(softmax=None)
    assert online.softmax_reason == "online, as asked"
    assert run(softmax=UnifiedMax(1.0)).softmax_reason == "unified, phi 1, as asked"
    assert online.is_online
    assert run().softmax_reason.startswith(
        "unified, phi 6, the default: no fdpp_calibration.json beside the checkpoint"
    )
    for low, high, reason in (
        (-10.0, 30.0, "unified, phi 10.00, calibrated: ln den from -10.0 to 30.0"),
        (-200.0, 200.0, "online, since no phi fits fdpp_calibration.json"),
    ):
        calibration_of([[low] * 4] * 2, [[high] * 4] * 2).save(tmp_path / "fdpp_calibration.json")
        result = run()
        assert result.softmax_reason.startswith(reason)
        assert result.recomputed_steps == 0
        np.testing.assert_array_equal(result.tokens, online.tokens)
    (tmp_path / "fdpp_calibration.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a calibration"):
        run()


def test_up_to_the_last_position(model):
    prompt = np.arange(17)  # its bucket is 32, and 31 more exceed a power of two
    result = generate(model, prompt[None], max_new_tokens=31)
    assert result.tokens[0].tolist() == plain_loop(prompt, 31)


def test_steps_take_online_softmax_where_the_plan_prefers_it_and_nothing_is_asked(monkeypatch):
    loaded = load(FIXTURES / "llama3_gqa", dtype=jnp.float32)
    plan = dataclasses.replace(loaded.layer_plan(2), online_up_to=128)
    monkeypatch.setattr(type(loaded), "layer_plan", lambda self, batch: plan)
    seen, request = [], generation.Request

    def recorded(function, statics, args, options):
        if function is generation.decode_chunk:
            seen.append(args[-1])
        return request(function, statics, args, options)

    monkeypatch.setattr(generation, "Request", recorded)
    chosen = generate(loaded, PROMPTS, max_new_tokens=8)
    assert chosen.is_online
    assert chosen.softmax_reason.startswith(
        "online in decode steps, mostly faster there up to 128 slots; the prompt: unified, phi 6, the default: "
    )
    asked = generate(loaded, PROMPTS, max_new_tokens=8, softmax=UnifiedMax())
    assert not asked.is_online
    assert not generate(loaded, PROMPTS, max_new_tokens=127).is_online  # which takes more slots
    assert [softmax is None for softmax in seen] == [True, False, False]
    np.testing.assert_array_equal(chosen.tokens, asked.tokens)


@pytest.mark.parametrize("softmax", SOFTMAXES.values(), ids=SOFTMAXES)
def test_unequal_prompts_equal_single_runs(model, softmax):
    lengths = [1, 7, 4]
    tokens = np.full((3, 9), -1)  # padding may hold anything
    for row, length in enumerate(lengths):
        tokens[row, :length] = np.arange(length) * 5 + row
    result = generate(model, tokens, lengths, max_new_tokens=10, softmax=softmax)
    expected = [plain_loop(tokens[row, :length], 10) for row, length in enumerate(lengths)]
    assert result.tokens.tolist() == expected


def test_one_token_needs_no_decode_step(model):
    result = generate(model, PROMPTS[:1], max_new_tokens=1)
    assert result.tokens.tolist() == [plain_loop(PROMPTS[0], 1)]
    assert (result.decode_steps, result.decode_seconds) == (0, 0.0)


@pytest.fixture
def in_blocks(model, monkeypatch):
    """Steps are run as where a model's layers are fused."""
    plan = dataclasses.replace(model.layer_plan(2), overlaps_attention=True)
    monkeypatch.setattr(type(model), "layer_plan", lambda *_: plan)


@pytest.mark.parametrize(
    ("chunk_size", "how"), [(1, None), (3, None), (32, None), (12, "in_blocks"), (32, "in_blocks")]
)
def test_rows_end_at_their_first_end_token(request, model, chunk_size, how):
    if how is not None:
        request.getfixturevalue(how)
    expected = [plain_loop(prompt, 20) for prompt in PROMPTS]
    ends = (expected[0][3], expected[1][6])
    lengths = [1 + min(row.index(end) for end in ends if end in row) for row in expected]
    chunks, result = drain(stream(model, PROMPTS, max_new_tokens=20, eos_ids=ends, chunk_size=chunk_size))
    assert result.lengths.tolist() == lengths
    for row, length in enumerate(lengths):
        assert result.tokens[row].tolist() == expected[row][:length] + [ends[0]] * (20 - length)
    assert result.decode_steps == max(lengths) - 1  # stops inside a chunk
    assert sum(chunk.tokens.shape[1] for chunk in chunks) == max(lengths)


def test_steps_behind_the_last_token_of_a_block_do_not_count(model, in_blocks):
    """19 steps behind the first token are two blocks of eight, and a third that is needed in part."""
    result = generate(model, PROMPTS, max_new_tokens=20)
    assert result.lengths.tolist() == [20, 20]
    assert result.tokens.tolist() == [plain_loop(prompt, 20) for prompt in PROMPTS]


@pytest.mark.parametrize("step", [7, 8, 9])
def test_a_token_that_ends_a_row_is_in_its_cache(model, in_blocks, step):
    """Also where it is the last of a block, and the row gets another end token from then on."""
    expected = [plain_loop(prompt, 20) for prompt in PROMPTS]
    row = next(i for i, tokens in enumerate(expected) if tokens[step] not in tokens[:step] + expected[1 - i])
    end = expected[row][step]
    other = next(token for token in range(CONFIG.vocab_size) if not any(token in tokens for tokens in expected))
    result = generate(model, PROMPTS, max_new_tokens=20, eos_ids=[other, end], return_cache=True)
    assert result.lengths[row] == step + 1
    longer = generate(model, [[1], [2]], max_new_tokens=3, cache=result.cache)
    whole = [[*tokens, new] for tokens, new in zip(result.cache.tokens, (1, 2), strict=True)]
    assert longer.tokens.tolist() == [plain_loop(tokens, 3) for tokens in whole]


def test_steps_between_two_looks_are_whole_blocks(model, in_blocks, monkeypatch):
    """Chunks of 12 steps, of two blocks of six, with a look at the unified max after 10 at the latest."""
    monkeypatch.setattr(generation, "_STEPS_OF_DRIFT", 10)
    options = dict(max_new_tokens=20, softmax=UnifiedMax(200.0), max_recompute_rate=1.0)
    chunks, result = drain(stream(model, PROMPTS, chunk_size=12, **options))
    assert [chunk.tokens.shape[1] for chunk in chunks] == [1, 6, 6, 6, 1]
    assert result.tokens.tolist() == [plain_loop(prompt, 20) for prompt in PROMPTS]


def test_a_first_token_that_ends_every_row(model):
    ends = [plain_loop(prompt, 1)[0] for prompt in PROMPTS]
    result = generate(model, PROMPTS, max_new_tokens=20, eos_ids=ends)
    assert result.lengths.tolist() == [1, 1]
    assert result.decode_steps == 0


@pytest.mark.parametrize(("phi", "how"), [(200.0, None), (-200.0, None), (200.0, "in_blocks")])
def test_a_phi_far_off_costs_time_only(request, model, phi, how):
    if how is not None:
        request.getfixturevalue(how)
    online = generate(model, PROMPTS, max_new_tokens=20)
    result = generate(model, PROMPTS, max_new_tokens=20, softmax=UnifiedMax(phi), max_recompute_rate=1.0)
    assert result.tokens.tolist() == online.tokens.tolist()
    assert result.recomputed_steps == result.decode_steps == 19
    assert online.recomputed_steps == 0


# Drift.


@pytest.fixture(scope="module")
def longer():
    """A model with 256 positions."""
    return random_model(dataclasses.replace(CONFIG, max_position_embeddings=256), jnp.float32)


@pytest.mark.parametrize(("rate", "online_from"), [(0.1, 128), (0.999, 128), (1.0, None)])
def test_a_phi_that_fails_too_often_gives_way_to_online_softmax(longer, rate, online_from):
    """After 64 steps, and the 64 that ran while the host looked at them."""
    steps = 160
    online = generate(longer, PROMPTS, max_new_tokens=1 + steps)
    arguments = dict(max_new_tokens=1 + steps, softmax=UnifiedMax(200.0), max_recompute_rate=rate)
    if online_from is None:
        result = generate(longer, PROMPTS, **arguments)
    else:
        with pytest.warns(
            UserWarning, match="64 of the latest 64 decode steps .*: the rest runs with online"
        ) as caught:
            result = generate(longer, PROMPTS, **arguments)
        assert len(caught) == 1
    assert result.online_from == online_from
    assert result.recomputed_steps == (online_from or steps)
    assert result.tokens.tolist() == online.tokens.tolist()


def test_the_host_looks_every_256_steps_and_at_a_unified_max_every_64(longer):
    def sizes(softmax, chunk_size):
        options = dict(softmax=softmax, max_recompute_rate=1.0, chunk_size=chunk_size)
        chunks = stream(longer, PROMPTS, max_new_tokens=1 + 150, **options)
        return [chunk.tokens.shape[1] for chunk in chunks][1:]

    assert generation._UNWATCHED_CHUNK == 256
    assert sizes(None, 128) == [128, 22]
    assert sizes(UnifiedMax(200.0), 128) == [64, 64, 22]
    assert sizes(UnifiedMax(200.0), 40) == [40, 40, 40, 30]


@pytest.mark.parametrize("steps", [7, 63, 64])
def test_a_call_that_ends_first_is_warned_of_too(longer, steps):
    """7 of 64 are more than a tenth, whatever the others would have done; 63 are the steps of 64 tokens."""
    with pytest.warns(
        UserWarning, match=rf"{steps} of the latest {steps} .* softmax\. Calibrate .*bound\(\)"
    ) as caught:
        result = generate(longer, PROMPTS, max_new_tokens=1 + steps, softmax=UnifiedMax(200.0))
    assert [one.filename for one in caught] == [__file__]  # the caller's
    assert (result.recomputed_steps, result.online_from) == (steps, None)
    few = generate(longer, PROMPTS, max_new_tokens=7, softmax=UnifiedMax(200.0))  # may pass
    assert (few.recomputed_steps, few.online_from) == (6, None)


def test_good_steps_long_ago_do_not_count(longer, monkeypatch):
    """Steps fail from the 128th on; from the 142nd on they are a tenth of all. The host hears of 136, while 8 run."""
    step_of = decode_loop.decode_step

    def drifting(model, tokens, cache, softmax):
        logits, after, redone = step_of(model, tokens, cache, softmax)
        return logits, after, redone if softmax is None else cache.lengths[0] >= PROMPTS.shape[1] + 127

    decode_chunk = decode_loop.decode_chunk.__wrapped__
    fresh = jax.jit(lambda *args: decode_chunk(*args), static_argnums=(0, 1, 2), donate_argnums=4)  # own cache
    monkeypatch.setattr(decode_loop, "decode_step", drifting)
    monkeypatch.setattr(generation, "decode_chunk", fresh)
    with pytest.warns(UserWarning, match="8 of the latest 8 decode steps"):
        _, result = drain(stream(longer, PROMPTS, max_new_tokens=161, chunk_size=8, softmax=UnifiedMax()))
    assert result.online_from == 144


def test_the_switch_compiles_one_program(longer):
    def misses(**arguments):
        before = decode_loop._compile.cache_info().misses
        with pytest.warns(UserWarning, match="the rest runs with online softmax"):
            generate(longer, PROMPTS, max_new_tokens=161, **arguments)
        return decode_loop._compile.cache_info().misses - before

    decode_loop._compile.cache_clear()
    assert misses(softmax=UnifiedMax(200.0)) == 3  # prefill, and the loop with either softmax
    assert misses(softmax=UnifiedMax(-200.0)) == 0
    generate(longer, PROMPTS, max_new_tokens=161)  # is what the rest ran
    assert decode_loop._compile.cache_info().misses == 3


def test_a_bound_that_fails_is_not_advised(longer):
    """Large queries and keys, whose bound is far above their scores."""
    graphdef, weights = nnx.split(longer)

    def grown(path, x):
        return x * 300 if "qkv_proj" in map(str, (getattr(key, "key", key) for key in path)) else x

    wild = nnx.merge(graphdef, jax.tree.map_with_path(grown, weights))
    with pytest.warns(UserWarning, match=r"online softmax\. Calibrate .*, or use softmax=None") as caught:
        result = generate(wild, PROMPTS, max_new_tokens=161, softmax=UnifiedMax.bound())
    assert len(caught) == 1
    assert result.online_from == 128
    assert result.tokens.tolist() == generate(wild, PROMPTS, max_new_tokens=161).tokens.tolist()


def test_a_phi_of_each_layer_and_head(model):
    online = generate(model, PROMPTS, max_new_tokens=20)
    fails = jnp.array([[[0.0]], [[200.0]]])  # in the second layer, always
    for phi, redone in ((fails, 19), (jnp.zeros((2, 1, 4)), 0)):
        result = generate(model, PROMPTS, max_new_tokens=20, softmax=UnifiedMax(phi), max_recompute_rate=1.0)
        assert result.tokens.tolist() == online.tokens.tolist()
        assert result.recomputed_steps == redone


def test_same_shapes_compile_nothing(model):
    arguments = {"max_new_tokens": 20, "temperature": 0.7, "top_p": 0.9}
    generate(model, PROMPTS, **arguments, softmax=UnifiedMax(6.0))
    misses = decode_loop._compile.cache_info().misses
    for phi in (7.0, 200, jnp.float32(3)):
        changed = arguments | {"temperature": 0.5 + float(phi) / 1000}
        result = generate(
            model, PROMPTS + 1, **changed, softmax=UnifiedMax(phi), key=jax.random.key(int(phi)), max_recompute_rate=1.0
        )
        assert result.compile_seconds == 0.0
    # Another length within the bucket and the capacity is the same program too.
    generate(model, PROMPTS[:, :3] + 1, **arguments | {"max_new_tokens": 30}, softmax=UnifiedMax())
    assert decode_loop._compile.cache_info().misses == misses


def test_seeds(model):
    def run(key):
        return generate(model, PROMPTS, max_new_tokens=20, temperature=1.0, key=key).tokens.tolist()

    key = jax.random.key(3)
    assert run(key) == run(key)  # the caller's key is not used up
    assert run(None) == run(jax.random.key(0)) != run(key)


def test_every_token_is_drawn_with_a_key_of_its_own(model):
    """With logits that are all equal, what is drawn depends on the key alone."""
    graphdef, weights = nnx.split(model)
    indifferent = nnx.merge(graphdef, jax.tree.map(jnp.zeros_like, weights))
    tokens = generate(indifferent, PROMPTS, max_new_tokens=40, temperature=1.0).tokens
    assert len(np.unique(tokens[0])) > 20  # of 64
    assert len(np.unique(tokens, axis=1).T) > 35


def test_stream_yields_what_generate_returns(model):
    chunks, result = drain(stream(model, PROMPTS, max_new_tokens=20, chunk_size=8))
    assert [chunk.tokens.shape[1] for chunk in chunks] == [1, 8, 8, 3]
    assert [chunk.lengths.tolist() for chunk in chunks] == [[1, 1], [9, 9], [17, 17], [20, 20]]
    tokens = np.concatenate([chunk.tokens for chunk in chunks], axis=1)
    np.testing.assert_array_equal(tokens, result.tokens)
    np.testing.assert_array_equal(tokens, generate(model, PROMPTS, max_new_tokens=20).tokens)


# JAX's settings.


@pytest.mark.parametrize("setting", ["jax_enable_x64", "jax_numpy_dtype_promotion"])
@pytest.mark.parametrize("num_prompts", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_generation_under_the_user_s_settings(model, setting, num_prompts):
    options = dict(max_new_tokens=4, eos_ids=[63], softmax=UnifiedMax.bound())

    def two_turns():
        first = generate(model, PROMPTS[:num_prompts], **options, return_cache=True)
        second = generate(model, PROMPTS[:num_prompts], **options, cache=first.cache, prefill_chunk_size=4)
        return first.token_lists, second.token_lists

    expected = two_turns()
    before = getattr(jax.config, setting)
    decode_loop._compile.cache_clear()  # a program compiled before would run as it is
    jax.config.update(setting, True if setting == "jax_enable_x64" else "strict")
    try:
        assert two_turns() == expected
    finally:
        jax.config.update(setting, before)


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": [1, 2, 3]}, r"tokens must be integers \[B, T\], got int64 of shape \(3,\)"),
        ({"tokens": [[1.0, 2.0]]}, "tokens must be integers .* got float64"),
        ({"tokens": np.zeros((2, 0), int)}, r"tokens must be integers .* of shape \(2, 0\)"),
        ({"tokens": [[1, 64]]}, r"tokens must be within 0\.\.63, got 64"),
        ({"tokens": [[-1, 2]]}, r"tokens must be within 0\.\.63, got -1"),
        ({"prompt_lengths": [3]}, r"prompt_lengths must be integers \[2\], got int64 of shape \(1,\)"),
        ({"prompt_lengths": [3.0, 3.0]}, "prompt_lengths must be integers .* got float64"),
        ({"prompt_lengths": [0, 3]}, r"prompt_lengths must be within 1\.\.5 .* got \[0, 3\]"),
        ({"prompt_lengths": [6, 3]}, r"prompt_lengths must be within 1\.\.5 .* got \[6, 3\]"),
        ({"tokens": [[1, 2], []]}, "expected prompts of at least one token, got none for prompt 1"),
        ({"tokens": [[], []]}, "expected prompts of at least one token, got none for prompt 0"),
        ({"tokens": [[1, 2], [3.0]]}, r"tokens must be lists of integers, got \[3.0\] for prompt 1"),
        ({"tokens": [[1, 2], 3]}, "tokens must be lists of integers, got 3 for prompt 1"),
        ({"tokens": [[1, 2], [3]], "prompt_lengths": [2, 1]}, "prompt_lengths belong to a padded array"),
        ({"tokens": "x"}, r"texts need a tokenizer, and the model was not loaded from a checkpoint: pass tokens, or"),
        ({"tokens": ["x", [1]]}, "expected prompts that are all texts or all tokens, got list and str"),
        ({"tokens": []}, "expected at least one prompt, got none"),
        ({"tokens": "x", "prompt_lengths": [1, 1]}, r"prompt_lengths belong to a padded array \[B, T\], got texts"),
        ({"tokens": [np.str_("x"), [1]]}, "expected prompts that are all texts or all tokens, got list and str_"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 3.0}, "max_new_tokens must be an integer of at least 1, got 3.0"),
        ({"eos_ids": 5}, "eos_ids must be a sequence of token ids, got 5"),
        ({"eos_ids": [5.0]}, r"eos_ids must be a sequence of token ids, got \[5.0\]"),
        ({"key": 7}, r"key must be a PRNG key such as jax.random.key\(7\), got 7"),
        ({"key": jnp.zeros((2, 2))}, "key must be a PRNG key such as"),
        ({"key": jnp.zeros(3, jnp.uint32)}, r"key must be a PRNG key .* got uint32 of shape \(3,\)"),
        ({"key": jax.random.split(jax.random.key(0))}, r"key must be a PRNG key .* got key<fry> of shape \(2,\)"),
        ({"max_new_tokens": 44}, r"prompt of 5 tokens and max_new_tokens=44 need 49 positions, the model has 48"),
        ({"eos_ids": (1, 64)}, r"eos_ids must be within 0\.\.63, got \[64\]"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": 1.0, "top_k": 65}, "top_k must be within"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"softmax": 6.0}, 'softmax must be None, "auto" or a UnifiedMax, got 6.0'),
        ({"max_recompute_rate": 1.5}, r"max_recompute_rate must be within 0\.\.1, got 1.5"),
        ({"max_recompute_rate": "x"}, "max_recompute_rate must be a number, got 'x'"),
        ({"max_recompute_rate": None}, "max_recompute_rate must be a number, got None"),
        ({"softmax": UnifiedMax(jnp.zeros(3))}, r"phi .* broadcast to \[B, N\] = \[2, 4\].* got shape \(3,\)"),
        ({"softmax": UnifiedMax(jnp.zeros((1, 2, 4)))}, r"phi .* one a layer.* L = 2, got shape \(1, 2, 4\)"),
    ],
)
def test_bad_input_is_one_clear_error_before_anything_runs(model, arguments, message):
    arguments = {"tokens": PROMPTS, "max_new_tokens": 4} | arguments
    with pytest.raises(ValueError, match=message):
        stream(model, **arguments)  # at the call: nothing was asked of the generator yet
    with pytest.raises(ValueError, match=message):
        generate(model, **arguments)


def test_bad_chunk_size(model):
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        stream(model, PROMPTS, chunk_size=0)
    with pytest.raises(ValueError, match=r"chunk_size must be an integer of at least 1, got 8\.0"):
        stream(model, PROMPTS, chunk_size=8.0)


# Memory.


def test_memory_that_is_used_up_names_what_takes_it(model, monkeypatch):
    def exhausted(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345 bytes.")

    message = (
        r"Out of memory while trying to allocate 12345 bytes. Of the device's memory.*: the weights take [\d.]+ kB, "
        r"the KV cache of 2 x 64 tokens 32.8 kB\. Lower max_new_tokens, the number of prompts"
    )
    monkeypatch.setattr(generation, "executable", exhausted)
    with pytest.raises(MemoryError, match=message):
        generate(model, PROMPTS, max_new_tokens=20)


def test_other_failures_of_jax_stay_what_they_are(model, monkeypatch):
    def fail(*args):
        raise jax.errors.JaxRuntimeError("INTERNAL: no idea")

    monkeypatch.setattr(generation, "executable", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: no idea"):
        generate(model, PROMPTS, max_new_tokens=20)
