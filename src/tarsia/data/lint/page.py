"""The findings as one page: self-contained, nothing is fetched, and no row's text can act in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import jinja2

from tarsia.core.errors import ConfigError
from tarsia.data.lint.finding import Where
from tarsia.data.lint.report import Findings, View
from tarsia.data.lint.rules.answers import classes
from tarsia.data.lint.view import visible

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
    pictures = {view.where: view for view in views}
    pairs = {
        finding: [
            (_shown(findings, pictures, a), _shown(findings, pictures, b))
            for a, b in list(zip(finding.rows, finding.like, strict=True))[:PAIRS]
        ]
        for finding in findings.findings
        if finding.like
    }
    return _template().render(
        title=title,
        findings=findings,
        views=views,
        pairs=pairs,
        encoder=findings.survey.encoder,
        context=findings.survey.context,
        classes=[(s.name, c.most_common()) for s in findings.survey.sources if (c := classes(s)) is not None],
    )


def _shown(findings: Findings, known: Mapping[Where, View], where: Where) -> View:
    return known[where] if where in known else findings.view(where)


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
