"""The gate: how many points may be lost on what was known before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Final, Literal

from pydantic import BaseModel

from tarsia.core.errors import ConfigError
from tarsia.evaluate.bootstrap import LEVEL, Interval, differences, mean_of_means
from tarsia.evaluate.report import FROZEN, Report, compare

POWER: Final = 0.8
_SLACK: Final = 1e-9  # points: 100 * (0.93 - 0.91) is 2.0000000000000018

Judged = Literal["estimate", "upper"]
"""What is held against the limit: what was measured, or the upper bound of its interval."""


class Lost(BaseModel):
    """Points lost, 100 * (accuracy before - accuracy after) of free answers, with the interval; a gain is negative.

    ``source`` is None for the mean of the general sources, each of one weight. ``allowed`` is the limit in points, None
    where there is none for it. ``detectable`` is the least distance from the limit, in points, that as many rows
    tell from it with a power of 80 % (two-sided, 5 %). ``needed`` is how many ``rows`` there would have to be, in the
    same shares, for the interval to lie on one side of the limit if its middle stayed: None where it does already,
    or where the estimate is the limit.
    """

    model_config = FROZEN

    source: str | None
    rows: int
    points: Interval
    allowed: float | None
    passed: bool
    detectable: float
    needed: int | None


class Verdict(BaseModel):
    """Whether an adapter passes: no limit is exceeded. ``judged`` says what was held against the limits; ``mean`` is
    of all general sources, ``each`` of every one."""

    model_config = FROZEN

    passed: bool
    judged: Judged
    mean: Lost
    each: tuple[Lost, ...]

    def sentence(self) -> str:
        """What was decided and how sure it is, for people."""
        failed = [lost for lost in (self.mean, *self.each) if not lost.passed]
        told = [_told(lost, self.judged) for lost in (failed or [self.mean])]
        return ("The gate is passed: " if self.passed else "The gate is not passed: ") + "; ".join(told) + "."


def points_lost(before: Report, after: Report, general: Sequence[str]) -> Interval:
    """Points lost on the mean of the ``general`` sources, every source of one weight; rows are drawn within them."""
    held = {a.source: (a, b) for a, b in zip(before.results, after.results, strict=True) if a.source in general}
    changed = [differences(*([row.free_score for row in r.rows] for r in held[name])) for name in general]
    return mean_of_means(changed, before.seed, span=(-1.0, 1.0)).scaled(-100)


def gate(
    before: Report,
    after: Report,
    general: Sequence[str],
    most: float | None = None,
    *,
    each: float | None = None,
    judged: Judged = "estimate",
) -> Verdict:
    """Hold what was lost against ``most`` points on the mean of the ``general`` sources and ``each`` points on every
    single one (None: no limit).

    Raises ConfigError where there is no limit at all, one is no number of points or can not be exceeded, a source
    was not measured, or the base knew nothing of it.
    """
    if most is None and each is None:
        raise ConfigError("A gate needs a limit.", do="give the points that may be lost, 2 for one")
    for limit in (most, each):
        if limit is not None and not 0 <= limit <= 100:
            raise ConfigError("That is no limit of points.", given=limit, allowed="0 to 100")
    changes = {change.source: change for change in compare(before, after).changes}
    if not general or (unknown := [name for name in general if name not in changes]):
        raise ConfigError(
            "The gate has no general source to look at." if not general else "A general source was not measured.",
            given=", ".join(unknown) if general else "none",
            allowed=", ".join(changes),
        )
    check_known(before, general, most, each=each, judged=judged)
    rows = sum(changes[name].n for name in general)
    mean = _lost(None, rows, points_lost(before, after, general), most, judged)
    single = [_lost(n, changes[n].n, changes[n].free_change.scaled(-100), each, judged) for n in general]
    return Verdict(passed=all(x.passed for x in (mean, *single)), judged=judged, mean=mean, each=tuple(single))


def check_known(
    before: Report,
    general: Sequence[str],
    most: float | None = None,
    *,
    each: float | None = None,
    judged: Judged = "estimate",
) -> None:
    """Raise ConfigError where no loss could be seen or none could exceed its limit, whatever is forgotten.

    That is where the base is right in no row of a general source, or, judged by the estimate, where it has no more
    than the limit to lose.
    """
    for result in before.results:
        if result.source in general and not any(row.free_score for row in result.rows):
            cut = sum(row.cut for row in result.rows)
            raise ConfigError(
                f"The base is right in no row of {result.source}, so that it forgets can not be seen there.",
                given=f"{result.n} rows" + (f", {cut} answers cut at {before.max_new_tokens} tokens" if cut else ""),
                do="allow longer answers" if cut else "give rows that the base answers right, or another metric",
            )
    known = {r.source: 100 * r.free.mean for r in before.results if r.source in general}
    held = [("the mean of the general sources", sum(known.values()) / len(known), most)]
    held += [(name, points, each) for name, points in known.items()]
    for where, points, limit in held:
        if judged == "estimate" and limit is not None and points <= limit + _SLACK:
            raise ConfigError(
                "This limit can not be exceeded: the base has no more than that to lose.",
                given=f"{limit:g} points; of {where} the base has {points:.1f} right of 100",
                allowed=f"less than {points:.1f}",
                do="lower the limit, or give rows of which the base answers more right",
            )


def _lost(source: str | None, rows: int, points: Interval, limit: float | None, judged: Judged) -> Lost:
    held = points.high if judged == "upper" else points.mean
    half = (points.high - points.low) / 2
    normal = NormalDist()
    error = half / normal.inv_cdf((1 + LEVEL) / 2)
    needed = None
    if limit is not None and points.low <= limit < points.high:
        apart = abs(points.mean - limit)
        reach = points.high - points.mean if limit > points.mean else points.mean - points.low  # towards the limit
        needed = math.ceil(rows * (reach / apart) ** 2) if apart > _SLACK else None
    return Lost(
        source=source,
        rows=rows,
        points=points,
        allowed=limit,
        passed=limit is None or held <= limit + _SLACK,
        detectable=error * (normal.inv_cdf((1 + LEVEL) / 2) + normal.inv_cdf(POWER)),
        needed=needed,
    )


def _told(lost: Lost, judged: Judged) -> str:
    where = lost.source or "the mean of the general sources"
    low, high = lost.points.low, lost.points.high
    text = f"{where} lost {lost.points.mean:.1f} points [{low:.1f}, {high:.1f}] on {lost.rows} rows"
    if lost.allowed is None:
        return text
    text += f", at most {lost.allowed:g} are allowed" + (", judged by the upper bound" if judged == "upper" else "")
    if not low <= lost.allowed < high:
        return text
    if lost.needed is None:
        return f"{text}; the loss is the limit itself, which no number of rows can tell from it"
    return f"{text}; these rows can not tell it from the limit, about {lost.needed} could"
