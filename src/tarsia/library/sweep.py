"""Garbage: contents and records that belong to no version, and stages whose process is gone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tarsia.core.errors import LibraryError
from tarsia.library import index, record, stages
from tarsia.library.places import NAME, Places

_HASH: Final = re.compile(r"[0-9a-f]{64}")
_RECORD: Final = re.compile(r"([1-9][0-9]{0,17})\.json")


@dataclass(frozen=True, slots=True)
class Swept:
    """What was removed: hashes of contents, records by their files, how many dead stages, bytes of all."""

    objects: tuple[str, ...]
    records: tuple[str, ...]
    stages: int
    bytes: int


def sweep(places: Places) -> Swept:
    """Remove what nothing refers to; never what another process is publishing.

    Raises LibraryError where a record is not in the index that once was: the content that it names is then not garbage.
    """
    with index.told(places):
        with stages.staged(places) as away:
            with index.writing(places) as work:
                known = {digest for (digest,) in work.db.execute("SELECT DISTINCT hash FROM versions")}
                named = {(name, n) for name, n in work.db.execute("SELECT name, number FROM versions")}
                loose = [(path, key) for path, key in records(places) if key not in named]
                gone = record.retired(work.db)
                lost = [p for p, key in loose if key not in gone and key[1] <= record.highest(work.db, key[0])]
                if lost:
                    raise LibraryError(
                        "The index lacks versions whose records are there, so what is garbage can not be told.",
                        given=", ".join(map(str, lost[:3])),
                        do="put the records right, or give the versions up: tarsia library gc --retire NAME@N",
                    )
                # records first: one without its content would be a fault
                for number, (path, _) in enumerate(loose):
                    stages.shift(path, away, f"{number}.json")
                objects = [path for path in contents(places) if path.name not in known]
                for path in objects:
                    stages.shift(path, away)
            size = _size(away)
        dead = 0
        for path in stages.dead(places):
            size, dead = size + _size(path), dead + 1
            stages.remove(path)
    return Swept(tuple(path.name for path in objects), tuple(str(path) for path, _ in loose), dead, size)


def contents(places: Places) -> Iterator[Path]:
    """Every folder of a content, known or not."""
    for shelf in sorted(places.objects.iterdir()) if places.objects.is_dir() else ():
        if shelf.is_dir():
            yield from (path for path in sorted(shelf.iterdir()) if _HASH.fullmatch(path.name))


def records(places: Places) -> Iterator[tuple[Path, tuple[str, int]]]:
    """Every record's file, with the name and number of the version that it is of."""
    for folder in sorted(places.records.iterdir()) if places.records.is_dir() else ():
        if folder.is_dir() and NAME.fullmatch(folder.name):
            for path in sorted(folder.iterdir()):
                if match := _RECORD.fullmatch(path.name):
                    yield path, (folder.name, int(match[1]))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
