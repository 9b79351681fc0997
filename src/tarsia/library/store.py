"""A library of adapters on disk, for any number of processes at once, any of which may be killed at any moment.

``places`` says where everything lies. What is true after each step of a publish, and who puts it right should the
process end there (SIGKILL, power cut):

====  =========================================  ======================================================================
step                                             if it ends here
====  =========================================  ======================================================================
1     a stage is made and locked                 a dead stage: ``gc`` removes it
2     files copied, hashed, held to tarsia.json  the same
3     files read-only and flushed to the disk    the same
4     the index's write lock is taken            the system lifts it; SQLite undoes what was begun
5     stage renamed to objects/ab/ab12...        a content without a version: ``gc`` removes it, or the next publish of
                                                 the same content uses it, once its hashes are found right
6     record written (stage, flush, rename)      a record without a version: the next publish of that name writes its
                                                 own in its place, or ``gc`` removes it
7     journal.jsonl lengthened and flushed       an end that the index does not know: the next writer does what it says,
                                                 for all that it needs is there, or cuts it off where it is not whole
8     transaction committed (WAL, flushed)       published, whole, though nobody was told
9     the version is returned                    published
====  =========================================  ======================================================================

Only step 8, or the next writer's, makes a version seen, and only after everything that it needs is on the disk; readers
see the index before it or after it. 5 to 8 are under the index's write lock, which everything else that changes files
takes too, so ``gc`` never sees a content between 5 and 8. ``tag`` and ``rollback`` are 4, 7, 8 and 9. ``gc`` takes the
write lock, renames what nothing refers to into a locked stage, lets go of the lock, and then removes the stage; killed,
it leaves a dead stage. A library is made under its lock, held alone, and its marker is written last; killed, the next
process makes it, and deletes nothing. A commit that is refused takes 7 back. ``repair`` holds the lock alone, moves a
damaged index away before it puts the new one in its place, and leaves, killed, a library whose index is missing, which
everybody refuses and the next ``repair`` mends.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Self

from tarsia.core.errors import LibraryError
from tarsia.library import content, frame, index, journal, record, stages
from tarsia.library.index import Writing
from tarsia.library.journal import Entry
from tarsia.library.places import CURRENT, Places, Reference, check_name, check_text
from tarsia.library.record import Version


@dataclass(frozen=True, slots=True)
class Published:
    """What came of a publish: ``fresh`` is False where the name had this content already, as ``version``.

    ``mended`` is True where the library held this content damaged, and now holds it whole. ``left`` names what lay in
    the source and is no part of an adapter.
    """

    version: Version
    fresh: bool
    mended: bool
    left: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Library:
    """The library in a folder. It holds nothing open; every call sees what all processes have done before it."""

    places: Places

    @classmethod
    def open(cls, root: Path | str) -> Self:
        """The library that is there. Raises LibraryError where there is none, or it lost its marker."""
        places = Places(Path(root))
        with index.told(places):
            frame.check(places)
        return cls(places)

    @classmethod
    def make(cls, root: Path | str) -> Self:
        """The library that is there, or a new one. Raises LibraryError where something else is there."""
        places = Places(Path(root))
        if not places.marker.is_file():
            with index.told(places):
                frame.make(places)
        return cls.open(root)

    def publish(
        self,
        folder: Path | str,
        name: str,
        *,
        tags: Sequence[str] = (),
        note: str = "",
        who: str | None = None,
        new_base: bool = False,
    ) -> Published:
        """Copy an adapter's folder into the library as the next version of ``name``, which ``current`` moves to.

        Durable when this returns. A content that the name has already gets no second version. ``tags`` move to the
        version in the same step. Raises LibraryError where the folder is no whole adapter, or belongs to another
        base than the name's last version and ``new_base`` does not say that this is meant.
        """
        check_name(name)
        for tag in tags:
            _check_tag(tag)
        by = who or whoever()
        check_text(by, note)
        with index.told(self.places), stages.staged(self.places) as fresh:
            taken, left = content.take(Path(folder), fresh)
            stages.harden(fresh)
            place = self.places.object(taken.hash)
            spoilt = place.exists() and bool(content.damage(place, taken.files))
            with index.writing(self.places) as work:
                held = record.select(work.db, "versions.name = :n", {"n": name})
                same = next((version for version in held if version.hash == taken.hash), None)
                version = same or Version.of(taken, name, record.highest(work.db, name) + 1, now(), by, note)
                if same is None and held and not new_base:
                    _check_base(held[-1], version)
                if same is None or spoilt:
                    self._install(fresh, taken.hash, spoilt)
                if same is None:
                    self._add(work, version, taken)
                for tag in tags:
                    move(work, version, tag, by, note, "tag")
                version = find(work.db, Reference(name, number=version.number))
            return Published(version, same is None, spoilt, left)

    def _install(self, fresh: Path, digest: str, spoilt: bool) -> None:
        """Put a content where it belongs, in place of one that is spoilt; one that is there and sound is left."""
        place = self.places.object(digest)
        if spoilt and place.exists():
            with stages.staged(self.places) as away:
                stages.shift(place, away)
        if place.exists():
            return
        if not place.parent.is_dir():
            place.parent.mkdir()
            stages.flush(place.parent.parent)
        os.rename(fresh, place)
        place.chmod(0o555)
        stages.flush(place.parent)

    def _add(self, work: Writing, version: Version, taken: content.Content) -> None:
        """Let a version be known, by its record, by the index and as its name's current one."""
        path = self.places.record(version.name, version.number)
        stages.write(path, record.write(version, taken.files), self.places)
        record.insert(work.db, version, taken.files)
        move(work, version, CURRENT, version.who, version.note, "publish")

    def version(self, reference: Reference | str) -> Version:
        """The version that a reference means. Raises LibraryError where there is none, or it could be two."""
        asked = Reference.parse(reference) if isinstance(reference, str) else reference
        with index.reading(self.places) as db:
            return find(db, asked)

    def folder(self, version: Version) -> Path:
        """Where a version's files lie, read-only and not looked at."""
        return self.places.object(version.hash)

    def whole(self, reference: Reference | str) -> tuple[Version, Path]:
        """A version and its folder, every byte of which was hashed for this. Raises LibraryError, naming the files."""
        asked = Reference.parse(reference) if isinstance(reference, str) else reference
        with index.reading(self.places) as db:
            version = find(db, asked)
            files = record.files_of(db, version.hash)
        if damage := content.damage(self.folder(version), files):
            raise LibraryError(
                f"The files of {version.reference} are not those that were published.",
                given="; ".join(damage),
                do="add the same adapter again, which puts them right, or roll back to another version",
            )
        return version, self.folder(version)

    def tag(self, reference: Reference | str, tag: str, *, why: str = "", who: str | None = None) -> Entry:
        """Let a tag point at a version, wherever it pointed before."""
        asked = Reference.parse(reference) if isinstance(reference, str) else reference
        _check_tag(tag)
        with index.writing(self.places) as work:
            return move(work, find(work.db, asked), tag, who or whoever(), why, "tag")

    def untag(self, name: str, tag: str, *, why: str = "", who: str | None = None) -> Entry:
        """Take a tag away. Raises LibraryError where there is none."""
        asked = Reference(check_name(name), tag=_check_tag(tag))
        with index.writing(self.places) as work:
            version = find(work.db, asked)
            work.db.execute("DELETE FROM tags WHERE name = ? AND tag = ?", (name, tag))
            check_text(who or "", why)
            entry = Entry(now(), who or whoever(), "untag", name, tag, version.number, None, why)
            work.entries.append(entry)
            return entry

    def rollback(
        self, name: str, tag: str = CURRENT, *, to: int | None = None, why: str = "", who: str | None = None
    ) -> Entry:
        """Let a tag point at version ``to`` again, or at what it pointed at before its last move that still counts.

        Rolled back twice, it is where it was two moves ago. Versions that are gone are passed over. Raises LibraryError
        where there is no such version.
        """
        with index.writing(self.places) as work:
            held = find(work.db, Reference(check_name(name), tag=tag))
            if to is None:
                past = _still_there(work.db, name, journal.read(work.db, "name = ? AND tag = ?", (name, tag)))
                if len(past) < 2:
                    raise LibraryError(f"{name}@{tag} was never anywhere else.", given=held.reference)
                to = past[-2]
            if to == held.number:
                raise LibraryError(f"{name}@{tag} is there already.", given=held.reference)
            version = find(work.db, Reference(name, number=to))
            return move(work, version, tag, who or whoever(), why, "rollback")

    def retire(self, name: str, number: int, *, why: str = "", who: str | None = None) -> Entry:
        """Give a version up, for good: ``sweep`` removes its content where no other version has the same.

        Its number is not given again. Raises LibraryError where a tag points at it, or there never was one.
        """
        with index.writing(self.places) as work:
            values = {"n": check_name(name), "v": number}
            held = record.select(work.db, "versions.name = :n AND number = :v", values)
            once = journal.read(work.db, "action = 'publish' AND name = ? AND after = ?", (name, number))
            if (not held and not once) or (name, number) in record.retired(work.db):
                raise _unknown(work.db, Reference(name, number=number))
            if held and held[0].tags:
                given = ", ".join(f"{name}@{tag}" for tag in held[0].tags)
                do = _freed(work.db, held[0])
                raise LibraryError("A version that a tag points at is not given up.", given=given, do=do)
            record.delete(work.db, name, number)
            check_text(who or "", why)
            entry = Entry(now(), who or whoever(), "retire", name, None, number, None, why)
            work.entries.append(entry)
            return entry

    def history(self, name: str | None = None) -> list[Entry]:
        """The journal, of one name or of all, in order."""
        with index.reading(self.places) as db:
            found = journal.read(db) if name is None else journal.read(db, "name = ?", (check_name(name),))
            return [entry for _, entry in found]

    def search(
        self,
        pattern: str | None = None,
        *,
        tag: str | None = None,
        base: str | None = None,
        digest: str | None = None,
        every: bool = False,
    ) -> list[Version]:
        """Versions by name and number: each name's current one, or ``every``, of those that all options choose.

        ``pattern`` is a shell's, for names; ``tag`` takes the versions that it points at; ``base`` is part of what the
        base is called, or how the hash of its weights begins; ``digest`` is how the content's hash begins.
        """
        conditions = {
            "versions.name GLOB :pattern": pattern,
            "(versions.name, number) IN (SELECT name, number FROM tags WHERE tag = :tag)": tag
            or (None if every or digest else CURRENT),
            "(instr(lower(base), lower(:base)) OR weights GLOB '*:' || :base || '*')": base,
            "hash GLOB :digest || '*'": digest,
        }
        where = " AND ".join(condition for condition, value in conditions.items() if value is not None)
        values = {"pattern": pattern, "tag": tag or CURRENT, "base": base, "digest": digest}
        with index.reading(self.places) as db:
            return record.select(db, where or "1", values)


def find(db: sqlite3.Connection, asked: Reference) -> Version:
    """The version that a reference means. Raises LibraryError where there is none, or a hash's beginning means two."""
    if asked.number is not None and not 0 < asked.number < 2**62:  # more than SQLite can be asked for
        raise _unknown(db, asked)
    where, value = {
        "number": ("number = :v", asked.number),
        "tag": ("number = (SELECT number FROM tags WHERE tags.name = :n AND tag = :v)", asked.tag),
        "hash": ("hash GLOB :v || '*'", asked.hash),
    }["hash" if asked.hash is not None else "tag" if asked.tag is not None else "number"]
    found = record.select(db, f"versions.name = :n AND versions.{where}", {"n": asked.name, "v": value})
    if len({version.hash for version in found}) == 1:
        return found[-1]
    if found:
        raise LibraryError(
            "This hash is the beginning of more than one.",
            given=str(asked),
            allowed=", ".join(f"{version.name}#{version.hash[:16]}" for version in found),
        )
    raise _unknown(db, asked)


def _unknown(db: sqlite3.Connection, asked: Reference) -> LibraryError:
    import difflib

    there = record.select(db, "versions.name = :n", {"n": asked.name})
    if there:
        tags = sorted({tag for version in there for tag in version.tags})
        return LibraryError(
            f"{asked.name} has no such version.",
            given=str(asked),
            allowed=f"{asked.name}@1 to @{there[-1].number}; {', '.join(f'@{tag}' for tag in tags)}",
        )
    names = [name for (name,) in db.execute("SELECT DISTINCT name FROM versions")]
    near = difflib.get_close_matches(asked.name, names, 1, 0.6)
    return LibraryError(
        "The library has no adapter of this name.",
        given=asked.name,
        do=f"did you mean {near[0]}?" if near else "tarsia library list says what there is",
    )


def move(work: Writing, version: Version, tag: str, who: str, why: str, action: str) -> Entry:
    """Let a tag of the version's name point at it, and write that down."""
    row = work.db.execute("SELECT number FROM tags WHERE name = ? AND tag = ?", (version.name, tag)).fetchone()
    work.db.execute("INSERT OR REPLACE INTO tags VALUES (?, ?, ?)", (version.name, tag, version.number))
    before = None if row is None else row["number"]
    check_text(who, why)
    entry = Entry(now(), who, action, version.name, tag, before, version.number, why)
    work.entries.append(entry)
    return entry


def trail(moves: Sequence[Entry]) -> list[int]:
    """Where a tag has been, without what was rolled back; the last is where it is. Empty where it was taken away."""
    been: list[int] = []
    for entry in moves:
        if entry.after is None:
            been = []
        elif entry.action == "rollback" and entry.after in been:
            del been[len(been) - been[::-1].index(entry.after) :]
        elif not been or been[-1] != entry.after:
            been.append(entry.after)
    return been


def _still_there(db: sqlite3.Connection, name: str, moves: Sequence[tuple[int, Entry]]) -> list[int]:
    """The trail of a tag without versions that are gone."""
    there = {number for (number,) in db.execute("SELECT number FROM versions WHERE name = ?", (name,))}
    past = [number for number in trail([entry for _, entry in moves]) if number in there]
    return [number for number, _ in groupby(past)]


def now() -> str:
    """UTC, in ISO 8601 with microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def whoever() -> str:
    """The user's name, or number where the system knows none."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def _freed(db: sqlite3.Connection, version: Version) -> str:
    """What lets every tag of a version go elsewhere, as it is typed."""
    others = record.select(db, "versions.name = :n AND number != :v", {"n": version.name, "v": version.number})
    steps = [f"tarsia library tag {version.name} {tag} --remove" for tag in version.tags if tag != CURRENT]
    if CURRENT in version.tags:
        moved = f"tarsia library rollback {version.name} --to {others[-1].number}" if others else "add another version"
        steps.insert(0, moved)
    return f"first {'; '.join(steps)}"


def _check_tag(tag: str) -> str:
    if tag == CURRENT:
        raise LibraryError(
            "This tag moves by itself, to what is published.", given=tag, do="tarsia library rollback NAME --to N"
        )
    return check_name(tag, "tag")


def _check_base(last: Version, version: Version) -> None:
    parts = [part for part, digest in version.fingerprint.items() if digest != last.fingerprint[part]]
    if parts:
        raise LibraryError(
            f"The adapter belongs to another base than {last.reference}.",
            given=f"{version.base or 'a base in memory'}: another {', '.join(parts)}",
            allowed=f"{last.base or 'a base in memory'}",
            do="choose another name, or say --new-base if this is meant",
        )
