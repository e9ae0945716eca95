"""Calibrations of rows that a test chooses."""

import numpy as np

from fdpp_jax import Calibration
from fdpp_jax.score_stats import Distribution, Stats


def calibration_of(low, high, dtype="bfloat16", max_keys=1024):
    """512 rows a head with ln den at low, and as many at high, [L, N] each."""
    low, high = np.array(low, np.float32), np.array(high, np.float32)
    counts = np.zeros((*low.shape, 4000), np.int64)
    for values in (low, high):
        bins = ((values + 1000) / 0.5).astype(int)
        np.put_along_axis(counts, bins[..., None], np.take_along_axis(counts, bins[..., None], -1) + 512, -1)
    distribution = Distribution(counts, low, high)
    return Calibration(Stats(distribution, distribution, distribution), dtype, max_keys, 1, 1024, {"jax": "0"})
