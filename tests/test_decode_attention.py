"""The decode kernel against float64, interpreted on the CPU and as it is on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax.config import DecodeAttentionConfig
from fdpp_jax.pallas.decode_attention import decode_attention

ON_GPU = jax.default_backend() == "gpu"

# The interpreter multiplies in numpy, which warns of the infinities that these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    yield
    gpu_callbacks.reset_gpu_interpret_mode_state()


def run(query, key, value, lengths, phi, config, detect_races=False):
    interpret = None if ON_GPU else plgpu.InterpretGPUParams(detect_races=detect_races)
    if phi is not None:
        phi = jnp.broadcast_to(jnp.asarray(phi, jnp.float32), query.shape[:2])
    call = functools.partial(decode_attention, scale=query.shape[-1] ** -0.5, config=config, interpret=interpret)
    return jax.jit(call)(query, key, value, jnp.asarray(lengths, jnp.int32), phi)


def is_flagged(out):
    """[B, N]: the kernel marks a row that must be recomputed by NaN, in all of it."""
    flagged = np.isnan(np.asarray(out, np.float32))
    np.testing.assert_array_equal(flagged.any(-1), flagged.all(-1))
    return flagged.any(-1)


CASES = {  # batch, capacity, heads, kv heads, head dim, lengths, (block_kv, splits, stages)
    "mha": (2, 200, 4, 4, 64, (200, 131), (64, 2, 2)),
    "gqa": (2, 136, 8, 2, 128, (129, 1), (64, 1, 2)),
    "mqa": (1, 264, 16, 1, 64, (263,), (64, 4, 2)),
    "nine rows": (1, 72, 9, 1, 64, (71,), (64, 1, 2)),
    "sixty-four rows": (1, 72, 64, 1, 64, (72,), (64, 1, 2)),
    "head dim 256": (1, 136, 2, 1, 256, (130,), (64, 2, 2)),
    "wide tiles": (1, 384, 2, 1, 128, (380,), (128, 2, 2)),
    "length 0": (3, 72, 2, 2, 64, (0, 5, 72), (64, 2, 2)),
    "odd capacity": (2, 67, 2, 1, 64, (67, 66), (64, 1, 2)),
    "splits without keys": (1, 512, 2, 2, 64, (63,), (64, 8, 2)),
    "more tiles than stages": (1, 512, 2, 1, 64, (509,), (64, 1, 2)),
}


@pytest.mark.parametrize("phi", [0.5, None], ids=["unified", "online"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64(case, dtype, phi):
    batch, capacity, num_heads, num_kv_heads, head_dim, lengths, tiles = CASES[case]
    inputs = oracle.attention_inputs(
        len(case),
        batch=batch,
        capacity=capacity,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        lengths=lengths,
    )
    out = run(*inputs, lengths, phi, DecodeAttentionConfig(*tiles))
    assert out.dtype == dtype
    assert oracle.relative_error(out, oracle.attention(*inputs, lengths)) < oracle.TOLERANCE[dtype]
    assert not np.asarray(out, np.float64)[np.asarray(lengths) == 0].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("phi", [-100.0, 100.0], ids=["overflow", "underflow"])
def test_flags_rows_outside_the_window(phi, dtype):
    lengths = (70, 0)
    inputs = oracle.attention_inputs(
        3, batch=2, capacity=72, num_heads=4, num_kv_heads=2, head_dim=64, dtype=dtype, lengths=lengths
    )
    per_row = jnp.full((2, 4), 0.0).at[:, 1].set(phi)
    out = run(*inputs, lengths, per_row, DecodeAttentionConfig(64, 1, 2))
    np.testing.assert_array_equal(
        is_flagged(out), [[False, True, False, False], [False] * 4]
    )  # a row without keys is safe
    safe = ~is_flagged(out)
    expected = oracle.attention(*inputs, lengths)
    assert oracle.relative_error(np.asarray(out, np.float64)[safe], expected[safe]) < oracle.TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("phi", [-8.0, -4.0, 0.0, 4.0, 8.0])
def test_no_unflagged_row_is_wrong(phi, dtype):
    """Scores from harmless to far outside: a row is right to working precision, or it is flagged."""
    inputs = oracle.attention_inputs(
        7, batch=1, capacity=136, num_heads=16, num_kv_heads=1, head_dim=64, dtype=jnp.float32
    )
    spread = jnp.geomspace(0.01, 60.0, 16)[None, :, None]  # from flat rows to one dominating score of over 100 nats
    inputs = tuple(x.astype(dtype) for x in (inputs[0] * spread, *inputs[1:]))
    out = run(*inputs, (136,), phi, DecodeAttentionConfig(64, 2, 2))
    overflow = is_flagged(out)
    expected = oracle.attention(*inputs)
    for row in range(16):
        if not overflow[0, row]:
            assert oracle.relative_error(out[0, row], expected[0, row]) < 2 * oracle.TOLERANCE[dtype], row
    if abs(phi) <= 4:
        assert not overflow[0, 0]  # the flat row must not pay for its neighbours
    assert overflow[0, 15]


def test_online_survives_huge_scores():
    inputs = oracle.attention_inputs(
        5, batch=1, capacity=136, num_heads=2, num_kv_heads=1, head_dim=64, dtype="bfloat16", query_scale=1e4
    )
    out = run(*inputs, (136,), None, DecodeAttentionConfig(64, 2, 2))
    # Scores of 1e4 round by more than 1 nat in bfloat16 products summed in float32: compare on those same scores.
    assert oracle.relative_error(out, oracle.attention(*inputs)) < 0.02


def test_traced_phi_compiles_once():
    inputs = oracle.attention_inputs(
        1, batch=1, capacity=64, num_heads=2, num_kv_heads=1, head_dim=64, dtype="bfloat16", lengths=(64,)
    )
    interpret = None if ON_GPU else plgpu.InterpretGPUParams()
    call = jax.jit(
        functools.partial(decode_attention, scale=0.125, config=DecodeAttentionConfig(64, 1, 2), interpret=interpret)
    )
    outs = [call(*inputs, jnp.array([64]), jnp.full((1, 2), phi)) for phi in (0.0, 3.0)]
    assert call._cache_size() == 1
    assert oracle.relative_error(outs[0], outs[1]) < oracle.TOLERANCE["bfloat16"]


@pytest.mark.skipif(ON_GPU, reason="the race detector is the interpreter's")
@pytest.mark.parametrize("phi", [0.5, None], ids=["unified", "online"])
def test_has_no_race(phi):
    lengths = (300, 65)
    inputs = oracle.attention_inputs(
        2, batch=2, capacity=304, num_heads=2, num_kv_heads=1, head_dim=64, dtype="bfloat16", lengths=lengths
    )
    out = run(*inputs, lengths, phi, DecodeAttentionConfig(64, 1, 2), detect_races=True)
    jax.block_until_ready(out)
    assert not gpu_callbacks.get_races().races_found
    assert oracle.relative_error(out, oracle.attention(*inputs, lengths)) < oracle.TOLERANCE["bfloat16"]


@pytest.mark.parametrize("phi", [0.5, None], ids=["unified", "online"])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (1, 128), (1, 256), (8, 128), (64, 128), (16, 256)])
def test_lowers_for_cuda(group, head_dim, phi):
    shape = jax.ShapeDtypeStruct
    key = shape((2, 4096, 2, head_dim), jnp.bfloat16)
    call = functools.partial(decode_attention, scale=0.1, config=DecodeAttentionConfig(64, 4, 2))
    lowered = (
        jax.jit(call)
        .trace(
            shape((2, 2 * group, head_dim), jnp.bfloat16),
            key,
            key,
            shape((2,), jnp.int32),
            None if phi is None else shape((2, 2 * group), jnp.float32),
        )
        .lower(lowering_platforms=("cuda",))
    )
    assert "mosaic_gpu" in lowered.as_text()
