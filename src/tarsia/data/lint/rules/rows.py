"""Rows that can not be trained on, or that teach nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tarsia.core.errors import TarsiaError
from tarsia.data.lint.finding import Severity
from tarsia.data.lint.rule import Hit, rule
from tarsia.data.lint.survey import Row, Stage, Survey, Surveyed


def _failing(survey: Survey, stage: Stage, do: str) -> Iterator[Hit]:
    """A hit for each source and each way in which its rows fail at this stage."""
    for source in survey.sources:
        ways: dict[str, list[Row]] = {}
        for row in source.rows:
            if row.trouble is not None and row.trouble.stage == stage:
                ways.setdefault(re.sub(r"\d+", "#", reason(row.trouble.error)), []).append(row)
        for rows in ways.values():
            error = rows[0].trouble.error if rows[0].trouble else None
            given = getattr(error, "given", None)
            what = reason(error) + (f" Given: {given}." if given is not None else "")
            first = "" if len(rows) == 1 else " the first:"
            what = f"{source.some(rows)}:{first} {what}"
            yield Hit(what, getattr(error, "do", None) or do, source.where(rows), source.name)


def reason(error: object) -> str:
    """What an error says, without the row that a finding names anyway."""
    text = error.what if isinstance(error, TarsiaError) else f"{type(error).__name__}: {error}"
    return re.sub(r"^Row \d+ of .{1,80}?(?::|(?= has | begins )) ?", "", text.replace("\n", " "))


@rule("unreadable-row", Severity.ERROR)
def unreadable(survey: Survey) -> Iterator[Hit]:
    """Rows of no known format, with broken fields, or with other pictures than placeholders."""
    yield from _failing(survey, "read", "mend the row, or take it out")


@rule("control-token", Severity.ERROR)
def controls(survey: Survey) -> Iterator[Hit]:
    """Rows whose text holds what is a control token to this model."""
    yield from _failing(survey, "control", "take the control token out of the text, or spell it otherwise")


@rule("template", Severity.ERROR)
def template(survey: Survey) -> Iterator[Hit]:
    """Rows that the chat template refuses, or of which it can not be told exactly what the assistant says."""
    yield from _failing(survey, "template", "change the order of the turns, or use another chat template")


@rule("encoding", Severity.ERROR)
def encoding(survey: Survey) -> Iterator[Hit]:
    """Rows that the processor refuses, or whose image tokens do not match their pictures."""
    yield from _failing(survey, "encode", "take the row out")


@rule("no-label", Severity.ERROR)
def no_label(survey: Survey) -> Iterator[Hit]:
    """Rows of which nothing is learnt: nobody answers, or `max_length` cuts the answer off."""
    yield from _failing(survey, "label", "give each row an answer, or take it out")


@rule("all-fail", Severity.ERROR)
def all_fail(survey: Survey) -> Iterator[Hit]:
    """Sources of which no row can be used."""
    for source in survey.sources:
        if all(row.trouble is not None for row in source.rows):
            yield Hit(
                f"None of the {len(source.rows):,} rows can be used.",
                "mend what the first row's finding says; the others mostly have the same fault",
                source.where(source.rows),
                source.name,
            )


@rule("empty-answer", Severity.WARNING)
def empty_answers(survey: Survey) -> Iterator[Hit]:
    """Rows that teach to say nothing."""
    for source in survey.sources:
        rows = [row for row in source.rows if row.answers and not all(answer.strip() for answer in row.answers)]
        if rows:
            yield Hit(
                f"{source.some(rows)}: an answer without any text teaches the model to be silent.",
                "fill the answers in, or take these rows out",
                source.where(rows),
                source.name,
            )


@rule("sampled", Severity.NOTE)
def sampled(survey: Survey) -> Iterator[Hit]:
    """Sources of which not every row was looked at."""
    for source in survey.sources:
        if len(source.rows) < source.total:
            yield Hit(
                f"Only {len(source.rows):,} of {source.total:,} rows were looked at, spread over all of it; "
                "what is wrong with the others is not known.",
                "look at all of them: --rows 0",
                source=source.name,
            )


def share(rows: Sequence[Row], source: Surveyed) -> float:
    """Of the rows looked at, 0..1."""
    return len(rows) / max(1, len(source.rows))
