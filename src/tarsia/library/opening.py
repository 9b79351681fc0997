"""A version's adapter as a value: everything checked when its files are first read, nothing copied after that.

The first time the files are hashed, their tables and descriptions held together and every number looked at. What the
system then says of each file (device, inode, size, times of its content and of its inode) is kept in the index. As long
as it says the same before and after, later reads parse tarsia.json and map the tensors. Whatever changes a file changes
one of these; a disk that forgets bits does not, and ``verify`` is what finds it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Final

from tarsia.adapter import Adapter
from tarsia.adapter.files import load_mapped
from tarsia.core.errors import LibraryError
from tarsia.library import content, index, record
from tarsia.library.places import Reference
from tarsia.library.record import Version
from tarsia.library.remote import Remote
from tarsia.library.store import Library, find

SETTLED: Final = 0.1
"""Seconds since a file's last change from which another change shows in its times: several ticks of any kernel."""

COARSE: Final = 2.5
"""The same where times are whole seconds, as some file systems keep them."""


def open_adapter(library: Library, reference: Reference | str) -> Adapter:
    """The adapter that a reference means; its tensors are private views of the library's files.

    Raises LibraryError where there is no such version, or, naming each file, where the files are not what was
    published, and AdapterError where what was published is no adapter.
    """
    asked = Reference.parse(reference) if isinstance(reference, str) else reference
    with index.reading(library.places) as db:
        version = find(db, asked)
        row = db.execute("SELECT stamp FROM reads WHERE hash = ?", (version.hash,)).fetchone()
        files = record.files_of(db, version.hash)
    place = library.folder(version)
    if row is not None and row["stamp"] == stamp(place, files):
        adapter = load_mapped(place, whole=True)
        if row["stamp"] == stamp(place, files):
            return adapter
    return _first(library, version, place, files)


def open_remote(remote: Remote, reference: Reference | str) -> Adapter:
    """The adapter of a version of a remote; its tensors are private views of files in the remote's cache.

    Everything is checked, every time. Raises as ``Remote.held`` does, and AdapterError where this is no adapter.
    """
    with remote.held(reference) as (_, folder):
        return load_mapped(folder)


def _first(library: Library, version: Version, place: Path, files: dict[str, content.File]) -> Adapter:
    """Look at everything; keep in the index that this was done."""
    before = stamp(place, files)
    damaged = content.damage(place, files)
    if damaged:
        raise LibraryError(
            f"The files of {version.reference} are not those that were published.",
            given="; ".join(damaged),
            do="add the same adapter again, which puts them right, or roll back to another version",
        )
    adapter = load_mapped(place)
    if before is None or before != stamp(place, files):
        raise LibraryError("The files were changed while they were read.", given=str(place), do="open it again")
    if index.writable(library.places) and settled(place, files):
        # a full disk, or others at work, take nothing from what was read: it is looked at again the next time
        with suppress(index.Busy, index.Full), index.writing(library.places, patience=0.0) as work:
            work.db.execute("INSERT OR REPLACE INTO reads VALUES (?, ?)", (version.hash, before))
    return adapter


def stamp(folder: Path, files: Collection[str]) -> str | None:
    """What the system says of the files without reading them; None where one is not there."""
    try:
        found = {name: os.stat(folder / name) for name in files}
    except OSError:
        return None
    said = {n: [s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for n, s in sorted(found.items())}
    return json.dumps(said)


def settled(folder: Path, files: Collection[str], now: float | None = None) -> bool:
    """Whether the files' last changes are long enough ago for the next one to get another time."""
    times = [os.stat(folder / name).st_ctime_ns for name in files]
    wait = COARSE if all(moment % 1_000_000_000 == 0 for moment in times) else SETTLED
    return max(times, default=0) / 1e9 + wait < (time.time() if now is None else now)
