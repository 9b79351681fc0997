"""Everything that a library holds, looked at: each fault with its file."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tarsia.core.errors import LibraryError
from tarsia.library import content, frame, index, journal, record, stages, sweep
from tarsia.library.content import File
from tarsia.library.journal import Entry
from tarsia.library.places import CURRENT, Places, Reference
from tarsia.library.record import Version
from tarsia.library.store import find


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with which file."""

    file: Path
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclass(frozen=True, slots=True)
class Verified:
    """Faults, and what ``gc`` would remove; how many versions and contents were looked at, and their bytes."""

    faults: tuple[Fault, ...]
    garbage: tuple[Path, ...]
    versions: int
    objects: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Known:
    """The index at one moment: versions, files by content, tags, the journal and how long its file was."""

    versions: Mapping[tuple[str, int], Version]
    files: Mapping[str, Mapping[str, File]]
    tags: Mapping[tuple[str, str], int]
    journal: Sequence[tuple[int, Entry]]
    length: int

    @classmethod
    def read(cls, db: sqlite3.Connection) -> Known:
        """All of an index."""
        versions = {(v.name, v.number): v for v in record.select(db)}
        return cls(
            versions,
            {digest: record.files_of(db, digest) for digest in {v.hash for v in versions.values()}},
            {(name, tag): number for name, tag, number in db.execute("SELECT name, tag, number FROM tags")},
            journal.read(db),
            db.execute("SELECT value FROM facts WHERE key = 'journal'").fetchone()[0],
        )


def verify(places: Places, references: Iterable[str] = ()) -> Verified:
    """Look at every file of the library, or of the versions that are named alone.

    Others may go on publishing meanwhile. Where the index is damaged the rest is judged by the records.
    Raises LibraryError where there is no such version, others keep the library busy, or the disk refuses.
    """
    asked = [Reference.parse(text) for text in references]
    with index.told(places):
        faults = of_frame(places)
        if places.lock.exists():
            faults += of_index(places)
        if any(fault.file in (places.lock, places.index) for fault in faults):
            return _by_records(places, faults)
        return _by_index(places, faults, asked)


def of_frame(places: Places) -> list[Fault]:
    """What every library needs and is not there."""
    texts = {places.marker: "is not there, or is damaged"}
    return [Fault(path, texts.get(path, "is not there")) for path in frame.missing(places)]


def _by_index(places: Places, faults: list[Fault], asked: Sequence[Reference]) -> Verified:
    with index.reading(places) as db:
        known = Known.read(db)
        chosen = [find(db, one) for one in asked] if asked else list(known.versions.values())
    files = {version.hash: known.files[version.hash] for version in chosen}
    found = _Found(
        {(v.name, v.number): held for v in chosen if (held := of_record(places, v, known.files[v.hash]))},
        of_objects(places, files),
    )
    unwritable = of_journal(places, known) + of_end(places, known)  # nobody can write then, and nobody does
    garbage: tuple[Path, ...] = ()
    if not asked:
        faults += [*of_tags(places, known), *unwritable]
    if unwritable:
        faults += found.faults()
    elif not asked or found.faults():
        with index.quiet(places) as db:  # nobody is in the middle of a publish now
            now = Known.read(db)
            faults += found.again(places, now).faults()
            strangers, garbage = ([], ()) if asked else of_strangers(places, now)
        faults += strangers
        garbage += () if asked else tuple(stages.dead(places))
    size = sum(file.bytes for held in files.values() for file in held.values())
    return Verified(tuple(faults), garbage, len(chosen), len(files), size)


@dataclass(frozen=True, slots=True)
class _Found:
    """Faults of records, by version, and of contents, by their hash."""

    records: Mapping[tuple[str, int], Sequence[Fault]]
    objects: Mapping[str, Sequence[Fault]]

    def faults(self) -> list[Fault]:
        return [fault for held in (*self.records.values(), *self.objects.values()) for fault in held]

    def again(self, places: Places, known: Known) -> _Found:
        """What is left of them by a newer index: others may have put right, or given up, what was looked at."""
        versions = {key: known.versions[key] for key in self.records if key in known.versions}
        return _Found(
            {key: of_record(places, version, known.files[version.hash]) for key, version in versions.items()},
            {key: _of_object(places, key, known.files[key]) for key in self.objects if key in known.files},
        )


def of_index(places: Places) -> list[Fault]:
    """What is wrong with the database itself. Raises what SQLite says where the disk or the system refuses."""
    try:
        with index.opened(places) as db:
            said = [str(row[0]) for row in db.execute("PRAGMA integrity_check")]
            broken = db.execute("PRAGMA foreign_key_check").fetchall()
            if said == ["ok"] and not broken:
                Known.read(db)
                return []
    except sqlite3.Error as error:
        if not index.damaged(error):
            raise
        return [Fault(places.index, f"{type(error).__name__} {error}")]
    except (ValueError, TypeError, LookupError) as error:
        return [Fault(places.index, f"{type(error).__name__} {error}")]
    except LibraryError as error:
        if not str(error.given).startswith(f"{places.index}: "):
            raise
        return [Fault(places.index, str(error.given).removeprefix(f"{places.index}: "))]
    lost = [f"{row['table']} refers to {row['parent']} that is not there" for row in broken]
    return [Fault(places.index, text) for text in [*(s for s in said if s != "ok"), *lost]]


def of_objects(places: Places, files: Mapping[str, Mapping[str, File]]) -> dict[str, list[Fault]]:
    """What is wrong with contents, by their hash; every byte is hashed."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(lambda digest: _of_object(places, digest, files[digest]), files))
    return {digest: faults for digest, faults in zip(files, found, strict=True) if faults}


def _of_object(places: Places, digest: str, files: Mapping[str, File]) -> list[Fault]:
    folder = places.object(digest)
    if content.hash_of(files) != digest:
        return [Fault(places.index, f"the files of the content {digest} have another hash")]
    return [_fault(text) for text in content.damage(folder, files)]


def _fault(text: str) -> Fault:
    file, _, what = text.partition(": ")
    return Fault(Path(file), what)


def of_record(places: Places, version: Version, files: Mapping[str, File]) -> list[Fault]:
    """What is wrong with the file of a version's record."""
    path = places.record(version.name, version.number)
    try:
        if path.read_bytes() == record.write(version, files):
            return []
        record.read(places, version.name, version.number)
    except OSError as error:
        return [Fault(path, error.strerror or str(error))]
    except LibraryError as error:
        return [Fault(path, str(error.given).removeprefix(f"{path}: "))]
    return [Fault(path, "is not what the index says")]


def of_tags(places: Places, known: Known) -> list[Fault]:
    """Names without a current version, and tags that the journal puts elsewhere."""
    names = {name for name, _ in known.versions}
    faults = [
        Fault(places.index, f"{n} has no current version") for n in sorted(names) if (n, CURRENT) not in known.tags
    ]
    told = tags_of(entry for _, entry in known.journal)
    differing = sorted(key for key in told.keys() | known.tags.keys() if told.get(key) != known.tags.get(key))
    return faults + [
        Fault(
            places.index, f"{name}@{tag} is {known.tags.get((name, tag))}, and {told.get((name, tag))} by the journal"
        )
        for name, tag in differing
    ]


def tags_of(moves: Iterable[Entry]) -> dict[tuple[str, str], int]:
    """Where the journal leaves every tag."""
    tags: dict[tuple[str, str], int] = {}
    for entry in moves:
        if entry.tag is not None and entry.after is not None:
            tags[entry.name, entry.tag] = entry.after
        elif entry.tag is not None:
            tags.pop((entry.name, entry.tag), None)
    return tags


def of_journal(places: Places, known: Known) -> list[Fault]:
    """Where journal.jsonl is not what the index says of it, as far as the index knows it."""
    try:
        with places.journal.open("rb") as file:
            held = file.read(known.length)
    except OSError as error:
        return [Fault(places.journal, error.strerror or str(error))]
    wanted = "".join(entry.line(number) for number, entry in known.journal).encode()
    if held == wanted:
        return []
    lines = zip(held.split(b"\n"), wanted.split(b"\n"), strict=False)
    number = next((n for n, (a, b) in enumerate(lines, 1) if a != b), None)
    return [Fault(places.journal, f"line {number} is not what the index says" if number else "has another length")]


def of_end(places: Places, known: Known) -> list[Fault]:
    """What the next writer can not do of what journal.jsonl holds beyond what the index knows."""
    found = _of_end(places, known)
    return found and _of_end(places, known)  # another may have given up, in between, what the first look missed


def _of_end(places: Places, known: Known) -> list[Fault]:
    try:
        with places.journal.open("rb") as file:
            file.seek(known.length)
            told, _ = journal.whole(file.read(), max((number for number, _ in known.journal), default=0) + 1)
    except OSError:
        return []  # of_journal says so
    faults = []
    for key in sorted(journal.published(entry for _, entry in told)):
        try:
            record.read(places, *key)
        except LibraryError as error:
            path = places.record(*key)
            faults.append(Fault(path, str(error.given).removeprefix(f"{path}: ")))
    return faults


def of_strangers(places: Places, known: Known) -> tuple[list[Fault], tuple[Path, ...]]:
    """Versions that the index lacks; and what is left of killed processes and of what was retired."""
    highest: dict[str, int] = {}
    for name, number in [*known.versions, *((e.name, e.after or 0) for _, e in known.journal)]:
        highest[name] = max(number, highest.get(name, 0))
    gone = journal.retired(entry for _, entry in known.journal)
    faults, garbage = [], []
    for path, (name, number) in sweep.records(places):
        if (name, number) in gone or number > highest.get(name, 0):
            garbage.append(path)
        elif (name, number) not in known.versions:
            faults.append(Fault(path, "is of a version that the index lacks"))
    garbage += [path for path in sweep.contents(places) if path.name not in known.files]
    for key in sorted(journal.published(entry for _, entry in known.journal) - set(known.versions)):
        if not places.record(*key).exists():
            faults.append(
                Fault(places.record(*key), "is not there; the journal knows this version, the index does not")
            )
    return faults, tuple(garbage)


def _by_records(places: Places, faults: list[Fault]) -> Verified:
    """The same of a library whose index can not be asked."""
    held: list[tuple[Version, dict[str, File]]] = []
    for path, (name, number) in sweep.records(places):
        try:
            held.append(record.read(places, name, number))
        except LibraryError as error:
            faults.append(Fault(path, str(error.given).removeprefix(f"{path}: ")))
    files = {version.hash: files for version, files in held}
    for digest, wanted in files.items():
        faults += _of_object(places, digest, wanted)
    size = sum(file.bytes for one in files.values() for file in one.values())
    return Verified(tuple(faults), (), len(held), len(files), size)
