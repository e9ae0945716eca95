"""The jitted loop: the recompute's place in it, logits that are not finite, and chunks behind one another."""

import concurrent.futures
import dataclasses
import functools
import itertools
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from generation_case import CONFIG, PROMPTS, SOFTMAXES, drain, loud_model, plain_loop

from fdpp_jax import decode_loop, generation, ops
from fdpp_jax.generation import generate, stream
from fdpp_jax.models import KVCache, LlamaForCausalLM
from fdpp_jax.plans import device
from fdpp_jax.plans.backend import LayerPlan
from fdpp_jax.sampling import Sampling
from fdpp_jax.unified_max import UnifiedMax


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return loud_model()


@pytest.mark.parametrize(
    ("overlaps", "options"),
    [(True, {"xla_gpu_enable_command_buffer": ""}), (False, {"xla_gpu_enable_dynamic_slice_fusion": False})],
)
def test_a_step_is_one_cuda_graph_unless_its_launches_overlap(overlaps, options, monkeypatch, model):
    plan = LayerPlan("mosaic_gpu", "fused", None, "in a test", overlaps_attention=overlaps)
    monkeypatch.setattr(type(model), "layer_plan", lambda *_: plan)
    assert decode_loop.decode_compiler_options(model, 1) == options
    compiled = jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile(compiler_options=options)  # XLA knows them
    assert compiled(jnp.ones(3)).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("name", "options"), [("H200", {"xla_gpu_enable_triton_gemm": False}), ("A100", {}), ("MI300X", {}), (None, {})]
)
def test_prompts_leave_out_xlas_triton_matmuls_on_hopper_alone(name, options, monkeypatch):
    if name is not None:
        monkeypatch.setattr(device, "current", lambda: device.by_name(name))
    assert decode_loop.prefill_compiler_options() == options
    compiled = jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile(compiler_options=options)  # XLA knows them
    assert compiled(jnp.ones(3)).tolist() == [2, 2, 2]


def _decode_chunk_arguments(model, batch: int, capacity: int, softmax):
    structure, weights = decode_loop.flattened(model)
    eos_ids = jnp.array([3], jnp.int32)
    prompts, lengths = jnp.zeros((batch, 16), jnp.int32), jnp.full((batch,), 5, jnp.int32)
    prefill = (
        structure,
        capacity,
        softmax is not None and softmax.is_bound,
        16,
        weights,
        prompts,
        lengths,
        Sampling(),
        eos_ids,
        jax.random.key(0),
        None,
    )
    loop, _ = decode_loop.prefill(*prefill)
    return structure, 8, 4, weights, loop, jnp.int32(8), Sampling(), eos_ids, softmax


@pytest.mark.parametrize(
    ("softmax", "num_conds"), [(None, 0), (UnifiedMax(jnp.float32(6)), 1), (UnifiedMax.bound(), 1)]
)
def test_one_cond_a_step_and_none_without_unified_max(model, softmax, num_conds):
    arguments = _decode_chunk_arguments(model, 2, 64, softmax)
    assert str(decode_loop.decode_chunk.trace(*arguments).jaxpr).count("= cond[") == num_conds


@pytest.mark.parametrize(("sampling", "num_splits"), [(Sampling(), 0), (Sampling(temperature=jnp.float32(1)), 1)])
def test_a_greedy_step_makes_no_keys(model, sampling, num_splits):
    *arguments, _, eos_ids, softmax = _decode_chunk_arguments(model, 2, 64, None)
    jaxpr = str(decode_loop.decode_chunk.trace(*arguments, sampling, eos_ids, softmax).jaxpr)
    assert jaxpr.count("= random_split") == num_splits


def test_the_key_of_a_draw_is_neither_the_last_nor_the_next():
    key = jax.random.key(0)
    keys = [key, *decode_loop._next_keys(key, Sampling(temperature=jnp.float32(1)))]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 3


@pytest.mark.parametrize(("has_kernel", "num_conds"), [((True, True), 0), ((False, True), 1)])
def test_what_a_kernel_redoes_is_counted_without_a_cond(model, monkeypatch, has_kernel, num_conds):
    unchecked, layers = ops.unchecked_decode_attention, itertools.cycle(has_kernel)

    def attend(*arrays, softmax, redone, **options):
        if not next(layers) or softmax is None:
            return unchecked(*arrays, softmax=softmax, redone=redone, **options)
        fails = softmax.phi[..., 0] > 100  # [1]: of head 0, in a stand-in for the kernel
        return unchecked(*arrays, **options)[0], redone.at[:, 0].max(fails.astype(jnp.int32))

    monkeypatch.setattr(ops, "unchecked_decode_attention", attend)
    graphdef, weights = nnx.split(model)
    cache = KVCache.create(CONFIG, 2, 16, jnp.float32)

    @jax.jit
    def step(softmax):
        return decode_loop.decode_step(nnx.merge(graphdef, weights), jnp.array([3, 5]), cache, softmax)

    exact, exact_cache, redone = step(None)
    assert not redone
    for layer in (None, 0, 1):
        softmax = UnifiedMax(jnp.zeros((2, 1, 4)) if layer is None else jnp.zeros((2, 1, 4)).at[layer].set(200.0))
        assert str(step.trace(softmax).jaxpr).count("= cond[") == num_conds
        logits, grown, redone = step(softmax)
        assert bool(redone) == (layer is not None)
        np.testing.assert_allclose(logits, exact, atol=1e-5)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), grown, exact_cache)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_recompute_copies_no_cache(model, batch):
    capacity = 4096
    array_bytes = batch * capacity * CONFIG.kv_size * 4
    temp_bytes = {}
    for name, softmax in (("online", None), ("unified", UnifiedMax(jnp.float32(6)))):
        compiled = decode_loop.decode_chunk.lower(*_decode_chunk_arguments(model, batch, capacity, softmax)).compile()
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= 2 * CONFIG.num_hidden_layers * array_bytes  # all of it in place
        temp_bytes[name] = memory.temp_size_in_bytes
    assert temp_bytes["unified"] - temp_bytes["online"] < array_bytes / 4


# Logits that are not finite.


def _poisoned(model, token, value):
    """The model with an embedding that makes the logits of whoever sees that token no finite numbers."""
    graphdef, weights = nnx.split(model)

    def poison(path, x):
        is_embedding = "embed_tokens" in map(str, (getattr(key, "key", key) for key in path))
        return x.at[token].set(value) if is_embedding else x

    return nnx.merge(graphdef, jax.tree.map_with_path(poison, weights))


@pytest.mark.parametrize(
    ("softmax", "value", "sampling"),
    [
        ("online", np.nan, {}),
        ("unified", np.nan, {}),
        pytest.param("unified", np.inf, {"temperature": 0.7}, marks=pytest.mark.slow),
        pytest.param("bound", np.nan, {"temperature": 0.7, "top_k": 3, "top_p": 0.9}, marks=pytest.mark.slow),
    ],
)
def test_logits_that_are_not_finite_are_an_error_that_names_row_and_step(model, softmax, value, sampling):
    softmax = SOFTMAXES[softmax]
    expected = generate(model, PROMPTS, max_new_tokens=20, **sampling).tokens
    row = 1
    token, step = next(
        (int(token), step)
        for step, token in enumerate(expected[row])
        if step > 2 and token not in expected[:, :step] and token not in PROMPTS and token != expected[0, step]
    )
    wrong = _poisoned(model, token, value)
    message = (
        rf"expected finite logits, got NaN or infinity in row {row} of decode step {step + 1}: weights are damaged"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none blames phi
        with pytest.raises(FloatingPointError, match=message):
            generate(wrong, PROMPTS, max_new_tokens=20, softmax=softmax, **sampling)
        chunks = stream(wrong, PROMPTS, max_new_tokens=20, softmax=softmax, chunk_size=1, **sampling)
        for _ in range(step + 1):  # what came before is right
            next(chunks)
        with pytest.raises(FloatingPointError, match=message):
            next(chunks)


def test_a_prompt_whose_logits_are_not_finite(model):
    wrong = _poisoned(model, PROMPTS[1, 2], np.nan)
    with pytest.raises(
        FloatingPointError, match=r"in row 1 of the prompt: weights are damaged, or .* exceed float32\.$"
    ):
        generate(wrong, PROMPTS, max_new_tokens=4)


def test_a_row_that_has_ended_may_hold_anything(model):
    expected = [plain_loop(prompt, 20) for prompt in PROMPTS]
    end = next(token for token in expected[1] if token not in expected[0] and token not in PROMPTS)
    wrong = _poisoned(model, end, np.nan)  # which row 1 feeds itself for ever
    result = generate(wrong, PROMPTS, max_new_tokens=20, eos_ids=[end])
    assert result.tokens[0].tolist() == expected[0]


# Chunks that run while the host looks at others.


class _Calls:
    """Between `generate` and the programs of its chunks: counts their calls, each of which waits for `may_run`."""

    def __init__(self, monkeypatch):
        self.num, self.statics, self.may_run, self._changed = 0, list[tuple](), lambda num: True, threading.Condition()
        compiled = generation.executable

        def executable(request):
            program, seconds = compiled(request)
            if request.function is not decode_loop.decode_chunk:
                return program, seconds
            self.statics.append(request.statics)
            return functools.partial(self._call, program), seconds

        monkeypatch.setattr(generation, "executable", executable)

    def _call(self, program, *args):
        with self._changed:
            self.num += 1
            self._changed.notify_all()
            self._wait_for(lambda: self.may_run(self.num))
        return program(*args)

    def _wait_for(self, condition):
        assert self._changed.wait_for(condition, timeout=60)

    def let_run(self, may_run):
        with self._changed:
            self.may_run = may_run
            self._changed.notify_all()

    def wait_for(self, num):
        with self._changed:
            self._wait_for(lambda: self.num >= num)


@pytest.fixture
def calls(monkeypatch):
    return _Calls(monkeypatch)


def test_the_next_chunk_runs_before_the_host_has_seen_the_last(model, calls):
    chunks = stream(model, PROMPTS, max_new_tokens=20, chunk_size=4)
    next(chunks)  # of the prefill
    assert calls.num == 0  # a first token waits for no compilation
    for num in range(1, 6):
        next(chunks)
        calls.wait_for(min(num + 1, 5))  # no one has asked for the next one
    assert calls.num == 5
    with pytest.raises(StopIteration):
        next(chunks)


def test_a_chunk_is_there_while_the_next_one_runs(model, calls):
    """Even where the call of a program returns at its end."""
    expected = [plain_loop(prompt, 20) for prompt in PROMPTS]
    calls.may_run = lambda num: num < 2
    chunks = stream(model, PROMPTS, max_new_tokens=20, chunk_size=4)
    assert [next(chunks).tokens.shape[1] for _ in range(2)] == [1, 4]
    for num in range(3, 6):
        calls.let_run(lambda num, allowed=num: num < allowed)
        assert next(chunks).lengths.tolist() == [4 * num - 3] * 2
    calls.let_run(lambda num: True)
    (last,), result = drain(chunks)
    assert last.tokens.shape[1] == 3
    assert result.tokens.tolist() == expected


@pytest.mark.parametrize("end_step", [1, 4, 5, 19])
def test_no_more_than_one_chunk_is_started_behind_the_end(model, calls, end_step):
    expected = [plain_loop(prompt, 20) for prompt in PROMPTS]
    ends = [expected[0][end_step], expected[1][end_step]]
    lengths = [1 + min(row.index(end) for end in ends if end in row) for row in expected]
    chunks, result = drain(stream(model, PROMPTS, max_new_tokens=20, eos_ids=ends, chunk_size=4, return_cache=True))
    needed = -(-(max(lengths) - 1) // 4)
    assert needed <= calls.num <= min(needed + 1, 5)
    assert result.decode_steps == max(lengths) - 1
    assert result.lengths.tolist() == lengths == chunks[-1].lengths.tolist()
    assert np.asarray(result.cache.kv.lengths).tolist() == [4 + min(n, max(lengths) - 1) + 1 for n in lengths]
    longer = generate(model, [[1], [2]], max_new_tokens=3, cache=result.cache)
    whole = [[*row, token] for row, token in zip(result.cache.tokens, (1, 2), strict=True)]
    assert longer.tokens.tolist() == generate(model, whole, max_new_tokens=3).tokens.tolist()


def test_a_stream_that_is_left_early(model, calls):
    expected = generate(model, PROMPTS, max_new_tokens=20).tokens.tolist()
    calls.num = 0
    chunks = stream(model, PROMPTS, max_new_tokens=20, chunk_size=4)
    for _ in range(2):
        next(chunks)
    num_threads = threading.active_count()
    chunks.close()
    assert calls.num <= 2  # nothing begins after that
    assert threading.active_count() == num_threads - 2
    assert generate(model, PROMPTS, max_new_tokens=20).tokens.tolist() == expected


def test_steps_are_in_blocks_where_their_launches_overlap(model, calls, monkeypatch):
    plan = model.layer_plan(2)
    for overlaps, block_size in ((False, 1), (True, 8)):
        plan = dataclasses.replace(plan, overlaps_attention=overlaps)
        monkeypatch.setattr(type(model), "layer_plan", lambda *_, plan=plan: plan)
        monkeypatch.setattr(generation, "decode_compiler_options", lambda *_: {})  # says nothing of it
        generate(model, PROMPTS, max_new_tokens=4)
        assert calls.statics[-1][-2:] == (256, block_size)


def test_what_fails_while_the_host_looks_elsewhere_is_its_error(model, calls):
    chunks = stream(model, PROMPTS, max_new_tokens=20, chunk_size=4)
    next(chunks)

    def may_run(num):
        if num == 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345 bytes.")
        return True

    calls.may_run = may_run
    assert next(chunks).tokens.shape[1] == 4
    with pytest.raises(MemoryError, match=r"allocate 12345 bytes\. Of the device's"):
        next(chunks)


def test_seconds_of_chunks_are_those_in_which_one_runs(monkeypatch):
    now = 0.0

    def program(weights, loop, seconds):
        nonlocal now
        now += seconds
        return loop + 1, jnp.int32(loop)

    monkeypatch.setattr(decode_loop.time, "perf_counter", lambda: now)
    with decode_loop.Chunks([], 0) as chunks:
        assert chunks.start(program, 5.0).result() == (0, 5.0)
        now += 100.0  # nothing runs
        assert chunks.start(program, 3.0).result() == (1, 3.0)
        now += 100.0
        (third, some), (fourth, others) = [chunk.result() for chunk in [chunks.start(program, 2.0) for _ in range(2)]]
        assert (third, fourth, some + others) == (2, 3, 4.0)
    assert chunks.loop == 4


def test_seconds_of_decoding_are_those_of_all_chunks(model, monkeypatch):
    read = decode_loop.Chunks._read
    monkeypatch.setattr(decode_loop.Chunks, "_read", lambda *args: (read(*args)[0], 2.0))
    chunks, result = drain(stream(model, PROMPTS, max_new_tokens=20, chunk_size=8))
    assert len(chunks) == 4  # the first token is of the prefill
    assert result.decode_seconds == 6.0


def test_chunks_of_an_ending_interpreter_are_left_to_it(monkeypatch):
    """Its executors have ended by then, and what they need may be gone."""
    monkeypatch.setattr("sys.is_finalizing", lambda: True)
    chunks = decode_loop.Chunks([], 0)
    monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, "shutdown", None)
    with chunks:
        pass


def test_chunks_may_be_collected_in_their_own_thread():
    """The garbage collector runs in any thread, and none can wait for itself."""
    chunks = decode_loop.Chunks([], 0)

    def leave(*_):
        chunks.__exit__(None, None, None)
        return 0, 0

    assert chunks.start(leave).result(timeout=10)[0] == 0
