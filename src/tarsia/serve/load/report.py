"""A load as one page: self-contained, nothing is fetched, and no word of a server's can act in it. And as JSON."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import jinja2

from tarsia.core.errors import ConfigError
from tarsia.serve.load.asked import Mix
from tarsia.serve.load.client import Answered
from tarsia.serve.load.drive import Limits
from tarsia.serve.load.figures import Figures, Spread
from tarsia.serve.load.plot import picture

SHOWN: Final = 40
"""Adapters, and wrong answers, that a page lists."""
_CHANGED: Final = 60


@dataclass(frozen=True, slots=True)
class Told:
    """All that a report is made from. ``server`` is by how much the server's own counters grew."""

    url: str
    when: str
    mix: Mix
    limits: Limits
    found: Figures
    answered: Sequence[Answered]
    server: Mapping[str, float]


def page(told: Told) -> str:
    """The page as HTML."""
    drawn = base64.b64encode(picture(told.answered, told.found)).decode()
    spreads = {
        "to the first text, ms": told.found.first,
        "for each further token, ms": told.found.each,
        "longest pause in an answer, ms": told.found.gap,
        "to the end, ms": told.found.whole,
    }
    changed = dict(list(told.server.items())[:_CHANGED])
    return _template().render(told=told, found=told.found, plot=drawn, spreads=spreads, shown=SHOWN, changed=changed)


def summary(told: Told) -> dict[str, Any]:
    """The same for machines, without single answers."""
    found = told.found
    return {
        "url": told.url,
        "at": told.when,
        "passed": found.passed,
        "asked": found.asked,
        "answered": found.answered,
        "seconds": round(found.seconds, 3),
        "requests_a_second": round(found.requests_a_second, 3),
        "tokens_a_second": round(found.tokens_a_second, 2),
        "tokens": found.tokens,
        "prompt_tokens": found.prompt,
        "first": asdict(found.first),
        "each": asdict(found.each),
        "whole": asdict(found.whole),
        "gap": asdict(found.gap),
        "errors": dict(found.errors),
        "checked": found.checked,
        "wrong": len(found.wrong),
        "adapters": len(found.adapters),
        "server": dict(told.server),
        "limits": asdict(told.limits),
        "mix": {**asdict(told.mix), "models": len(told.mix.models)},
    }


def writable(path: Path) -> None:
    """Raises ConfigError where a file can not be written there now; what is there stays."""
    if path.is_dir():
        raise _unwritable(path, "a folder")
    try:
        _partial(path).touch()
        _partial(path).unlink()
    except OSError as error:
        raise _unwritable(path, error.strerror) from None


def write(text: str, path: Path) -> None:
    """Write a file whole or not at all. Raises ConfigError where it can not be written."""
    partial = _partial(path)
    try:
        try:
            partial.write_text(text, encoding="utf8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error.strerror) from None


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _unwritable(path: Path, why: str | None) -> ConfigError:
    return ConfigError("The report can not be written.", given=f"{path}: {why}", do="give another --out")


def ms(seconds: float | None) -> str:
    """Milliseconds with three figures."""
    if seconds is None:
        return "-"
    value = 1000 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cells(spread: Spread) -> tuple[str, ...]:
    """Median, 90 %, 99 % and the longest, in ms."""
    return tuple(ms(value) for value in (spread.middle, spread.ninety, spread.worst, spread.longest))


def _printable(text: str) -> str:
    """What a model says may hold anything, marks that turn the writing's direction among it."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{MIDDLE DOT}" for c in text) or "(nothing)"


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"ms": ms, "cells": cells, "printable": _printable}
    return environment.from_string((Path(__file__).parent / "report.html.jinja").read_text(encoding="utf-8"))
