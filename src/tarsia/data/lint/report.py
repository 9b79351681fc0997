"""What a lint found: findings, the numbers of each source, and rows as the loss sees them."""

from __future__ import annotations

import base64
import copy
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from PIL import Image

from tarsia.core.errors import DataError
from tarsia.data.encode import Encoder
from tarsia.data.lint import rules
from tarsia.data.lint.finding import Finding, Severity, Where
from tarsia.data.lint.rule import RULES
from tarsia.data.lint.survey import ROWS, Aim, Given, Progress, Row, Survey, Surveyed, survey
from tarsia.data.lint.view import Run, runs
from tarsia.data.samples import Picture

assert rules.__all__  # importing them has registered them

FIRST: Final = 3
"""Rows of each source that are shown."""
SUSPICIOUS: Final = 2
"""Rows of each error and warning that are shown besides."""
BINS: Final = 24
_THUMBNAIL: Final = (128, 128)
_ORDER: Final = {severity: i for i, severity in enumerate(Severity)}


@dataclass(frozen=True, slots=True)
class Numbers:
    """One source in numbers. Tokens are of the whole row, before `max_length` cuts; ``histogram`` has ``BINS`` bins.

    ``labelled`` is the share 0..1 of tokens that is learnt, ``per_picture`` the median of image tokens a picture,
    ``walks`` how often the run walks the source (None where that is not known).
    """

    name: str
    trained: bool
    rows: int
    looked: int
    failed: int
    median: int
    most: int  # of 95 % of the rows
    longest: int
    labelled: float
    pictures: int
    per_picture: float
    share: float | None
    walks: float | None
    histogram: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class View:
    """A row as the loss sees it, or why it can not be seen. ``pictures`` are thumbnails as data URLs, or errors."""

    where: Where
    trained: bool
    codes: tuple[str, ...]
    runs: tuple[Run, ...]
    pictures: tuple[str, ...]
    error: str | None
    tokens: int
    labelled: int


@dataclass(frozen=True)
class Findings:
    """What the rules said of a survey, the worst first."""

    survey: Survey
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What would spoil or stop the training."""
        return tuple(f for f in self.findings if f.severity is Severity.ERROR)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What may."""
        return tuple(f for f in self.findings if f.severity is Severity.WARNING)

    @cached_property
    def numbers(self) -> tuple[Numbers, ...]:
        """Every source in numbers, in the order of the recipe."""
        total = sum(s.given.weight for s in self.survey.trained)
        longest = max((row.tokens for s in self.survey.sources for row in s.encoded), default=1)
        return tuple(_numbers(source, total, longest) for source in self.survey.sources)

    def views(self, first: int = FIRST, suspicious: int = SUSPICIOUS) -> tuple[View, ...]:
        """The first rows of every source, and the first few of every error and warning."""
        codes: dict[Where, list[str]] = {}
        for source in self.survey.sources:
            for row in source.rows[:first]:
                codes[Where(source.name, row.number)] = []
        for finding in self.findings:
            for where in finding.rows if finding.severity is not Severity.NOTE else ():
                fresh = sum(finding.code in known for known in codes.values())
                if where in codes or fresh < suspicious:
                    codes.setdefault(where, []).append(finding.code)
        return tuple(self.view(where, tuple(dict.fromkeys(codes[where]))) for where in codes)

    def view(self, where: Where, codes: tuple[str, ...] = ()) -> View:
        """One row that was looked at, as the loss sees it."""
        return _view(self.survey, where, codes)


def lint(
    given: Sequence[Given],
    encoder: Encoder,
    *,
    rows: int | None = ROWS,
    context: int | None = None,
    aim: Aim | None = None,
    progress: Progress | None = None,
) -> Findings:
    """Look at the rows of every source as training would read them, and let every rule speak.

    ``encoder`` is the run's own, ``rows`` the most that are looked at of a source (None: all), ``context`` the
    tokens that the model has positions for, ``aim`` its sites and the recipe's parts. What a row holds
    never raises; it is a finding.
    """
    seen = survey(given, encoder, rows=rows, context=context, aim=aim, progress=progress)
    found = [finding for rule in RULES.values() for finding in rule.findings(seen)]
    return Findings(seen, tuple(sorted(found, key=lambda f: _ORDER[f.severity])))


def _numbers(source: Surveyed, total: float, longest: int) -> Numbers:
    tokens = np.array([row.tokens for row in source.encoded] or [0])
    pictures = [row.image / len(row.looks) for row in source.encoded if row.looks]
    labelled = sum(row.labelled for row in source.encoded)
    drawn = source.given.drawn
    bins, _ = np.histogram(tokens[tokens > 0], bins=BINS, range=(0, longest))
    return Numbers(
        name=source.name,
        trained=source.given.trained,
        rows=source.total,
        looked=len(source.rows),
        failed=sum(row.trouble is not None for row in source.rows),
        median=int(np.median(tokens)),
        most=int(np.percentile(tokens, 95, method="higher")),
        longest=int(tokens.max()),
        labelled=labelled / max(1, int(tokens.sum())),
        pictures=sum(len(row.looks) for row in source.rows),
        per_picture=float(np.median(pictures)) if pictures else 0.0,
        share=source.given.weight / total if source.given.trained and total else None,
        walks=drawn / source.total if drawn is not None else None,
        histogram=tuple(int(n) for n in bins),
    )


def _view(survey: Survey, where: Where, codes: tuple[str, ...]) -> View:
    source = next(s for s in survey.sources if s.name == where.source)
    row = next(r for r in source.rows if r.number == where.row)
    error = row.trouble.error if row.trouble is not None else None
    pictures: tuple[str, ...] = ()
    shown: tuple[Run, ...] = ()
    try:
        if row.trouble is None or row.trouble.stage != "read":
            pictures, shown = _again(survey, source, row)
    except Exception as changed:  # noqa: BLE001 (a row that was read before and can not be now says so on the page)
        error = error or changed
    told = None if error is None else " ".join(str(error).split())
    return View(where, source.given.trained, codes, shown, pictures, told, row.tokens, row.labelled)


def _again(survey: Survey, source: Surveyed, row: Row) -> tuple[tuple[str, ...], tuple[Run, ...]]:
    """A row's thumbnails and runs; no runs where its tokens are not known."""
    sample = source.given.rows[row.number]
    pictures = tuple(_thumbnail(picture, survey.encoder.resolution) for picture in sample.pictures)
    if not row.tokens:
        return pictures, ()
    entire = copy.copy(survey.encoder)
    entire.max_length = None
    limit = survey.max_length if source.given.trained else None
    return pictures, runs(entire.batch([sample]), survey.encoder.processor, limit)


def _thumbnail(picture: Picture, resolution: int | None) -> str:
    try:
        shown = picture.load(resolution)
    except DataError as error:
        return error.what
    shown.thumbnail(_THUMBNAIL)
    if max(shown.size) < 96:  # small pictures are shown large, pixel by pixel
        times = 96 // max(shown.size)
        shown = shown.resize((shown.width * times, shown.height * times), Image.Resampling.NEAREST)
    held = io.BytesIO()
    shown.save(held, "PNG")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()
