"""How the library's versions are shown: rows, cards, differences."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from tarsia.cli import output
from tarsia.core.visible import visible

if TYPE_CHECKING:
    from tarsia.library import Library, Published, Version
    from tarsia.library.card import Card
    from tarsia.library.differ import Difference
    from tarsia.library.places import Places
    from tarsia.library.verify import Fault

_LONGEST = 100
"""Characters of a value that are shown, unless it is a path; --json has all."""


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


def published(library: Library, made: Published, *, as_json: bool) -> None:
    """What came of a publish: the version, what of it was put right, and which one is current where it is not."""
    from tarsia.library.places import CURRENT

    version = made.version
    if as_json:
        output.line({**plain(version), "fresh": made.fresh, "mended": made.mended, "left": list(made.left)})
        return
    said = "" if made.fresh else " is there already, with the same content; nothing is added"
    if made.mended:
        said += "; its damaged files were put right"
    print(f"{version.reference}{said}  {version.hash[:12]}  {size(version.bytes)}")
    if CURRENT not in version.tags:
        current, name = library.version(version.name).reference, version.name
        print(f"current is {current}: tarsia library rollback {name} --to {version.number} moves it")
    if made.left:
        print(f"not part of an adapter, and left out: {visible(', '.join(made.left))}")


def remedy(places: Places, faults: Iterable[Fault]) -> None:
    """What puts damaged contents right: no repair makes their files anew."""
    under = [fault.file.relative_to(places.objects) for fault in faults if fault.file.is_relative_to(places.objects)]
    for digest in dict.fromkeys(path.parts[1] for path in under if len(path.parts) > 1):
        who = f"tarsia library list --all --hash {digest[:12]}"
        print(f"damaged: to put it right, add the same adapter again (tarsia library add); which one says {who}")


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
    whole = len(text) <= _LONGEST or os.sep in text  # half a path is none
    return text if whole else f"{text[: _LONGEST - 1]}…"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
