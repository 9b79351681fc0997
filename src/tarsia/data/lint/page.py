"""The findings as one page: self-contained, nothing is fetched, and no row's text can act in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import jinja2

from tarsia.core.errors import ConfigError
from tarsia.data.lint.finding import Finding, Where
from tarsia.data.lint.report import Findings, View
from tarsia.data.lint.rules.answers import classes
from tarsia.data.lint.view import visible

NEAR: Final = "\N{ALMOST EQUAL TO}"
PAIRS: Final = 4
"""Pairs of like rows that a finding shows."""


def write_page(findings: Findings, path: Path, title: str) -> None:
    """Write the page. Raises ConfigError where it can not be written."""
    text = page(findings, title)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError("The page can not be written.", given=f"{path}: {error}", do="give another --page") from None


def page(findings: Findings, title: str) -> str:
    """The page as HTML."""
    views = findings.views()
    shown = {view.where: view for view in views}
    pairs = {finding: _pairs(findings, finding, shown) for finding in findings.findings}
    return _template().render(
        title=title,
        findings=findings,
        views=views,
        shown=shown,
        pairs=pairs,
        mark=lambda finding: NEAR if finding.code.startswith("near") else "=",
        encoder=findings.survey.encoder,
        context=findings.survey.context,
        classes=[(s.name, c.most_common()) for s in findings.survey.sources if (c := classes(s)) is not None],
    )


def _pairs(findings: Findings, finding: Finding, known: Mapping[Where, View]) -> list[tuple[View, View]]:
    """The first rows that are like others, each beside its other, where both have pictures to show."""
    both = list(zip(finding.rows, finding.like, strict=True)) if finding.like else []
    views = [tuple(known[where] if where in known else findings.view(where) for where in pair) for pair in both[:PAIRS]]
    return [(a, b) for a, b in views if a.pictures and b.pictures]


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["visible"] = visible
    environment.filters["percent"] = lambda share, digits=0: f"{share:.{digits}%}"
    environment.filters["count"] = lambda number: f"{number:,}"
    environment.globals["anchor"] = _anchor
    return environment.from_string((Path(__file__).parent / "page.html.jinja").read_text(encoding="utf-8"))


def _anchor(where: Where) -> Any:
    return "row-" + "".join(c if c.isalnum() else "-" for c in str(where))
