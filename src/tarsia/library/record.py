"""What the library says of one version: as a value, as a row of the index, and as a file to make the row anew from.

A record's file holds the same as the row, the hashes of its files, and a hash of all that, so that damage is seen.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, Self

from tarsia.core.errors import LibraryError
from tarsia.library.content import FINGERPRINT, Content, File
from tarsia.library.places import FORMAT, Places, check_text

_CHECK: Final = "check"


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable version. ``at`` is UTC in ISO 8601; ``numbers`` is how many its tensors hold.

    The five digests of the base's fingerprint are None where the adapter has none; ``passed`` says how its gate went,
    None where it was not judged. ``tags`` are those that pointed at it when it was read.
    """

    name: str
    number: int
    hash: str
    at: str
    who: str
    note: str
    base: str | None
    weights: str | None
    architecture: str | None
    quantisation: str | None
    processor: str | None
    template: str | None
    methods: str
    sites: int
    numbers: int
    passed: bool | None
    bytes: int
    tags: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        """``name@3``."""
        return f"{self.name}@{self.number}"

    @property
    def fingerprint(self) -> dict[str, str | None]:
        """The base's digests by what they are of."""
        return {part: getattr(self, part) for part in FINGERPRINT}

    @classmethod
    def of(cls, content: Content, name: str, number: int, at: str, who: str, note: str) -> Self:
        """What there is to say of a content that is published now."""
        said = content.described
        gate = said["card"].get("gate")
        base: dict[str, Any] = said["fingerprint"] or dict.fromkeys(FINGERPRINT)
        methods = ", ".join(sorted({patch["method"] for patch in said["patches"].values()}))
        check_text(said["base"] or "", methods, *(value for value in base.values() if value is not None))
        passed = gate.get("passed") if isinstance(gate, dict) else None
        return cls(
            name=name,
            number=number,
            hash=content.hash,
            at=at,
            who=who,
            note=note,
            base=said["base"],
            weights=base["weights"],
            architecture=base["architecture"],
            quantisation=base["quantisation"],
            processor=base["processor"],
            template=base["template"],
            methods=methods,
            sites=len(said["patches"]),
            numbers=content.numbers,
            passed=passed if isinstance(passed, bool) else None,
            bytes=content.bytes,
        )


COLUMNS: Final = tuple(field.name for field in fields(Version) if field.name not in ("bytes", "tags"))
"""The columns of the table of versions."""


def select(db: sqlite3.Connection, where: str = "1", values: Mapping[str, object] | None = None) -> list[Version]:
    """Versions that fulfil a condition on ``versions``, by name and number."""
    columns = ", ".join(f"versions.{column}" for column in COLUMNS)
    tags = "SELECT group_concat(tag, ' ') FROM tags WHERE tags.name = versions.name AND tags.number = versions.number"
    cursor = db.execute(
        f"SELECT {columns}, objects.bytes, ({tags}) FROM versions JOIN objects USING (hash) WHERE {where}"
        " ORDER BY versions.name, versions.number",
        values or {},
    )
    # by position, which takes a third of the time: a listing is of thousands
    cursor.row_factory = None
    return [
        Version(*(*rest, None if passed is None else passed == 1, size, tuple(sorted(at.split())) if at else ()))
        for *rest, passed, size, at in cursor
    ]


def highest(db: sqlite3.Connection, name: str) -> int:
    """The highest version that a name ever had, lost ones included; 0 where it never had one."""
    (number,) = db.execute(
        "SELECT max(coalesce((SELECT max(number) FROM versions WHERE name = :n), 0),"
        " coalesce((SELECT max(after) FROM journal WHERE name = :n), 0))",
        {"n": name},
    ).fetchone()
    return int(number)


def retired(db: sqlite3.Connection) -> set[tuple[str, int]]:
    """Versions that were given up; their numbers are not given again."""
    return {(name, number) for name, number in db.execute("SELECT name, before FROM journal WHERE action = 'retire'")}


def insert(db: sqlite3.Connection, version: Version, files: Mapping[str, File]) -> None:
    """Add a version, and its content where that is new, to the index."""
    listed = json.dumps({name: [file.sha256, file.bytes] for name, file in files.items()})
    db.execute("INSERT OR IGNORE INTO objects VALUES (?, ?, ?)", (version.hash, version.bytes, listed))
    marks = ", ".join("?" for _ in COLUMNS)
    db.execute(
        f"INSERT INTO versions ({', '.join(COLUMNS)}) VALUES ({marks})", [getattr(version, key) for key in COLUMNS]
    )


def delete(db: sqlite3.Connection, name: str, number: int) -> None:
    """Take a version out of the index, with its content where no other has the same."""
    db.execute("DELETE FROM versions WHERE name = ? AND number = ?", (name, number))
    db.execute("DELETE FROM reads WHERE hash NOT IN (SELECT hash FROM versions)")
    db.execute("DELETE FROM objects WHERE hash NOT IN (SELECT hash FROM versions)")


def files_of(db: sqlite3.Connection, digest: str) -> dict[str, File]:
    """The files of a content that the index knows."""
    (listed,) = db.execute("SELECT files FROM objects WHERE hash = ?", (digest,)).fetchone()
    return {name: File(*values) for name, values in json.loads(listed).items()}


def write(version: Version, files: Mapping[str, File]) -> bytes:
    """A version's record as it lies in its file."""
    values: dict[str, Any] = {"format": FORMAT, **asdict(replace(version, tags=()))}
    del values["tags"]
    values["files"] = {name: asdict(file) for name, file in files.items()}
    return (json.dumps({**values, _CHECK: _check(values)}, indent=1, ensure_ascii=False) + "\n").encode()


def read(places: Places, name: str, number: int) -> tuple[Version, dict[str, File]]:
    """A version's record, from its file. Raises LibraryError where it is damaged, or another's."""
    path = places.record(name, number)
    try:
        version, files = parse(path.read_bytes())
        if (version.name, version.number) != (name, number):
            raise ValueError("it is another version's")
        return version, files
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LibraryError(
            "The record of a version is damaged.",
            given=f"{path}: {error}",
            do="tarsia library verify --repair writes it anew where the index is sound",
        ) from None


def parse(raw: bytes) -> tuple[Version, dict[str, File]]:
    """What ``write`` wrote. Raises ValueError, TypeError, KeyError, AttributeError or RecursionError for all else."""
    values = json.loads(raw)
    check = values.pop(_CHECK)
    files = {name: File(**file) for name, file in values.pop("files").items()}
    if check != _check({**values, "files": {name: asdict(file) for name, file in files.items()}}):
        raise ValueError("it was changed since it was written")
    if values.pop("format") != FORMAT:
        raise ValueError("it is of another format")
    return Version(**values), files


def _check(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
