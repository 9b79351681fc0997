"""Replay by ratio: an endless stream that draws each row's source by its weight.

This is the sampled mode: a row of source s is drawn with probability lambda_s. It estimates
sum_s lambda_s * E[L_s over rows], which is not the weighted mode's sum of means over tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tarsia.core.errors import ConfigError
from tarsia.data.samples import Sample

_BLOCK: Final = 4096
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)


def _mix(key: int, count: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea, Flood 2014) of ``key`` at each ``count``: the same on every machine and version."""
    with np.errstate(over="ignore"):
        z = np.uint64(key % 2**64) + (count + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _key(*words: int) -> int:
    key = 0
    for word in words:
        key = int(_mix(key ^ (word % 2**64), np.zeros(1, np.uint64))[0])
    return key


@dataclass(frozen=True, slots=True)
class Share:
    """What one source got of a stream: rows, the share asked for and got, and how often it was walked."""

    source: int
    rows: int
    asked: float
    got: float
    epochs: float


class Mixture:
    """An endless, deterministic stream of rows over several sources.

    Row n is a pure function of (seed, weights, lengths, n): any process can ask for any row, and a
    stream is resumed by going on at its n. Each source is walked in shuffled epochs of its own, so
    every row of it comes once before any comes again.

    ``sources`` are sequences of samples; ``weights`` are shares in any unit. Raises ConfigError where
    they differ in number, or a weight is negative, not finite, or all are zero.
    """

    def __init__(self, sources: Sequence[Sequence[Sample]], weights: Sequence[float], seed: int) -> None:
        given = f"{len(sources)} sources, weights {tuple(weights)}"
        if not sources or len(sources) != len(weights) or not all(map(len, sources)):
            raise ConfigError("A mixture needs sources with rows and one weight for each.", given=given)
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise ConfigError("A mixture's weights must be finite, none negative, not all zero.", given=given)
        self.sources = tuple(sources)
        self.weights = tuple(float(w) / sum(weights) for w in weights)
        self.seed = seed
        # Where only zeros follow, the edge is exactly 1: a rounded sum below it would let a zero be drawn.
        sums = np.cumsum(self.weights)[:-1]
        self._edges = np.array([e if any(self.weights[i + 1 :]) else 1.0 for i, e in enumerate(sums)])
        self._before: list[tuple[int, ...]] = [(0,) * len(sources)]
        self._block = lru_cache(maxsize=4)(self._draw)
        self._order = lru_cache(maxsize=2 * len(sources))(self._shuffle)

    def row(self, n: int) -> tuple[int, int]:
        """(source, row in that source) of row ``n`` of the stream, both from 0."""
        source = int(self._block(n // _BLOCK)[n % _BLOCK])
        epoch, at = divmod(self.counts(n)[source], len(self.sources[source]))
        return source, int(self._order(source, epoch)[at])

    def __getitem__(self, n: int) -> Sample:
        source, row = self.row(n)
        return self.sources[source][row]

    def counts(self, n: int) -> tuple[int, ...]:
        """How many of the first ``n`` rows each source gave, exactly."""
        if n < 0:
            raise IndexError(n)
        while len(self._before) <= n // _BLOCK:
            full = self._tally(self._block(len(self._before) - 1))
            self._before.append(tuple(a + b for a, b in zip(self._before[-1], full, strict=True)))
        part = self._tally(self._block(n // _BLOCK)[: n % _BLOCK])
        return tuple(a + b for a, b in zip(self._before[n // _BLOCK], part, strict=True))

    def shares(self, n: int) -> tuple[Share, ...]:
        """Asked and got share of each source over the first ``n`` rows."""
        return tuple(
            Share(i, rows, self.weights[i], rows / n if n else 0.0, rows / len(self.sources[i]))
            for i, rows in enumerate(self.counts(n))
        )

    def _tally(self, draws: NDArray[np.int64]) -> tuple[int, ...]:
        return tuple(int(c) for c in np.bincount(draws, minlength=len(self.sources)))

    def _draw(self, block: int) -> NDArray[np.int64]:
        numbers = np.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=np.uint64)
        uniform = (_mix(_key(self.seed, 0), numbers) >> np.uint64(11)) * 2.0**-53
        return np.searchsorted(self._edges, uniform, side="right").astype(np.int64)

    def _shuffle(self, source: int, epoch: int) -> NDArray[np.int64]:
        rows = np.arange(len(self.sources[source]), dtype=np.uint64)
        return np.argsort(_mix(_key(self.seed, 1, source, epoch), rows), kind="stable")
