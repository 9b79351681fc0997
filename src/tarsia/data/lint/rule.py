"""Rules by code. To add one, write a function and register it; to prove it, plant its fault in a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tarsia.data.lint.finding import NAMED, Finding, Severity, Where
from tarsia.data.lint.survey import Survey


@dataclass(frozen=True, slots=True)
class Hit:
    """What a rule says: a sentence, a fix, and the rows. ``severity`` is the rule's where it is None.

    ``like`` is empty, or for each row one that it is like.
    """

    what: str
    do: str
    rows: Sequence[Where] = ()
    source: str | None = None
    severity: Severity | None = None
    like: Sequence[Where] = ()


Check = Callable[[Survey], Iterator[Hit]]


@dataclass(frozen=True, slots=True)
class Rule:
    """A check with its code, the severity of its hits, and what a survey must have for it (``Survey.needs``)."""

    code: str
    severity: Severity
    needs: frozenset[str]
    check: Check = field(repr=False)

    def findings(self, survey: Survey) -> Iterator[Finding]:
        """The hits as findings. What is wrong with a source that is never drawn from is no error."""
        idle = {source.name for source in survey.sources if source.given.trained and not source.live}
        for hit in self.check(survey) if self.needs <= survey.needs else ():
            severity = hit.severity or self.severity
            if severity is Severity.ERROR and hit.source in idle:
                severity = Severity.WARNING
            named, like = tuple(hit.rows[:NAMED]), tuple(hit.like[:NAMED])
            what, do = (text.encode("utf-8", "backslashreplace").decode() for text in (hit.what, hit.do))
            yield Finding(self.code, severity, what, do, hit.source, named, len(hit.rows), like)


RULES: dict[str, Rule] = {}


def rule(code: str, severity: Severity, *needs: str) -> Callable[[Check], Check]:
    """Register a function from a survey to hits under ``code``."""

    def register(check: Check) -> Check:
        if code in RULES:
            raise ValueError(f"two rules are called {code!r}")
        RULES[code] = Rule(code, severity, frozenset(needs), check)
        return check

    return register
