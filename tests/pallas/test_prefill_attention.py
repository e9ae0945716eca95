"""The prefill kernel against float64: masks, lengths, caches of all kinds, sinks, caps, both directions of failure."""

import dataclasses
import itertools
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from decode_case import ON_GPU, _keep_clocks
from jax._src.pallas.mosaic_gpu.interpret import shared_memory
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.pallas.prefill_attention import blocks, prefill_attention
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions
from fdpp_jax.plans.hopper import HEAD_DIMS
from fdpp_jax.plans.hopper_prefill import PrefillAttentionConfig

pytestmark = [
    pytest.mark.usefixtures("fresh_interpreter"),
    # numpy, by which the interpreter multiplies, warns of what overflows on purpose.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]
SMALL = PrefillAttentionConfig(64, 2)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and features of a call."""

    batch: int = 1
    query_length: int = 130
    capacity: int = 130
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 64
    dtype: str = "bfloat16"
    lengths: tuple[int, ...] | None = None
    starts: tuple[int, ...] | None = None
    offset: tuple[int, ...] | None = None
    has_sinks: bool = False
    is_causal: bool = True
    local_window_size: tuple[int, int] | None = None
    logits_soft_cap: float | None = None
    query_scale: float = 1.0
    page_size: int | None = None
    kv_dtype: str | None = None
    scales: str = "head"
    config: PrefillAttentionConfig = SMALL

    def arrays(self, seed=0):
        """Random arrays, with NaN behind the lengths and before the starts."""
        rng = np.random.default_rng(seed)
        query = rng.standard_normal((self.batch, self.query_length, self.num_heads, self.head_dim), np.float32)
        key, value = rng.standard_normal((2, self.batch, self.capacity, self.num_kv_heads, self.head_dim), np.float32)
        position, lengths = np.arange(self.capacity), self.lengths or (self.capacity,) * self.batch
        dead = position >= np.array(lengths)[:, None]
        if self.starts is not None:
            dead |= position < np.array(self.starts)[:, None]
        key[dead] = value[dead] = np.nan
        dtype = jnp.dtype(self.dtype)
        given = dict(query=(query * self.query_scale).astype(dtype))
        if self.kv_dtype is None:
            given |= dict(key=key.astype(dtype), value=value.astype(dtype))
        else:
            given["key"], given["key_scale"] = oracle.quantised(key, self.kv_dtype, self.scales)
            given["value"], given["value_scale"] = oracle.quantised(value, self.kv_dtype, self.scales)
        if self.page_size is not None:
            by_key = [name for name in ("key", "value", "key_scale", "value_scale") if np.ndim(given.get(name)) > 1]
            pools = oracle.paged(seed, [given[name] for name in by_key], lengths, self.page_size, self.starts or 0)
            given |= dict(zip((*by_key, "page_table"), pools, strict=True))
        for name, numbers in (("lengths", lengths), ("starts", self.starts), ("query_offset", self.offset)):
            if numbers is not None:
                given[name] = np.array(numbers, np.int32)
        if self.has_sinks:
            given["sinks"] = rng.uniform(-3, 6, self.num_heads).astype(np.float32)
        return AttentionArrays(**{name: jnp.asarray(x) for name, x in given.items()})

    @property
    def options(self):
        scale = self.head_dim**-0.5
        return AttentionOptions(scale, self.is_causal, self.local_window_size, self.logits_soft_cap, True)

    def expected(self, arrays):
        """The oracle's output, and its log-sum-exp."""
        given = {name: x for name, x in arrays._asdict().items() if x is not None}
        options = dataclasses.asdict(self.options)
        del options["return_residual"]
        return oracle.attention_and_log_sum(**given, **options)


def run(case, arrays, phi, **options):
    """The kernel; interpreted, where there is no GPU, without races."""
    interpret = None if ON_GPU else plgpu.InterpretGPUParams(detect_races=True)
    arrays = arrays._replace(phi=None if phi is None else jnp.float32(phi))
    with mock.patch.object(shared_memory.GPUSharedMemory, "reset_per_cluster_state", _keep_clocks):
        return jax.block_until_ready(
            prefill_attention(arrays, case.options, case.config, interpret=interpret, **options)
        )


def in_turn(case, num_ctas):
    """The case, where so many CTAs take all tiles."""
    return dataclasses.replace(case, config=dataclasses.replace(case.config, num_ctas=num_ctas))


def check(case, phi, seed=0, arrays=None):
    """Right in all rows, and in their log-sum-exps; recomputed where they leave the window."""
    arrays = case.arrays(seed) if arrays is None else arrays
    out, log_sum = run(case, arrays, phi, recompute=True)
    expected, expected_log_sum = case.expected(arrays)
    assert out.dtype == case.dtype
    assert np.isfinite(np.asarray(out, np.float32)).all()
    assert oracle.relative_error(out, expected) < oracle.TOLERANCE[case.dtype]
    np.testing.assert_allclose(log_sum, expected_log_sum, atol=4e-3, rtol=1e-5)


CASES = {
    "causal": Case(config=PrefillAttentionConfig(64, 2, heads_together=2)),
    "whole": Case(is_causal=False, query_length=40, capacity=200, num_kv_heads=2, dtype="float16"),
    "chunk": Case(batch=2, query_length=40, capacity=200, lengths=(150, 77), offset=(110, 37), has_sinks=True),
    "window": Case(query_length=140, capacity=140, local_window_size=(50, 0)),
    "starts": Case(batch=2, query_length=70, capacity=70, starts=(0, 66), logits_soft_cap=5.0),
    "pages": Case(batch=2, query_length=33, capacity=192, lengths=(150, 77), page_size=32, dtype="float16"),
    "pages of 256": Case(query_length=20, capacity=300, lengths=(290,), page_size=256, offset=(270,)),
    "int8": Case(batch=2, query_length=40, capacity=200, lengths=(150, 77), is_causal=False, kv_dtype="int8"),
    "float8 of tokens, pages": Case(
        query_length=70,
        capacity=200,
        num_heads=4,
        num_kv_heads=4,
        page_size=64,
        kv_dtype="float8_e4m3fn",
        scales="token",
        lengths=(140,),
        head_dim=128,
    ),
    "int8, wide": Case(
        query_length=17, capacity=130, kv_dtype="int8", head_dim=256, logits_soft_cap=20.0, offset=(100,)
    ),
    "packed": Case(
        batch=2,
        query_length=45,
        capacity=130,
        num_heads=6,
        num_kv_heads=2,
        has_sinks=True,
        offset=(70, -10),
        config=PrefillAttentionConfig(64, 2, packs_group=True, heads_together=3),
    ),
    "no keys": Case(batch=2, query_length=17, capacity=64, lengths=(0, 9), offset=(0, -20), has_sinks=True),
}


@pytest.mark.gpu if ON_GPU else pytest.mark.slow
@pytest.mark.parametrize(("name", "phi"), [*((name, 6.0) for name in CASES), ("causal", None), ("chunk", None)])
def test_against_float64(name, phi):
    check(CASES[name], phi)


@pytest.mark.gpu if ON_GPU else pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_ctas"), [(name, n) for i, name in enumerate(CASES) for n in (2, 3) if ON_GPU or n == 2 + i % 2]
)
def test_ctas_that_take_tiles_in_turn(name, num_ctas):
    check(in_turn(CASES[name], num_ctas), None if name == "causal" else 6.0)


@pytest.mark.gpu if ON_GPU else pytest.mark.slow
@pytest.mark.parametrize(("tile", "score", "head_dim"), [(0, -200.0, 64), (1, 200.0, 256), (3, 200.0, 64)])
def test_one_tile_of_a_cta_that_leaves_the_window_is_redone(tile, score, head_dim):
    case = in_turn(Case(query_length=400, num_heads=1, is_causal=False, capacity=70, head_dim=head_dim), 1)
    arrays = case.arrays()
    number = case.query_length // 128 - tile  # the last rows are the first tile
    fails = np.arange(case.query_length) // 128 == number
    query = arrays.query.at[0, :, 0, 0].set(jnp.where(fails, score, 0.0).astype(case.dtype))
    key = arrays.key.at[..., 0].set(head_dim**0.5)  # each score of these rows is near `score`
    arrays = arrays._replace(query=query, key=key)
    out, _ = run(case, arrays, 6.0)
    np.testing.assert_array_equal(np.isnan(np.asarray(out, np.float32)).any(axis=(0, 2, 3)), fails)
    check(case, 6.0, arrays=arrays)


@pytest.mark.parametrize("num_ctas", [None, 4, 2])
def test_only_ctas_that_take_turns_claim_tiles(num_ctas):
    """The counter is an operand that the kernel changes, so XLA makes a new one for each call."""
    case = in_turn(Case(), num_ctas)  # 4 tiles

    def call(arrays):
        return prefill_attention(arrays._replace(phi=jnp.float32(6.0)), case.options, case.config, recompute=True)

    text = jax.jit(call).trace(case.arrays()).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert text.count("output_operand_alias<") == (num_ctas == 2)


@pytest.mark.parametrize("together", [1, 3, 8, 99])
def test_the_order_of_ctas(together):
    """Every block of rows once; the heads that are left over first; of each section the last rows first."""
    config = PrefillAttentionConfig(64, 2, heads_together=together)
    facts = types.SimpleNamespace(config=config, num_blocks=3, batch=2, row_heads=4)
    places = [tuple(map(int, blocks._place(jnp.int32(i), facts))) for i in range(24)]
    assert sorted(places) == list(itertools.product(range(2), range(4), range(3)))
    numbers = [number for *_, number in places]
    sections = {1: [1] * 8, 3: [2, 3, 3], 8: [8], 99: [8]}[together]
    assert numbers == [number for heads in sections for number in (2, 1, 0) for _ in range(heads)]


@pytest.mark.parametrize("phi", [90.0, -90.0])
def test_rows_that_leave_the_window_are_nan_until_they_are_redone(phi):
    case = Case(query_length=20, capacity=64, num_heads=1, offset=(44,))
    arrays = case.arrays()
    out, log_sum = run(case, arrays, phi)
    assert np.isnan(np.asarray(out, np.float32)).all()
    assert np.isnan(log_sum).all()
    check(case, phi)


def random_cases(seed):
    """Every feature and their combinations; four calls with ragged everything of one compiled kernel."""
    rng = np.random.default_rng(seed)

    def maybe(share, x):
        return x if rng.random() < share else None

    batch, num_kv_heads, head_dim = int(rng.integers(1, 4)), int(rng.integers(1, 3)), int(rng.choice(HEAD_DIMS))
    dtype, scales = str(rng.choice(["bfloat16", "float16"])), str(rng.choice(["head", "token"]))
    kv_dtype = maybe(0.3, str(rng.choice(["int8", "float8_e4m3fn"]))) if head_dim % 64 == 0 else None
    if kv_dtype is not None and scales == "token":
        dtype, num_kv_heads = "bfloat16", 4
    packs_group = bool(rng.random() < 0.3)
    capacity, query_length = int(rng.integers(1, 700)), int(rng.integers(17, 65 if packs_group else 400))
    case = Case(
        batch=batch,
        query_length=query_length,
        capacity=capacity,
        num_heads=num_kv_heads * int(rng.choice([1, 2, 4])),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        has_sinks=bool(rng.random() < 0.25),
        is_causal=bool(rng.random() < 0.6),
        local_window_size=maybe(0.3, (int(rng.integers(0, 200)), int(rng.integers(0, 50)))),
        logits_soft_cap=maybe(0.2, float(rng.choice([5.0, 30.0]))),
        page_size=maybe(0.4, int(rng.choice([16, 32, 64, 128, 256]))),
        kv_dtype=kv_dtype,
        scales=scales,
        config=PrefillAttentionConfig(
            64 if head_dim > 128 else int(rng.choice([64, 128])),
            2,
            packs_group,
            heads_together=int(rng.choice([1, 2, 3, 100])),
            num_ctas=maybe(0.6, int(rng.choice([1, 2, 5, 132]))),
        ),
    )
    has_lengths, has_starts, has_offset = rng.random(3) < (0.5, 0.3, 0.6)

    def some(low, high):
        return tuple(map(int, rng.integers(low, high, batch)))

    for query_scale in (1.0, 1.0, 1.0, 8.0):
        yield dataclasses.replace(
            case,
            lengths=some(0, capacity + 1) if has_lengths else None,
            starts=some(0, capacity + 1) if has_starts else None,
            offset=some(-20, capacity) if has_offset else None,
            query_scale=query_scale,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(125))
def test_random_cases(seed):
    for case, phi in zip(random_cases(seed), (6.0, 30.0, -40.0, 6.0), strict=True):
        check(case, None if seed % 4 == 0 else phi, seed)
