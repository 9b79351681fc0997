"""What was fetched from remotes, kept on this machine up to a number of bytes: the least recently used goes first.

contents/HASH/    one adapter's folder under the hash of its content; its time is that of its last use;
                  whoever reads it holds a shared lock on it, and whoever drops it needs that alone
stages/           what is on its way in or out; each locked while its process lives
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
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

    @contextmanager
    def held(self, files: Mapping[str, File], fetch: Fetch) -> Iterator[Path]:
        """The folder of the content that these files are, fetched where it is not there or is damaged.

        Nobody drops it while this lasts. Raises LibraryError where it can not be had, with nothing of it left here.
        """
        try:
            handle = self._bring(files, fetch)
        except OSError as error:
            given = f"{self.root}: {error.strerror or error}"
            raise LibraryError(
                "The cache of remotes can not be written.", given=given, do="make room, or set TARSIA_CACHE to another"
            ) from error
        try:
            yield self.contents / content.hash_of(files)
        finally:
            os.close(handle)

    def _bring(self, files: Mapping[str, File], fetch: Fetch) -> int:
        """See that the content is there and sound; returns a handle whose lock, shared, holds it."""
        for path in (self.contents, self._places.stages):
            path.mkdir(parents=True, exist_ok=True)
        for stale in stages.dead(self._places):
            stages.remove(stale)
        place, fetched = self.contents / content.hash_of(files), False
        while True:
            handle = _locked(place, fcntl.LOCK_SH)
            if handle is None:
                self._fetch(files, fetch, place)
                fetched = True
            elif content.damage(place, files):
                os.close(handle)
                self._drop(place, fcntl.LOCK_EX)
            else:
                os.utime(place)
                break
        if fetched:
            self._make_room()
        return handle

    def _fetch(self, files: Mapping[str, File], fetch: Fetch, place: Path) -> None:
        with stages.staged(self._places) as fresh:
            for name, file in files.items():
                fetch(name, file, fresh / name)
            damage = content.damage(fresh, files)
            if damage:
                raise LibraryError("What arrived is not what was sent.", given="; ".join(damage), do="fetch it again")
            stages.harden(fresh)
            try:
                os.rename(fresh, place)
            except OSError as error:
                # another process has brought the same content meanwhile
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise

    def _make_room(self) -> None:
        """Drop what was used longest ago and is not in use, until the rest keeps to the limit."""
        held = []
        for path in self.contents.iterdir():
            with suppress(FileNotFoundError, NotADirectoryError):  # dropped meanwhile, or no folder
                held.append((path.stat().st_mtime_ns, path, sum(file.stat().st_size for file in path.iterdir())))
        over = sum(size for _, _, size in held) - self.limit
        for _, path, size in sorted(held):
            if over <= 0:
                break
            if self._drop(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
                over -= size

    def _drop(self, path: Path, lock: int) -> bool:
        """Whether it is gone: one that is in use is waited for, or left, as ``lock`` says. What is mapped stays."""
        try:
            handle = _locked(path, lock)
        except BlockingIOError:
            return False
        if handle is None:
            return True
        try:
            with stages.staged(self._places) as away:
                os.rename(path, away / path.name)
        finally:
            os.close(handle)
        return True

    @property
    def _places(self) -> Places:
        return Places(self.root)


def _locked(path: Path, lock: int) -> int | None:
    """A handle that has the lock of a folder; None where there is no such folder. Raises BlockingIOError."""
    while True:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(handle, lock)
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except FileNotFoundError:  # dropped while we waited
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


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
