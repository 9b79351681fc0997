"""How the library's versions are shown: rows, cards, differences."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from tarsia.cli import output
from tarsia.core.visible import visible

if TYPE_CHECKING:
    from tarsia.library import Version
    from tarsia.library.card import Card
    from tarsia.library.differ import Difference

_LONGEST = 100
"""Characters of a value that are shown; --json has all."""


def plain(version: Version) -> dict[str, object]:
    """A version as JSON."""
    return {field.name: getattr(version, field.name) for field in fields(version)}


def lines(versions: Iterable[Version]) -> None:
    """Versions as lines of JSON; thousands at once, not each flushed by itself."""
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    sys.stdout.write("".join(encode(plain(version)) + "\n" for version in versions))


def size(number: float) -> str:
    """Bytes, for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"


def columns(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> None:
    """A plain table on stdout. ``output.table`` takes seconds where this takes a hundredth, of thousands of rows."""
    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(heads, *rows, strict=True)]
    widths[-1] = 0
    bold = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    form = "  ".join(f"{{:{'>' if n in right else '<'}{width}}}" for n, width in enumerate(widths))
    lines = [f"{bold[0]}{form.format(*heads)}{bold[1]}", *(form.format(*row) for row in rows)]
    sys.stdout.write("\n".join(lines) + "\n")


def show(version: Version, card: Card, folder: Path) -> None:
    """A version's card; what is not set is left out, and what else is in it is named."""
    from tarsia.library.card import flat

    gate = {None: "not judged", True: "passed", False: "not passed"}[version.passed]
    facts = {
        "tags": ", ".join(version.tags),
        "hash": version.hash,
        "folder": str(folder),
        "size": f"{size(version.bytes)}, {version.numbers:,} numbers at {version.sites} sites",
        "methods": version.methods,
        "published": f"{version.at[:19].replace('T', ' ')} UTC by {version.who}",
        "why": version.note,
        "gate": gate,
    }
    sections = {
        version.reference: facts,
        "base": card.base,
        "parts": {str(n): part for n, part in enumerate(card.parts)},
        "recipe": {key: value for key, value in card.recipe.items() if key != "parts"},
        "data": card.data,
        "results": card.results,
        "forgetting": card.forgetting,
    }
    for title, values in sections.items():
        set_ = {visible(key): value for key, value in flat(values).items() if value not in (None, "", [], {})}
        width = max(map(len, set_), default=0)
        print(title if set_ else f"{title}: (nothing)")
        for key, value in set_.items():
            print(f"  {key:<{width}}  {_text(value)}")
    if card.rest:
        print(f"also in the card (--json shows it): {visible(', '.join(card.rest))}")


def difference(found: Difference) -> None:
    """What lies between two versions."""
    a, b = (version.reference for version in found.versions)
    if found.same:
        print(f"{a} and {b} have the same content: {found.versions[0].hash[:12]}")
    for title, changed in found.entries.items():
        rows = [(visible(key), _text(one), _text(two)) for key, (one, two) in changed.items()]
        output.table(title, ("", a, b), rows)
    for version, sites in zip((a, b), found.only, strict=True):
        if sites:
            output.table(f"sites of {version} alone", ("",), [(visible(site),) for site in sites])
    if found.distances:
        apart = [(visible(d.site), visible(d.of), _number(d.relative), _number(d.cosine)) for d in found.distances]
        title = "how far apart (relative: |a - b| / |a|)"
        output.table(title, ("site", "of", "relative", "cosine"), apart, right=("relative", "cosine"))


def _text(value: object) -> str:
    text = visible(value if isinstance(value, str) else "-" if value is None else json.dumps(value, ensure_ascii=False))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
