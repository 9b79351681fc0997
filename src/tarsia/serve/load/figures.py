"""What a load measured, in figures: quantiles of waiting, rates, and the same by adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tarsia.serve.load.client import Answered
from tarsia.serve.load.drive import Wrong

QUANTILES: Final = ((0.5, 1), (0.9, 10), (0.99, 100))
"""Quantiles that are told, and of how many values at the least."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Quantiles of some seconds, and how many there are; None where too few lie beyond to say one."""

    count: int
    middle: float | None
    ninety: float | None
    worst: float | None
    longest: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread:
        """Of those that are not None."""
        held = sorted(value for value in values if value is not None)
        if not held:
            return cls(0, None, None, None, None)
        middle, ninety, worst = (quantile(held, q) if len(held) >= least else None for q, least in QUANTILES)
        return cls(len(held), middle, ninety, worst, held[-1])


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter's share of a load."""

    name: str
    asked: int
    failed: int
    tokens: int
    first: Spread
    whole: Spread


@dataclass(frozen=True, slots=True)
class Figures:
    """A load's figures. Rates are over the seconds from the first question to the last answer.

    ``lost`` are errors that no server should give; 429 (too much at once) is not one of them. ``checked`` and ``wrong``
    are None and () where nothing was checked.
    """

    asked: int
    answered: int
    seconds: float
    tokens: int
    prompt: int
    first: Spread
    each: Spread
    whole: Spread
    gap: Spread
    errors: Mapping[str, int]
    told: Mapping[str, str]
    adapters: tuple[Adapter, ...]
    checked: int | None = None
    wrong: tuple[Wrong, ...] = ()

    @property
    def requests_a_second(self) -> float:
        """Answers."""
        return self.answered / self.seconds if self.seconds else 0.0

    @property
    def tokens_a_second(self) -> float:
        """Tokens of answers."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def lost(self) -> int:
        """Errors other than that there is too much to do."""
        return sum(many for kind, many in self.errors.items() if not kind.startswith("429"))

    @property
    def passed(self) -> bool:
        """Something was answered, nothing was lost, and nothing that was checked is wrong."""
        return self.answered > 0 and not self.lost and not self.wrong


def figures(answered: Sequence[Answered], checked: int | None = None, wrong: Sequence[Wrong] = ()) -> Figures:
    """Of a load's answers, given in the order of asking."""
    good = [one for one in answered if not one.error]
    began, ended = min((one.began for one in answered), default=0.0), max((one.ended for one in answered), default=0.0)
    by: dict[str, list[Answered]] = {}
    for one in answered:
        by.setdefault(one.question.model, []).append(one)
    return Figures(
        asked=len(answered),
        answered=len(good),
        seconds=ended - began,
        tokens=sum(one.tokens for one in good),
        prompt=sum(one.prompt for one in good),
        first=Spread.of(one.waited for one in good),
        each=Spread.of(one.each for one in good),
        whole=Spread.of(one.ended - one.began for one in good),
        gap=Spread.of(one.gap for one in good if one.tokens > 1),
        errors=dict(Counter(one.error for one in answered if one.error).most_common()),
        told={one.error: one.told for one in reversed(answered) if one.error},
        adapters=tuple(sorted((_adapter(n, held) for n, held in by.items()), key=lambda a: (-a.asked, a.name))),
        checked=checked,
        wrong=tuple(wrong),
    )


def quantile(ordered: Sequence[float], q: float) -> float:
    """The least of the ordered values that a share of ``q`` is not above."""
    return ordered[max(0, -int(-len(ordered) * q // 1) - 1)]


def flow(answered: Sequence[Answered], bins: int = 60) -> tuple[list[float], list[float], list[float]]:
    """Over time: the middles of ``bins`` equal stretches, tokens a second in each (of an answer evenly over its time of
    being told), and how many questions were under way on average."""
    end = max((one.ended for one in answered), default=0.0)
    if not end:
        return [], [], []
    width = end / bins
    tokens, running = [0.0] * bins, [0.0] * bins
    for one in answered:
        _spread(running, width, one.began, one.ended, one.ended - one.began)
        if not one.error and one.first is not None:
            _spread(tokens, width, one.first, max(one.last or 0.0, one.first + 1e-6), float(one.tokens))
    return [(i + 0.5) * width for i in range(bins)], [t / width for t in tokens], [r / width for r in running]


def _spread(into: list[float], width: float, start: float, end: float, amount: float) -> None:
    for i in range(int(start / width), min(len(into), int(end / width) + 1)):
        share = min(end, (i + 1) * width) - max(start, i * width)
        into[i] += amount * max(0.0, share) / max(end - start, 1e-9)


def _adapter(name: str, held: Sequence[Answered]) -> Adapter:
    good = [one for one in held if not one.error]
    return Adapter(
        name=name,
        asked=len(held),
        failed=len(held) - len(good),
        tokens=sum(one.tokens for one in good),
        first=Spread.of(one.waited for one in good),
        whole=Spread.of(one.ended - one.began for one in good),
    )
