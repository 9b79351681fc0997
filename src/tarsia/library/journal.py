"""The journal: who moved what, when and why, in the index and, written first, in journal.jsonl.

A line is on the disk before the transaction that it tells of is committed; where the commit is refused, the line is
taken back. So what the file holds beyond what the index knows is of a writer that was killed between the two, or of an
index that has lost commits (its -wal file was removed, an older copy was put in its place). Either way records and
contents were there before the line was: the next writer does what the lines say, as far as they are whole transactions,
and cuts off the rest.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Self

from tarsia.core.errors import LibraryError
from tarsia.library import record
from tarsia.library.places import Places


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the journal: ``tag`` went from version ``before`` to ``after`` (None: there was or is none).

    ``ends`` is 1 for the last entry of a transaction and 0 for the others.
    """

    at: str
    who: str
    action: str
    name: str
    tag: str | None
    before: int | None
    after: int | None
    why: str
    ends: int = 1

    def line(self, number: int) -> str:
        """As it stands in journal.jsonl, as the entry of this number (from 1)."""
        text = json.dumps({"id": number, **asdict(self)}, ensure_ascii=False)
        return f'{text[:-1]}, "check": "{_check(text)}"}}\n'

    @classmethod
    def parse(cls, line: str) -> tuple[int, Self]:
        """Number and entry of a line. Raises ValueError where it is not one, or was changed since it was written."""
        values = json.loads(line)
        if not isinstance(values, dict) or "check" not in values:
            raise ValueError("no entry")
        check, number = values.pop("check"), values.get("id")
        if check != _check(json.dumps(values, ensure_ascii=False)) or type(number) is not int:
            raise ValueError("changed since it was written")
        del values["id"]
        return number, cls(**values)


def _check(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def appended(places: Places, db: sqlite3.Connection, entries: Sequence[Entry]) -> Iterator[None]:
    """Add the entries of one transaction to the file, flushed, and to the index, which has been caught up.

    The commit is done within this. Where it fails, or something else does, the file ends where it did: what was refused
    is not done by the next writer, who waits for the file's lock until that is so.
    """
    known, last = _known(db)
    parted = [replace(entry, ends=int(n == len(entries))) for n, entry in enumerate(entries, 1)]
    numbered = list(enumerate(parted, last + 1))
    lines = "".join(entry.line(number) for number, entry in numbered).encode()
    handle = os.open(places.journal, os.O_WRONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            os.ftruncate(handle, known)
            written = os.pwrite(handle, lines, known)
            if written != len(lines):
                raise OSError(None, f"only {written} of {len(lines)} bytes could be written", str(places.journal))
            os.fsync(handle)
            note(db, numbered, known + len(lines))
            yield
        except BaseException:
            # SQLite may have rolled back by itself, or the interruption have come after the commit
            if db.in_transaction or _known(db)[0] == known:
                os.ftruncate(handle, known)
                os.fsync(handle)
            raise
    finally:
        os.close(handle)


def catch_up(places: Places, db: sqlite3.Connection) -> None:
    """Do what whole transactions of the file say that the index does not know yet. Within a transaction of its own.

    Raises LibraryError where the file has lost what the index knows, or lacks what it says was published.
    """
    known, last = _known(db)
    with places.journal.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        size = os.fstat(file.fileno()).st_size
        if size == known:
            return
        if size < known:
            raise LibraryError(
                "journal.jsonl has lost its end.",
                given=f"{places.journal}: {size} of {known} bytes",
                do="tarsia library verify --repair",
            )
        file.seek(known)
        rest = file.read()
    told, length = whole(rest, last + 1)
    _do(places, db, [entry for _, entry in told])
    note(db, told, known + length)


def whole(raw: bytes, first: int) -> tuple[list[tuple[int, Entry]], int]:
    """The whole transactions at the beginning of some bytes, the first entry of number ``first``; their length."""
    found: list[tuple[int, Entry]] = []
    pending: list[tuple[int, Entry]] = []
    length = end = 0
    for line in raw.splitlines(keepends=True):
        try:
            number, entry = Entry.parse(line.decode())
        except (ValueError, TypeError, RecursionError):
            break
        if number != first + len(found) + len(pending) or not line.endswith(b"\n"):
            break
        pending.append((number, entry))
        end += len(line)
        if entry.ends:
            found, pending, length = found + pending, [], end
    return found, length


def published(entries: Iterable[Entry]) -> set[tuple[str, int]]:
    """Versions that entries tell of, without those that they say were retired."""
    told = list(entries)
    made = {(e.name, e.after) for e in told if e.action == "publish" and e.after is not None}
    return made - retired(told)


def retired(entries: Iterable[Entry]) -> set[tuple[str, int]]:
    """Versions that entries say were given up."""
    return {(e.name, e.before) for e in entries if e.action == "retire" and e.before is not None}


def _do(places: Places, db: sqlite3.Connection, entries: Sequence[Entry]) -> None:
    for key in sorted(published(entries)):  # what was retired since may have no files any more
        version, files = record.read(places, *key)
        record.insert(db, version, files)
    last = {(e.name, e.tag): e.after for e in entries if e.tag is not None}
    for (name, tag), number in last.items():
        if number is None:
            db.execute("DELETE FROM tags WHERE name = ? AND tag = ?", (name, tag))
        else:
            db.execute("INSERT OR REPLACE INTO tags VALUES (?, ?, ?)", (name, tag, number))
    for key in retired(entries):
        record.delete(db, *key)


def _known(db: sqlite3.Connection) -> tuple[int, int]:
    """How many bytes of the file the index knows, and the number of the last entry."""
    (length,) = db.execute("SELECT value FROM facts WHERE key = 'journal'").fetchone()
    (last,) = db.execute("SELECT coalesce(max(id), 0) FROM journal").fetchone()
    return length, last


def note(db: sqlite3.Connection, numbered: Iterable[tuple[int, Entry]], length: int) -> None:
    """Add entries to the index, under their numbers; ``length`` is that of the file with them, in bytes."""
    for number, entry in numbered:
        values = {"id": number, **asdict(entry)}
        marks = ", ".join(f":{key}" for key in values)
        db.execute(f"INSERT INTO journal ({', '.join(values)}) VALUES ({marks})", values)
    db.execute("UPDATE facts SET value = ? WHERE key = 'journal'", (length,))


def read(db: sqlite3.Connection, where: str = "1", values: Sequence[object] = ()) -> list[tuple[int, Entry]]:
    """Entries of the index's journal, with their numbers, in order."""
    found = []
    for row in db.execute(f"SELECT * FROM journal WHERE {where} ORDER BY id", values):
        held = dict(row)
        found.append((held.pop("id"), Entry(**held)))
    return found
