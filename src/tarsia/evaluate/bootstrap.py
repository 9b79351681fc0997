"""Percentile bootstrap intervals of a mean, of a paired difference, of a mean of sources and of a ratio.

B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. The bootstrap can not see what the
sample does not have, so where all scores are equal the interval is the one of the rule of three instead: J. Hanley
and A. Lippman-Hand, If Nothing Goes Wrong, Is Everything All Right? (JAMA 249, 1983).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES, LEVEL = 2000, 0.95
_CHUNK = 4_000_000  # drawn indices held at a time

Span = tuple[float, float]
"""The least and the largest score that there can be."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the bounds of its interval at ``LEVEL``, in the scores' own unit."""

    mean: float
    low: float
    high: float

    def scaled(self, factor: float) -> Interval:
        """The same in another unit; a negative factor turns the bounds around."""
        mean, low, high = (factor * value + 0.0 for value in (self.mean, self.low, self.high))  # no -0.0
        return Interval(mean, min(low, high), max(low, high))


def interval(
    scores: Sequence[float], seed: int = 0, resamples: int = RESAMPLES, span: Span | None = (0.0, 1.0)
) -> Interval:
    """Mean of ``scores`` with its bootstrap interval. The same seed gives the same bounds.

    ``span`` bounds what a score can be (None: nothing does, and equal scores then give an interval of no width).
    """
    return mean_of_means([scores], seed, resamples, span)


def paired(before: Sequence[float], after: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean of ``after - before``, scores of 0..1, with its interval; rows are drawn as pairs, so what both share
    cancels."""
    return interval(differences(before, after), seed, resamples, (-1.0, 1.0))


def differences(before: Sequence[float], after: Sequence[float]) -> list[float]:
    """``after - before``, row by row. Raises ValueError where they are no pairs."""
    if len(before) != len(after):
        raise ValueError(f"{len(before)} scores before and {len(after)} after are no pairs")
    return [float(value) for value in np.subtract(after, before)]


def mean_of_means(
    groups: Sequence[Sequence[float]], seed: int = 0, resamples: int = RESAMPLES, span: Span | None = (0.0, 1.0)
) -> Interval:
    """Mean over ``groups`` of each group's mean, every group of one weight; rows are drawn within their groups.

    Groups whose scores are all equal, which no drawing can move, add the rule of three in quadrature. If a share p_s
    of such a group s would score otherwise, the n_s rows of all D of them hide it with the chance
    prod (1 - p_s)^n_s; shares that stay hidden with more than 1 - LEVEL have a mean of at most
    1 - (1 - LEVEL)^(1 / (D min n_s)), and move the whole by at most that times D / S of the longest way to a span's
    end; groups that are at that end are none of the D.
    """
    arrays = [np.asarray(scores, dtype=np.float64) for scores in groups]
    if wrong := [a.shape for a in arrays if a.ndim != 1 or not len(a)] or [()] * (not arrays):
        raise ValueError(f"one score or more is needed, not an array of shape {wrong[0]}")
    if span is not None and any(a.min() < span[0] - 1e-9 or a.max() > span[1] + 1e-9 for a in arrays):
        raise ValueError(f"a score lies outside {span}")
    mean, drawn = float(np.mean([a.mean() for a in arrays])), np.zeros(resamples)
    generator, still = np.random.default_rng(seed), [a for a in arrays if (a == a[0]).all()]
    for a in arrays:
        drawn += _sums(a[:, None], generator, resamples)[:, 0] / len(a)
    found = _bounds(mean, drawn / len(arrays))
    if span is None or not still:
        return found
    down, up = (_hidden(still, end) / len(arrays) for end in span)
    low, high = min(found.low, mean), max(found.high, mean)  # a drawn mean of equal scores may round
    return Interval(mean, mean - float(np.hypot(mean - low, down)), mean + float(np.hypot(high - mean, up)))


def _hidden(still: Sequence[NDArray[np.float64]], end: float) -> float:
    """How far towards ``end`` rows that were not seen can move the sum of the means of groups of equal scores."""
    movable = [a for a in still if a[0] != end]  # the others are there
    if not movable:
        return 0.0
    share = 1 - (1 - LEVEL) ** (1 / (len(movable) * min(map(len, movable))))
    return float(share * len(movable) * max(abs(a[0] - end) for a in movable))


def ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Interval:
    """Sum of ``numerators`` over the sum of ``denominators`` (above 0), an entry a row; rows are drawn."""
    values = np.stack([np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)], 1)
    if not len(values) or (values[:, 1] <= 0).any():
        raise ValueError("rows with denominators above 0 are needed")
    drawn = _sums(values, np.random.default_rng(seed), RESAMPLES)
    return _bounds(float(values[:, 0].sum() / values[:, 1].sum()), drawn[:, 0] / drawn[:, 1])


def _sums(values: NDArray[np.float64], generator: np.random.Generator, resamples: int) -> NDArray[np.float64]:
    """Sums over rows drawn with replacement: [rows, k] to [resamples, k]."""
    sums = np.empty((resamples, values.shape[1]))
    step = max(1, _CHUNK // len(values))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        sums[start : start + count] = values[generator.integers(0, len(values), (count, len(values)))].sum(1)
    return sums


def _bounds(mean: float, drawn: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high))
