"""Percentile bootstrap intervals of a mean and of a paired difference.

B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. Scores that are all equal
give an interval of no width: the bootstrap can not see what the sample does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES, LEVEL = 2000, 0.95
_CHUNK = 4_000_000  # drawn indices held at a time


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the bounds of its interval at ``LEVEL``, in the scores' own unit."""

    mean: float
    low: float
    high: float


def interval(scores: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean of ``scores`` with its bootstrap interval. The same seed gives the same bounds."""
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"one score or more is needed, not an array of shape {values.shape}")
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _CHUNK // len(values))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        means[start : start + count] = values[generator.integers(0, len(values), (count, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def paired(before: Sequence[float], after: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean of ``after - before`` with its interval; rows are drawn as pairs, so what both share cancels."""
    if len(before) != len(after):
        raise ValueError(f"{len(before)} scores before and {len(after)} after are no pairs")
    return interval(np.subtract(after, before).tolist(), seed, resamples)
