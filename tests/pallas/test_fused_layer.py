"""The fused layer against float64, interpreted on the CPU (a launch a product) and as it is on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.pallas.fused_layer import BetweenWeights, counters_for, fused_layer, fused_qkv
from fdpp_jax.pallas.fused_layer.phases import LayerFacts
from fdpp_jax.plans import device
from fdpp_jax.plans.calls import LayerCache, NextAttention
from fdpp_jax.plans.hopper_layer import FusedLayerConfig, fused_layer_config
from fdpp_jax.plans.shapes import LayerShape, LayerSpec, Norm, Rotation

ON_GPU = jax.default_backend() == "gpu"
EPS = 1e-5
CAPACITY = 24


pytestmark = pytest.mark.usefixtures("fresh_interpreter")


@dataclasses.dataclass(frozen=True)
class Case:
    shape: LayerShape
    config: FusedLayerConfig
    seed: int = 0
    has_bias: bool = False

    @property
    def spec(self):
        return LayerSpec(norm=Norm(eps=EPS), has_qkv_bias=self.has_bias)

    def inputs(self):
        """attended, hidden, weights, cache."""
        shape, keys = self.shape, iter(jax.random.split(jax.random.key(self.seed), 16))
        query_size, kv_size = shape.num_query_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim

        def normal(*sizes, scale=1.0):
            return (scale * jax.random.normal(next(keys), sizes)).astype(jnp.bfloat16)

        def matrix(rows, columns):
            return normal(rows, columns, scale=columns**-0.5)

        weights = BetweenWeights(
            o=matrix(shape.hidden_size, query_size),
            post_norm=1 + normal(shape.hidden_size, scale=0.1),
            gate_up=matrix(2 * shape.intermediate_size, shape.hidden_size),
            down=matrix(shape.hidden_size, shape.intermediate_size),
            next_norm=1 + normal(shape.hidden_size, scale=0.1),
            next_qkv=matrix(query_size + 2 * kv_size, shape.hidden_size),
            next_bias=normal(query_size + 2 * kv_size) if self.has_bias else None,
        )
        angles = jax.random.uniform(next(keys), (shape.batch, shape.head_dim // 2), maxval=6.0)
        slots = shape.batch, CAPACITY, shape.num_kv_heads, shape.head_dim
        attended = normal(shape.batch, shape.num_query_heads, shape.head_dim)
        hidden = normal(shape.batch, shape.hidden_size)
        cache = LayerCache(
            keys=normal(*slots),
            values=normal(*slots),
            slots=jax.random.randint(next(keys), (shape.batch,), 0, CAPACITY, jnp.int32),
            rotation=jnp.stack([jnp.cos(angles), jnp.sin(angles)]),
        )
        return attended, hidden, weights, cache

    def counters(self):
        shape = self.shape
        depth = max(shape.num_query_heads * shape.head_dim, shape.hidden_size, shape.intermediate_size)
        return counters_for(depth, self.config)

    def run(self, inputs, counters=None, *, detect_races=False):
        interpret = interpreted(detect_races=detect_races)
        run = functools.partial(fused_layer, spec=self.spec, config=self.config, interpret=interpret)
        results = jax.block_until_ready(jax.jit(run)(*inputs, self.counters() if counters is None else counters))
        assert ON_GPU or not detect_races or not gpu_callbacks.get_races().races_found  # JAX 0.12 raises by itself
        return results


def interpreted(*, detect_races):
    return None if ON_GPU else plgpu.InterpretGPUParams(detect_races=detect_races)


def case(batch, hidden, inner, heads, kv_heads, head_dim, tiles, seed=0):
    return Case(LayerShape(batch, hidden, inner, heads, kv_heads, head_dim), FusedLayerConfig(*tiles), seed)


# In float64; on a GPU, where matrices are large, in its float32.
lib = jnp if ON_GPU else np
product = functools.partial(jnp.matmul, precision="highest") if ON_GPU else np.matmul


def in_exact(x):
    return x.astype(jnp.float32) if ON_GPU else np.asarray(x, np.float64)


def normed(x, weight):
    return x / lib.sqrt((x**2).mean(axis=1, keepdims=True) + EPS) * in_exact(weight)


def expected_hidden(attended, hidden, weights):
    batch = attended.shape[0]
    hidden = in_exact(hidden) + product(in_exact(attended).reshape(batch, -1), in_exact(weights.o).T)
    gate, up = lib.split(product(normed(hidden, weights.post_norm), in_exact(weights.gate_up).T), 2, axis=1)
    return hidden + product(gate / (1 + lib.exp(-gate)) * up, in_exact(weights.down).T)


def expected_next(x, weights, cache):
    """query, keys, values, for x after the norm."""
    batch, _, num_kv_heads, head_dim = cache.keys.shape
    qkv = product(x, in_exact(weights.next_qkv).T)
    if weights.next_bias is not None:
        qkv = qkv + in_exact(weights.next_bias)
    qkv = qkv.reshape(batch, -1, head_dim)
    num_turned = qkv.shape[1] - num_kv_heads
    turned, value = lib.split(qkv, [num_turned], axis=1)
    low, high = lib.split(turned, 2, axis=2)
    cos, sin = in_exact(cache.rotation)[:, :, None]
    turned = lib.concatenate([low * cos - high * sin, high * cos + low * sin], axis=2)
    query, key, value, keys, values = (
        np.array(x, np.float64)
        for x in (*lib.split(turned, [num_turned - num_kv_heads], axis=1), value, cache.keys, cache.values)
    )
    for row, slot in enumerate(np.asarray(cache.slots)):
        if slot < keys.shape[1]:
            keys[row, slot], values[row, slot] = key[row], value[row]
    return query, keys, values


def expected(attended, hidden, weights, cache):
    """hidden, query, keys, values."""
    hidden = expected_hidden(attended, hidden, weights)
    return hidden, *expected_next(normed(hidden, weights.next_norm), weights, cache)


def check(case, inputs, results):
    hidden, following, _ = results
    for out, exact in zip((hidden, *following), expected(*inputs), strict=True):
        # Four products with inputs rounded to bfloat16 stand one on the other.
        assert oracle.relative_error(out, exact) < 2 * oracle.TOLERANCE["bfloat16"]
    check_slots(inputs[-1], following)


def check_slots(cache, following):
    """No slot changed but the rows' own."""
    rows, slots = np.arange(len(cache.slots)), np.asarray(cache.slots)
    for before, after in ((cache.keys, following.keys), (cache.values, following.values)):
        changed = np.array((before != after).any(axis=(2, 3)))
        live = slots < CAPACITY
        changed[rows[live], slots[live]] = False
        assert not changed.any()


SMALL = case(1, 128, 128, 2, 1, 64, (3, 64, 3, 2, 2))
# Two groups of rows; no size is a multiple of a tile; more CTAs than some products have units.
RAGGED = case(9, 192, 320, 1, 1, 64, (5, 128, 2, 2, 2))
# Of every product some units are split along K: owners with one helper and with two, chunks begun in their middle.
SPLIT = case(2, 256, 256, 2, 1, 64, (3, 64, 3, 2, 2))
BIASED = dataclasses.replace(SPLIT, has_bias=True)
H200 = device.by_name("H200")


def planned(batch, *sizes, seed=0):
    shape = LayerShape(batch, *sizes)
    return Case(shape, fused_layer_config(shape, H200), seed)


LLAMA_2_7B = 4096, 11008, 32, 32, 128
LLAMA_3_8B = 4096, 14336, 32, 8, 128
OTHERS = [
    case(3, 256, 384, 2, 1, 128, (5, 64, 4, 2, 3)),
    case(8, 64, 128, 1, 1, 64, (4, 256, 2, 4, 2)),  # one tile is all of K
    *(planned(batch, *LLAMA_2_7B) for batch in (1, 2, 7, 8, 9, 24, 32)),
    *(planned(batch, *LLAMA_3_8B) for batch in (1, 16, 32)),
    planned(3, 8192, 28672, 64, 8, 128),  # Llama 70B
    planned(4, 2048, 8192, 32, 8, 64),  # Llama-3.2-1B
    dataclasses.replace(planned(2, 3584, 18944, 28, 4, 128), has_bias=True),  # Qwen2.5-7B
]


@pytest.mark.parametrize("case", [SMALL, BIASED, *(pytest.param(case, marks=pytest.mark.gpu) for case in OTHERS)])
def test_agrees_with_float64(case):
    inputs = case.inputs()
    check(case, inputs, case.run(inputs, detect_races=case == SMALL))


@pytest.mark.parametrize("case", [RAGGED, pytest.param(planned(9, *LLAMA_2_7B), marks=pytest.mark.gpu)])
def test_nan_stays_in_its_row_and_slots_beyond_the_capacity_are_nowhere(case):
    """NaN marks a row whose attention left the safe window."""
    attended, hidden, weights, cache = case.inputs()
    cache = cache._replace(slots=cache.slots.at[1].set(CAPACITY).at[7].set(CAPACITY + 5))
    inputs = attended, hidden, weights, cache
    hidden, following, counters = case.run((attended.at[3, 0, 5].set(jnp.nan), *inputs[1:]))
    for out in (hidden, following.query):
        assert np.isnan(out[3]).all()
    slot = int(cache.slots[3])
    exact = expected(*inputs)
    repaired = [out.at[3].set(x[3].astype(out.dtype)) for out, x in zip((hidden, following.query), exact, strict=False)]
    keys, values = (
        x.at[3, slot].set(y[3, slot].astype(x.dtype)) for x, y in zip(following[1:], exact[2:], strict=True)
    )
    check(case, inputs, (repaired[0], NextAttention(repaired[1], keys, values), counters))


@pytest.mark.parametrize(
    ("case", "vocab_size"),
    [
        (SMALL, None),
        (SPLIT, 256),
        pytest.param(SMALL, 256, marks=pytest.mark.gpu),  # on the CPU: tests/models/test_decoder.py
        pytest.param(SPLIT, None, marks=pytest.mark.gpu),
        *(
            pytest.param(planned(*sizes), vocab_size, marks=pytest.mark.gpu)
            for sizes in ((3, *LLAMA_2_7B), (32, *LLAMA_3_8B))
            for vocab_size in (None, 256)
        ),
    ],
)
def test_behind_the_last_layer_are_logits(case, vocab_size):
    """Or without a head its hidden states. Some units of the head are split along K."""
    attended, hidden, weights, _ = case.inputs()
    last = weights._replace(next_norm=None, next_qkv=None, next_bias=None)
    if vocab_size is not None:
        vocab_size *= 150 if case.shape.hidden_size > 1000 else 1
        head = jax.random.normal(jax.random.key(7), (vocab_size, case.shape.hidden_size), jnp.bfloat16)
        last = last._replace(next_norm=weights.next_norm, head=head * case.shape.hidden_size**-0.5)
    out, logits, _ = case.run((attended, hidden, last, None))
    exact = expected_hidden(attended, hidden, weights)
    assert oracle.relative_error(out, exact) < 2 * oracle.TOLERANCE["bfloat16"]
    if vocab_size is None:
        assert logits is None
        return
    assert logits.dtype == jnp.float32
    exact = product(normed(exact, weights.next_norm), in_exact(last.head).T)
    assert oracle.relative_error(logits, exact) < 2 * oracle.TOLERANCE["bfloat16"]


@pytest.mark.parametrize(
    "case",
    [
        SPLIT,
        RAGGED,
        *(pytest.param(planned(batch, *LLAMA_2_7B), marks=pytest.mark.gpu) for batch in (1, 32)),
        pytest.param(dataclasses.replace(planned(2, 3584, 18944, 28, 4, 128), has_bias=True), marks=pytest.mark.gpu),
    ],
)
def test_before_the_first_attention_are_queries_keys_and_values(case):
    _, x, weights, cache = case.inputs()
    cache = cache._replace(slots=cache.slots.at[-1].set(CAPACITY + 1))
    run = functools.partial(fused_qkv, spec=case.spec, config=case.config, interpret=interpreted(detect_races=False))
    following, counters = jax.jit(run)(x, weights.next_qkv, weights.next_bias, cache, case.counters())
    assert not counters.any()
    for out, exact in zip(following, expected_next(in_exact(x), weights, cache), strict=True):
        assert oracle.relative_error(out, exact) < oracle.TOLERANCE["bfloat16"]
    check_slots(cache, following)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [planned(1, *LLAMA_2_7B), planned(8, *LLAMA_3_8B), RAGGED])
def test_gives_the_same_each_time(case):
    """Layer upon layer, the last among them, on the same counters: whoever reads too early sees another's numbers."""
    attended, hidden, weights, cache = case.inputs()
    last = weights._replace(next_qkv=None, head=jnp.tile(weights.o, (4, 1))[:, : case.shape.hidden_size])

    @jax.jit
    def step(hidden, counters):
        following, counters = fused_qkv(
            hidden, weights.next_qkv, None, cache, counters, spec=case.spec, config=case.config
        )
        for _ in range(4):
            query = following.query + attended
            hidden, following, counters = case.run((query, hidden, weights, cache), counters)
        hidden, logits, counters = case.run((following.query, hidden, last, None), counters)
        return (hidden, logits, *following), counters

    first, counters = step(hidden, case.counters())
    for _ in range(100):
        again, counters = step(hidden, counters)
        for x, y in zip(first, again, strict=True):
            assert (x == y).all()


@pytest.mark.parametrize(
    "case",
    [SPLIT, RAGGED, *(planned(1, *sizes) for sizes in (LLAMA_2_7B, LLAMA_3_8B, (5120, 13824, 40, 40, 128)))],
)
def test_every_tile_is_multiplied_once(case):
    """CTAs have equally many, but for one round of units; a split unit's parts follow upon its owner's."""
    shape, num_ctas = case.shape, case.config.num_ctas
    sizes = shape.num_query_heads, shape.num_kv_heads, shape.head_dim, shape.hidden_size, shape.intermediate_size
    facts = LayerFacts(8, *sizes, case.spec, case.config, True)
    ctas = jnp.arange(num_ctas)
    for index, phase in enumerate(facts.phases):
        num_tiles, num_split = facts.num_tiles(phase), facts.num_split(phase)
        times = np.zeros((phase.num_units, num_tiles), int)
        work, parts = np.zeros(num_ctas, int), [[] for _ in range(num_split)]
        for step in facts.steps:
            counts = np.broadcast_to(facts.num_segments(step, ctas), num_ctas) * (step.index == index)
            for turn in range(counts.max()):
                for cta, (unit, start, stop) in enumerate(
                    np.stack(np.broadcast_arrays(*facts.segment(step, ctas, jnp.int32(turn))), axis=-1)
                ):
                    if turn < counts[cta] and start < stop:
                        times[unit, start:stop] += 1
                        work[cta] += stop - start
                        if unit < num_split:
                            parts[unit].append((cta, step.is_helpers, start))
        assert (times == 1).all()
        assert work.max() - work.min() <= (1 if num_split else num_tiles)
        for unit, found in enumerate(parts):
            owner = next(cta for cta, is_helper, start in found if not is_helper and start == 0)
            helpers = [cta for cta, is_helper, _ in found if is_helper]
            assert helpers == list(range(owner + 1, owner + 1 + int(facts.num_helpers(phase, owner, unit))))
            assert len(found) == len(helpers) + 1


def test_lowers_for_cuda():
    """One launch, which updates the cache and the counters in place."""
    case = planned(8, *LLAMA_2_7B)
    inputs = jax.eval_shape(case.inputs)
    run = functools.partial(fused_layer, spec=case.spec, config=case.config)
    text = jax.jit(run).trace(*inputs, jax.eval_shape(case.counters)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert text.count("output_operand_alias<") == 3


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (dict(norm=Norm("layer")), "RMSNorm"),
        (dict(activation="gelu_tanh"), "SiLU"),
        (dict(rotation=Rotation("neighbours")), "one half with the other"),
        (dict(has_o_bias=True), "biases"),
    ],
)
def test_refuses_another_layer_with_the_reason(changed, reason):
    spec = dataclasses.replace(SMALL.spec, **changed)
    run = functools.partial(fused_layer, spec=spec, config=SMALL.config)
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(run, *jax.eval_shape(SMALL.inputs), jax.eval_shape(SMALL.counters))
