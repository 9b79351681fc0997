"""The router over a library that changes: every name's current card, read as it is published, away from the engine."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from tarsia.adapter import Host
from tarsia.adapter.signature import signature, view
from tarsia.core.errors import AdapterError, LibraryError
from tarsia.library import Library, Version
from tarsia.library.card import read
from tarsia.serve.house import Choice
from tarsia.serve.request import Picture, Prompt
from tarsia.serve.route import CARD, Router

_SECONDS: Final = 1.0  # between looks at whether the library is another than it was
_SIGNATURES: Final = 1024  # of pictures that are remembered
_TOLD: Final = 20  # adapters that the log names at once
_ROUTERS: Final = 16  # sets of adapters that have a router made
_LOG = logging.getLogger("tarsia.serve.routing")

Patterns = tuple[str, ...] | None


class Chosen:
    """Chooses for a prompt among the current versions of a library's adapters; see `house.Route`.

    A thread looks every second whether something was published or withdrawn, and makes the routers anew where it was;
    until then the choice is by what was known. An adapter whose card does not say what its pictures look like is not
    chosen, which the log tells once.
    """

    def __init__(self, host: Host, library: Library) -> None:
        self._host, self._library, self._view = host, library, view(host)
        self._looks: dict[str, Mapping[str, Any] | None] = {}  # by the content's hash
        self._current: dict[str, Mapping[str, Any]] = {}
        self._routers: OrderedDict[Patterns, Router] = OrderedDict()
        self._signatures: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self._stamp: object = None
        self._closed = threading.Event()
        self.look()
        threading.Thread(target=self._watch, name="router", daemon=True).start()

    def __call__(self, prompt: Prompt, may: Sequence[str] | None) -> Choice:
        """The choice for a prompt's pictures, among names that match a pattern of ``may``."""
        signatures = [self._signature(picture) for picture in prompt.pictures]
        made = self._router(None if may is None or "*" in may else tuple(sorted(set(may)))).choose(signatures)
        return Choice(made.name, made.plain())

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def look(self) -> bool:
        """Take in what the library has now; whether that is another than it was."""
        stamp = self._stamps()
        if stamp == self._stamp:
            return False
        current, left = {}, dict[str, str]()
        for version in self._library.search():
            if version.hash not in self._looks:
                self._looks[version.hash] = self._look(version, left)
            if (found := self._looks[version.hash]) is not None:
                current[version.name] = found
        if left:
            facts = {"count": len(left), "first": dict(islice(left.items(), _TOLD))}
            _LOG.info("adapters that are not chosen by pictures", extra={"facts": facts})
        with self._lock:
            known = [*self._routers]
        made = {patterns: self._made(current, patterns) for patterns in (None, *known)}
        with self._lock:
            self._current = current
            self._routers = OrderedDict(made)
        self._stamp = stamp
        return True

    def _watch(self) -> None:
        while not self._closed.wait(_SECONDS):
            try:
                self.look()
            except (LibraryError, OSError) as error:
                _LOG.warning("the router could not look at the library: %s", error)

    def _look(self, version: Version, left: dict[str, str]) -> Mapping[str, Any] | None:
        """What a version's card says for the router; None where that is nothing it can use, and why in ``left``."""
        try:
            card = read(self._library, version.reference)[1].rest
            Router(self._view).fit_for(version.reference, card)
        except (AdapterError, LibraryError) as error:
            left[version.reference] = error.what
            return None
        return {CARD: card[CARD]}

    def _router(self, patterns: Patterns) -> Router:
        with self._lock:
            found = self._routers.get(patterns)
            current = self._current
        if found is None:
            found = self._made(current, patterns)
            with self._lock:
                if current is self._current:
                    self._routers[patterns] = found
                    while len(self._routers) > _ROUTERS:
                        self._routers.popitem(last=False)
        return found

    def _made(self, current: Mapping[str, Mapping[str, Any]], patterns: Patterns) -> Router:
        router = Router(self._view)
        for name, card in current.items():
            if patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns):
                router.add(name, card)
        router.settle()
        return router

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
