"""Rows that stand twice: within training, and in training and evaluation both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from tarsia.data.lint.finding import Severity, Where
from tarsia.data.lint.rule import Hit, rule
from tarsia.data.lint.survey import Row, Survey, Surveyed

MANY: Final = 0.05
"""Share of a source's rows from which on copies are worth a warning."""


def _by(sources: Iterable[Surveyed], key: Callable[[Row], bytes]) -> dict[bytes, list[tuple[Where, Row]]]:
    groups: dict[bytes, list[tuple[Where, Row]]] = defaultdict(list)
    for source in sources:
        for row in source.rows:
            if key(row):
                groups[key(row)].append((Where(source.name, row.number), row))
    return groups


@rule("leak", Severity.ERROR, "evaluation")
def leaks(survey: Survey) -> Iterator[Hit]:
    """Rows of evaluation that are trained on: the same texts, and pictures of the same pixels."""
    trained = _by(survey.trained, lambda row: row.content)
    for source in survey.evaluated:
        rows = [row for row in source.rows if row.content in trained]
        if rows:
            like = [trained[row.content][0][0] for row in rows]
            yield Hit(
                f"{source.some(rows)} of evaluation: trained on too ({source.name}:{rows[0].number} is {like[0]}), "
                "so what is measured on them is memory.",
                "take them out of the training rows, or split anew by picture",
                source.where(rows),
                source.name,
                like=like,
            )


@rule("near-leak", Severity.WARNING, "evaluation")
def near_leaks(survey: Survey) -> Iterator[Hit]:
    """Rows of evaluation that show a picture of training, or one that is nearly the same."""
    contents = _by(survey.trained, lambda row: row.content)
    owners: dict[int, Where] = {}
    for source in survey.trained:
        for row in source.rows:
            for shown in _shown(survey, row):
                owners.setdefault(shown, Where(source.name, row.number))
    for source in survey.evaluated:
        found: dict[Where, Where] = {}
        for row in source.rows if owners else ():
            family = [k for shown in _shown(survey, row) for k in (shown, *survey.kin.near.get(shown, ()))]
            other = next((owners[k] for k in family if k in owners), None)
            if other is not None and row.content not in contents:
                found[Where(source.name, row.number)] = other
        if found:
            first, other = next(iter(found.items()))
            yield Hit(
                f"{source.some(found)} of evaluation: a picture is, or nearly is, one of training "
                f"({first} is like {other}): a copy that was resized, re-encoded or brightened, or the next frame.",
                "look at them on the page; split anew so that one picture's copies stay together",
                list(found),
                source.name,
                like=list(found.values()),
            )


def _shown(survey: Survey, row: Row) -> Iterator[int]:
    """The row's pictures, each by the first that has the same pixels; empty ones left out."""
    return (k for place in row.looks if (k := survey.kin.of[place]) is not None)


@rule("duplicate", Severity.NOTE)
def duplicates(survey: Survey) -> Iterator[Hit]:
    """Rows of training that stand more than once, in one source or in several."""
    repeated: dict[str, dict[Where, Where]] = defaultdict(dict)
    for members in _by(survey.trained, lambda row: row.content).values():
        for where, _ in members[1:]:
            repeated[where.source][where] = members[0][0]
    for source in survey.trained:
        if found := dict(sorted(repeated[source.name].items())):
            often = len(found) / len(source.rows)
            yield Hit(
                f"{source.some(found)}: the same, word for word and pixel for pixel, as an earlier row; "
                "such rows weigh more than others.",
                "keep one of each, or say by the source's weight how much it should count",
                list(found),
                source.name,
                Severity.WARNING if often > MANY else None,
                list(found.values()),
            )


@rule("near-duplicate", Severity.NOTE)
def near_duplicates(survey: Survey) -> Iterator[Hit]:
    """Rows of training whose picture is nearly, and not wholly, that of an earlier one."""
    owners: dict[int, Where] = {}
    for source in survey.trained:
        found: dict[Where, Where] = {}
        for row in source.rows:
            where = Where(source.name, row.number)
            shown = list(_shown(survey, row))
            fresh = [n for k in shown if k not in owners for n in survey.kin.near.get(k, ()) if n in owners]
            if fresh:
                found[where] = owners[fresh[0]]
            for k in shown:
                owners.setdefault(k, where)
        if found:
            often = len(found) / len(source.rows)
            yield Hit(
                f"{source.some(found)}: a picture is nearly that of an earlier row.",
                "keep one of each; where frames of a film were cut out, take fewer of them",
                list(found),
                source.name,
                Severity.WARNING if often > MANY else None,
                list(found.values()),
            )


@rule("contradiction", Severity.WARNING)
def contradictions(survey: Survey) -> Iterator[Hit]:
    """The same question, with the same pictures, and different answers."""
    groups = _by([*survey.trained, *survey.evaluated], lambda row: row.question)
    against: dict[str, dict[Where, Where]] = defaultdict(dict)
    for members in groups.values():
        firsts: dict[tuple[str, ...], Where] = {}
        for where, row in members:
            firsts.setdefault(row.answers, where)
        for where, row in members if len(firsts) > 1 else ():
            against[where.source][where] = next(w for answers, w in firsts.items() if answers != row.answers)
    for source in survey.sources:
        if found := dict(sorted(against[source.name].items())):
            yield Hit(
                f"{source.some(found)}: another row asks the same, of the same picture if any, "
                "and is answered otherwise.",
                "decide which answer is right; where several are, say so in the question",
                list(found),
                source.name,
                like=list(found.values()),
            )
