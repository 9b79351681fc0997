"""Seconds of an operation between the sizes at which it was measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Size = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """Measured seconds over a grid of sizes. Between its points the logarithm is linear in those of the sizes; below
    the least size nothing gets cheaper, and beyond the largest, time grows with it.
    """

    axes: tuple[tuple[float, ...], ...]
    """Base-2 logarithms of the sizes, ascending."""
    values: Mapping[Size, float]
    """Base-2 logarithm of seconds at each place, by the indices along the axes; all places are there."""

    @classmethod
    def of(cls, points: Iterable[tuple[Sequence[int], float]]) -> Grid:
        """From sizes and their seconds. A place without a point has its neighbour's time, grown with the size."""
        seconds = {tuple(size): value for size, value in points}
        if not seconds:
            raise ValueError("a grid without points")
        sizes = tuple(tuple(sorted(set(axis))) for axis in zip(*seconds, strict=True))
        axes = tuple(tuple(math.log2(n) for n in axis) for axis in sizes)
        values: dict[Size, float] = {}
        # smaller places first: a place that is missing looks at those below it
        for place in sorted(itertools.product(*(range(len(axis)) for axis in axes)), key=sum):
            found = seconds.get(tuple(axis[i] for axis, i in zip(sizes, place, strict=True)))
            value = math.log2(found) if found else _grown(place, axes, values, seconds, sizes)
            # what is larger is not cheaper: where it seems so, a repeat was disturbed
            values[place] = max([value, *(values[lower] for lower in _below(place))])
        return cls(axes, values)

    def seconds(self, size: Sequence[int]) -> float:
        """Seconds at this size."""
        beyond, corners = 0.0, []
        for axis, n in zip(self.axes, size, strict=True):
            x = math.log2(max(n, 1))
            beyond += max(0.0, x - axis[-1])
            corners.append(_between(axis, x))
        total = 0.0
        for choice in itertools.product(*corners):
            share = math.prod(weight for _, weight in choice)
            total += share * self.values[tuple(index for index, _ in choice)]
        return float(2 ** (total + beyond))


def _between(axis: Sequence[float], x: float) -> tuple[tuple[int, float], ...]:
    """The places to both sides of ``x`` with their weights; one place where it lies on it or outside."""
    if x <= axis[0]:
        return ((0, 1.0),)
    if x >= axis[-1]:
        return ((len(axis) - 1, 1.0),)
    above = next(i for i, edge in enumerate(axis) if edge > x)
    share = (x - axis[above - 1]) / (axis[above] - axis[above - 1])
    return ((above - 1, 1 - share), (above, share)) if share else ((above - 1, 1.0),)


def _grown(
    place: Size,
    axes: Sequence[Sequence[float]],
    values: Mapping[Size, float],
    seconds: Mapping[Size, float],
    sizes: Sequence[Sequence[int]],
) -> float:
    below = [
        values[lower] + axes[d][place[d]] - axes[d][place[d] - 1]
        for lower in _below(place)
        for d in range(len(place))
        if lower[d] < place[d]
    ]
    if below:
        # the larger an operation, the less each part of it costs: none grows by more than its size
        return min(below)
    # the least place of all: nothing is smaller, so what is nearest stands for it
    least = min(seconds, key=lambda size: sum(map(math.log2, size)))
    return math.log2(seconds[least])


def _below(place: Size) -> tuple[Size, ...]:
    """The places that are one less along one axis."""
    return tuple((*place[:d], index - 1, *place[d + 1 :]) for d, index in enumerate(place) if index)
