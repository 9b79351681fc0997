"""A library put right from what is left of it: files from a sound index, or the index from the files.

What can not be made again is a content: where its files are damaged, the same adapter must be added again.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tarsia.core.errors import LibraryError
from tarsia.library import index, journal, record, stages, sweep, verify
from tarsia.library.content import File
from tarsia.library.frame import rebuilt
from tarsia.library.journal import Entry
from tarsia.library.places import CURRENT, Places
from tarsia.library.record import Version
from tarsia.library.store import now, whoever

_BESIDE: Final = ("", "-wal", "-shm")
"""The files of a database in WAL mode, by what follows its name."""


@dataclass(frozen=True, slots=True)
class Repaired:
    """``done``: what was written anew. ``lost``: what could not be read, each with its file."""

    done: tuple[str, ...]
    lost: tuple[str, ...]


def repair(places: Places) -> Repaired:
    """Put right what can be; everything else of the library waits meanwhile. Contents are not looked at.

    Raises LibraryError where there is no library, others do not let go of it, or the disk refuses.
    """
    with index.told(places):
        frame = tuple(f"{path} made again" for path in rebuilt(places))
        broken = verify.of_index(places)
        with index.held(places, alone=True):
            mended = _anew(places) if broken else _files(places)
    return Repaired(frame + mended.done, mended.lost)


def _files(places: Places) -> Repaired:
    """Records and the journal's file, from a sound index."""
    done, lost = [], []
    with closing(index.connect(places)) as db:
        known = verify.Known.read(db)
        broken = bool(verify.of_journal(places, known))
        if not broken:
            try:
                db.execute("BEGIN IMMEDIATE")
                journal.catch_up(places, db)
                db.execute("COMMIT")
            except LibraryError as error:
                db.execute("ROLLBACK")
                lost.append(f"{places.journal}: its end can not be done: {error.given}")
            known = verify.Known.read(db)
    for (name, number), version in known.versions.items():
        if verify.of_record(places, version, known.files[version.hash]):
            path = places.record(name, number)
            stages.write(path, record.write(version, known.files[version.hash]), places)
            done.append(f"{path} written anew from the index")
    if broken or lost:
        _, kept = _write_journal(places, known.journal)
        done.append(f"{places.journal} written anew from the index")
        done += [f"{path} keeps what was there" for path in kept]
    return Repaired(tuple(done), tuple(lost))


def _write_journal(places: Places, entries: Sequence[tuple[int, Entry]]) -> tuple[int, list[Path]]:
    """Write the file anew: its length, and where what was there is kept, if it was anything else."""
    lines = "".join(entry.line(number) for number, entry in entries).encode()
    kept = []
    if places.journal.is_file() and (before := places.journal.read_bytes()) != lines:
        kept.append(places.root / f"{places.journal.name}.{_suffix()}")
        stages.write(kept[0], before, places, 0o644)
    stages.write(places.journal, lines, places, 0o644)
    return len(lines), kept


def _anew(places: Places) -> Repaired:
    """The index, from records and journal; the damaged one is kept beside it."""
    lost: list[str] = []
    held = _read_records(places, lost)
    there = {(version.name, version.number) for version, _ in held}
    entries = _read_journal(places, lost)
    gone = journal.retired(entry for _, entry in entries)
    held = [one for one in held if (one[0].name, one[0].number) not in gone]
    there -= gone
    lost += [
        f"{places.record(*key)}: is in the journal, and has no record"
        for key in sorted(journal.published(entry for _, entry in entries) - there)
    ]
    last = max((number for number, _ in entries), default=0)
    entries += enumerate(_mended(there, entries, lost), last + 1)
    kept: list[Path] = []

    def fill(db: sqlite3.Connection) -> None:
        index.make(db)
        db.execute("BEGIN")
        for version, files in held:
            record.insert(db, version, files)
        for key, number in verify.tags_of(entry for _, entry in entries).items():
            db.execute("INSERT INTO tags VALUES (?, ?, ?)", (*key, number))
        length, before = _write_journal(places, entries)
        journal.note(db, entries, length)
        db.execute("COMMIT")
        kept.extend([*before, *_put_aside(places)])

    index.put(places, fill)
    done = [f"{places.index} made anew from {len(held)} records and {len(entries)} entries of the journal"]
    return Repaired((*done, *(f"{path} keeps what was there" for path in kept)), tuple(lost))


def _put_aside(places: Places) -> list[Path]:
    """Rename the old database, itself first: without it nobody takes what lies beside for whole."""
    kept = []
    suffix = _suffix()
    for ending in _BESIDE:
        path = places.root / f"{places.index.name}{ending}"
        if path.exists():
            kept.append(path.rename(places.root / f"{places.index.name}.{suffix}{ending}"))
            stages.flush(places.root)
    return kept


def _suffix() -> str:
    return f"before-repair-{secrets.token_hex(4)}"


def _read_records(places: Places, lost: list[str]) -> list[tuple[Version, dict[str, File]]]:
    held = []
    for path, (name, number) in sweep.records(places):
        try:
            held.append(record.read(places, name, number))
        except LibraryError as error:
            lost.append(str(error.given or path))
    return held


def _read_journal(places: Places, lost: list[str]) -> list[tuple[int, Entry]]:
    """The entries that are whole, in order; a last line that was cut off is a killed writer's."""
    try:
        lines = places.journal.read_bytes().split(b"\n")
    except OSError as error:
        lost.append(f"{places.journal}: {error.strerror}")
        return []
    found: dict[int, Entry] = {}
    for row, line in enumerate(lines[:-1], 1):
        try:
            number, entry = Entry.parse(line.decode())
        except (ValueError, TypeError, RecursionError) as error:
            lost.append(f"{places.journal}: line {row}: {error}")
            continue
        found[number] = entry
    while found and not found[max(found)].ends:  # a transaction that was not written to its end
        del found[max(found)]
    gaps = sorted(set(range(1, max(found, default=0) + 1)) - set(found))
    lost += [f"{places.journal}: entry {number} is missing" for number in gaps]
    return sorted(found.items())


def _mended(there: set[tuple[str, int]], entries: list[tuple[int, Entry]], lost: list[str]) -> list[Entry]:
    """What the journal lacks, so that every tag is on a version that is there, and every name has a current one."""
    highest = dict(sorted(there))
    tags = verify.tags_of(entry for _, entry in entries)
    moves = []
    for (name, tag), number in sorted(tags.items()):
        if (name, number) not in there:
            lost.append(f"{name}@{tag}: version {number} is not there any more")
            instead = highest.get(name) if tag == CURRENT else None
            moves.append(_entry(name, tag, number, instead))
    return moves + [_entry(n, CURRENT, None, highest[n]) for n in highest if (n, CURRENT) not in tags]


def _entry(name: str, tag: str, before: int | None, after: int | None) -> Entry:
    return Entry(now(), whoever(), "repair", name, tag, before, after, "the index was made anew")
