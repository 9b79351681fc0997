"""What the worker's threads hand to each other: commands that come in, events that go out."""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from tarsia.serve import wire
from tarsia.serve.frames import BrokenFrame, Connection

T = TypeVar("T")
_MOST = 256
"""Events that go out in one piece."""


@dataclass(frozen=True, slots=True)
class Closed:
    """Nobody speaks to the worker any more."""

    why: str


class Inbox(Generic[T]):
    """What was put here by any thread, for the one that takes it."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[T] = queue.SimpleQueue()

    def put(self, item: T) -> None:
        """Put one thing here."""
        self._items.put(item)

    def take(self, wait: float) -> list[T]:
        """All that is here; where that is nothing, what comes first within ``wait`` seconds, if anything does."""
        found: list[T] = []
        try:
            if wait > 0:
                found.append(self._items.get(timeout=wait))
            while True:
                found.append(self._items.get_nowait())
        except queue.Empty:
            return found


class Outbox:
    """Sends events from a thread of its own, so that a step never waits for whoever reads them.

    ``lost`` is called once, on that thread, where nobody is there any more.
    """

    def __init__(self, connection: Connection, lost: Callable[[str], None]) -> None:
        self._connection, self._lost = connection, lost
        self._items: queue.SimpleQueue[wire.Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="sender", daemon=True)
        self._thread.start()

    def put(self, *events: wire.Event) -> None:
        """Send events, in this order."""
        for event in events:
            self._items.put(event)

    def close(self, seconds: float = 10.0) -> None:
        """Send what is left and end, waiting no longer than this."""
        self._items.put(None)
        self._thread.join(seconds)

    def _work(self) -> None:
        why: str | None = "the sender broke"
        try:
            while (first := self._items.get()) is not None:
                events: list[wire.Event | None] = [first]
                while len(events) < _MOST and events[-1] is not None and not self._items.empty():
                    events.append(self._items.get())
                self._connection.send(*(wire.framed(event) for event in events if event is not None))
                if events[-1] is None:
                    break
            why = None
        except (OSError, BrokenFrame) as error:
            why = f"nothing can be sent any more: {error}"
            if isinstance(error, BrokenFrame):  # the other side is there, and can not be told in any other way
                print(f"tarsia.serve.worker: {why}", file=sys.stderr, flush=True)
        finally:  # a worker that says nothing must not live on, whatever made it mute
            if why is not None:
                self._lost(why)


class Told(logging.Handler):
    """What is logged in the worker, as events."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__()
        self._outbox = outbox

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record, with its traceback where it has one."""
        facts = dict(getattr(record, "facts", {}))
        if record.exc_info:
            facts["traceback"] = logging.Formatter().formatException(record.exc_info)
        level = record.levelname.lower()
        known = level if level in ("debug", "info", "warning", "error") else "error"
        self._outbox.put(wire.Log.model_validate({"level": known, "what": record.getMessage(), "facts": facts}))


class Every:
    """Says when ``seconds`` have passed since it last said so."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._next = seconds, time.monotonic()

    @property
    def left(self) -> float:
        """Seconds until it is due."""
        return max(0.0, self._next - time.monotonic())

    def due(self) -> bool:
        """Whether it is time; it then begins anew."""
        if self.left > 0:
            return False
        self._next = time.monotonic() + self._seconds
        return True
