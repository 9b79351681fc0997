"""An interference report as one page: self-contained, nothing is fetched, and no name can act in it."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jinja2

from tarsia.core.errors import ConfigError
from tarsia.merge.interference import Interference, Place
from tarsia.merge.interference_plot import chance, picture


@dataclass(frozen=True, slots=True)
class Table:
    """A table on the page: what else is told of a merge."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def write_page(report: Interference, path: Path, title: str = "", tables: Sequence[Table] = ()) -> None:
    """Write the page, and its picture beside it as a .png. Raises ConfigError where a file can not be written."""
    plot = picture(report)
    _write(path, page(report, plot, title, tables).encode())
    _write(path.with_suffix(".png"), plot)


def page(report: Interference, plot: bytes, title: str = "", tables: Sequence[Table] = ()) -> str:
    """The page as HTML; ``plot`` is a PNG file, ``tables`` stand before the report's own."""
    return _template().render(
        report=report,
        title=title,
        plot=base64.b64encode(plot).decode(),
        shared=sum(bool(place.pairs) for place in report.sites),
        tables=[*tables, pairs(report), norms(report)],
        chance=[chance(2), chance(len(report.adapters))],
    )


def pairs(report: Interference) -> Table:
    """Every pair, everywhere."""
    rows = [
        (
            f"{pair.first} and {pair.second}",
            str(pair.sites),
            f"{100 * pair.conflict:.1f} %",
            f"{pair.cosine:+.3f}",
            _beside(pair.rows, pair.rows_chance),
            _beside(pair.columns, pair.columns_chance),
        )
        for pair in report.whole.pairs
    ]
    columns = ("pair", "sites", "lost", "cosine", "overlap, read (chance)", "overlap, write (chance)")
    return Table("Pairs", "at the sites that both change", columns, tuple(rows))


def norms(report: Interference) -> Table:
    """How much each adapter changes, by component, and what all lose there."""
    places: tuple[Place, ...] = (report.whole, *report.components)
    rows = [(p.name, str(p.sites), *(f"{n:.3g}" for n in p.norms), f"{100 * p.conflict:.1f} %") for p in places]
    note = "Frobenius norms of the changes, weights applied; and what all adapters together lose to signs"
    return Table("Sizes", note, ("part", "sites", *report.adapters, "lost"), tuple(rows))


def _beside(value: float | None, chance: float | None) -> str:
    return "-" if value is None or chance is None else f"{value:.3f} ({chance:.3f})"


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError("The page can not be written.", given=f"{path}: {error}", do="give another file") from None


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string((Path(__file__).parent / "interference.html.jinja").read_text(encoding="utf-8"))
