"""The harness itself: what a kernel reads and writes, interpreted."""

import numpy as np
import pytest
import triton_case
import triton_toy

from fdpp_jax.triton import bridge


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setattr(bridge, "call", triton_case.call)


def test_a_product_is_interpreted():
    draw = np.random.default_rng(0)
    x, w = (draw.normal(size=size).astype(np.float16) for size in ((16, 128), (128, 192)))
    out, count = triton_toy.product(x, w, arch="sm_80")
    np.testing.assert_allclose(out, x.astype(np.float64) @ w.astype(np.float64), atol=0.02, rtol=1e-3)
    assert count.tolist() == [3]


def test_what_is_updated_is_a_result():
    x, kept = np.arange(64, dtype=np.float32), np.ones((3, 64), np.float32)
    before, after = triton_toy.update(x, kept, arch="sm_80")
    np.testing.assert_array_equal(before, kept[1])
    np.testing.assert_array_equal(after, [kept[0], x, kept[2]])
