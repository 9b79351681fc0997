"""What the worker does, turn by turn: takes what has come, steps the engine, says what came of it.

A request that is refused ends as its ``failed`` event and disturbs no other. An exception that nobody foresaw ends the
requests of the step that it came from, with kind "internal", and goes to the log with its traceback; where steps fail
again and again, or a GPU has lost its state, the worker ends with ``UNTRUSTED``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from pydantic import ValidationError

from tarsia.core.errors import ServeError, TarsiaError
from tarsia.serve import wire
from tarsia.serve.desk import Desk, Sheet, unread
from tarsia.serve.frames import BrokenFrame, Connection
from tarsia.serve.house import House, Ticket
from tarsia.serve.post import Closed, Every, Inbox, Outbox
from tarsia.serve.request import AUTO, Event, Prompt, Request
from tarsia.serve.told import Counts, Open, message

DONE: Final = 0
UNTRUSTED: Final = 70
"""Exit codes: told to end; what is in memory can not be trusted any more."""

_IN_A_ROW = 3  # steps that fail one after the other before nothing here is trusted
_SOON = 0.002  # seconds between looks at adapters that are on their way
_TOLD = 100  # requests that the log names
_EARLY = 4  # adapters that are fetched for one tenant's requests before these are read
_LOG = logging.getLogger("tarsia.serve.worker")


@dataclass(frozen=True, eq=False)
class _Encoded:
    """A request that was read, or why it could not be."""

    sheet: Sheet
    found: Prompt | Exception


@dataclass(eq=False)
class _Coming:
    """A load that is not answered yet. ``dropped``: why it is not to be served once it has come."""

    command: wire.Load
    ticket: Ticket
    dropped: str = ""


class Untrusted(Exception):
    """What is in memory can not be trusted any more."""


@dataclass(eq=False)
class Worker:
    """Serves out of ``house``: what comes over ``connection`` is answered through ``outbox``, until the end."""

    house: House
    configure: wire.Configure
    connection: Connection
    outbox: Outbox
    inbox: Inbox[Any]
    _open: dict[str, Open] = field(default_factory=dict)
    _counts: Counts = field(default_factory=Counts)
    _loads: list[_Coming] = field(default_factory=list)
    _early: dict[str, tuple[str, Ticket]] = field(default_factory=dict)
    _draining: bool = False
    _failures: int = 0
    _moving: bool = True

    def __post_init__(self) -> None:
        self._desk = Desk(
            self.house.read,
            lambda command: self.house.prepare(command.sampling),
            lambda sheet, found: self.inbox.put(_Encoded(sheet, found)),
            self.configure.readers,
            lambda why: self.inbox.put(Closed(why)),
        )
        self._stats = Every(0.5)

    def run(self) -> int:
        """Serve until the end; the exit code."""
        threading.Thread(target=self._receive, name="receiver", daemon=True).start()
        self.outbox.put(self.house.ready)
        try:
            while (code := self._turn()) is None:
                pass
        except Untrusted as error:
            _LOG.error("the worker ends, for another to take its place: %s", error)
            code = UNTRUSTED
        self._desk.close()
        return code

    # the receiver's thread ----------------------------------------------------------------------------------------

    def _receive(self) -> None:
        why = "the receiver broke"
        try:
            while (frame := self.connection.receive()) is not None:
                self._hear(wire.command_in(frame), frame.blobs)
            why = "the server is gone"
        except (BrokenFrame, OSError) as error:
            why = str(error)
        finally:  # a worker that hears nothing must not live on, whatever made it deaf
            self.inbox.put(Closed(why))

    def _hear(self, command: wire.Command, pictures: tuple[bytes, ...]) -> None:
        if isinstance(command, wire.Generate):
            if command.id in self._open:
                raise BrokenFrame("An id was used twice.", given=command.id)
            if self._draining or len(self._open) >= self.configure.waiting:
                self.outbox.put(wire.Failed.about(command.id, self._full()))
                return
            self._open[command.id] = Open(command.sampling.choices)
            late = float("inf") if command.seconds is None else time.monotonic() + command.seconds
            self.inbox.put(command)  # its adapter is fetched while it is read
            self._desk.add(Sheet(command, pictures, late))
            return
        if isinstance(command, wire.Cancel):
            self._desk.forget(command.id)
        self.inbox.put(command)

    def _full(self) -> ServeError:
        what = "The worker is shutting down." if self._draining else "Too many requests wait already."
        return ServeError("overloaded", what, given=len(self._open), do="try again in a while")

    # the main thread ----------------------------------------------------------------------------------------------

    def _turn(self) -> int | None:
        """Take what has come, step once, and say what there is to say; the exit code at the end."""
        for item in self.inbox.take(self._pause()):
            if (code := self._take(item)) is not None:
                return code
        if self._busy:
            self._step()
            self._loaded()
            self._fetched()
        if self._stats.due():
            told = {**self.house.engine.stats(), **self.house.shelf.stats()}
            self.outbox.put(self._counts.stats(told, len(self._desk)))
        if self._draining and not self._open:
            self.outbox.put(wire.Drained())
            return DONE
        return None

    @property
    def _busy(self) -> bool:
        """Whether a step has something to do: rows, or adapters that are on their way."""
        return not self.house.engine.idle or bool(self._loads) or bool(self._early)

    def _pause(self) -> float:
        """How long nothing needs to be done unless something comes."""
        if not self._busy:
            return self._stats.left
        return 0.0 if self._moving else _SOON

    def _take(self, item: object) -> int | None:
        """Do what was asked; the exit code where that is to end."""
        match item:
            case wire.Generate():
                self._fetch(item)
            case _Encoded():
                self._submit(item)
            case wire.Cancel():
                self.house.engine.cancel(item.id)
                self._over(item.id)
                for coming in self._loads:
                    if coming.command.id == item.id:
                        coming.dropped = "Nobody waited for it any more."
            case wire.Load():
                self._load(item)
            case wire.Unload():
                self._answer(item.id, lambda: self._drop(item.name))
            case wire.Models():
                self._answer(item.id, lambda: None)
            case wire.Drain():
                self._draining = True
            case wire.Stop():
                return DONE
            case Closed():
                _LOG.error("the worker ends: %s", item.why)
                return DONE
            case _:
                raise BrokenFrame("A worker is configured once.", given=type(item).__name__)
        return None

    def _fetch(self, command: wire.Generate) -> None:
        """Have a request's adapter come, or refuse the request, while it is read; so for a few of each tenant's."""
        if command.adapter in (None, AUTO) or command.id not in self._open:
            return
        if sum(tenant == command.tenant for tenant, _ in self._early.values()) >= _EARLY:
            return
        try:
            self._early[command.id] = command.tenant, self.house.shelf.want(command.adapter)
        except Exception as error:  # noqa: BLE001 - as in `_submit`
            self._desk.forget(command.id)
            self._refuse(command.id, error)

    def _submit(self, encoded: _Encoded) -> None:
        command, found = encoded.sheet.command, encoded.found
        request = self._open.get(command.id)
        if request is None:
            return  # cancelled meanwhile
        try:
            if isinstance(found, Exception):
                raise found
            adapter = command.adapter
            if adapter == AUTO:
                adapter, request.routed = self._routed(found, command)
            self.house.engine.submit(
                Request(
                    id=command.id,
                    prompt=found,
                    adapter=adapter,
                    sampling=command.sampling,
                    tenant=command.tenant,
                    weight=command.weight,
                    deadline=encoded.sheet.deadline,
                )
            )
            self._let(command.id)  # the engine has it now
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this request's and nobody else's
            self._refuse(command.id, error)

    def _refuse(self, id_: str, error: Exception) -> None:
        """End a request that could not be taken; what nobody foresaw goes to the log."""
        if not isinstance(error, TarsiaError):
            _LOG.error("a request could not be taken", exc_info=error, extra={"facts": {"request": id_}})
        self._fail(id_, unread(error))

    def _let(self, id_: str) -> None:
        """Let go of an adapter that was fetched for a request which is not with the engine."""
        if (early := self._early.pop(id_, None)) is not None:
            early[1].release()

    def _fetched(self) -> None:
        """Let go of what has come: it stays where there is room, but who only waits keeps nobody's adapter out."""
        for id_, (_, ticket) in [*self._early.items()]:
            if ticket.page is not None or ticket.error is not None:
                self._let(id_)

    def _routed(self, prompt: Prompt, command: wire.Generate) -> tuple[str | None, Mapping[str, Any]]:
        if self.house.route is None:
            raise ServeError(
                "unknown_adapter", "This server does not choose adapters.", given=AUTO, do="ask for one by its name"
            )
        choice = self.house.route(prompt, command.may)
        if choice.adapter is None and not command.base:
            raise ServeError(
                "unknown_adapter",
                "None of the adapters that may be asked for is for this.",
                do="ask for one by its name",
            )
        return choice.adapter, choice.facts

    def _step(self) -> None:
        engine = self.house.engine
        before = engine.stats()["steps"]
        try:
            events = engine.step()
            self._failures = 0
        except Exception as error:  # noqa: BLE001 - one defect must not end everybody's requests
            events = self._broken(error)
        self._moving = bool(events) or engine.stats()["steps"] != before
        for event in events:
            self._tell(event)

    def _broken(self, error: Exception) -> list[Event]:
        """The end of what ran in a step that failed. Raises Untrusted where the next one can not be believed in."""
        self._failures += 1
        facts = {"open": sorted(self._open)[:_TOLD], "in_a_row": self._failures}
        _LOG.error("a step failed", exc_info=error, extra={"facts": facts})
        if isinstance(error, torch.AcceleratorError) or self._failures >= _IN_A_ROW:
            raise Untrusted(f"{type(error).__name__} in a step, {self._failures} in a row")
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            told = ServeError("overloaded", "There was not enough memory for this step.", do="try again in a while")
        else:
            told = ServeError("internal", "The step that answered this request failed.", do="see the server's log")
        return self.house.engine.abort(told)

    def _tell(self, event: Event) -> None:
        """Send what the engine says of a request."""
        request = self._open.get(event.id)
        if request is None:
            return  # cancelled in this very turn
        try:
            told = message(event, request.routed)
        except ValidationError as error:
            _LOG.error("the engine said what is no event", exc_info=error)
            self.house.engine.cancel(event.id)
            self._fail(event.id, ServeError("internal", "The answer could not be told.", do="see the server's log"))
            return
        self.outbox.put(told)
        if self._counts.hear(request, told):
            self._over(event.id)

    def _fail(self, id_: str, error: TarsiaError) -> None:
        self.outbox.put(wire.Failed.about(id_, error))
        self._over(id_)

    def _over(self, id_: str) -> None:
        self._let(id_)
        self._desk.release(id_)
        request = self._open.pop(id_, None)
        if request is not None:
            self._counts.over(request)

    # adapters by name ---------------------------------------------------------------------------------------------

    def _load(self, command: wire.Load) -> None:
        """Begin to load; it is answered once the adapter is there and proved. Until then its name means what it did."""
        try:
            self._loads.append(_Coming(command, self.house.shelf.bring(command.name, command.source)))
        except Exception as error:  # noqa: BLE001 - as in `_answer`
            self._refused(command.id, error)

    def _loaded(self) -> None:
        """Answer those whose adapter has come, or was refused: of one name in the order in which they were asked."""
        pending = set[str]()
        for coming in [*self._loads]:
            command, ticket = coming.command, coming.ticket
            if (ticket.page is None and ticket.error is None) or command.name in pending:
                pending.add(command.name)
                continue
            self._loads.remove(coming)
            if ticket.error is not None or coming.dropped:
                error = ServeError("refused", coming.dropped, given=command.name) if coming.dropped else ticket.error
                self._refused(command.id, error or ServeError("internal", "It was not loaded."))
            else:
                alias = partial(self.house.shelf.alias, command.name, command.source)
                self._answer(command.id, alias, command.name)
            ticket.release()

    def _drop(self, name: str) -> None:
        coming = [each for each in self._loads if each.command.name == name]
        for each in coming:
            each.dropped = each.dropped or "It was unloaded while it came."
        try:
            self.house.shelf.drop(name)
        except ServeError:
            if not coming:
                raise

    def _answer(self, id_: str, act: Callable[[], None], name: str | None = None) -> None:
        """Do something with the shelf and say what is on it then: all, or what is called ``name``."""
        try:
            act()
            models = [model for model in self.house.shelf.models() if name in (None, model.name)]
        except Exception as error:  # noqa: BLE001 - whoever asked is told, and everybody's requests go on
            self._refused(id_, error)
        else:
            self.outbox.put(wire.Answer(id=id_, models=tuple(models)))

    def _refused(self, id_: str, error: Exception) -> None:
        if not isinstance(error, TarsiaError):
            _LOG.error("the adapters could not be asked", exc_info=error)
            error = ServeError("internal", "The adapters could not be asked.", do="see the server's log")
        self.outbox.put(wire.Answer(id=id_, failure=wire.Failure.of(error, "refused")))
