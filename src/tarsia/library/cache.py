"""What was fetched from remotes, kept on this machine up to a number of bytes: the least recently used goes first.

contents/HASH/    one adapter's folder under the hash of its content; its time is that of its last use
stages/           what is on its way in or out; each locked while its process lives
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tarsia.core.errors import LibraryError
from tarsia.library import content, stages
from tarsia.library.content import File
from tarsia.library.places import Places

LIMIT: Final = 10 << 30
"""Bytes that a cache holds where nothing else is said: some 250 adapters of 42 MiB."""

Fetch = Callable[[str, File, Path], None]
"""Bring the file of this name, which is to have this hash, to a path. Raises LibraryError."""


@dataclass(frozen=True, slots=True)
class Cache:
    """A folder, for any number of processes at once; ``limit`` is in bytes."""

    root: Path
    limit: int = LIMIT

    @property
    def contents(self) -> Path:
        """The folder of all contents."""
        return self.root / "contents"

    def folder(self, files: Mapping[str, File], fetch: Fetch) -> Path:
        """The folder of the content that these files are, fetched where it is not there or is damaged.

        Raises LibraryError where it can not be had, with nothing of it left here.
        """
        try:
            return self._folder(files, fetch)
        except OSError as error:
            given = f"{self.root}: {error.strerror or error}"
            raise LibraryError(
                "The cache of remotes can not be written.", given=given, do="make room, or set TARSIA_CACHE to another"
            ) from error

    def _folder(self, files: Mapping[str, File], fetch: Fetch) -> Path:
        for path in (self.contents, self._places.stages):
            path.mkdir(parents=True, exist_ok=True)
        for stale in stages.dead(self._places):
            stages.remove(stale)
        place = self.contents / content.hash_of(files)
        if place.is_dir():
            if not content.damage(place, files):
                os.utime(place)
                return place
            self._drop(place)
        with stages.staged(self._places) as fresh:
            for name, file in files.items():
                fetch(name, file, fresh / name)
            damage = content.damage(fresh, files)
            if damage:
                raise LibraryError("What arrived is not what was sent.", given="; ".join(damage), do="fetch it again")
            stages.harden(fresh)
            with suppress(OSError):  # another process has brought the same content meanwhile
                os.rename(fresh, place)
        self._make_room(place)
        return place

    def _make_room(self, keep: Path) -> None:
        held = []
        for path in self.contents.iterdir():
            with suppress(OSError):  # another process has dropped it meanwhile
                held.append((path.stat().st_mtime_ns, path, sum(file.stat().st_size for file in path.iterdir())))
        over = sum(size for _, _, size in held) - self.limit
        for _, path, size in sorted(held):
            if over <= 0:
                break
            if path != keep:
                self._drop(path)
                over -= size

    def _drop(self, path: Path) -> None:
        """Whoever has it open keeps it: what is mapped outlives its name."""
        with stages.staged(self._places) as away, suppress(OSError):
            os.rename(path, away / path.name)

    @property
    def _places(self) -> Places:
        return Places(self.root)


def default_cache() -> Path:
    """``remotes`` below TARSIA_CACHE (default: ~/.cache/tarsia)."""
    return Path(os.environ.get("TARSIA_CACHE") or Path.home() / ".cache" / "tarsia") / "remotes"


def limit_of(text: str) -> int:
    """Bytes of "500 MB", "10GiB" or a plain number. Raises LibraryError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise LibraryError("This is no size.", given=repr(text), allowed="a number, with KB, MiB, GB and the like")
    unit = (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * unit)
