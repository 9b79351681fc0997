"""Sources as a command line names them, and the probes that come with an embedded base."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tarsia.data import Rows, Sample

KINDS: Final = "a .jsonl, .json or .parquet file, a folder of pictures or of `datasets`, or hub:owner/name"
PROBES: Final = 100
"""Rows of each built-in probe, at most."""
_DRAWN: Final = 400  # texts among which the different ones are looked for


def general_option(parser: argparse.ArgumentParser) -> None:
    """Declare the sources of what must not be forgotten."""
    parser.add_argument(
        "--general", metavar="[NAME=]SOURCE", action="append", default=[],
        help="rows of what must not be forgotten, of any kind; may be given again "
        "(default for an embedded base: held-out rows of its own world)",
    )  # fmt: skip


def named(given: Sequence[str], limit: int | None, option: str) -> dict[str, Rows]:
    """Each source's rows by name. Raises ConfigError where two have one name."""
    from tarsia.core.errors import ConfigError
    from tarsia.data import Source, read

    found: dict[str, Rows] = {}
    for text in given:
        name = name_in(text)
        path = text if name is None else text.partition("=")[2]
        source = Source(path=path, limit=limit) if name is None else Source(path=path, name=name, limit=limit)
        if source.title in found:
            raise ConfigError("Two sources have one name.", given=source.title, do=f"name them: {option} NAME=SOURCE")
        found[source.title] = read(source)
    return found


def name_in(text: str) -> str | None:
    """The NAME of [NAME=]SOURCE, where there is one."""
    name, equals, path = text.partition("=")
    return name if equals and path and not Path(text).exists() else None


def general(given: Sequence[str], model: str, limit: int | None) -> dict[str, Sequence[Sample]]:
    """The general sources that were named, or else the probes of an embedded base.

    Raises ConfigError where none are named and the base brings none along.
    """
    from tarsia.base import NAMES
    from tarsia.core.errors import ConfigError

    if given:
        return dict(named(given, limit, "--general"))
    if model not in NAMES:
        raise ConfigError(
            "What must not be forgotten? Only embedded bases bring rows of that along.",
            given=model,
            allowed=KINDS,
            do="name rows of what this base could do before: --general [NAME=]SOURCE",
        )
    return probes(limit or PROBES)


def probes(rows: int = PROBES) -> dict[str, Sequence[Sample]]:
    """Held-out rows of mini-1's own world, by source: at most ``rows`` of each, no text asked twice."""
    from tarsia.data import PICTURE, Message, Picture, Sample
    from tarsia.labs.sources import WORLD

    found: dict[str, Sequence[Sample]] = {}
    for name, draw in WORLD.items():
        seen: set[str] = set()
        kept: list[Sample] = []
        for question, answer, shown in draw(
            max(rows, _DRAWN) if name not in ("digits", "scenes") else rows, "held-out"
        ):
            if len(kept) == rows or (not shown and question in seen):
                continue
            seen.add(question)
            row = len(kept)
            pictures = tuple(Picture(p, f"drawn {row}", name, row) for p in shown)
            asked = Message("user", (*(PICTURE for _ in shown), question))
            kept.append(Sample((asked, Message("assistant", (answer,))), pictures, name, row))
        found[name] = tuple(kept)
    return found
