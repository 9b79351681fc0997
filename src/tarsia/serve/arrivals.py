"""Where adapters come from: what a name means now, and the work with files that brings one."""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tarsia.adapter import Adapter, Host, load
from tarsia.core.errors import LibraryError, ServeError, TarsiaError
from tarsia.library import Library
from tarsia.library.opening import SETTLED, open_adapter
from tarsia.library.record import Version as Record

_CURRENT: Final = 4096
"""Names whose meaning is remembered."""
_LOG = logging.getLogger("tarsia.serve.pages")


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable content under a name. ``number`` is the library's, None for a folder.

    ``digest`` is the content's, of a folder what the system says of its files. ``source`` is what an alias stands for,
    None for a name of the library's own. ``foreign``: it says that it is of another base.
    """

    name: str
    number: int | None
    digest: bytes
    methods: str = ""
    source: str | None = None
    reference: str = ""
    folder: Path | None = None
    bytes: int = 0
    foreign: bool = False

    @property
    def origin(self) -> str | None:
        """What the library calls an alias's version; None for a name of its own, and for a folder."""
        return self.reference if self.source is not None and self.folder is None else None


class Shelf:
    """What names mean: those of a library, and aliases. Every answer is of now: what others publish is seen.

    The index is asked again only where one of its files is another than it was. Where somebody publishes under the
    name of an alias, the alias ends there, and the log tells of it. ``base`` is what adapters of this base say of it.
    """

    def __init__(self, library: Library | None, base: Mapping[str, Any] | None = None) -> None:
        self.library, self._base = library, base
        self.aliases: dict[str, str] = {}
        self._known: dict[str, Version] = {}
        self._stamp: tuple[Any, ...] = ()
        self._untaken: set[str] = set()
        self._untaken_stamp: tuple[Any, ...] = ()

    def resolve(self, reference: str) -> Version:
        """The version that a reference means now. Raises ServeError (unknown_adapter) where there is none."""
        source = self.aliases.get(reference)
        if source is not None and self.published(reference):
            del self.aliases[reference]
            facts = {"name": reference, "source": source}
            _LOG.warning(
                "an adapter was published under a name that was loaded: it is served now", extra={"facts": facts}
            )
            source = None
        return self._published(reference, reference) if source is None else self.meaning(reference, source)

    def meaning(self, name: str, source: str) -> Version:
        """The version that ``name`` would mean as an alias of ``source``. Raises as ``resolve`` does."""
        if os.path.isabs(source):
            return _folder(name, Path(source))
        return replace(self._published(source, name), name=name, source=source)

    def published(self, name: str) -> bool:
        """Whether the library has an adapter of this name now."""
        if self.library is None:
            return False
        stamp, settled = self._stamps()
        if stamp != self._untaken_stamp:
            self._untaken.clear()
        if name in self._untaken:
            return False
        try:
            self._published(name, name)
        except ServeError:
            if settled:
                self._untaken_stamp = stamp
                self._untaken.add(name)
            return False
        return True

    def _published(self, reference: str, asked: str) -> Version:
        if self.library is None:
            raise _unknown(asked, "this server has no library", self.aliases)
        stamp, settled = self._stamps()
        if stamp != self._stamp:
            self._known.clear()
        found = self._known.get(reference)
        if found is None:
            try:
                version = self.library.version(reference)
            except LibraryError as error:
                raise _unknown(asked, error.what, self.aliases, error.do) from None
            found = self._of(version)
            if settled:
                self._stamp = stamp
                if len(self._known) >= _CURRENT:
                    self._known.clear()
                self._known[reference] = found
        return found

    def _stamps(self) -> tuple[tuple[Any, ...], bool]:
        """What the system says of the index's files, and whether another change would show in that."""
        assert self.library is not None
        places, last = self.library.places, 0
        said: list[tuple[int, int, int] | None] = []
        for path in (places.index, Path(f"{places.index}-wal"), places.journal):
            try:
                held = os.stat(path)
            except FileNotFoundError:
                said.append(None)
                continue
            said.append((held.st_ino, held.st_size, held.st_mtime_ns))
            last = max(last, held.st_mtime_ns)
        return tuple(said), last / 1e9 + SETTLED < time.time()

    def all(self) -> list[Version]:
        """Every name's current version, and what every alias means; aliases that mean nothing now are left out."""
        made = {} if self.library is None else {v.name: self._of(v) for v in self.library.search()}
        for name in [*self.aliases]:
            with suppress(ServeError):
                made[name] = self.resolve(name)
        return list(made.values())

    def _of(self, record: Record) -> Version:
        digest, foreign = bytes.fromhex(record.hash), self._base is not None and of_another(record, self._base)
        return Version(
            record.name, record.number, digest, record.methods, None, record.reference, None, record.bytes, foreign
        )


def of_another(record: Record, base: Mapping[str, Any]) -> bool:
    """Whether an adapter says that it is of another base than ``base``."""
    return record.weights is not None and record.fingerprint != base


def _folder(name: str, folder: Path) -> Version:
    """An adapter in a folder, which is another one as soon as a file of it is."""
    try:
        said = [
            (entry.name, held.st_ino, held.st_size, held.st_mtime_ns, held.st_ctime_ns)
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
            for held in [entry.stat()]
        ]
    except OSError as error:
        raise ServeError(
            "unknown_adapter", "There is no such adapter.", given=name, do=f"load it again: {error.strerror}"
        ) from None
    digest = hashlib.sha256(repr((str(folder), said)).encode()).digest()
    return Version(name, None, digest, source=str(folder), reference=str(folder), folder=folder)


def _unknown(name: str, why: str, aliases: Any, do: str | None = None) -> ServeError:
    return ServeError("unknown_adapter", "There is no such adapter.", given=f"{name}: {why}", do=do)


def fetch(host: Host, library: Library | None, version: Version) -> tuple[Adapter, bytes]:
    """The adapter of a version, every file of it checked, and the digest of its content. For any thread.

    Raises LibraryError and AdapterError where the files are not what they should be.
    """
    if version.folder is None:
        assert library is not None
        return open_adapter(library, version.reference), version.digest
    before = _folder(version.name, version.folder)
    adapter = load(version.folder, host)
    total = hashlib.sha256()
    for path in sorted(version.folder.iterdir()):
        if path.is_file() and path.suffix in (".json", ".safetensors"):
            total.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    if not before.digest == version.digest == _folder(version.name, version.folder).digest:
        raise ServeError(
            "refused", "The files were changed while they were read.", given=version.name, do="load it again"
        )
    return adapter, total.digest()


class Fetcher:
    """A thread that fetches, in the order in which it is asked; what came of it is taken with `taken`."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self._work = work
        self._asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def ask(self, what: Any) -> None:
        """Have it fetched."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tarsia-pages", daemon=True)
            self._thread.start()
        self._asked.put(what)

    def taken(self) -> list[tuple[Any, Any]]:
        """Everything that has come since: what was asked for, and what came of it or the exception."""
        found = []
        while True:
            try:
                found.append(self._done.get_nowait())
            except queue.Empty:
                return found

    def close(self) -> None:
        """End the thread, once it has done what it was asked."""
        if self._thread is not None:
            self._asked.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (what := self._asked.get()) is not None:
            try:
                found = self._work(what)
            except Exception as error:  # noqa: BLE001 (whoever asked is told)
                found = error if isinstance(error, TarsiaError) else _internal(error)
            self._done.put((what, found))


def _internal(error: Exception) -> ServeError:
    return ServeError("internal", "The adapter could not be read.", given=f"{type(error).__name__}: {error}"[:200])
