"""The index of a library: one SQLite file, opened for one short transaction at a time.

Readers and writers hold the library's lock shared for as long as they have the database open, so that whoever
puts another database in its place (which takes the lock alone) never leaves a process writing to the old one. One
writer at a time is at work: what it does to files within ``writing`` nobody else does at that moment. The database is
in WAL mode with synchronous FULL: when ``writing`` is left, what was written has been flushed to the disk. WAL keeps
files beside the database, so who may read the library and not write it looks at a copy of the index in memory, taken in
a moment in which nobody has it open.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Final

from tarsia.core.errors import LibraryError
from tarsia.library import journal, stages
from tarsia.library.journal import Entry
from tarsia.library.places import Places

PATIENCE: Final = 30.0
"""Seconds to wait for other processes."""

REPAIR: Final = "tarsia library verify --repair makes it again"
_REFUSALS: Final = tuple(
    f"SQLITE_{name}" for name in ("FULL", "IOERR", "READONLY", "CANTOPEN", "PERM", "PROTOCOL", "NOMEM", "INTERRUPT")
)

APPLICATION: Final = 0x54415253
"""SQLite's application_id of a library: "TARS"."""

SCHEMA_VERSION: Final = 1
SCHEMA: Final = """
CREATE TABLE objects (
    hash TEXT PRIMARY KEY, bytes INTEGER NOT NULL,
    files TEXT NOT NULL                       -- JSON: {"tarsia.json": [sha256, bytes], ...}
) WITHOUT ROWID;
CREATE TABLE versions (
    name TEXT NOT NULL, number INTEGER NOT NULL CHECK (number > 0),
    hash TEXT NOT NULL REFERENCES objects,
    at TEXT NOT NULL, who TEXT NOT NULL, note TEXT NOT NULL,
    base TEXT,                                -- what its user called the base
    weights TEXT, architecture TEXT, quantisation TEXT, processor TEXT, template TEXT, -- the base's fingerprint
    methods TEXT NOT NULL,                    -- "dora, lora"
    sites INTEGER NOT NULL, numbers INTEGER NOT NULL, -- patches; numbers in their tensors
    passed INTEGER,                           -- of its gate: 1, 0 or NULL where it was not judged
    PRIMARY KEY (name, number)
) WITHOUT ROWID;
CREATE INDEX versions_hash ON versions (hash);
CREATE INDEX versions_weights ON versions (weights);
CREATE TABLE tags (
    name TEXT NOT NULL, tag TEXT NOT NULL, number INTEGER NOT NULL,
    PRIMARY KEY (name, tag), FOREIGN KEY (name, number) REFERENCES versions
) WITHOUT ROWID;
CREATE TABLE journal (
    id INTEGER PRIMARY KEY, at TEXT NOT NULL, who TEXT NOT NULL, action TEXT NOT NULL,
    name TEXT NOT NULL, tag TEXT, before INTEGER, after INTEGER, why TEXT NOT NULL,
    ends INTEGER NOT NULL                     -- 1 for the last of its transaction
);
CREATE INDEX journal_name ON journal (name, tag);
CREATE TABLE reads (                          -- contents that were hashed whole when they were first read
    hash TEXT PRIMARY KEY, stamp TEXT NOT NULL -- JSON: what stat said of the files then
) WITHOUT ROWID;
CREATE TABLE facts (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID; -- journal: bytes of journal.jsonl
INSERT INTO facts VALUES ('journal', 0);
"""


@dataclass(slots=True)
class Writing:
    """A transaction that writes: the database, and what it adds to the journal when it is done."""

    db: sqlite3.Connection
    entries: list[Entry] = field(default_factory=list)


class Busy(LibraryError):
    """Others did not let go of the library in time."""


class Full(LibraryError):
    """The disk has no room left, or the user none on it."""


@contextmanager
def reading(places: Places) -> Iterator[sqlite3.Connection]:
    """The index as it is at one moment. Raises LibraryError where there is none, or it is damaged or busy."""
    with told(places), opened(places) as db:
        db.execute("BEGIN")
        yield db


@contextmanager
def opened(places: Places) -> Iterator[sqlite3.Connection]:
    """The index to look at, or a copy of it in memory where this process may not write it. Raises what SQLite says."""
    if writable(places):
        with held(places), closing(connect(places)) as db:
            yield db
    else:
        with closing(_copy(places)) as db:
            yield db


@contextmanager
def quiet(places: Places) -> Iterator[sqlite3.Connection]:
    """The index while nobody writes; or, where this process may not keep others from it, at one moment."""
    if writable(places):
        with writing(places) as work:
            yield work.db
    else:
        with reading(places) as db:
            yield db


def writable(places: Places) -> bool:
    """Whether this process may write the index, as even a reader must: WAL keeps files beside it."""
    files = [places.root / f"{places.index.name}{ending}" for ending in ("", "-wal", "-shm")]
    return all(os.access(path, os.W_OK) for path in [places.root, *(path for path in files if path.exists())])


def _copy(places: Places) -> sqlite3.Connection:
    """The index of a library that may not be written, read while nobody has it open."""
    beside = places.root / f"{places.index.name}-wal"
    with held(places, alone=True):
        if beside.exists() and beside.stat().st_size:
            raise LibraryError(
                "The library may not be written, and its index is not whole without what lies beside it.",
                given=str(beside),
                do="let somebody who may write it say tarsia library list once",
            )
        if not places.index.is_file():
            raise _damaged(places, "index.sqlite is missing")
        raw = bytearray(places.index.read_bytes())
    raw[18:20] = b"\1\1"  # the format's versions: 1 is without WAL, which memory does not have
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.deserialize(bytes(raw))
    return _checked(places, db)


@contextmanager
def writing(places: Places, patience: float | None = None) -> Iterator[Writing]:
    """The only writer of the library for a moment; what it did is durable once this is left, or undone.

    ``patience`` in seconds, else PATIENCE. Raises LibraryError where there is no library, or it is damaged; Busy where
    others are at work for longer; Full where the disk is.
    """
    with told(places), held(places, patience=patience), closing(connect(places, patience)) as db:
        db.execute("BEGIN IMMEDIATE")
        try:
            journal.catch_up(places, db)
            work = Writing(db)
            yield work
            with journal.appended(places, db, work.entries) if work.entries else nullcontext():
                db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise


@contextmanager
def held(places: Places, alone: bool = False, patience: float | None = None) -> Iterator[None]:
    """The library's lock, shared or alone. Raises Busy where others do not let go of it in time."""
    handle = os.open(places.lock, os.O_RDONLY)
    try:
        end = time.monotonic() + _wait(patience)
        while True:
            try:
                fcntl.flock(handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise busy(places) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(handle)


def connect(places: Places, patience: float | None = None) -> sqlite3.Connection:
    """The database, which must be there, with nothing begun. Raises LibraryError where it is no index of ours."""
    if not places.index.is_file():
        raise _damaged(places, "index.sqlite is missing")
    address = f"{places.index.absolute().as_uri()}?mode=rw"
    return _checked(places, sqlite3.connect(address, uri=True, isolation_level=None, timeout=_wait(patience)))


def _wait(patience: float | None) -> float:
    return PATIENCE if patience is None else patience


def _checked(places: Places, db: sqlite3.Connection) -> sqlite3.Connection:
    try:
        set_up(db)
        (application,), (schema,) = (
            db.execute("PRAGMA application_id").fetchone(),
            db.execute("PRAGMA user_version").fetchone(),
        )
        if application != APPLICATION:
            raise _damaged(places, f"index.sqlite has the application id {application}, not {APPLICATION}")
        if schema != SCHEMA_VERSION:
            raise LibraryError(
                "The library is of another format.", given=schema, allowed=SCHEMA_VERSION, do="update tarsia"
            )
    except BaseException:
        db.close()
        raise
    return db


def set_up(db: sqlite3.Connection) -> None:
    """What every connection needs: durable commits, references that are held to."""
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")


def make(db: sqlite3.Connection) -> None:
    """Fill an empty database with the tables of an index."""
    set_up(db)
    db.execute("PRAGMA journal_mode = WAL")
    db.executescript(
        f"BEGIN;{SCHEMA};PRAGMA application_id = {APPLICATION};PRAGMA user_version = {SCHEMA_VERSION};COMMIT;"
    )


def put(places: Places, fill: Callable[[sqlite3.Connection], None]) -> None:
    """Put a new index in its place when it is full: SQLite's own files lie in a stage until then."""
    with stages.staged(places) as fresh:
        draft = fresh / places.index.name
        with closing(sqlite3.connect(draft, isolation_level=None)) as db:
            fill(db)
        stages.flush(draft)
        os.rename(draft, places.index)
    stages.flush(places.root)


@contextmanager
def told(places: Places) -> Iterator[None]:
    """What SQLite or the system refuses, as a refusal of ours."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise busy(places) from None
        if damaged(error):
            raise _damaged(places, str(error)) from None
        if name.startswith(_REFUSALS):
            kind = Full if name == "SQLITE_FULL" else LibraryError
            raise _unusable(kind, f"{places.root}: {error} ({name})") from error
        raise
    except OSError as error:
        kind = Full if error.errno in (errno.ENOSPC, errno.EDQUOT) else LibraryError
        lost = error.errno == errno.ENOENT and any(not path.exists() for path in (places.lock, *places.folders))
        given = f"{error.filename or places.root}: {error.strerror or error}"
        raise _unusable(kind, given, REPAIR if lost else None) from error


def damaged(error: sqlite3.Error) -> bool:
    """Whether this says that the database is none, and not that the disk, the system or other processes refuse."""
    name = getattr(error, "sqlite_errorname", "")
    told_so = any(text in str(error) for text in ("no such", "decode to UTF-8"))  # the second is Python's own
    return name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or told_so


def busy(places: Places) -> Busy:
    return Busy(
        "Other processes keep the library busy.", given=f"{places.root}, for {PATIENCE:.0f} s", do="try again later"
    )


def _damaged(places: Places, why: str) -> LibraryError:
    return LibraryError(
        "The index of the library is damaged or lost.",
        given=f"{places.index}: {why}",
        do="tarsia library verify --repair makes it anew from the versions' records",
    )


def _unusable(kind: type[LibraryError], given: str, do: str | None = None) -> LibraryError:
    return kind(
        "The library can not be used; what was published is as it was.",
        given=given,
        do=do or "make room, or see to the rights and the disk, and try again",
    )
