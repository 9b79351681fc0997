"""How well a host answers the rows of its sources: freely, and with the answers to choose from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from tarsia.adapter import Host
from tarsia.core import attach as attached
from tarsia.core.compose import Acting
from tarsia.core.errors import ConfigError, DataError
from tarsia.data import Sample
from tarsia.evaluate import metrics
from tarsia.evaluate.bootstrap import RESAMPLES, interval
from tarsia.evaluate.chat import reference
from tarsia.evaluate.choose import chances
from tarsia.evaluate.generate import Said, say
from tarsia.evaluate.report import Report, Result, Row

MOST_ANSWERS: Final = 64
"""Where a source's references are more than these, they are no set to choose from."""


@dataclass(frozen=True, slots=True)
class Asking:
    """How questions are put and answers judged: see ``evaluate``."""

    metric: str = "exact"
    max_new_tokens: int = 32
    batch: int = 16
    seed: int = 0


def evaluate(
    host: Host,
    sources: Mapping[str, Sequence[Sample]],
    *,
    metric: str = "exact",
    answers: Mapping[str, Sequence[str]] | None = None,
    max_new_tokens: int = 32,
    batch: int = 16,
    seed: int = 0,
) -> Report:
    """Answer every row of ``sources`` (name to samples) with the adapters that act now.

    ``answers`` are the answers to choose from, by source; where a source has none they are its own
    references, at most MOST_ANSWERS. Raises DataError for a source without rows, a row without a reference,
    and a row that no answer of its set can satisfy; ConfigError for an unknown metric or source.
    """
    return examine(host, sources, Asking(metric, max_new_tokens, batch, seed), answers)[0]


def examine(
    host: Host,
    sources: Mapping[str, Sequence[Sample]],
    asking: Asking,
    answers: Mapping[str, Sequence[str]] | None = None,
) -> tuple[Report, dict[str, tuple[Said, ...]]]:
    """``evaluate``, and by source what was said freely, with its ids."""
    judge = metrics.find(asking.metric)
    unknown = sorted(set(answers or {}) - set(sources))
    if unknown:
        raise ConfigError(
            "Answers are given for a source that is not evaluated.", given=unknown[0], allowed=", ".join(sources)
        )
    if not sources:
        raise ConfigError("There is nothing to evaluate.", do="give a source of rows")
    results, ways, heard = [], [], {}
    for name, members in sources.items():
        rows = tuple(members)
        if not rows:
            raise DataError(f"The source {name} has no rows.", do="fill it, or take the source out")
        choice, origin = _choice(name, rows, (answers or {}).get(name), judge)
        heard[name] = say(host, rows, asking.max_new_tokens, asking.batch)
        scored = chances(host, rows, choice, asking.batch)
        ways.append(scored.way)
        judged = tuple(
            _row(row, said, choice, found, tokens, judge)
            for row, said, found, tokens in zip(rows, heard[name], scored.found, scored.tokens, strict=True)
        )
        results.append(_result(name, judged, choice, origin, asking.seed))
    report = Report(
        base=host.name,
        digest=host.fingerprint.weights,
        form=host.form,
        precision=str(next(host.model.parameters()).dtype).removeprefix("torch."),
        adapters=tuple(map(str, active(host))),
        resolution=host.resolution,
        metric=asking.metric,
        max_new_tokens=asking.max_new_tokens,
        scoring="; ".join(dict.fromkeys(ways)),
        seed=asking.seed,
        resamples=RESAMPLES,
        results=tuple(results),
    )
    return report, heard


def active(host: Host) -> tuple[Acting, ...]:
    """What acts on every row now, the first lowest: adapters' names, and averages of some."""
    return attached.active(host.model)


def _choice(
    name: str, rows: Sequence[Sample], given: Sequence[str] | None, judge: metrics.Metric
) -> tuple[tuple[str, ...], str]:
    """The answers to choose from, and where they come from or why there are none."""
    references = tuple(dict.fromkeys(reference(row) for row in rows))
    if given is None:
        if len(references) > MOST_ANSWERS:
            return (), f"none: {len(references)} different references, more than {MOST_ANSWERS}"
        return tuple(sorted(references)), "the references of these rows"
    choice = tuple(dict.fromkeys(given))
    for wanted in references:
        if not any(judge(answer, wanted) == 1.0 for answer in choice):
            raise DataError(
                f"No answer of the set is right for a row of {name}.",
                given=repr(wanted),
                allowed=", ".join(map(repr, choice)),
                do="complete the set of answers",
            )
    return choice, "given"


def _row(sample: Sample, said: Said, choice: Sequence[str], chances: Tensor, tokens: int, judge: metrics.Metric) -> Row:
    """``chances`` are log-probabilities of the choice's answers and then of the reference, of ``tokens`` ids."""
    wanted = reference(sample)
    chosen = choice[int(chances[:-1].argmax())] if choice else None
    return Row(
        row=sample.row,
        reference=wanted,
        said=said.text,
        cut=said.cut,
        free_score=judge(said.text, wanted),
        chosen=chosen,
        chosen_score=None if chosen is None else judge(chosen, wanted),
        loss=-float(chances[-1]) / tokens,
        tokens=tokens,
    )


def _result(name: str, rows: tuple[Row, ...], choice: tuple[str, ...], origin: str, seed: int) -> Result:
    chosen = [row.chosen_score for row in rows if row.chosen_score is not None]
    return Result(
        source=name,
        free=interval([row.free_score for row in rows], seed),
        constrained=interval(chosen, seed) if chosen else None,
        loss=sum(row.loss * row.tokens for row in rows) / sum(row.tokens for row in rows),
        answers=choice,
        answers_from=origin,
        rows=rows,
    )
