"""Cases of a prefill kernel: sizes and features, random arrays with poison where no query looks, what float64 says."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import oracle

from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions


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
    block_kv: int = 64
    packs_group: bool = False
    heads_together: int = 1
    num_ctas: int | None = None  # of Mosaic's kernel

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


def check(case, found, expected):
    """That a result and its log-sum-exp are right in all rows."""
    (out, log_sum), (expected, expected_log_sum) = found, expected
    assert out.dtype == case.dtype
    assert np.isfinite(np.asarray(out, np.float32)).all()
    assert oracle.relative_error(out, expected) < oracle.TOLERANCE[case.dtype]
    np.testing.assert_allclose(log_sum, expected_log_sum, atol=4e-3, rtol=1e-5)


CASES = {
    "causal": Case(heads_together=2),
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
        packs_group=True,
        heads_together=3,
    ),
    "few queries of many heads": Case(query_length=5, capacity=140, num_heads=16, offset=(120,), lengths=(125,)),
    "no keys": Case(batch=2, query_length=17, capacity=64, lengths=(0, 9), offset=(0, -20), has_sinks=True),
}


def random_cases(seed, head_dims):
    """Every feature and their combinations; four calls with ragged everything of one compiled kernel."""
    rng = np.random.default_rng(seed)

    def maybe(share, x):
        return x if rng.random() < share else None

    batch, num_kv_heads, head_dim = int(rng.integers(1, 4)), int(rng.integers(1, 3)), int(rng.choice(head_dims))
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
        block_kv=64 if head_dim > 128 else int(rng.choice([64, 128])),
        packs_group=packs_group,
        heads_together=int(rng.choice([1, 2, 3, 100])),
        num_ctas=maybe(0.6, int(rng.choice([1, 2, 5, 132]))),
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
