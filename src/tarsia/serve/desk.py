"""Where requests are read before a step has to do with them: threads that make prompts of messages and pictures.

Reading takes long where pictures are decoded, so it never happens on the engine's thread. Tenants take turns, so that
who sends a thousand pictures delays nobody else's first. A thread of these computes alone: torch's own threads are the
engine's, and where the system knows priorities the engine goes first.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tarsia.core.errors import ServeError, TarsiaError
from tarsia.serve.request import Prompt
from tarsia.serve.wire import Generate

_BEHIND = 5
"""How far behind the engine's thread a reader's priority is (its niceness)."""
_LAST = 19
ROOM = 1 << 30
"""Bytes of pictures, as the model is given them, that prompts which were read may hold."""
_LOG = logging.getLogger("tarsia.serve.desk")


class Read(Protocol):
    """What makes a prompt: of ``messages`` as chat templates take them and ``pictures`` as they came. May refuse."""

    def __call__(self, messages: Sequence[Mapping[str, Any]], pictures: Sequence[bytes]) -> Prompt: ...


@dataclass(frozen=True, eq=False)
class Sheet:
    """A request to be read; ``deadline`` in ``time.monotonic()``."""

    command: Generate
    pictures: tuple[bytes, ...]
    deadline: float


Done = Callable[[Sheet, Prompt | Exception], None]


class Desk:
    """``threads`` readers. ``done`` is called, on one of these, with each request and its prompt or why there is none.

    ``first`` is what else a request needs before it is read, the grammar of its schema say. ``lost`` is called, with
    why, where a reader is no more: nothing can be trusted to be read then.

    What was read is counted until it is given back with ``release``. A tenant whose prompts hold its share of ``room``
    bytes of pictures, all tenants' being alike, has no further one read before that.
    """

    def __init__(
        self,
        read: Read,
        first: Callable[[Generate], None],
        done: Done,
        threads: int,
        lost: Callable[[str], None],
        room: int = ROOM,
    ) -> None:
        self._read, self._first, self._done, self._lost, self._room = read, first, done, lost, room
        self._held: dict[str, tuple[str, int]] = {}
        self._bytes: Counter[str] = Counter()
        self._tenants: dict[str, deque[Sheet]] = {}
        self._busy: set[str] = set()
        self._gone: set[str] = set()
        self._change = threading.Condition()
        self._open = True
        self._seated = threading.Barrier(threads + 1)
        self._threads = [threading.Thread(target=self._work, name=f"reader-{n}", daemon=True) for n in range(threads)]
        own = torch.get_num_threads()
        for thread in self._threads:
            thread.start()
        self._seated.wait()
        torch.set_num_threads(own)  # each reader has set its own; what new threads begin with is one number for all

    def __len__(self) -> int:
        with self._change:
            return sum(map(len, self._tenants.values())) + len(self._busy)

    def add(self, sheet: Sheet) -> None:
        """Have a request read."""
        with self._change:
            self._tenants.setdefault(sheet.command.tenant, deque()).append(sheet)
            self._change.notify()

    def forget(self, id_: str) -> bool:
        """Nobody waits for this request: ``done`` is not called for it. Whether it was here."""
        with self._change:
            if id_ in self._busy:
                self._gone.add(id_)
                return True
            for tenant, waiting in self._tenants.items():
                for sheet in waiting:
                    if sheet.command.id == id_:
                        waiting.remove(sheet)
                        if not waiting:
                            del self._tenants[tenant]
                        return True
        return False

    def release(self, id_: str) -> None:
        """A prompt that was read is needed no more. May be called for what holds nothing."""
        with self._change:
            tenant, count = self._held.pop(id_, ("", 0))
            self._bytes[tenant] -= count
            self._bytes += Counter()  # without tenants that hold nothing
            self._change.notify_all()

    def close(self) -> None:
        """Take nothing more, and let the threads end."""
        with self._change:
            self._open = False
            self._tenants.clear()
            self._change.notify_all()

    def _work(self) -> None:
        why: str | None = "a reader broke"
        try:
            self._sit()
            self._serve()
            why = None
        finally:
            if why is not None:
                self._lost(why)

    def _sit(self) -> None:
        try:
            _alone()
        finally:  # whatever comes of it, nobody waits for this one in vain
            self._seated.wait()

    def _serve(self) -> None:
        while (sheet := self._next()) is not None:
            found = self._prompt(sheet)
            with self._change:
                self._busy.discard(sheet.command.id)
                wanted = sheet.command.id not in self._gone
                self._gone.discard(sheet.command.id)
                if wanted and isinstance(found, Prompt) and (count := _size(found)):
                    self._held[sheet.command.id] = (sheet.command.tenant, count)
                    self._bytes[sheet.command.tenant] += count
            if wanted:
                self._done(sheet, found)

    def _next(self) -> Sheet | None:
        """The oldest of the tenant whose turn it is; None at the end."""
        with self._change:
            while self._open and (tenant := self._turn()) is None:
                self._change.wait()
            if not self._open or tenant is None:
                return None
            waiting = self._tenants.pop(tenant)
            sheet = waiting.popleft()
            if waiting:
                self._tenants[tenant] = waiting  # behind the others
            self._busy.add(sheet.command.id)
            return sheet

    def _turn(self) -> str | None:
        """The first tenant in turn that holds less than its share of the room."""
        active = len({*self._tenants, *self._bytes})
        return next((each for each in self._tenants if self._bytes[each] * active < self._room), None)

    def _prompt(self, sheet: Sheet) -> Prompt | Exception:
        if sheet.deadline < time.monotonic():
            return ServeError("timeout", "The time of this request is over.", do="try again in a while")
        try:
            self._first(sheet.command)
            messages = [message.model_dump() for message in sheet.command.messages]
            return self._read(messages, sheet.pictures)
        except TarsiaError as error:
            return error
        except Exception as error:  # noqa: BLE001 - a defect here ends one request, and the log tells of it
            return error
        except BaseException as error:  # noqa: BLE001 - what a library of another language panics with
            found = RuntimeError(f"{type(error).__name__}: {error}")
            found.__cause__ = error
            return found


def _size(prompt: Prompt) -> int:
    """Bytes of a prompt's pictures, each counted once."""
    once = {picture.key: picture for picture in prompt.pictures}
    return sum(value.nbytes for picture in once.values() for value in picture.inputs.values())


def _alone() -> None:
    """Have this thread compute by itself, behind the engine's."""
    torch.get_num_threads()  # the first question sets up the thread, with what is the default then
    torch.set_num_threads(1)
    if sys.platform == "linux":
        own = threading.get_native_id()
        try:
            os.setpriority(os.PRIO_PROCESS, own, min(_LAST, os.getpriority(os.PRIO_PROCESS, own) + _BEHIND))
        except OSError as error:  # it then reads beside the engine, not behind it
            _LOG.warning("a reader goes as fast as the engine: its priority could not be lowered: %s", error)


def unread(error: Exception) -> TarsiaError:
    """What a client is told of a request that could not be read."""
    if isinstance(error, TarsiaError):
        return error
    return ServeError("internal", "The request could not be read.", do="see the server's log")
