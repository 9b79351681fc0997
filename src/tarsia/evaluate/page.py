"""A forgetting report as one page: self-contained, nothing is fetched, and no answer's text can act in it."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Final

import jinja2
from PIL import Image

from tarsia.core.errors import ConfigError
from tarsia.data import Sample
from tarsia.evaluate.bootstrap import Interval
from tarsia.evaluate.divergence import OWN, REFERENCES
from tarsia.evaluate.forgetting import ForgettingReport, Sources, Turned
from tarsia.evaluate.gate import Verdict
from tarsia.evaluate.plot import picture
from tarsia.evaluate.report import short
from tarsia.evaluate.vocabulary import Lexicon

SHOWN: Final = 24
"""Rows that went from right to wrong."""
_SIDE: Final = 160  # pixels of a thumbnail's longer side


def write_page(report: ForgettingReport, verdict: Verdict | None, sources: Sources, path: Path) -> None:
    """Write the page, and the plot beside it as a .png of the same name.

    ``sources`` hold the rows that were measured, for their pictures. Raises ConfigError where a file can not be
    written.
    """
    plot = picture(report)
    _write(path, page(report, verdict, sources, plot).encode())
    _write(path.with_suffix(".png"), plot)


def page(report: ForgettingReport, verdict: Verdict | None, sources: Sources, plot: bytes) -> str:
    """The page as HTML; ``plot`` is a PNG file."""
    lexicon = None
    if report.vocabulary is not None:
        lexicon = Lexicon(frozenset(report.vocabulary.answers), frozenset(report.vocabulary.words))
    turned = [(t, _shown(t, sources), None if lexicon is None else lexicon.found(t.after)) for t in chosen(report)]
    return _template().render(
        report=report,
        verdict=verdict,
        lines=_lines(report),
        turned=turned,
        total=sum(t.source in report.general for t in report.turned),
        plot=base64.b64encode(plot).decode(),
        digest=short(report.before.digest),
    )


def chosen(report: ForgettingReport) -> list[Turned]:
    """The first general rows that went from right to wrong, of every source in turn."""
    by_source = [[t for t in report.turned if t.source == name] for name in report.general]
    return [t for t in chain.from_iterable(zip_longest(*by_source)) if t is not None][:SHOWN]


def _lines(report: ForgettingReport) -> list[dict[str, Any]]:
    """One line of the table a source, with whatever was measured on it."""
    common = {c.source: c for c in report.vocabulary.commonest} if report.vocabulary else {}
    leaks = report.vocabulary.by_source if report.vocabulary else {}
    apart = {(d.source, d.forced): d for d in report.divergence}
    return [
        {
            "change": change,
            "task": change.source in report.task,
            "references": apart.get((change.source, REFERENCES)),
            "own": apart.get((change.source, OWN)),
            "leak": leaks.get(change.source),
            "common": common.get(change.source),
        }
        for change in report.comparison.changes
    ]


def _shown(turned: Turned, sources: Sources) -> list[str]:
    sample: Sample = sources[turned.source][turned.index]
    return [_thumbnail(shown.load()) for shown in sample.pictures]


def _thumbnail(shown: Image.Image) -> str:
    """A picture as base64 of a PNG file. A small one is kept as it is: the page enlarges it pixel by pixel."""
    shown.thumbnail((_SIDE, _SIDE))
    held = io.BytesIO()
    shown.save(held, "PNG")
    return base64.b64encode(held.getvalue()).decode()


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError("The page can not be written.", given=f"{path}: {error}", do="give another --page") from None


def _points(found: Interval) -> str:
    return f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def _printable(text: str) -> str:
    """What a model says may hold anything, marks that turn the writing's direction among it."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{MIDDLE DOT}" for c in text) or "(nothing)"


def _listed(words: Sequence[str], most: int = 60) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more if words else "none"


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["points"] = _points
    environment.filters["printable"] = _printable
    environment.filters["listed"] = _listed
    environment.filters["percent"] = lambda share, digits=0: f"{100 * share:.{digits}f} %"
    environment.filters["number"] = lambda value: f"{value:.3g}"
    return environment.from_string((Path(__file__).parent / "page.html.jinja").read_text(encoding="utf-8"))
