"""What a library is called and where its things lie: names, references, paths. Nothing here opens a file.

tarsia-library.json    what this folder is: {"format": 1}; written last when a library is made
index.sqlite           the index (WAL: with -wal and -shm beside it while it is open)
journal.jsonl          every publish and every move of a tag, one JSON object a line, in order
records/NAME/3.json    what the index says of version 3 of NAME, so that the index can be made anew
objects/ab/ab12.../    one adapter's folder under the hash of its content, read-only
stages/                what is being written or thrown away; each locked while its process lives
lock                   held shared by whoever uses the index, alone by whoever replaces it
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tarsia.core.errors import LibraryError
from tarsia.core.visible import CONTROL

FORMAT = 1
CURRENT = "current"
"""The tag that every name has: what the name alone means. A publish moves it to the new version."""

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_HASH = re.compile(r"[0-9a-f]{4,64}")
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")
_REFERENCE = re.compile(r"(?P<name>[^@#]+)(?:@(?P<at>[^@#]+)|#(?P<hash>[^@#]+))?")
_FORMS = "NAME, NAME@3, NAME@TAG or NAME#HASH (4 to 64 hexadecimal digits)"


@dataclass(frozen=True, slots=True)
class Reference:
    """Which version: a number, a tag (``current`` where only the name is given) or the beginning of a hash."""

    name: str
    number: int | None = None
    tag: str | None = None
    hash: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """``name``, ``name@3``, ``name@stable`` or ``name#1a2b``. Raises LibraryError for anything else."""
        match = _REFERENCE.fullmatch(text)
        if match is None:
            raise LibraryError("This is no reference to an adapter.", given=repr(text), allowed=_FORMS)
        name, at, digest = check_name(match["name"]), match["at"], match["hash"]
        if digest is not None:
            if _HASH.fullmatch(digest) is None:
                raise LibraryError("This is no reference to an adapter.", given=repr(text), allowed=_FORMS)
            return cls(name, hash=digest)
        if at is not None and at.isdecimal():
            if _NUMBER.fullmatch(at) is None:
                raise LibraryError("This is no number of a version.", given=repr(text)[:80], allowed="1, 2, 3, ...")
            return cls(name, number=int(at))
        return cls(name, tag=CURRENT if at is None else check_name(at, "tag"))

    def __str__(self) -> str:
        if self.hash is not None:
            return f"{self.name}#{self.hash}"
        at = self.tag if self.number is None else str(self.number)
        return self.name if at == CURRENT else f"{self.name}@{at}"


def check_name(text: str, what: str = "name") -> str:
    """The text, where it can be a name or a tag. Raises LibraryError where it can not."""
    if NAME.fullmatch(text) is None or (what == "tag" and text.isdecimal()):
        lower = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:100]
        raise LibraryError(
            f"This can not be the {what} of an adapter.",
            given=repr(text),
            allowed="small letters, digits, '.', '_' and '-', the first a letter or a digit"
            + (", and not digits alone" if what == "tag" else ""),
            do=f"say {lower}" if NAME.fullmatch(lower) and not lower.isdecimal() else None,
        )
    return text


def check_text(*texts: str) -> None:
    """Raises LibraryError where a text has no form in UTF-8, as a name of a file in another encoding has none.

    So it does for characters that would act on the terminal of whoever lists it.
    """
    for text in texts:
        if CONTROL.search(text):
            raise LibraryError(
                "This text can not be kept: it has control characters.", given=repr(text)[:200], allowed="one line"
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise LibraryError("This text can not be kept.", given=repr(text), allowed="Unicode") from None


@dataclass(frozen=True, slots=True)
class Places:
    """Every path of the library in the folder ``root``."""

    root: Path

    @property
    def marker(self) -> Path:
        """The file that says that this is a library."""
        return self.root / "tarsia-library.json"

    @property
    def index(self) -> Path:
        """The database."""
        return self.root / "index.sqlite"

    @property
    def journal(self) -> Path:
        """Who did what, when and why."""
        return self.root / "journal.jsonl"

    @property
    def objects(self) -> Path:
        """The folder of all contents."""
        return self.root / "objects"

    @property
    def records(self) -> Path:
        """The folder of all versions' records."""
        return self.root / "records"

    @property
    def stages(self) -> Path:
        """The folder of what is being written or thrown away."""
        return self.root / "stages"

    @property
    def folders(self) -> tuple[Path, ...]:
        """Those that every library has, empty or not."""
        return self.objects, self.records, self.stages

    @property
    def lock(self) -> Path:
        """The file whose lock says that the index is in use."""
        return self.root / "lock"

    def object(self, digest: str) -> Path:
        """The folder of one content."""
        return self.objects / digest[:2] / digest

    def record(self, name: str, number: int) -> Path:
        """The record of one version."""
        return self.records / name / f"{number}.json"


def default_root() -> Path:
    """The user's library: TARSIA_LIBRARY, else ``tarsia/library`` in XDG_DATA_HOME (default: ~/.local/share)."""
    chosen = os.environ.get("TARSIA_LIBRARY")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "tarsia" / "library"
