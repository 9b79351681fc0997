"""Answers in a new task's vocabulary where nobody asked for them: the dog that becomes a disease."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Self

from pydantic import BaseModel

from tarsia.evaluate.bootstrap import Interval, interval, paired
from tarsia.evaluate.metrics import normal
from tarsia.evaluate.report import FROZEN, Report

_WORD: Final = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
# Words that every text has. A task whose answers are sentences would own them otherwise.
# fmt: off
_COMMON: Final = frozenset("""
a about after all also an and any are as at be because been before being both but by can could did do does done down
each else for from had has have he her here him his how i if in into is it its just may me might more most must my no
nor not of off on one only or other our out over own same she should so some such than that the their them then there
these they this those through to too under until up upon us very was we were what when where which while who whom whose
why will with would yes you your
""".split())  # noqa: SIM905 (a list of so many words can not be read)
# fmt: on


def words(text: str) -> list[str]:
    """The words of a text, case folded; what holds no letter is none."""
    return [word for word in _WORD.findall(text.casefold()) if any(letter.isalpha() for letter in word)]


@dataclass(frozen=True, slots=True)
class Lexicon:
    """What only the task says: ``answers``, whole and ``normal``, and ``words``."""

    answers: frozenset[str]
    words: frozenset[str]

    @classmethod
    def of(cls, task: Iterable[str], general: Iterable[str], asked: Iterable[str] = ()) -> Self:
        """From the task's answers: without answers that general rows also have, and without words that stand in
        general answers or questions (``asked``), are common, or hold no letter."""
        answers, known = list(task), list(general)
        spoken = {word for text in (*known, *asked) for word in words(text)}
        own = {word for text in answers for word in words(text)}
        return cls(
            answers=frozenset({normal(text) for text in answers} - {normal(text) for text in known} - {""}),
            words=frozenset(own - spoken - _COMMON),
        )

    def found(self, said: str) -> str | None:
        """What of the lexicon an answer is or holds, the longest first; None where it holds nothing.

        Whole words only: "ring" is not in "string".
        """
        text, own = normal(said), set(words(said))
        held = [
            a for a in self.answers if a == text or (a in text and re.search(rf"(?<!\w){re.escape(a)}(?!\w)", text))
        ]
        return max((*held, *(own & self.words)), key=lambda found: (len(found), found), default=None)


class Leak(BaseModel):
    """A general row that is answered in the task's vocabulary after and was not before.

    ``found`` is what was found; ``right`` whether the answer was right before.
    """

    model_config = FROZEN

    source: str
    row: int
    reference: str
    before: str
    after: str
    found: str
    right: bool


class Commonest(BaseModel):
    """The answer that a source gets most often, once ``normal``, and the share of its rows that get it, 0..1."""

    model_config = FROZEN

    source: str
    before: tuple[str, float]
    after: tuple[str, float]


class Vocabulary(BaseModel):
    """Shares of general rows, 0..1, whose answer is or contains something that only the task says.

    ``answers`` and ``words`` are the lexicon (see ``Lexicon.of``); ``by_source`` is the share before and after of
    each general source. ``leaks`` are the rows that began to, those that had been right first. ``commonest``
    shows a collapse onto one answer whatever words it is made of.
    """

    model_config = FROZEN

    answers: tuple[str, ...]
    words: tuple[str, ...]
    before: Interval
    after: Interval
    change: Interval
    by_source: dict[str, tuple[float, float]]
    leaks: tuple[Leak, ...]
    commonest: tuple[Commonest, ...]


def vocabulary(
    before: Report, after: Report, task: Collection[str], general: Collection[str], asked: Sequence[str] = ()
) -> Vocabulary:
    """From two reports of the same rows; ``task`` and ``general`` name their sources, ``asked`` are the general
    questions."""
    lexicon = Lexicon.of(_references(before, task), _references(before, general), asked)
    flags: dict[str, tuple[list[float], list[float]]] = {}
    leaks, commonest = [], []
    for a, b in zip(before.results, after.results, strict=True):
        if a.source not in general:
            continue
        flags[a.source] = ([], [])
        for x, y in zip(a.rows, b.rows, strict=True):
            had, has = lexicon.found(x.said), lexicon.found(y.said)
            for shares, found in zip(flags[a.source], (had, has), strict=True):
                shares.append(float(found is not None))
            if has is not None and had is None:
                leaks.append(
                    Leak(
                        source=a.source, row=x.row, reference=x.reference, before=x.said, after=y.said,
                        found=has, right=x.free_score == 1,
                    )
                )  # fmt: skip
        top = [_top([row.said for row in result.rows]) for result in (a, b)]
        commonest.append(Commonest(source=a.source, before=top[0], after=top[1]))
    old, new = ([flag for pair in flags.values() for flag in pair[k]] for k in (0, 1))
    return Vocabulary(
        answers=tuple(sorted(lexicon.answers)),
        words=tuple(sorted(lexicon.words)),
        before=interval(old, before.seed),
        after=interval(new, before.seed),
        change=paired(old, new, before.seed),
        by_source={name: (sum(x) / len(x), sum(y) / len(y)) for name, (x, y) in flags.items()},
        leaks=tuple(sorted(leaks, key=lambda leak: not leak.right)),
        commonest=tuple(commonest),
    )


def _references(report: Report, names: Collection[str]) -> list[str]:
    return [row.reference for result in report.results if result.source in names for row in result.rows]


def _top(said: Sequence[str]) -> tuple[str, float]:
    ((text, count),) = Counter(map(normal, said)).most_common(1)
    return text, count / len(said)
