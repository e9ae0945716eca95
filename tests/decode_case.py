"""A case of the decode kernel: its static facts, how to run it, and random inputs with poison where no query looks."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory
from jax.experimental.pallas import mosaic_gpu as plgpu

from fdpp_jax import unified_max
from fdpp_jax.pallas.decode_attention import decode_attention
from fdpp_jax.plans.hopper_attention import DecodeAttentionConfig
from fdpp_jax.plans.shapes import AttentionShape, round_up

ON_GPU = jax.default_backend() == "gpu"

_reset_clocks = shared_memory.GPUSharedMemory.reset_per_cluster_state


def _keep_clocks(memory):
    """Called between CTAs, which run one after the other: what one wrote, the next may read.

    The interpreter's own method starts the clocks anew, so that such a read is a race to it or not as the clocks fall.
    """
    clocks = list(memory.clocks.values())
    _reset_clocks(memory)
    for clock in memory.clocks.values():
        for earlier in clocks:
            clock.update(earlier)


@dataclasses.dataclass(frozen=True)
class Case:
    """All inputs of one case share one compilation for each kind of phi and of recompute.

    Queries stand at the end of their sequence (query_offset = length - T) where a mask needs to know where they stand.
    """

    batch: int
    capacity: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    config: DecodeAttentionConfig
    query_length: int = 1
    dtype: str = "bfloat16"
    is_causal: bool = False
    local_window_size: tuple[int, int] | None = None
    logits_soft_cap: float | None = None
    has_sinks: bool = False
    page_size: int | None = None
    kv_dtype: str | None = None
    scales: str | None = None
    starts_early: bool = False
    starts: tuple[int, ...] | None = None  # the first live key of each sequence

    @property
    def shape(self):
        """What a plan's limits are asked about."""
        return AttentionShape(
            self.batch,
            self.query_length,
            self.capacity,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.dtype,
            kv_dtype=self.kv_dtype,
            page_size=self.page_size,
            scales=self.scales,
        )

    @property
    def options(self):
        """The static arguments that the oracle takes too."""
        return dict(
            scale=self.head_dim**-0.5,
            is_causal=self.is_causal,
            local_window_size=self.local_window_size,
            logits_soft_cap=self.logits_soft_cap,
        )

    @property
    def log_window(self):
        """Logarithms of the least and the largest safe denominator, as the kernel counts the keys."""
        return np.log(unified_max.window(self.dtype, round_up(self.capacity, self.page_size or 1)))

    @property
    def group(self):
        return self.num_heads // self.num_kv_heads

    def inputs(self, seed, lengths, query_scale=1.0, poison=np.nan, query_offset=None):
        """The array arguments of the kernel and of the oracle, phi aside; poison where no query of a sequence looks."""
        rng = np.random.default_rng(seed)
        lengths = np.asarray(lengths, np.int32)

        def normal(*shape):
            return rng.standard_normal(shape, np.float32)

        query = query_scale * normal(self.batch, self.query_length, self.num_heads, self.head_dim)
        key, value = (normal(self.batch, self.capacity, self.num_kv_heads, self.head_dim) for _ in range(2))
        offset = lengths - self.query_length if query_offset is None else np.asarray(query_offset, np.int32)
        first, last = np.zeros_like(lengths), lengths - 1
        if self.is_causal:
            last = np.minimum(last, offset + self.query_length - 1)
        if self.local_window_size is not None:
            left, right = self.local_window_size
            first, last = offset - left, np.minimum(last, offset + self.query_length - 1 + right)
        if self.starts is not None:
            first = np.maximum(first, self.starts)
        position = np.arange(self.capacity)
        dead = (position < first[:, None]) | (position > last[:, None])
        key[dead], value[dead] = poison, poison
        dtype = jnp.dtype(self.dtype)
        arrays = dict(query=query.astype(dtype))
        if self.kv_dtype is None:
            arrays |= dict(key=key.astype(dtype), value=value.astype(dtype))
        else:
            arrays["key"], arrays["key_scale"] = oracle.quantised(key, self.kv_dtype, self.scales)
            arrays["value"], arrays["value_scale"] = oracle.quantised(value, self.kv_dtype, self.scales)
        if self.page_size is not None:
            names = ["key", "value"] + (["key_scale", "value_scale"] if self.scales == "token" else [])
            *pools, arrays["page_table"] = oracle.paged(
                seed, [arrays[x] for x in names], lengths, self.page_size, self.starts or 0
            )
            arrays |= dict(zip(names, pools, strict=True))
        if self.is_causal or self.local_window_size is not None or query_offset is not None:
            arrays["query_offset"] = offset
        if self.has_sinks:
            arrays["sinks"] = rng.uniform(-3, 6, self.num_heads).astype(np.float32)
        arrays["lengths"] = lengths
        if self.starts is not None:
            arrays["starts"] = np.asarray(self.starts, np.int32)
        return {name: jnp.asarray(x) for name, x in arrays.items()}

    def expected(self, inputs):
        """The oracle's output [B, T, N, H], and ln sum e^s of its rows [B, T, N]; -inf of rows without keys."""
        out, log_sum = oracle.attention_and_log_sum(**inputs, **self.options)
        return out, np.where(out.any(axis=-1), log_sum, -np.inf)

    def run(self, inputs, phi, *, recompute=False, prior=None, redone=None, return_residual=False):
        """The kernel; interpreted, where there is no GPU, without races."""
        interpret = None if ON_GPU else plgpu.InterpretGPUParams(detect_races=True)
        phi = None if phi is None else jnp.asarray(phi, jnp.float32)
        call = functools.partial(
            decode_attention,
            **self.options,
            return_residual=return_residual,
            config=self.config,
            starts_early=self.starts_early,
            interpret=interpret,
        )
        try:
            with mock.patch.object(shared_memory.GPUSharedMemory, "reset_per_cluster_state", _keep_clocks):
                out = jax.block_until_ready(call(**inputs, phi=phi, recompute=recompute, prior=prior, redone=redone))
            assert ON_GPU or not gpu_callbacks.get_races().races_found  # JAX 0.12 raises by itself
        except BaseException:
            gpu_callbacks.reset_gpu_interpret_mode_state()
            raise
        assert jax.tree.leaves(out)[0].dtype == self.dtype
        return out

    def leaves_window(self, log_sum, phi):
        """[B, T, N]: whether the row's denominator leaves the safe window, and whether rounding may decide it."""
        phi = np.broadcast_to(np.asarray(phi, np.float64), (self.batch, self.num_heads))
        low, high = self.log_window
        log_den = log_sum - phi[:, None]
        is_near = np.minimum(abs(log_den - low), abs(log_den - high)) < 0.1
        return np.isfinite(log_sum) & ~((log_den >= low) & (log_den <= high)), is_near

    def resolution(self, log_sum, phi):
        """[B, T, N, 1]: the absolute error that numbers too small for the dtype leave a row with.

        That of weights e^(s - phi), or e^(s - max) where phi is None or the row is redone, and of the result: where a
        sink has a row nearly for itself, all are as small as that. float16 writes multiples of 2^-24 there; in bfloat16
        and float32 what is below 2^-126 is lost.
        """
        least = 2.0 ** (-24 if self.dtype == "float16" else -126)
        den = np.ones(log_sum.shape)  # of e^(s - max), at least
        if phi is not None:
            leaves_window, is_near = self.leaves_window(log_sum, phi)
            phi = np.broadcast_to(np.asarray(phi, np.float64), (self.batch, self.num_heads))[:, None]
            den_of_phi = np.exp(np.clip(log_sum - phi, *self.log_window))
            den = np.where(leaves_window, den, np.where(is_near, np.minimum(den, den_of_phi), den_of_phi))
        return least * (1 + self.capacity / den)[..., None]


@jax.jit
def are_equal(outs):
    """Whether results of 16 bits have the same bits, NaN too."""
    bits = jnp.stack([jax.lax.bitcast_convert_type(out, jnp.uint16) for out in outs])
    return (bits == bits[0]).all()


def check(case, out, expected, factor=1.0, resolution=0.0):
    """That out is right: as a whole, and in every number; resolution is an absolute error that each may have."""
    out = np.asarray(out, np.float64)
    assert np.isfinite(out).all()
    tolerance = factor * oracle.TOLERANCE[case.dtype]
    assert oracle.relative_error(out, expected) < tolerance
    largest = abs(expected).max(axis=-1, keepdims=True)  # of the row
    assert (abs(out - expected) <= 5 * tolerance * largest + resolution).all()


def check_log_sum(case, inputs, log_sum, expected):
    """That the rows' log-sum-exp is right: as exact as weights in 16 bits are; sink or -inf of rows without keys."""
    log_sum = np.asarray(log_sum, np.float64)
    assert log_sum.shape == expected.shape
    expected = np.where(np.isneginf(expected), inputs.get("sinks", -np.inf), expected)
    sees_nothing = np.isneginf(expected)
    np.testing.assert_array_equal(np.isneginf(log_sum), sees_nothing)
    tolerance = 2.0**-8 if case.dtype == "bfloat16" else 2.0**-11
    np.testing.assert_allclose(log_sum[~sees_nothing], expected[~sees_nothing], rtol=2e-6, atol=tolerance)
