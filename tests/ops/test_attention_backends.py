"""One suite for attention, which every backend that takes a case runs: against float64, with NaN behind the lengths."""

import dataclasses
import functools

import backend_case
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from fdpp_jax.ops.running import module_of
from fdpp_jax.plans.backends import BACKENDS, by_name
from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions, attention_shape

pytestmark = [
    pytest.mark.usefixtures("fresh_interpreter"),
    # numpy, by which the interpreter multiplies, warns of what overflows on purpose.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and features of a call."""

    lengths: tuple[int, ...] = (40, 1, 0, 129)
    capacity: int = 129
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    query_length: int = 1
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    scales: str | None = None
    page_size: int | None = None
    has_sinks: bool = False
    is_causal: bool = False
    local_window_size: tuple[int, int] | None = None
    logits_soft_cap: float | None = None
    starts: tuple[int, ...] | None = None

    @property
    def options(self):
        return AttentionOptions(self.head_dim**-0.5, self.is_causal, self.local_window_size, self.logits_soft_cap)

    def arrays(self):
        """Random arrays, with NaN behind the lengths."""
        rng = np.random.default_rng(0)
        batch = len(self.lengths)
        query = rng.standard_normal((batch, self.query_length, self.num_heads, self.head_dim), np.float32)
        key, value = rng.standard_normal((2, batch, self.capacity, self.num_kv_heads, self.head_dim), np.float32)
        key[np.arange(self.capacity) >= np.array(self.lengths)[:, None]] = np.nan
        if self.starts is not None:
            key[np.arange(self.capacity) < np.array(self.starts)[:, None]] = np.nan
        value[np.isnan(key)] = np.nan
        arrays = dict(query=query.astype(jnp.dtype(self.dtype)), lengths=np.array(self.lengths, np.int32))
        if self.kv_dtype is None:
            arrays |= dict(key=key.astype(jnp.dtype(self.dtype)), value=value.astype(jnp.dtype(self.dtype)))
        else:
            arrays["key"], arrays["key_scale"] = oracle.quantised(key, self.kv_dtype, self.scales)
            arrays["value"], arrays["value_scale"] = oracle.quantised(value, self.kv_dtype, self.scales)
        if self.page_size is not None:
            names = ["key", "value", *(["key_scale", "value_scale"] if self.scales == "token" else [])]
            caches = [arrays[name] for name in names]
            *pools, arrays["page_table"] = oracle.paged(0, caches, self.lengths, self.page_size, self.starts or 0)
            arrays |= dict(zip(names, pools, strict=True))
        if self.is_causal or self.local_window_size is not None:
            arrays["query_offset"] = arrays["lengths"] - self.query_length
        if self.starts is not None:
            arrays["starts"] = np.array(self.starts, np.int32)
        if self.has_sinks:
            arrays["sinks"] = np.linspace(-3, 3, self.num_heads, dtype=np.float32)
        return AttentionArrays(**{name: jnp.asarray(x) for name, x in arrays.items()})


CASES = {
    "GQA": Case(),
    "MHA, float16": Case(num_kv_heads=4, dtype="float16"),
    "MQA, head dim 128": Case(num_kv_heads=1, head_dim=128),
    "head dim 80": Case(head_dim=80),
    "draft": Case(query_length=3, is_causal=True, lengths=(40, 3, 7, 129)),
    "draft, window": Case(query_length=3, is_causal=True, local_window_size=(20, 0), lengths=(40, 3, 7, 129)),
    "window, soft cap": Case(local_window_size=(20, 0), logits_soft_cap=2.0),
    "sinks": Case(has_sinks=True),
    "starts": Case(starts=(7, 0, 0, 70)),
    "starts, pages of a draft": Case(
        query_length=2, is_causal=True, page_size=16, capacity=144, lengths=(40, 5, 7, 144), starts=(39, 5, 0, 100)
    ),
    "pages": Case(page_size=16, capacity=144, lengths=(40, 1, 0, 144)),
    "int8 by head": Case(kv_dtype="int8", scales="head"),
    "float8 by token, pages": Case(
        kv_dtype="float8_e4m3fn", scales="token", num_kv_heads=4, page_size=32, capacity=160
    ),
    "float32": Case(dtype="float32"),
    "long queries": Case(query_length=24, is_causal=True, lengths=(40, 24, 30, 129)),
}
SHAPES = {name: attention_shape(case.arrays(), case.options, is_online=False) for name, case in CASES.items()}
TAKEN = backend_case.taken("attention", SHAPES)


def marked(param, names):
    """Marks of a parameter's backend and case, slow where a kernel is interpreted for a case that is none of these."""
    backend, name = param.values
    return [*param.marks, pytest.mark.slow] if backend.architectures and name not in names else param.marks


def run(backend, name, phi, arrays=None, *, returns_residual=False, **arguments):
    """The backend's answer, as it plans the case, to the case's arrays or others of their shapes."""
    arrays = CASES[name].arrays() if arrays is None else arrays
    arrays = arrays._replace(phi=None if phi is None else jnp.asarray(phi, jnp.float32))
    return _jitted(backend.name, name, returns_residual, **arguments)(arrays)


@functools.cache
def _jitted(backend, name, returns_residual, **arguments):
    """Compiled once for all tests of a case: interpreted, that takes longer than the run."""
    backend = by_name(backend)
    options = dataclasses.replace(CASES[name].options, return_residual=returns_residual)
    plan = backend.attention.plan(SHAPES[name], backend_case.device_of(backend), "")
    call = functools.partial(module_of(plan).attention, options=options, plan=plan)
    return jax.jit(functools.partial(call, **arguments, **backend_case.options_of(backend)))


def expected_of(name, arrays=None):
    """The oracle's output, and the log-sum-exp of its rows."""
    arrays = (CASES[name].arrays() if arrays is None else arrays)._asdict()
    del arrays["phi"], arrays["scale"]
    options = dataclasses.asdict(CASES[name].options)
    del options["return_residual"]
    return oracle.attention_and_log_sum(**arrays, **options)


# A kernel that is interpreted takes seconds: of online softmax these on a CPU, all on a GPU and of plain XLA.
ONLINE = ["GQA", "draft", "sinks", "starts, pages of a draft", "float8 by token, pages", "long queries"]
SLOW = ["MHA, float16", "MQA, head dim 128", "head dim 80", "draft, window", "window, soft cap", "starts", "pages"]


def _marks(param, phi):
    if phi is not None:
        return marked(param, [name for name in CASES if name not in SLOW])
    is_kernel = bool(param.values[0].architectures)
    return pytest.mark.gpu if is_kernel and param.values[1] not in ONLINE else marked(param, ["GQA"])


@pytest.mark.parametrize(
    ("backend", "name", "phi"),
    [
        pytest.param(
            *param.values, phi, id=f"{param.id}, {'online' if phi is None else 'unified'}", marks=_marks(param, phi)
        )
        for param in TAKEN
        for phi in (None, 1.0)
    ],
)
def test_agrees_with_float64(backend, name, phi):
    out = run(backend, name, phi)
    assert out.dtype == CASES[name].dtype
    assert oracle.relative_error(out, expected_of(name)[0]) < oracle.TOLERANCE[CASES[name].dtype]


DRAFTS = [
    pytest.param(*param.values, id=param.id, marks=marked(param, ["draft"]))
    for param in TAKEN
    if param.values[1] in ("draft", "draft, window", "long queries")
]


@pytest.mark.parametrize(("backend", "name"), DRAFTS)
@pytest.mark.parametrize("phi", [None, 1.0], ids=["online", "unified"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_a_mask_hides_from_all_queries_of_a_sequence_reaches_none(backend, name, phi, poison):
    case = CASES[name]
    arrays = case.arrays()
    offset = jnp.maximum(arrays.query_offset - 4, 0)  # the last live keys lie after the last query
    position, last = jnp.arange(case.capacity), offset[:, None] + case.query_length - 1
    hidden = position > last
    if case.local_window_size is not None:
        hidden |= position < offset[:, None] - case.local_window_size[0]
    assert (hidden & (position < arrays.lengths[:, None])).any()
    key, value = (jnp.where(hidden[..., None, None], poison, x) for x in (arrays.key, arrays.value))
    arrays = arrays._replace(query_offset=offset, key=key.astype(case.dtype), value=value.astype(case.dtype))
    out = run(backend, name, phi, arrays)
    assert oracle.relative_error(out, expected_of(name, arrays)[0]) < oracle.TOLERANCE[case.dtype]


@pytest.mark.parametrize(("backend", "name"), DRAFTS)
@pytest.mark.parametrize("phi", [None, 1.0], ids=["online", "unified"])
def test_a_key_that_is_nan_reaches_the_queries_that_see_it_alone(backend, name, phi):
    case = CASES[name]
    arrays = case.arrays()
    last = int(arrays.lengths[0]) - 1  # seen by the last query alone
    arrays = arrays._replace(key=arrays.key.at[0, last, 1, 5].set(np.nan))
    out, expected = np.asarray(run(backend, name, phi, arrays), np.float64), expected_of(name, arrays)[0]
    assert np.isnan(expected).sum() == case.num_heads // 2 * case.head_dim
    np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))
    assert oracle.relative_error(np.nan_to_num(out), np.nan_to_num(expected)) < oracle.TOLERANCE[case.dtype]


@pytest.mark.parametrize(("backend", "name"), DRAFTS)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_value_that_is_not_finite_reaches_all_queries_of_its_sequence_if_one_sees_it(backend, name, poison):
    """Where it is hidden, 0 times it is added: in one column, and in the query heads of its own head."""
    case = CASES[name]
    arrays = case.arrays()
    last = int(arrays.lengths[0]) - 1  # seen by the last query alone
    arrays = arrays._replace(value=arrays.value.at[0, last, 1, 5].set(poison))
    out, expected = np.asarray(run(backend, name, None, arrays), np.float64), expected_of(name, arrays)[0]
    reached = np.zeros(out.shape, bool)
    reached[0, :, case.num_heads // 2 :, 5] = True
    np.testing.assert_array_equal(~np.isfinite(out), reached)
    clean = np.where(reached, 0, expected)
    assert oracle.relative_error(np.where(reached, 0, out), clean) < oracle.TOLERANCE[case.dtype]


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        pytest.param(*param.values, id=param.id, marks=marked(param, ["GQA"]))
        for param in TAKEN
        if param.values[1] in ("GQA", "draft")
    ],
)
def test_a_row_outside_the_window_is_nan(backend, name):
    """Overflow and underflow; the rows of other heads, and rows without keys, are as they should be."""
    out = np.asarray(run(backend, name, [[-150.0, 1.0, 150.0, 1.0]] * 4), np.float64)
    expected, _ = expected_of(name)
    has_key = np.array(CASES[name].lengths) > 0
    assert np.isnan(out[has_key][:, :, ::2]).all()
    out[:, :, ::2] = np.where(has_key[:, None, None, None], expected[:, :, ::2], out[:, :, ::2])
    assert oracle.relative_error(out, expected) < oracle.TOLERANCE[CASES[name].dtype]


@pytest.mark.parametrize(
    ("backend", "name", "recompute"),
    [
        pytest.param(*param.values, recompute, id=f"{param.id}, {recompute}", marks=marked(param, ["sinks"]))
        for param in TAKEN
        if param.values[1] in ("GQA", "sinks", "draft")
        for recompute in param.values[0].attention.recomputes
        if recompute != "cond"  # the op's
    ],
)
def test_a_row_outside_the_window_is_redone_where_the_backend_can(backend, name, recompute):
    phi = [[-150.0, 1.0, 150.0, 1.0]] * 4
    out, log_sum = run(backend, name, phi, returns_residual=True, recompute=recompute)
    expected, expected_log_sum = expected_of(name)
    assert oracle.relative_error(out, expected) < oracle.TOLERANCE[CASES[name].dtype]
    np.testing.assert_allclose(log_sum, expected_log_sum, rtol=1e-6, atol=2.0**-8)  # -inf of rows without keys


def test_every_backend_takes_a_case():
    """Off a GPU all are planned for devices of theirs."""
    assert {param.values[0].name for param in TAKEN} == {b.name for b in BACKENDS if backend_case.has_suite(b)}
