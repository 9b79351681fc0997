"""Adapters as pages: fetched ahead, proved, pinned while in use, given up when there is no room."""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor

from tarsia.adapter import Adapter, Host
from tarsia.adapter.files import TENSORS
from tarsia.adapter.proof import prove
from tarsia.adapter.value import belongs
from tarsia.core.errors import ServeError, TarsiaError
from tarsia.library import Library
from tarsia.library.opening import settled, stamp
from tarsia.serve import carriage, wire
from tarsia.serve.arrivals import Fetcher, Shelf, Version, fetch
from tarsia.serve.carriage import Ground, Laid
from tarsia.serve.mixed import Board
from tarsia.serve.moulds import Kept, Moulds, again, first_byte, keep, over, refetched, there
from tarsia.serve.page import Page, foreseen, front, page
from tarsia.serve.tiers import Tier

__all__ = ["Page", "Pages", "Ticket", "Version"]

_LOG = logging.getLogger("tarsia.serve.pages")
_REFUSED: Final = 1024
"""Versions whose refusal is remembered: nobody makes the server prove the same broken adapter again and again."""
_PROVED: Final = 1 << 16
"""Contents that are known to have been proved."""
_REMEMBERED: Final = 16 << 20
"""Bytes of what is remembered of pages that are not here, at least; an eighth of the budget where that is more."""
GIB: Final = 1 << 30


_NOTHING: Final = torch.empty(0, dtype=torch.uint8)


class Ticket:
    """A wish for an adapter: its ``page`` once it is here, pinned until `release`; or the ``error`` of its refusal."""

    def __init__(self, version: Version, release: Callable[[Ticket], None]) -> None:
        self.version = version
        self.page: Page | None = None
        self.error: TarsiaError | None = None
        self.open = True
        self._release = release

    def release(self) -> None:
        """Nobody needs the page for this any more. May be called again."""
        if self.open:
            self.open = False
            self._release(self)


@dataclass(frozen=True, eq=False)
class Found:
    """An adapter whose files were looked at. ``said`` is what the system says of them; None: it may change its mind."""

    adapter: Adapter
    digest: bytes
    folder: Path | None = None
    files: tuple[str, ...] = ()
    said: str | None = None
    whole: Tensor | None = None
    """The bytes of its file, where all its tensors are views of them."""


@dataclass(frozen=True, eq=False)
class Warm:
    """The bytes of a page that was here before."""

    kept: Kept
    whole: Tensor


@dataclass(eq=False)
class _Coming:
    """An adapter that is on its way, and who waits for it."""

    version: Version
    kept: Kept | None
    tickets: list[Ticket] = field(default_factory=list)
    found: Found | Warm | None = None
    laid: Laid | None = None
    """Its bytes where the model computes; None where there is no room for it yet."""

    @property
    def wanted(self) -> bool:
        return any(ticket.open for ticket in self.tickets)


class Pages:
    """All adapters that can be asked for: those of a library and aliases, in at most ``budget`` bytes at once.

    The budget is of the memory of where the model computes. Before a GPU there are ``host_budget`` bytes of pinned
    memory more (None: four times as many), and a processor needs none.

    Everything but the reading of files is done by the thread that steps the engine. An adapter without a probe, or
    with one that proves nothing on this base, is refused; with ``unproved`` "allow" it is served, and its page says why
    it is unproved.
    """

    def __init__(
        self,
        host: Host,
        library: Library | None = None,
        *,
        budget: int = GIB,
        host_budget: int | None = None,
        ground: Ground | None = None,
        unproved: Literal["refuse", "allow"] = "refuse",
    ) -> None:
        self.host, self.library, self.unproved = host, library, unproved
        self.board = Board(host)
        place = host.model.get_input_embeddings().weight.device  # type: ignore[operator]
        self._ground = ground or carriage.ground(place, 4 * budget if host_budget is None else host_budget)
        self.shelf = Shelf(library, asdict(host.fingerprint))
        self._tier: Tier[Version, Page] = Tier(budget, self._gone)
        self._coming: OrderedDict[Version, _Coming] = OrderedDict()
        self._refused: OrderedDict[Version, TarsiaError] = OrderedDict()
        self._proved: dict[bytes, str] = {}
        self._moulds = Moulds(max(budget // 8, _REMEMBERED))
        self._fetcher = Fetcher(self._fetched)
        self.loads = self.proofs = self.refusals = 0

    def resolve(self, reference: str) -> Version:
        """The version that a reference means now. Raises ServeError (unknown_adapter) where there is none."""
        return self.shelf.resolve(reference)

    def want(self, reference: str) -> Ticket:
        """Ask for an adapter; what is not here begins to come. The version is that of now, whatever is published later.

        Raises ServeError (unknown_adapter) where there is none of this name.
        """
        return self._wanted(self.resolve(reference))

    def bring(self, name: str, source: str) -> Ticket:
        """Ask for what ``name`` would be as an alias of ``source``; what the name means stays as it is.

        Raises ServeError as ``alias`` does.
        """
        return self._wanted(self._meant(name, source))

    def _wanted(self, version: Version) -> Ticket:
        ticket = Ticket(version, self._released)
        if self._tier.get(version) is not None:
            self._tier.pin(version)
            ticket.page = self._tier.get(version)
        elif version in self._refused:
            ticket.error = self._refused[version]
        else:
            coming = self._coming.get(version)
            if coming is None:
                coming = self._coming[version] = _Coming(version, self._moulds.get(version.digest))
                coming.tickets.append(ticket)
                self._begin(coming)
            else:
                coming.tickets.append(ticket)
        return ticket

    @torch.inference_mode(False)
    @torch.no_grad()
    def _begin(self, coming: _Coming) -> None:
        """Have it fetched; what was here before and lies in memory needs nobody to wait for it."""
        kept, digest = coming.kept, coming.version.digest
        whole = None if kept is None else refetched(kept, digest, self._ground.here)
        if kept is None or whole is None:
            self._fetcher.ask(coming)
            return
        coming.found = Warm(kept, whole)
        first = all(other is coming or other.found is None for other in self._coming.values())
        if first and self._roomy(coming, coming.found):
            self._finish(coming, coming.found)

    def _released(self, ticket: Ticket) -> None:
        if ticket.page is not None:
            self._tier.release(ticket.version)
            ticket.page = None

    def _fetched(self, coming: _Coming) -> Found | Warm:
        """The work with files: on the thread that fetches."""
        version, kept = coming.version, coming.kept
        if kept is not None and (whole := refetched(kept, version.digest, self._ground.read)) is not None:
            return Warm(kept, whole)
        if self.library is None or version.folder is not None:
            return Found(*fetch(self.host, self.library, version))
        folder = self.library.places.object(version.digest.hex())
        files = tuple(sorted(os.listdir(folder))) if folder.is_dir() else ()
        said = stamp(folder, files)
        adapter, digest = fetch(self.host, self.library, version)
        whole = self._ground.read(digest, folder / TENSORS)
        if said != stamp(folder, files):  # what was checked and what was read may be two things
            raise ServeError(
                "refused", "The files were changed while they were read.", given=version.name, do="ask for it again"
            )
        return Found(adapter, digest, folder, files, said if settled(folder, files) else None, whole)

    @torch.inference_mode(False)
    @torch.no_grad()
    def pump(self) -> None:
        """Take in what has come: make room, make its page, prove it. One proof a call, so that rows go on meanwhile."""
        for coming, found in self._fetcher.taken():
            if isinstance(found, TarsiaError):
                self._refuse(coming, _unread(coming.version, found), lasting=False)
            else:
                coming.found = found
        for coming in [*self._coming.values()]:
            if coming.found is None:
                continue
            if not coming.wanted:
                self._dropped(coming)
            elif coming.laid is None and not self._roomy(coming, coming.found):
                return  # who came first is not passed by who needs less
            elif self._finish(coming, coming.found) and isinstance(coming.found, Found):
                return

    def _dropped(self, coming: _Coming) -> None:
        """Nobody waits for it any more."""
        del self._coming[coming.version]
        if coming.laid is not None:
            self._tier.take(coming.version)

    def _roomy(self, coming: _Coming, found: Found | Warm) -> bool:
        """Make room and begin to lay it there; False where there is none yet, or it was refused."""
        try:
            if isinstance(found, Found):
                belongs(self.host, found.adapter)
                count = foreseen(self.board, found.adapter, carried=self._ground.device.type != "cpu")
            else:
                count = found.kept.page["bytes"]
            self._check_size(coming.version, count)
        except TarsiaError as error:
            self._refuse(coming, error)
            return False
        if not self._tier.reserve(coming.version, count):
            return False
        coming.laid = Laid(_NOTHING, lambda: True) if found.whole is None else self._ground.laid(found.whole)
        return True

    def _finish(self, coming: _Coming, found: Found | Warm) -> bool:
        """Make and prove the page where its bytes are there; False where they are not."""
        if coming.laid is None or not coming.laid.ready():
            return False
        version = coming.version
        try:
            made = self._made(version, found, coming.laid.whole)
            self._tier.put(version, made, made.bytes)
        except Exception as error:
            self._tier.take(version)
            if isinstance(error, TarsiaError):
                self._refuse(coming, error)
            else:
                self._refuse(coming, _unforeseen(error), lasting=False)
            if isinstance(error, (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)):
                raise  # more than this adapter is in danger
            return True
        self.loads += 1
        del self._coming[version]
        for ticket in coming.tickets:
            if ticket.open:
                self._tier.pin(version)
                ticket.page = made
        self._tier.release(version)  # the pin of the making
        return True

    def _check_size(self, version: Version, count: int) -> None:
        if count > self._tier.budget:
            raise ServeError(
                "refused",
                "The adapter is larger than all that there is for adapters.",
                given=f"{version.name}: {count:,} bytes",
                allowed=f"{self._tier.budget:,}",
                do="give the server more memory for adapters",
            )

    def _made(self, version: Version, found: Found | Warm, whole: Tensor) -> Page:
        if isinstance(found, Warm):
            made = again(found.kept, whole)
            made.name, made.version, made.source = version.name, version.number, version.origin
            return made
        adapter, passed = found.adapter, front(self.host, found.adapter)
        file = None if found.folder is None else found.folder / TENSORS
        first = None if file is None else first_byte(adapter, file)
        if first is not None:
            adapter = over(adapter, first, whole)
        elif self._ground.device.type != "cpu":
            adapter = there(adapter, self._ground.device)
        made = page(self.board, version.name, adapter, found.digest, passed)
        made.version, made.source = version.number, version.origin
        made.unproved = self._prove(made, found.adapter)
        if first is not None and found.said is not None and found.folder is not None:
            kept = keep(made, whole, found.folder, found.files, found.said)
            if kept is not None:
                self._moulds.add(found.digest, kept)
        return made

    def _prove(self, made: Page, adapter: Adapter) -> str:
        """Hold the page to what the adapter gave when it was saved; why it can not be, or "". Raises AdapterError."""
        if made.digest in self._proved:
            return self._proved[made.digest]
        why = "it has no probe" if adapter.probe is None else adapter.probe.provable(self.host) or ""
        if adapter.probe is not None and not why:
            prove(self.host, self.board.alone(made), adapter.probe)
            self.proofs += 1
        elif self.unproved == "refuse":
            raise ServeError(
                "refused",
                "Nothing proves that this adapter does here what it did when it was saved.",
                given=f"{made.name}: {why}",
                do="save it with a probe (tarsia does), or let the server take unproved adapters",
            )
        if why:
            facts = {"adapter": made.name, "version": made.version, "hash": made.digest.hex(), "why": why}
            _LOG.warning("an adapter is served that nothing proves", extra={"facts": facts})
        self._proved[made.digest] = why
        if len(self._proved) > _PROVED:
            del self._proved[next(iter(self._proved))]
        return why

    def _refuse(self, coming: _Coming, error: TarsiaError, *, lasting: bool = True) -> None:
        self.refusals += 1
        del self._coming[coming.version]
        if lasting:
            self._refused[coming.version] = error
            while len(self._refused) > _REFUSED:
                self._refused.popitem(last=False)
        for ticket in coming.tickets:
            ticket.error = error

    def _gone(self, page: Page) -> None:
        self.board.forget(page)

    def alias(self, name: str, source: str) -> None:
        """Serve what ``source`` means (a reference, or the absolute path of a folder) as ``name`` from now on.

        Raises ServeError where the name is one of the library's, or the source means nothing.
        """
        self._meant(name, source)
        self.shelf.aliases[name] = source

    def _meant(self, name: str, source: str) -> Version:
        if self.shelf.published(name):
            raise ServeError(
                "refused", "The library has an adapter of this name.", given=name, do="choose another name"
            )
        return self.shelf.meaning(name, source)

    def drop(self, name: str) -> None:
        """Take no new wishes for an alias; who has its page keeps it. Raises ServeError (unknown_adapter)."""
        if name not in self.shelf.aliases:
            raise ServeError("unknown_adapter", "No adapter was loaded under this name.", given=name)
        del self.shelf.aliases[name]

    def models(self) -> list[wire.Model]:
        """What can be asked for."""
        unproved = self._unproved()
        return [
            wire.Model(
                name=version.name,
                version=version.number,
                hash=version.digest.hex(),
                methods=version.methods,
                bytes=version.bytes,
                source=version.source,
                resident=version in self._tier,
                unproved=unproved.get(version),
                foreign=version.foreign,
            )
            for version in self.shelf.all()
        ]

    def stats(self) -> Mapping[str, int]:
        """Gauges and counters: see `wire.Stats`."""
        return {
            "adapter_bytes": self._tier.bytes,
            "adapters_resident": len(self._tier),
            "adapters_coming": len(self._coming),
            "adapter_loads": self.loads,
            "adapter_proofs": self.proofs,
            "adapter_evictions": self._tier.evictions,
            "adapter_refusals": self.refusals,
        }

    def unproved_pages(self) -> dict[str, str]:
        """Names of what is here and unproved, and why."""
        return {version.name: why for version, why in self._unproved().items()}

    def _unproved(self) -> dict[Version, str]:
        held = [(version, self._tier.get(version)) for version in self._tier.order()]
        return {version: page.unproved for version, page in held if page is not None and page.unproved}

    def close(self) -> None:
        """End the thread, and leave the model as it was."""
        self._fetcher.close()
        for version in self._tier.order():
            self._tier.take(version)
        self.board.remove()


def _unread(version: Version, error: TarsiaError) -> ServeError:
    """What is told of an adapter whose files can not be read: of the library's own it is the server's fault."""
    if isinstance(error, ServeError):
        return error
    if version.folder is not None:
        return ServeError("refused", error.what, given=error.given, allowed=error.allowed, do=error.do)
    facts = {"adapter": version.name, "version": version.number, "hash": version.digest.hex(), "why": str(error)}
    _LOG.error("an adapter's files can not be read", extra={"facts": facts})
    return ServeError("damaged", "The adapter's files are not those that were published.", given=version.reference)


def _unforeseen(error: Exception) -> ServeError:
    _LOG.error("an adapter could not be taken in", exc_info=error)
    return ServeError("internal", "The adapter could not be taken in.", given=f"{type(error).__name__}: {error}"[:200])


def waited(pages: Pages, ticket: Ticket) -> Page:
    """Pump until the ticket's page is here. Raises the error of its refusal."""
    while ticket.page is None:
        if ticket.error is not None:
            raise ticket.error
        pages.pump()
        if ticket.page is None:
            time.sleep(0.0002)
    return ticket.page
