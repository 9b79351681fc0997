"""What the HTTP side needs of whoever holds the worker: ``serve.supervise.Supervisor``, or a fake of it in tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tarsia.serve.conversation import Conversation
from tarsia.serve.supervise import State
from tarsia.serve.wire import Generate, Model, Ready, Stats


class Service(Protocol):
    """The worker, as it is seen from here. All of it is called on one event loop."""

    state: State
    """What becomes of a new request."""
    ready: Ready | None
    """What the worker says of itself; None while there is none."""
    stats: Stats | None
    """What the worker last counted."""
    restarts: int
    """How often another worker was started."""

    async def generate(self, command: Generate, pictures: Sequence[bytes] = ()) -> Conversation:
        """Begin a request; to leave the conversation cancels it. Raises ServeError where none is taken."""

    async def models(self) -> tuple[Model, ...]:
        """What may be asked for. Raises ServeError."""

    async def load(self, name: str, source: str) -> Model:
        """Serve a source under a name. Raises ServeError where that is refused."""

    async def unload(self, name: str) -> None:
        """Take no more requests for a name. Raises ServeError where there is none."""
