"""What an evaluation found, as values that go to JSON and back, and how two of them differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Self

from pydantic import BaseModel, ConfigDict

from tarsia.adapter.fingerprint import PLAIN
from tarsia.core.errors import ConfigError
from tarsia.evaluate.bootstrap import LEVEL, Interval, paired

if TYPE_CHECKING:
    from rich.table import Table

FROZEN: Final = ConfigDict(frozen=True, extra="forbid")


class Row(BaseModel):
    """One row: what was right, what was said freely, and what was chosen from the answers (None: no choice).

    ``free_score`` and ``chosen_score`` are the metric's, 0..1; ``loss`` is the mean over the reference's
    ``tokens`` labels, in nats, end of turn included. ``cut``: what was said had not ended at ``max_new_tokens``.
    """

    model_config = FROZEN

    row: int
    reference: str
    said: str
    cut: bool = False
    free_score: float
    chosen: str | None
    chosen_score: float | None
    loss: float
    tokens: int


class Result(BaseModel):
    """One source: means with bootstrap intervals, 0..1, free and constrained to ``answers``.

    ``constrained`` is None where ``answers`` is empty; ``answers_from`` says where they come from, or why there
    are none. ``loss`` is the mean over all labels of the source, in nats.
    """

    model_config = FROZEN

    source: str
    free: Interval
    constrained: Interval | None
    loss: float
    answers: tuple[str, ...]
    answers_from: str
    rows: tuple[Row, ...]

    @property
    def n(self) -> int:
        """How many rows."""
        return len(self.rows)

    @property
    def cut(self) -> int:
        """How many free answers had not ended at their longest, and were judged as far as they went."""
        return sum(row.cut for row in self.rows)


class Report(BaseModel):
    """One evaluation of one model. ``base`` is its name, ``digest`` the digest of its files' weights, ``form`` what
    these were quantised to (``Host.form``; None where that is not known), ``precision`` what was computed in,
    ``adapters`` what acted. ``resolution`` is the most pixels along a picture's longer side (None: as many as there
    are). ``scoring`` says how answers were scored; ``seed`` and ``resamples`` are the bootstrap's.
    """

    model_config = FROZEN

    base: str
    digest: str
    form: str | None = None
    precision: str
    adapters: tuple[str, ...]
    resolution: int | None = None
    metric: str
    max_new_tokens: int
    scoring: str
    seed: int
    resamples: int
    results: tuple[Result, ...]

    def json_text(self) -> str:
        """The whole report as one JSON object on one line."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``json_text`` wrote. Raises ConfigError for anything else."""
        try:
            return cls.model_validate_json(text)
        except ValueError as error:
            raise ConfigError("This is no evaluation report.", given=str(error).splitlines()[-1]) from None

    def table(self) -> Table:
        """A table for people: one line a source, shares in percent, and how many free answers were cut if any were."""
        acting = " + ".join(self.adapters) or "no adapter"
        shown = "" if self.resolution is None else f", pictures of {self.resolution} pixels at most"
        cut = [f"cut at {self.max_new_tokens}"] if any(r.cut for r in self.results) else []
        table = _table(
            f"{_titled(self.base, self.digest, self.form)}, {acting}{shown}: {self.metric}, {LEVEL:.0%} intervals",
            ("source", "rows", "free", *cut, "constrained", "answers", "loss"),
        )
        for r in self.results:
            among = str(len(r.answers)) if r.answers else r.answers_from
            lost = [str(r.cut)] if cut else []
            table.add_row(r.source, str(r.n), _share(r.free), *lost, _share(r.constrained), among, f"{r.loss:.3f}")
        return table


class Change(BaseModel):
    """One source before and after: shares 0..1, and the interval of their paired difference.

    ``forgetting`` is what was lost of free answers, in points (percent of rows); a gain is negative.
    """

    model_config = FROZEN

    source: str
    n: int
    free: tuple[float, float]
    free_change: Interval
    constrained: tuple[float, float] | None
    constrained_change: Interval | None
    loss: tuple[float, float]

    @property
    def forgetting(self) -> float:
        """Points lost: 100 * (before - after) of free answers."""
        return -100 * self.free_change.mean


class Comparison(BaseModel):
    """Two reports of the same rows, source by source."""

    model_config = FROZEN

    base: str
    digest: str
    forms: tuple[str | None, str | None] = (None, None)
    before: tuple[str, ...]
    after: tuple[str, ...]
    metric: str
    changes: tuple[Change, ...]

    def table(self) -> Table:
        """A table for people: one line a source, in percent and points."""
        names = [" + ".join(adapters) or "no adapter" for adapters in (self.before, self.after)]
        forms = " -> ".join(dict.fromkeys(form or "a form that is not known" for form in self.forms))
        table = _table(
            f"{_titled(self.base, self.digest, forms if any(self.forms) else None)}, {names[0]} -> {names[1]}: "
            f"{self.metric}, {LEVEL:.0%} intervals",
            ("source", "rows", "free", "change", "constrained", "change", "loss"),
        )
        for c in self.changes:
            table.add_row(
                c.source,
                str(c.n),
                _arrow(c.free),
                _points(c.free_change),
                _arrow(c.constrained),
                _points(c.constrained_change),
                f"{c.loss[0]:.3f} -> {c.loss[1]:.3f}",
            )
        return table


def compare(before: Report, after: Report) -> Comparison:
    """What changed, source by source, on the same rows.

    Raises ConfigError where base, precision, metric, resolution, sources, rows or answers differ.
    """
    for name, a, b in [
        ("bases", before.digest, after.digest),
        ("precisions", before.precision, after.precision),
        ("metrics", before.metric, after.metric),
        ("resolutions", before.resolution, after.resolution),
        ("lengths of answers", before.max_new_tokens, after.max_new_tokens),
        ("sources", [r.source for r in before.results], [r.source for r in after.results]),
    ]:
        if a != b:
            raise ConfigError(f"Reports of different {name} can not be compared.", given=f"{a} and {b}")
    pairs = zip(before.results, after.results, strict=True)
    return Comparison(
        base=before.base,
        digest=before.digest,
        forms=(before.form, after.form),
        before=before.adapters,
        after=after.adapters,
        metric=before.metric,
        changes=tuple(_change(a, b, before.seed, before.resamples) for a, b in pairs),
    )


def _change(before: Result, after: Result, seed: int, resamples: int) -> Change:
    if [(r.row, r.reference) for r in before.rows] != [(r.row, r.reference) for r in after.rows]:
        raise ConfigError("Reports of different rows can not be compared.", given=before.source)
    if before.answers != after.answers:
        raise ConfigError("Reports of different sets of answers can not be compared.", given=before.source)
    chosen = constrained = None
    if before.constrained and after.constrained:
        constrained = (before.constrained.mean, after.constrained.mean)
        chosen = paired(_chosen(before.rows), _chosen(after.rows), seed, resamples)
    return Change(
        source=before.source,
        n=before.n,
        free=(before.free.mean, after.free.mean),
        free_change=paired([r.free_score for r in before.rows], [r.free_score for r in after.rows], seed, resamples),
        constrained=constrained,
        constrained_change=chosen,
        loss=(before.loss, after.loss),
    )


def _chosen(rows: Sequence[Row]) -> list[float]:
    return [r.chosen_score for r in rows if r.chosen_score is not None]


def _table(title: str, columns: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column == "source" else "right", no_wrap=True)
    return table


def _titled(base: str, digest: str, form: str | None) -> str:
    """A base as a title names it: with its form where that is not its files' own in 16 or 32 bits."""
    return f"{base} ({short(digest)})" + (f", {form}" if form not in (None, PLAIN) else "")


def _share(found: Interval | None) -> str:
    return "-" if found is None else f"{found.mean:.1%} [{found.low:.1%}, {found.high:.1%}]"


def _arrow(pair: tuple[float, float] | None) -> str:
    return "-" if pair is None else f"{pair[0]:.1%} -> {pair[1]:.1%}"


def _points(change: Interval | None) -> str:
    return "-" if change is None else f"{100 * change.mean:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"


def short(digest: str) -> str:
    """Enough of a digest to tell it by."""
    return digest.rpartition(":")[2][:12]
