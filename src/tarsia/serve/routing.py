"""The router over a library that changes: every name's current card, read as it is published, away from the engine."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any, Final

from PIL import Image
from torch import Tensor

from tarsia.adapter import Host
from tarsia.adapter.signature import picture_inputs, signature, view
from tarsia.core.errors import AdapterError, DataError, LibraryError
from tarsia.data import Picture as Shown
from tarsia.library import Library, Version
from tarsia.library.card import read
from tarsia.serve.house import Choice
from tarsia.serve.request import Picture, Prompt
from tarsia.serve.route import CARD, Router

_SECONDS: Final = 1.0  # between looks at whether the library is another than it was
_AGAIN: Final = 10.0  # until what could not be read is tried again, where nothing changes before
_SIGNATURES: Final = 1024  # of pictures that are remembered
_TOLD: Final = 20  # adapters that the log names at once
_PATTERNS: Final = 1024  # sets of patterns whose names are remembered
_LOG = logging.getLogger("tarsia.serve.routing")

Patterns = tuple[str, ...] | None
Cards = dict[str, Mapping[str, Any]]


class Chosen:
    """Chooses for a prompt among the current versions of a library's adapters; see `house.Route`.

    A thread looks every second whether something was published or withdrawn, and makes the router anew where it was;
    until then the choice is by what was known. An adapter whose card does not say what its pictures look like, or with
    which nothing can be computed, is not chosen, which the log tells once.
    """

    def __init__(self, host: Host, library: Library) -> None:
        self._host, self._library, self._view = host, library, view(host)
        self._width = _width(host)
        self._looks: dict[str, Mapping[str, Any] | None] = {}  # by the content's hash
        self._told: set[str] = set()  # contents that the log has told of
        self._names: OrderedDict[Patterns, Collection[str] | None] = OrderedDict()
        self._signatures: OrderedDict[bytes, Tensor] = OrderedDict()
        self._router = self._empty()
        self._lock = threading.Lock()
        self._stamp: object = None
        self._due = float("inf")
        self._closed = threading.Event()
        self._looked()
        threading.Thread(target=self._watch, name="router", daemon=True).start()

    def __call__(self, prompt: Prompt, may: Sequence[str] | None) -> Choice:
        """The choice for a prompt's pictures, among names that match a pattern of ``may``."""
        signatures = [self._signature(picture) for picture in prompt.pictures]
        router, among = self._among(None if may is None or "*" in may else tuple(sorted(set(may))))
        made = router.choose(signatures, among)
        return Choice(made.name, made.plain())

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def look(self) -> bool:
        """Take in what the library has now; whether it was looked at, being another or not read whole the last time.

        Raises LibraryError and OSError where the library can not be asked: it is, again, a while later.
        """
        stamp = self._stamps()
        if stamp == self._stamp and time.monotonic() < self._due:
            return False
        self._stamp, self._due = stamp, time.monotonic() + _AGAIN
        versions, left = self._library.search(), dict[str, str]()
        passing = self._read(versions, left)
        router = self._made(versions, left)
        with self._lock:
            self._router = router
            self._names.clear()
        self._due = self._due if passing else float("inf")
        self._say(versions, left)
        return True

    def _looked(self) -> None:
        """Look, and have whatever comes of that end nothing: the choice stays what it was."""
        try:
            self.look()
        except (LibraryError, OSError) as error:
            _LOG.warning("the router could not look at the library: %s", error)
        except Exception:  # noqa: BLE001 - the log has it, and the thread lives on
            _LOG.exception("the router could not be made anew")

    def _watch(self) -> None:
        while not self._closed.wait(_SECONDS):
            self._looked()

    def _read(self, versions: Sequence[Version], left: dict[str, str]) -> bool:
        """Read the cards that are new, and forget those that are gone; whether one may be readable later."""
        passing, known = False, self._looks
        self._looks = {version.hash: known[version.hash] for version in versions if version.hash in known}
        for version in versions:
            if version.hash in self._looks:
                continue
            try:
                card = read(self._library, version.reference)[1].rest
                self._empty().fit_for(version.reference, card)
            except AdapterError as error:
                left[version.reference], self._looks[version.hash] = error.what, None
            except (LibraryError, OSError) as error:
                left[version.reference], passing = str(error).partition("\n")[0], True
            else:
                self._looks[version.hash] = {CARD: card[CARD]}
        return passing

    def _say(self, versions: Sequence[Version], left: Mapping[str, str]) -> None:
        """Name in the log what is not chosen, once."""
        hashes = {version.reference: version.hash for version in versions}
        new = {reference: why for reference, why in left.items() if hashes[reference] not in self._told}
        self._told = {*(self._told & {*hashes.values()}), *(hashes[reference] for reference in new)}
        if new:
            facts = {"count": len(new), "first": dict(islice(new.items(), _TOLD))}
            _LOG.info("adapters that are not chosen by pictures", extra={"facts": facts})

    def _empty(self) -> Router:
        return Router(self._view, width=self._width)

    def _made(self, versions: Sequence[Version], left: dict[str, str]) -> Router:
        """The router of all; where one's numbers break that for all, of the others."""
        current = self._current(versions)
        try:
            return self._settled(current)
        except (ArithmeticError, RuntimeError):
            broken = self._breaking(current)
            if not broken:
                raise
        for version in versions:
            if version.name in broken:
                left[version.reference] = "nothing can be computed with the numbers of its card"
                self._looks[version.hash] = None
        return self._settled(self._current(versions))

    def _current(self, versions: Sequence[Version]) -> Cards:
        """What there is of each name."""
        return {v.name: card for v in versions if (card := self._looks.get(v.hash)) is not None}

    def _breaking(self, current: Cards) -> set[str]:
        """Which of these break the router, each by itself."""
        broken = set()
        for name, card in current.items():
            try:
                self._settled({name: card})
            except (ArithmeticError, RuntimeError):
                broken.add(name)
        return broken

    def _settled(self, current: Cards) -> Router:
        router = self._empty()
        for name, card in current.items():
            router.add(name, card)
        router.settle()
        return router

    def _among(self, patterns: Patterns) -> tuple[Router, Collection[str] | None]:
        """The router, and which of its names match a pattern; None: all."""
        with self._lock:
            router = self._router
            if patterns is None:
                return router, None
            if patterns not in self._names:
                self._names[patterns] = {
                    name for name in router.names if any(fnmatchcase(name, pattern) for pattern in patterns)
                }
                while len(self._names) > _PATTERNS:
                    self._names.popitem(last=False)
            self._names.move_to_end(patterns)
            return router, self._names[patterns]

    def _signature(self, picture: Picture) -> Tensor:
        found = self._signatures.get(picture.key)
        if found is None:
            found = self._signatures[picture.key] = signature(self._host, picture.inputs)
            while len(self._signatures) > _SIGNATURES:
                self._signatures.popitem(last=False)
        self._signatures.move_to_end(picture.key)
        return found

    def _stamps(self) -> tuple[Any, ...]:
        """What the system says of the files of the library's index."""
        places, said = self._library.places, list[tuple[int, int, int] | None]()
        for path in (places.index, Path(f"{places.index}-wal"), places.journal):
            try:
                held = os.stat(path)
            except FileNotFoundError:
                said.append(None)
            else:
                said.append((held.st_ino, held.st_size, held.st_mtime_ns))
        return tuple(said)


def _width(host: Host) -> int | None:
    """How many numbers this base's signatures have; None, which the log tells, where it makes none."""
    shown = Shown(Image.new("RGB", (64, 64)), "a picture", "the router", 0)
    try:
        return len(signature(host, picture_inputs(host, shown)))
    except (AdapterError, DataError) as error:
        _LOG.warning("nothing is chosen by pictures: %s", error.what)
        return None
