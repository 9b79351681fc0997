"""What the answers are: too much alike, given away, or never taught."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Final

from tarsia.data.lint.finding import Severity, brief
from tarsia.data.lint.rule import Hit, rule
from tarsia.data.lint.survey import Row, Survey, Surveyed

ENOUGH: Final = 20
"""Rows from which on shares of answers mean something."""
CLASSES: Final = 50
"""Most answers that still count as classes, with ``EACH`` rows or more for each on average."""
EACH: Final = 5
ONE: Final = 0.9
"""Share of one answer from which on a model learns to say nothing else."""
UNEVEN: Final = 10
"""Rows of the commonest class for each of the rarest, from which on they are uneven."""
GIVEN_AWAY: Final = 0.5
"""Share of rows whose prompt says the answer, from which on it is worth a warning."""


def classes(source: Surveyed) -> Counter[str] | None:
    """How often each answer stands, where answers form a small set; else None."""
    counts = Counter(row.answers[0].strip() for row in source.rows if len(row.answers) == 1 and row.answers[0].strip())
    total = sum(counts.values())
    small = total >= ENOUGH and len(counts) <= CLASSES and total >= EACH * len(counts)
    return counts if small else None


@rule("one-answer", Severity.WARNING)
def one_answer(survey: Survey) -> Iterator[Hit]:
    """Sources with hardly more than one answer."""
    for source in survey.trained:
        counts = Counter(row.answers[-1].strip() for row in source.rows if row.answers)
        total = sum(counts.values())
        if total < ENOUGH:
            continue
        answer, most = counts.most_common(1)[0]
        if most > ONE * total:
            others = "; no other is ever given" if most == total else ""
            yield Hit(
                f"{most / total:.1%} of the answers are {brief(answer, 60)}{others}: "
                "saying so always is the easiest thing to learn.",
                "add rows with other answers, or take fewer of these",
                source.where([row for row in source.rows if row.answers and row.answers[-1].strip() != answer]),
                source.name,
            )


@rule("imbalance", Severity.NOTE)
def imbalance(survey: Survey) -> Iterator[Hit]:
    """Classes of very uneven size."""
    for source in survey.trained:
        counts = classes(source)
        if counts is None or len(counts) < 2:
            continue
        (common, most), (rare, least) = counts.most_common()[0], counts.most_common()[-1]
        if most >= UNEVEN * least and most <= ONE * sum(counts.values()):
            yield Hit(
                f"{brief(common)} stands {most:,} times, {brief(rare)} {least:,} times.",
                f"add rows of {brief(rare)}, or put them into a source of their own with a weight",
                source.where(_saying(source, rare)),
                source.name,
            )


def _saying(source: Surveyed, answer: str) -> list[Row]:
    return [row for row in source.rows if row.answers and row.answers[0].strip() == answer]


@rule("answer-in-prompt", Severity.NOTE)
def given_away(survey: Survey) -> Iterator[Hit]:
    """Rows whose prompt says the answer, unless it offers a choice between several."""
    for source in survey.trained:
        offered: dict[bytes, set[tuple[str, ...]]] = defaultdict(set)
        for row in source.rows:
            if row.told:
                offered[row.prompt].add(row.answers)
        rows = [row for row in source.rows if row.told and len(offered[row.prompt]) == 1]
        if rows:
            often = len(rows) / len(source.rows)
            yield Hit(
                f"{source.some(rows)}: the prompt says the answer already, "
                "so it can be copied without looking at a picture.",
                "take the answer out of the prompt, or offer the same choice in every row",
                source.where(rows),
                source.name,
                Severity.WARNING if often > GIVEN_AWAY and len(rows) >= ENOUGH else None,
            )


@rule("unseen-answer", Severity.WARNING, "evaluation")
def unseen(survey: Survey) -> Iterator[Hit]:
    """Classes of evaluation that no row of training teaches."""
    if any(len(source.rows) < source.total for source in survey.trained):
        return  # another row may well teach it
    taught = {answer.strip() for source in survey.trained for row in source.rows for answer in row.answers}
    asked = {row.prompt for source in survey.trained for row in source.rows}
    for source in survey.evaluated:
        counts = classes(source)
        rows = [
            row for row in source.rows if row.prompt in asked and row.answers and row.answers[0].strip() not in taught
        ]
        if counts is not None and rows:
            names = sorted({row.answers[0].strip() for row in rows})
            yield Hit(
                f"{source.some(rows)} of evaluation: training asks the same and never answers "
                f"{', '.join(map(brief, names[:4]))}.",
                "add such rows to training, or take them out of the evaluation",
                source.where(rows),
                source.name,
            )
