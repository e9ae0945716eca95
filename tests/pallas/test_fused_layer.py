"""The fused layer against float64, interpreted on the CPU (a launch a product) and as it is on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import layer_case
import numpy as np
import oracle
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from layer_case import CAPACITY, ON_GPU, SPECS, check_slots, exact, lib, product

from fdpp_jax.pallas.fused_layer import fused_layer, fused_qkv, handover
from fdpp_jax.pallas.fused_layer.epilogues import _gelu_tanh
from fdpp_jax.pallas.fused_layer.norms import LayerNorm, RMSNormOfSum
from fdpp_jax.pallas.fused_layer.phases import LayerFacts
from fdpp_jax.pallas.fused_layer.refs import NUM_RESULT_ROWS, GlobalRefs
from fdpp_jax.plans import device
from fdpp_jax.plans.calls import HeadWeights, NextAttention
from fdpp_jax.plans.hopper_layer import FusedLayerConfig, fused_layer_config
from fdpp_jax.plans.shapes import LayerShape, LayerSpec, Norm, Rotation

pytestmark = pytest.mark.usefixtures("fresh_interpreter")


@dataclasses.dataclass(frozen=True)
class Case(layer_case.Case):
    config: FusedLayerConfig | None = None

    def handover(self):
        """Of a launch before, whose last product still lacks its norm where a layer has such norms."""
        before = handover(self.shape, self.config)
        if before.added is None:
            return before
        added = jax.random.normal(jax.random.key(77), before.added.shape, jnp.bfloat16)
        return before._replace(added=added, sums=jnp.ones_like(before.sums))

    def run(self, inputs, before=None, *, detect_races=False):
        interpret = interpreted(detect_races=detect_races)
        run = functools.partial(fused_layer, spec=self.shape.spec, config=self.config, interpret=interpret)
        results = jax.block_until_ready(jax.jit(run)(*inputs, self.handover() if before is None else before))
        assert ON_GPU or not detect_races or not gpu_callbacks.get_races().races_found  # JAX 0.12 raises by itself
        return results

    def whole(self, hidden, left):
        """The residual stream, of what a launch leaves."""
        hidden = exact(hidden)
        if left.added is None:
            return hidden
        hidden_size = self.shape.hidden_size
        squares = exact(left.sums)[0, : 2 * hidden_size // 32, : self.shape.batch].sum(axis=0)
        factor = 1 / lib.sqrt(squares / hidden_size + self.shape.spec.norm.eps)[:, None]
        return hidden + exact(left.added) * factor

    def expected_of(self, attended, hidden, *others):
        """hidden, query, keys, values."""
        return self.expected(attended, self.whole(hidden, self.handover()), *others)


def interpreted(*, detect_races):
    return None if ON_GPU else plgpu.InterpretGPUParams(detect_races=detect_races)


def case(batch, hidden, inner, heads, kv_heads, head_dim, tiles, name="llama"):
    shape = LayerShape(batch, hidden, inner, heads, kv_heads, head_dim, spec=SPECS[name])
    return Case(shape, config=FusedLayerConfig(*tiles))


def with_spec(case, name):
    return dataclasses.replace(case, shape=dataclasses.replace(case.shape, spec=SPECS[name]))


def facts_of(case):
    shape = case.shape
    sizes = shape.num_query_heads, shape.num_kv_heads, shape.head_dim, shape.hidden_size, shape.intermediate_size
    return LayerFacts(shape.batch, *sizes, shape.spec, case.config, True)


def check(case, inputs, results):
    hidden, following, left = results
    outs = case.whole(hidden, left), *following
    for out, expected in zip(outs, case.expected_of(*inputs), strict=True):
        # Four products with inputs rounded to bfloat16 stand one on the other.
        assert oracle.relative_error(out, expected) < 2 * oracle.TOLERANCE["bfloat16"]
    check_slots(inputs[-1], following)


def check_before_the_first_attention(case, x, weights, cache):
    """What `fused_qkv` leaves, whose queries, keys and values are right."""
    run = functools.partial(
        fused_qkv, spec=case.shape.spec, config=case.config, interpret=interpreted(detect_races=False)
    )
    attention, left = jax.jit(run)(x, weights, cache, handover(case.shape, case.config))
    for out, expected in zip(attention, case.expected_attention(exact(x), weights, cache), strict=True):
        assert oracle.relative_error(out, expected) < oracle.TOLERANCE["bfloat16"]
    check_slots(cache, attention)
    return left


SMALL = case(1, 128, 128, 2, 1, 64, (3, 64, 3, 2, 2))
# Two groups of rows; no size is a multiple of a tile; more CTAs than some products have units.
RAGGED = case(9, 192, 320, 1, 1, 64, (5, 128, 2, 2, 2))
# Of every product some units are split along K: owners with one helper and with two, chunks begun in their middle.
SPLIT = case(2, 256, 256, 2, 1, 64, (3, 64, 3, 2, 2))
WIDE_HEADS = case(3, 256, 256, 2, 1, 128, (3, 64, 3, 2, 2))
KINDS = {
    "qwen3": case(2, 128, 128, 2, 1, 256, (4, 64, 3, 2, 2), "qwen3"),  # four units a head
    "gemma, many rows": with_spec(RAGGED, "gemma"),  # rows of x: 18, padded to 24
    "opt, many rows": with_spec(RAGGED, "opt"),
    "all biases": with_spec(SMALL, "all biases"),
    # The second unit of a head has columns of the first one, too.
    "heads of 96": case(2, 128, 128, 2, 1, 96, (3, 64, 3, 2, 2)),
    "heads of 80": case(2, 128, 128, 4, 2, 80, (3, 64, 3, 2, 2), "opt"),
}
SMALL_GEMMA, SMALL_OPT = with_spec(SPLIT, "gemma"), with_spec(SPLIT, "opt")
H200 = device.by_name("H200")


def planned(batch, *sizes, name="llama"):
    shape = LayerShape(batch, *sizes, spec=SPECS[name])
    return Case(shape, config=fused_layer_config(shape, H200))


LLAMA_2_7B = 4096, 11008, 32, 32, 128
LLAMA_3_8B = 4096, 14336, 32, 8, 128
QWEN3_8B = 4096, 12288, 32, 8, 128
GEMMA_2_9B = 3584, 14336, 16, 8, 256
OTHERS = [  # on the CPU, small ones of each family: tests/models/test_decoder.py
    SMALL_GEMMA,
    SMALL_OPT,
    with_spec(SPLIT, "qwen2"),
    with_spec(WIDE_HEADS, "qwen3"),
    with_spec(WIDE_HEADS, "chatglm"),
    case(3, 256, 384, 2, 1, 128, (5, 64, 4, 2, 3)),
    case(8, 64, 128, 1, 1, 64, (4, 256, 2, 4, 2)),  # one tile is all of K
    *(planned(batch, *LLAMA_2_7B) for batch in (1, 2, 7, 8, 9, 24, 32)),
    *(planned(batch, *LLAMA_3_8B) for batch in (1, 16, 32)),
    planned(3, 8192, 28672, 64, 8, 128),  # Llama 70B
    planned(4, 2048, 8192, 32, 8, 64),  # Llama-3.2-1B
    planned(2, 3584, 18944, 28, 4, 128, name="qwen2"),  # Qwen2.5-7B
    *(planned(batch, *QWEN3_8B, name="qwen3") for batch in (1, 5, 32)),
    planned(3, 1024, 3072, 16, 8, 128, name="qwen3"),  # Qwen3-0.6B
    *(planned(batch, *GEMMA_2_9B, name="gemma") for batch in (1, 4, 8, 32)),
    *(planned(batch, 4096, 13696, 32, 2, 128, name="chatglm") for batch in (1, 12)),
    *(planned(batch, 4096, 16384, 32, 32, 128, name="opt") for batch in (1, 6, 7, 32)),
    *(planned(batch, 3072, 8192, 32, 32, 96) for batch in (1, 9, 32)),  # Phi-3-mini
    *(planned(batch, 2560, 10240, 32, 32, 80, name="opt") for batch in (1, 9, 32)),  # OPT-2.7B
    planned(3, 4096, 13696, 32, 2, 160, name="chatglm"),  # 80 columns that rotate, and 80 others
]


@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        *(pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in KINDS.items()),
        *(pytest.param(case, marks=pytest.mark.gpu) for case in OTHERS),
    ],
)
def test_agrees_with_float64(case):
    inputs = case.inputs()
    check(case, inputs, case.run(inputs, detect_races=case == SMALL))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(RAGGED, marks=pytest.mark.slow),
        *(
            pytest.param(case, marks=pytest.mark.gpu)
            for case in (
                planned(9, *LLAMA_2_7B),
                planned(9, *QWEN3_8B, name="qwen3"),
                with_spec(RAGGED, "gemma"),
                with_spec(RAGGED, "opt"),
            )
        ),
    ],
)
def test_nan_stays_in_its_row_and_slots_beyond_the_capacity_are_nowhere(case):
    """NaN marks a row whose attention left the safe window."""
    attended, hidden, weights, following, cache = case.inputs()
    cache = cache._replace(slots=cache.slots.at[1].set(CAPACITY).at[7].set(CAPACITY + 5))
    inputs = attended, hidden, weights, following, cache
    hidden, attention, left = case.run((attended.at[3, 0, 5].set(jnp.nan), *inputs[1:]))
    hidden = case.whole(hidden, left)
    for out in (hidden, attention.query):
        assert np.isnan(out[3]).all()
    slot = int(cache.slots[3])
    expected = case.expected_of(*inputs)
    repaired = [np.array(out, np.float64) for out in (hidden, attention.query)]
    for out, x in zip(repaired, expected, strict=False):
        out[3] = x[3]
    keys, values = (
        x.at[3, slot].set(y[3, slot].astype(x.dtype)) for x, y in zip(attention[1:], expected[2:], strict=True)
    )
    for out, x in zip((*repaired, keys, values), expected, strict=True):
        assert oracle.relative_error(out, x) < 2 * oracle.TOLERANCE["bfloat16"]
    check_slots(cache, NextAttention(attention.query, keys, values))


@pytest.mark.parametrize(
    ("case", "vocab_size"),
    [
        (SMALL, None),
        pytest.param(SPLIT, 256, marks=pytest.mark.slow),
        pytest.param(SMALL_GEMMA, None, marks=pytest.mark.slow),
        pytest.param(SMALL_GEMMA, 96, marks=pytest.mark.slow),  # its last unit is half a one
        pytest.param(SMALL_OPT, 96, marks=pytest.mark.slow),
        pytest.param(SMALL, 256, marks=pytest.mark.gpu),  # on the CPU: tests/models/test_decoder.py
        pytest.param(SPLIT, None, marks=pytest.mark.gpu),
        *(
            pytest.param(planned(*sizes), vocab_size, marks=pytest.mark.gpu)
            for sizes in ((3, *LLAMA_2_7B), (32, *LLAMA_3_8B))
            for vocab_size in (None, 256)
        ),
        *(pytest.param(planned(3, *GEMMA_2_9B, name="gemma"), size, marks=pytest.mark.gpu) for size in (None, 96)),
        pytest.param(planned(3, 4096, 16384, 32, 32, 128, name="opt"), 96, marks=pytest.mark.gpu),
    ],
)
def test_behind_the_last_layer_are_logits(case, vocab_size):
    """Or without a head its hidden states. Some units of the head are split along K."""
    attended, hidden, weights, following, _ = case.inputs()
    head = None
    if vocab_size is not None:
        vocab_size *= 150 if case.shape.hidden_size > 1000 else 1
        matrix = jax.random.normal(jax.random.key(7), (vocab_size, case.shape.hidden_size), jnp.bfloat16)
        matrix *= case.shape.hidden_size**-0.5
        head = HeadWeights(following.input_norm, matrix, following.input_norm_bias)
    out, logits, left = case.run((attended, hidden, weights, head, None))
    expected = case.expected_hidden(attended, case.whole(hidden, case.handover()), weights)
    out = out if vocab_size is None else case.whole(out, left)
    assert oracle.relative_error(out, expected) < 2 * oracle.TOLERANCE["bfloat16"]
    if vocab_size is None:
        assert logits is None
        return
    assert logits.dtype == jnp.float32
    expected = product(case.normed(expected, head.norm, head.norm_bias), exact(head.weight).T)
    if cap := case.shape.spec.logits_soft_cap:
        expected = cap * lib.tanh(expected / cap)
    assert oracle.relative_error(logits, expected) < 2 * oracle.TOLERANCE["bfloat16"]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(SPLIT, marks=pytest.mark.slow),
        RAGGED,
        pytest.param(KINDS["qwen3"], marks=pytest.mark.slow),
        *(
            pytest.param(case, marks=pytest.mark.gpu)
            for case in (
                *(planned(batch, *LLAMA_2_7B) for batch in (1, 32)),
                planned(2, 3584, 18944, 28, 4, 128, name="qwen2"),
                planned(3, *QWEN3_8B, name="qwen3"),
                planned(3, *GEMMA_2_9B, name="gemma"),
                planned(3, 4096, 13696, 32, 2, 128, name="chatglm"),
                planned(3, 4096, 16384, 32, 32, 128, name="opt"),
            )
        ),
    ],
)
def test_before_the_first_attention_are_queries_keys_and_values(case):
    _, x, weights, _, cache = case.inputs()
    cache = cache._replace(slots=cache.slots.at[-1].set(CAPACITY + 1))
    left = check_before_the_first_attention(case, x, weights, cache)
    is_counted = np.asarray(left.counters.any(axis=(1, 2)))
    assert not np.delete(is_counted, NUM_RESULT_ROWS).any()  # that of heads is cleared by the next launch


def test_eps_keeps_tiny_queries_and_keys_small():
    """Their mean squares are about as large as eps: without eps they would be a third longer."""
    small = case(1, 64, 128, 1, 1, 64, (2, 64, 2, 2, 2), "qwen3")
    _, x, weights, _, cache = small.inputs()
    x = (x * small.shape.spec.norm.eps**0.5).astype(x.dtype)
    check_before_the_first_attention(small, x, weights, cache)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        planned(1, *LLAMA_2_7B),
        planned(8, *LLAMA_3_8B),
        RAGGED,
        planned(1, *QWEN3_8B, name="qwen3"),
        planned(9, *GEMMA_2_9B, name="gemma"),
        planned(1, 4096, 16384, 32, 32, 128, name="opt"),
    ],
)
def test_gives_the_same_each_time(case):
    """Layer upon layer, the last among them, on the same counters: whoever reads too early sees another's numbers."""
    attended, hidden, weights, following, cache = case.inputs()
    head = jnp.tile(weights.mlp_in[: case.shape.hidden_size], (4, 1))
    head = HeadWeights(following.input_norm, head, following.input_norm_bias)

    @jax.jit
    def step(hidden):
        attention, left = fused_qkv(
            hidden, weights, cache, handover(case.shape, case.config), spec=case.shape.spec, config=case.config
        )
        for _ in range(4):
            query = attention.query + attended
            hidden, attention, left = case.run((query, hidden, weights, following, cache), left)
        hidden, logits, left = case.run((attention.query, hidden, weights, head, None), left)
        return hidden, logits, *attention

    first = step(hidden)
    for _ in range(100):
        for x, y in zip(first, step(hidden), strict=True):
            assert (x == y).all()


@pytest.mark.parametrize(
    "case",
    [
        SPLIT,
        RAGGED,
        *(planned(1, *sizes) for sizes in (LLAMA_2_7B, LLAMA_3_8B, (5120, 13824, 40, 40, 128))),
        planned(1, 4096, 16384, 32, 32, 128, name="opt"),
    ],
)
def test_every_tile_is_multiplied_once(case):
    """CTAs have equally many, but for one round of units; a split unit's parts follow upon its owner's."""
    num_ctas, facts = case.config.num_ctas, facts_of(case)
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


@pytest.mark.parametrize(
    "sizes",
    [QWEN3_8B, (1024, 3072, 16, 8, 128), (1280, 320, 1, 1, 256), (1280, 4096, 5, 5, 512), (2560, 9728, 32, 8, 128)],
)
def test_no_cta_waits_for_itself(sizes):
    """Where heads are normalised, units of a head wait for each other, and a CTA finishes one unit after the other."""
    case = planned(1, *sizes, name="qwen3")
    facts, ctas = facts_of(case), jnp.arange(case.config.num_ctas)
    phase, owned = facts.phases[-1], []  # (cta, head) of each unit
    for step in facts.steps:
        if step.phase != phase or step.is_helpers:
            continue
        counts = np.broadcast_to(facts.num_segments(step, ctas), len(ctas))
        for turn in range(counts.max()):
            unit, start, stop = np.broadcast_arrays(*facts.segment(step, ctas, jnp.int32(turn)))
            is_owner = (turn < counts) & (start < stop)
            owned += zip(np.arange(len(ctas))[is_owner], unit[is_owner] // facts.units_per_head, strict=True)
    assert len(owned) == phase.num_units
    assert len(set(owned)) == len(owned)


def test_lowers_for_cuda():
    """One launch, which updates the cache and the counters in place."""
    case = planned(8, *LLAMA_2_7B)
    inputs = jax.eval_shape(case.inputs)
    run = functools.partial(fused_layer, spec=case.shape.spec, config=case.config)
    text = jax.jit(run).trace(*inputs, jax.eval_shape(case.handover)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert text.count("output_operand_alias<") == 3


@pytest.mark.parametrize("rotation", [Rotation(), Rotation(0.5), None])
def test_units_have_every_column_once(rotation):
    """Of queries, keys and values: pairs that rotate together, and neighbours that do not rotate."""
    facts = LayerFacts(1, 2, 1, 256, 512, 512, LayerSpec(rotation=rotation), SMALL.config, True)
    low, high = (np.asarray(x) for x in facts.columns(facts.phases[-1], jnp.arange(16)))
    assert sorted([*low, *high]) == list(range(0, 4 * 256, 32))
    is_rotated = low % 256 < facts.num_rotated
    assert (high - low == np.where(is_rotated, facts.num_rotated // 2, 32)).all()


@pytest.mark.parametrize(
    ("head_dim", "rotation", "num_units"),
    [(96, Rotation(), 2), (80, Rotation(), 2), (80, None, 2), (144, None, 3), (160, Rotation(0.5), 4)],
)
def test_units_have_every_column_at_least_once(head_dim, rotation, num_units):
    """Where heads are no multiples of units. Units with the same columns add up K in the same order."""
    spec, num_heads = LayerSpec(rotation=rotation), 4 + 2 * 2
    facts = LayerFacts(1, 4, 2, head_dim, 512, 512, spec, dataclasses.replace(SMALL.config, num_ctas=5), True)
    phase = facts.phases[-1]
    assert phase.num_units == num_heads * num_units
    assert facts.num_split(phase) == 0
    assert facts.num_split(dataclasses.replace(phase, name="head")) > 0
    low, high = (np.asarray(x) for x in facts.columns(phase, jnp.arange(phase.num_units)))
    columns = low[:, None] + np.arange(32), high[:, None] + np.arange(32)
    assert set(np.concatenate(columns).flat) == set(range(num_heads * head_dim))
    assert (low // head_dim == (high + 31) // head_dim).all()
    place, half = columns[0] % head_dim, facts.num_rotated // 2
    is_rotated = place < facts.num_rotated
    assert (place[is_rotated] < half).all()
    assert (columns[1] - columns[0] == np.where(is_rotated, half, 32)).all()


def test_refuses_another_layer_with_the_reason():
    case, spec = SMALL, LayerSpec(norms_products=True, norm=Norm("layer"))
    run = functools.partial(fused_layer, spec=spec, config=case.config)
    with pytest.raises(NotImplementedError, match="RMSNorm only"):
        jax.eval_shape(run, *jax.eval_shape(case.inputs), jax.eval_shape(case.handover))


@pytest.mark.parametrize(
    ("kind", "case", "means"),
    [
        (RMSNormOfSum, SMALL_GEMMA, (1.0, 1.0, -1.0, 0.999)),  # x cancels z, nearly
        (LayerNorm, SMALL_OPT, (0.999, 1.0)),  # x is constant, and its mean square is rounded down
    ],
)
def test_a_sum_that_rounding_makes_negative_has_a_factor(kind, case, means):
    norm = kind.__new__(kind)
    norm.gmem, norm.facts = GlobalRefs(None, None), facts_of(case)
    norm.mean = lambda sums, kind: jnp.full((8,), means[kind])
    _, factor = norm.factors(facts_of(case).phases[1])
    np.testing.assert_allclose(factor, case.shape.spec.norm.eps**-0.5, rtol=1e-3)


def test_gelu_is_as_exact_as_float32():
    x = jnp.linspace(-6, 6, 1001)
    np.testing.assert_allclose(_gelu_tanh(x), jax.nn.gelu(x, approximate=True), rtol=1e-5, atol=1e-6)
