"""How long rows are, and what of them is learnt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tarsia.data.lint.finding import Severity
from tarsia.data.lint.rule import Hit, rule
from tarsia.data.lint.rules.rows import _failing, share
from tarsia.data.lint.survey import Survey

MANY_CUT: Final = 0.1
"""Share of a source's rows with a cut answer from which on it is an error."""
FEW_LABELLED: Final = 0.01
"""Share of a source's tokens that is learnt, below which it is worth a word."""
MOSTLY_PICTURE: Final = 0.75
"""Share of `max_length` that the pictures of one row may take."""


@rule("over-long", Severity.WARNING, "max_length")
def over_long(survey: Survey) -> Iterator[Hit]:
    """Rows whose answer is cut by `max_length`: the model never learns how such an answer ends."""
    for source in survey.trained:
        rows = [row for row in source.encoded if row.kept < row.labelled and row.trouble is None]
        if rows:
            longest = max(row.tokens for row in source.encoded)
            yield Hit(
                f"max_length {survey.max_length} cuts the answer in {source.some(rows)}; "
                f"the longest row has {longest:,} tokens.",
                f"set max_length: {longest}, or shorten these rows",
                source.where(rows),
                source.name,
                Severity.ERROR if share(rows, source) > MANY_CUT else None,
            )


@rule("cut-picture", Severity.ERROR, "max_length")
def cut_picture(survey: Survey) -> Iterator[Hit]:
    """Rows in which `max_length` ends within a picture."""
    yield from _failing(survey, "cut", "raise max_length, or make the pictures smaller")


@rule("over-context", Severity.ERROR, "context")
def over_context(survey: Survey) -> Iterator[Hit]:
    """Rows that are longer than what the model has positions for."""
    assert survey.context is not None
    for source in survey.sources:
        limit = survey.max_length if source.given.trained else None
        rows = [row for row in source.encoded if min(row.tokens, limit or row.tokens) > survey.context]
        if rows:
            yield Hit(
                f"{source.some(rows)}: longer than the {survey.context:,} tokens that the model has positions for; "
                f"the longest has {max(row.tokens for row in rows):,}.",
                f"set max_length: {survey.context} or less, shorten them, or take smaller pictures",
                source.where(rows),
                source.name,
            )


@rule("no-end", Severity.WARNING)
def no_end(survey: Survey) -> Iterator[Hit]:
    """Chat templates with which a model can not learn where an answer ends."""
    if not survey.encoder.closes:
        yield Hit(
            "The chat template writes no control token after an answer, so the model can not learn when to stop.",
            "let the template write the end-of-turn token after the assistant's text",
        )


@rule("few-labels", Severity.NOTE)
def few_labels(survey: Survey) -> Iterator[Hit]:
    """Sources in which next to nothing is learnt from a row."""
    for source in survey.trained:
        tokens, labelled = (sum(getattr(row, name) for row in source.encoded) for name in ("tokens", "labelled"))
        if labelled < FEW_LABELLED * tokens:
            yield Hit(
                f"Only {labelled / tokens:.2%} of the tokens are learnt; most of the time goes into what is only read.",
                "shorten the prompts, take smaller pictures, or ask several questions of one picture in one row",
                source=source.name,
            )


@rule("picture-tokens", Severity.WARNING, "max_length")
def picture_tokens(survey: Survey) -> Iterator[Hit]:
    """Rows whose pictures leave little of `max_length` for words."""
    assert survey.max_length is not None
    for source in survey.trained:
        rows = [
            r for r in source.encoded if r.image > MOSTLY_PICTURE * survey.max_length and r.tokens > survey.max_length
        ]
        if rows:
            yield Hit(
                f"In {source.some(rows)} pictures take more than {MOSTLY_PICTURE:.0%} of max_length, "
                "and the words beside them are cut.",
                "raise max_length, or make the pictures smaller",
                source.where(rows),
                source.name,
            )
