"""Replay by ratio: an endless stream of rows over several sources, in either of two modes.

With lambda_s for the share asked of source s:

- sampled: each row is drawn from source s with probability lambda_s, and the loss is the mean over all
  labelled tokens. In expectation a source has lambda_s of the *rows*; one with longer answers has more of
  the loss.
- weighted: every step holds a fixed number of rows of every source, and the loss is
  sum_s lambda_s * (mean over the source's labelled tokens of the step). A source has lambda_s of the
  *loss's weight*, whatever its number of rows and the length of its answers.

They are two estimators, not two implementations of one: they agree only where the answers of all sources
are equally long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Protocol

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
    """What one source got of a stream: rows, the share of rows asked for and got, and how often it was walked."""

    source: int
    rows: int
    asked: float
    got: float
    epochs: float


class Order(Protocol):
    """Which source gives which row of an endless stream."""

    asked: tuple[float, ...]
    """The share of the rows that each source is to have; they add up to 1."""

    def source(self, n: int) -> int:
        """The source of row ``n``, both from 0."""

    def counts(self, n: int) -> tuple[int, ...]:
        """How many of the first ``n`` rows each source gave, exactly."""


class Drawn:
    """Each row's source is drawn with the probability ``weights[s]`` (which add up to 1)."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.asked = tuple(weights)
        self.seed = seed
        # Where only zeros follow, the edge is exactly 1: a rounded sum below it would let a zero be drawn.
        sums = np.cumsum(self.asked)[:-1]
        self.edges = np.array([e if any(self.asked[i + 1 :]) else 1.0 for i, e in enumerate(sums)])
        self._before: list[tuple[int, ...]] = [(0,) * len(self.asked)]
        self._block = lru_cache(maxsize=4)(self._draw)

    def source(self, n: int) -> int:
        return int(self._block(n // _BLOCK)[n % _BLOCK])

    def counts(self, n: int) -> tuple[int, ...]:
        while len(self._before) <= n // _BLOCK:
            full = self._tally(self._block(len(self._before) - 1))
            self._before.append(tuple(a + b for a, b in zip(self._before[-1], full, strict=True)))
        part = self._tally(self._block(n // _BLOCK)[: n % _BLOCK])
        return tuple(a + b for a, b in zip(self._before[n // _BLOCK], part, strict=True))

    def _tally(self, draws: NDArray[np.int64]) -> tuple[int, ...]:
        return tuple(int(c) for c in np.bincount(draws, minlength=len(self.asked)))

    def _draw(self, block: int) -> NDArray[np.int64]:
        numbers = np.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=np.uint64)
        uniform = (_mix(_key(self.seed, 0), numbers) >> np.uint64(11)) * 2.0**-53
        return np.searchsorted(self.edges, uniform, side="right").astype(np.int64)


class Allotted:
    """Every step of ``sum(rows)`` rows holds exactly ``rows[s]`` of source s, spread evenly over the step."""

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = tuple(rows)
        self.asked = tuple(count / sum(self.rows) for count in self.rows)
        places = [((k + 0.5) / count, s) for s, count in enumerate(self.rows) for k in range(count)]
        self._step = tuple(s for _, s in sorted(places))

    def source(self, n: int) -> int:
        return self._step[n % len(self._step)]

    def counts(self, n: int) -> tuple[int, ...]:
        steps, part = divmod(n, len(self._step))
        begun = self._step[:part]
        return tuple(steps * count + begun.count(s) for s, count in enumerate(self.rows))


def allot(weights: Sequence[float], rows: int) -> tuple[int, ...]:
    """Share a step's ``rows`` among sources by their weights: largest remainders (Hamilton's method).

    Every source with a weight above 0 has at least one row; the others share what such small ones leave. Ties
    go to the first. Raises ConfigError where there are fewer rows than sources with a weight.
    """
    named = [s for s, weight in enumerate(weights) if weight > 0]
    if rows < len(named):
        raise ConfigError(
            "A step of the weighted mode needs a row of every source.",
            given=f"{rows} rows a step, {len(named)} sources with a weight above 0",
            do=f"raise batch or accumulate until batch * accumulate is {len(named)} or more, or mix: sampled",
        )
    counts = [0] * len(weights)
    left, rest = rows, named
    while small := [s for s in rest if weights[s] * left < sum(weights[r] for r in rest)]:
        for s in small:
            counts[s] = 1
        left, rest = left - len(small), [s for s in rest if s not in small]
    quotas = {s: weights[s] * left / sum(weights[r] for r in rest) for s in rest}
    for s in rest:
        counts[s] = max(1, math.floor(quotas[s]))
    for s in sorted(rest, key=lambda s: counts[s] - quotas[s])[: rows - sum(counts)]:
        counts[s] += 1
    return tuple(counts)


class Mixture:
    """An endless, deterministic stream of rows over several sources.

    Row n is a pure function of (seed, weights, lengths, n): any process can ask for any row, and a
    stream is resumed by going on at its n. Each source is walked in shuffled epochs of its own, so
    every row of it comes once before any comes again.

    ``sources`` are sequences of samples; ``weights`` are shares in any unit. ``rows`` makes the weighted
    mode's stream: so many rows of each source in every step; without it rows are drawn by weight. Raises
    ConfigError where sources and weights differ in number, a weight is negative, not finite, or all are
    zero, or a source with a weight has no rows in a step, or one without has.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Sample]],
        weights: Sequence[float],
        seed: int,
        rows: Sequence[int] | None = None,
    ) -> None:
        given = f"{len(sources)} sources, weights {tuple(weights)}"
        if not sources or len(sources) != len(weights) or not all(map(len, sources)):
            raise ConfigError("A mixture needs sources with rows and one weight for each.", given=given)
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise ConfigError("A mixture's weights must be finite, none negative, not all zero.", given=given)
        if rows is not None and [count > 0 for count in rows] != [weight > 0 for weight in weights]:
            raise ConfigError(
                "A mixture's step must hold rows of exactly the sources that have a weight.",
                given=f"{given}, rows {tuple(rows)}",
            )
        self.sources = tuple(sources)
        self.weights = tuple(float(w) / sum(weights) for w in weights)
        self.seed = seed
        self.order: Order = Drawn(self.weights, seed) if rows is None else Allotted(rows)
        self._epoch = lru_cache(maxsize=2 * len(sources))(self._shuffle)

    def row(self, n: int) -> tuple[int, int]:
        """(source, row in that source) of row ``n`` of the stream, both from 0."""
        source = self.order.source(n)
        epoch, at = divmod(self.counts(n)[source], len(self.sources[source]))
        return source, int(self._epoch(source, epoch)[at])

    def __getitem__(self, n: int) -> Sample:
        source, row = self.row(n)
        return self.sources[source][row]

    def counts(self, n: int) -> tuple[int, ...]:
        """How many of the first ``n`` rows each source gave, exactly."""
        if n < 0:
            raise IndexError(n)
        return self.order.counts(n)

    def shares(self, n: int) -> tuple[Share, ...]:
        """Asked and got share of each source over the first ``n`` rows."""
        return tuple(
            Share(i, rows, self.order.asked[i], rows / n if n else 0.0, rows / len(self.sources[i]))
            for i, rows in enumerate(self.counts(n))
        )

    def _shuffle(self, source: int, epoch: int) -> NDArray[np.int64]:
        rows = np.arange(len(self.sources[source]), dtype=np.uint64)
        return np.argsort(_mix(_key(self.seed, 1, source, epoch), rows), kind="stable")
