"""The cases of the decode kernel in Triton, whose inputs and oracle are those of `decode_case`."""

import dataclasses
import functools

import decode_case
import jax
import jax.numpy as jnp
import numpy as np
from decode_case import check, check_log_sum

from fdpp_jax.plans.calls import AttentionArrays, AttentionOptions
from fdpp_jax.plans.triton_attention import DecodeAttentionConfig
from fdpp_jax.triton.decode_attention import attend

INT8, FLOAT8 = dict(kv_dtype="int8"), dict(kv_dtype="float8_e4m3fn")
HEAD, TOKEN = dict(scales="head"), dict(scales="token")
DRAFT = dict(is_causal=True)


def tiles(block_kv, num_splits, num_buffers, combine="kernel", uses_dot=True):
    """A config for an A100."""
    return DecodeAttentionConfig("sm_80", block_kv, num_splits, num_buffers, combine=combine, uses_dot=uses_dot)


@dataclasses.dataclass(frozen=True)
class Case(decode_case.Case):
    """A case whose config is that of the kernel in Triton."""

    def run(self, inputs, phi, *, recompute=False, redone=None, return_residual=False):
        """The kernel, whoever `bridge.call` is."""
        options = AttentionOptions(**self.options, return_residual=return_residual)
        arrays = AttentionArrays(**inputs, phi=None if phi is None else jnp.asarray(phi, jnp.float32))
        out = jax.block_until_ready(_run(arrays, redone, options, self.config, recompute))
        assert jax.tree.leaves(out)[0].dtype == self.dtype
        return out

    def check(self, lengths, phi, query_offset=None):
        """That result and log-sum-exp are right, and rows without keys zeros, not almost."""
        inputs = self.inputs(len(lengths), lengths, query_offset=query_offset)
        expected, expected_log_sum = self.expected(inputs)
        out, log_sum = self.run(inputs, phi, return_residual=True)
        check(self, out, expected)
        assert not np.asarray(out, np.float64)[~expected.any(axis=-1)].any()
        check_log_sum(self, inputs, log_sum, expected_log_sum)

    def check_recompute(self, lengths, seed=0):
        """That rows of both directions out of the window are NaN, or redone; and marked with others of their head."""
        inputs, expected, log_sum, phi, leaves_window = self.failing(lengths, seed)
        flagged, log_sum_of_flagged = self.run(inputs, phi, return_residual=True)
        np.testing.assert_array_equal(np.isnan(flagged).all(axis=-1), leaves_window)
        np.testing.assert_array_equal(np.isnan(flagged).any(axis=-1), leaves_window)
        np.testing.assert_array_equal(np.isnan(log_sum_of_flagged), leaves_window)
        groups = leaves_window.reshape(self.batch, self.query_length, self.num_kv_heads, -1).any(axis=(1, 3))
        assert groups.any()
        assert not groups.all()
        earlier = jnp.zeros(groups.shape, jnp.int32).at[-1, -1].set(1)
        (out, found), redone = self.run(inputs, phi, recompute=True, redone=earlier, return_residual=True)
        check(self, out, expected)
        check_log_sum(self, inputs, found, log_sum)
        np.testing.assert_array_equal(redone, np.maximum(groups, earlier))
        kept = np.repeat(~groups, self.group, axis=1)[:, None].repeat(self.query_length, axis=1)
        np.testing.assert_array_equal(np.asarray(out)[kept], np.asarray(flagged)[kept])

    def failing(self, lengths, seed=0):
        """Inputs, oracle, and phi [B, N] that leaves the window upwards in the first head and downwards in the last."""
        inputs = self.inputs(seed, lengths)
        expected, log_sum = self.expected(inputs)
        phi = np.where(np.isfinite(log_sum), log_sum, 0.0).mean(axis=1)
        phi[::2, 0] -= 300
        phi[1::2, -1] += 300
        leaves_window, is_near = self.leaves_window(log_sum, phi)
        assert not is_near.any()
        return inputs, expected, log_sum, phi, leaves_window


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _run(arrays, redone, options, config, recompute):
    return attend(arrays, options, config, recompute=recompute, redone=redone)


@dataclasses.dataclass(frozen=True)
class HalfCase(Case):
    """In float16: the interpreter's products of bfloat16 are wrong."""

    dtype: str = "float16"


# Batch, capacity, heads, kv heads, head dim; lengths.
CASES = {
    "mha": (HalfCase(2, 100, 2, 2, 32, tiles(32, 2, 2)), (100, 33)),
    "mha, each thread multiplies": (HalfCase(2, 100, 2, 2, 32, tiles(32, 2, 2, uses_dot=False)), (100, 33)),
    "nine rows, odd capacity": (HalfCase(2, 67, 9, 1, 64, tiles(32, 2, 1)), (67, 66)),
    "64 rows": (HalfCase(1, 70, 64, 1, 16, tiles(32, 2, 2)), (66,)),
    "splits without keys": (HalfCase(1, 200, 2, 1, 16, tiles(16, 16, 2)), (63,)),
    "ragged": (HalfCase(5, 130, 4, 2, 16, tiles(16, 3, 2)), (110, 0, 64, 29, 130)),
    "ragged, second launch": (
        HalfCase(5, 130, 4, 2, 16, tiles(16, 3, 2, "launch"), has_sinks=True),
        (110, 0, 64, 29, 130),
    ),
    "many sequences": (HalfCase(9, 40, 2, 1, 16, tiles(16, 2, 2)), tuple(x * 7 % 40 for x in range(9))),
    "length 0": (HalfCase(3, 72, 2, 2, 16, tiles(32, 2, 2), has_sinks=True), (0, 5, 72)),
    "draft of 4": (HalfCase(2, 100, 4, 2, 80, tiles(32, 2, 2), 4, **DRAFT), (90, 3)),
    "draft of 16": (HalfCase(2, 69, 4, 1, 16, tiles(32, 3, 2), 16, has_sinks=True, **DRAFT), (67, 9)),
    "window": (HalfCase(2, 150, 4, 2, 24, tiles(16, 2, 2), local_window_size=(50, 0)), (140, 20)),
    "window, each thread multiplies": (
        HalfCase(2, 150, 2, 2, 24, tiles(16, 2, 2, uses_dot=False), local_window_size=(50, 0), has_sinks=True),
        (140, 20),
    ),
    "window of a draft": (
        HalfCase(3, 100, 4, 2, 16, tiles(16, 3, 2), 3, local_window_size=(35, 1), logits_soft_cap=5.0),
        (90, 20, 1),
    ),
    "cap and sinks": (HalfCase(1, 68, 2, 1, 256, tiles(32, 2, 2), logits_soft_cap=2.0, has_sinks=True), (65,)),
    "pages of 16": (HalfCase(2, 125, 4, 2, 16, tiles(32, 2, 2), 2, page_size=16, **DRAFT), (125, 17)),
    "pages of 64": (
        HalfCase(3, 250, 4, 2, 16, tiles(32, 3, 2), page_size=64, local_window_size=(90, 0), has_sinks=True),
        (250, 0, 129),
    ),
    "int8 of tokens": (
        HalfCase(2, 69, 3, 3, 16, tiles(32, 3, 2), 2, logits_soft_cap=3.0, **INT8, **TOKEN, **DRAFT),
        (65, 1),
    ),
    "int8, each thread multiplies": (
        HalfCase(2, 69, 2, 2, 16, tiles(32, 3, 2, uses_dot=False), page_size=16, **INT8, **TOKEN),
        (65, 1),
    ),
    "float8": (HalfCase(1, 69, 6, 3, 32, tiles(32, 1, 2), 2, has_sinks=True, **FLOAT8, **HEAD), (65,)),
    "float8 pages of 16 of tokens": (
        HalfCase(2, 125, 4, 2, 16, tiles(32, 2, 2), page_size=16, local_window_size=(40, 0), **FLOAT8, **TOKEN),
        (125, 17),
    ),
    "starts": (HalfCase(4, 160, 4, 2, 16, tiles(16, 3, 2), starts=(125, 0, 32, 100)), (155, 65, 100, 100)),
    "starts, pages of a draft": (
        HalfCase(3, 125, 4, 4, 16, tiles(16, 2, 2), 2, page_size=16, **INT8, **TOKEN, **DRAFT, starts=(35, 65, 17)),
        (125, 66, 17),
    ),
}
ONLINE = [
    "mha, each thread multiplies",
    "ragged",
    "ragged, second launch",
    "draft of 16",
    "window of a draft",
    "int8 of tokens",
    "starts",
]

RECOMPUTED = {
    "shared": (HalfCase(4, 70, 4, 2, 16, tiles(32, 2, 2)), (70, 1, 0, 40)),
    "draft": (HalfCase(3, 69, 6, 2, 16, tiles(16, 4, 2), 3, page_size=16, has_sinks=True, **DRAFT), (69, 3, 40)),
    "second launch": (HalfCase(3, 69, 4, 2, 16, tiles(16, 4, 2, "launch"), has_sinks=True), (69, 3, 40)),
    "int8": (HalfCase(2, 69, 4, 2, 16, tiles(32, 2, 2), local_window_size=(35, 0), **INT8, **TOKEN), (69, 60)),
    "each thread multiplies": (HalfCase(3, 69, 2, 2, 16, tiles(32, 2, 2, uses_dot=False)), (69, 3, 40)),
}
