"""What every library has, whatever it holds: a marker, a lock, an index, a journal, folders. Made, known again, mended.

A folder without the marker may be one that a killed process was making, or a library that lost it (a backup that left
it out, a hand). The second is never taken for the first: what holds anything is refused, and ``rebuilt`` by ``repair``.
"""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

from tarsia.core.errors import LibraryError
from tarsia.library import content, index, stages, sweep
from tarsia.library.places import FORMAT, Places


def check(places: Places) -> None:
    """Raises LibraryError where there is no library, or one that lost its marker, or of a format that is not ours."""
    marked = _marked(places)
    if marked is None:
        raise _unmarked(places) if holds(places) or places.marker.is_file() else _none(places)
    if marked != FORMAT:
        raise LibraryError("The library is of another format.", given=marked, allowed=FORMAT, do="update tarsia")


def make(places: Places) -> None:
    """Make what ``check`` lets pass, of an empty folder or of one where this was begun.

    Raises LibraryError where something else is there, or a library that lost its marker.
    """
    places.root.mkdir(parents=True, exist_ok=True)
    ours = {path.name for path in (places.lock, places.index, places.journal, *places.folders)}
    strange = sorted(path.name for path in places.root.iterdir() if path.name not in ours)
    if strange and not places.marker.is_file() and not holds(places):
        raise LibraryError(
            "Something that is no library is there already.",
            given=f"{places.root}: {', '.join(strange[:3])}",
            do="choose an empty folder",
        )
    places.lock.touch()
    with index.held(places, alone=True):
        if places.marker.is_file():
            return
        if holds(places) and not _begun(places):
            raise _unmarked(places)
        for folder in places.folders:
            folder.mkdir(exist_ok=True)
        if not places.index.exists():
            index.put(places, index.make)
        places.journal.touch()
        stages.flush(places.journal)
        _mark(places)


def missing(places: Places) -> list[Path]:
    """What a library needs besides index and journal, and is not there."""
    found = [folder for folder in places.folders if not folder.is_dir()]
    found += [places.lock] if not places.lock.is_file() else []
    return found + ([places.marker] if _marked(places) is None else [])


def rebuilt(places: Places) -> list[Path]:
    """Make again what ``missing`` tells of; these. Raises LibraryError where nothing says that this was a library."""
    lost = missing(places)
    if places.marker in lost and not places.marker.is_file() and not holds(places):
        raise _none(places)
    for folder in places.folders:
        folder.mkdir(exist_ok=True)
    places.lock.touch()
    if places.marker in lost:
        _mark(places)
    check(places)
    if lost:
        stages.flush(places.root)
    return lost


def holds(places: Places) -> bool:
    """Whether a folder has what a library leaves alone: an index, a line of a journal, a record or a content."""
    if places.index.exists() or (places.journal.is_file() and places.journal.stat().st_size):
        return True
    return any(True for found in (sweep.records, sweep.contents) for _ in found(places))


def _begun(places: Places) -> bool:
    """Whether all that is held is an index of nothing, as one that is being made has it."""
    if places.journal.is_file() and places.journal.stat().st_size:
        return False
    if any(True for found in (sweep.records, sweep.contents) for _ in found(places)):
        return False
    with closing(index.connect(places)) as db:
        (known,) = db.execute("SELECT (SELECT count(*) FROM versions) + (SELECT count(*) FROM journal)").fetchone()
    return bool(known == 0)


def _marked(places: Places) -> object:
    """The format that the marker names; None where there is none, or it is damaged."""
    if not places.marker.is_file():
        return None
    try:
        return content.read_json(places.marker).get("format")
    except LibraryError:  # damaged: what the caller tells of, or mends
        return None


def _mark(places: Places) -> None:
    stages.write(places.marker, (json.dumps({"format": FORMAT}) + "\n").encode(), places, 0o644)


def _none(places: Places) -> LibraryError:
    return LibraryError(
        "There is no library.",
        given=str(places.root),
        do="say which with --library FOLDER or TARSIA_LIBRARY; tarsia library add makes one",
    )


def _unmarked(places: Places) -> LibraryError:
    return LibraryError(
        "The library has lost the file that says that it is one, or this file is damaged; nothing was changed.",
        given=str(places.marker),
        do=index.REPAIR,
    )
