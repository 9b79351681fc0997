"""What the worker says of one request, for the one who waits on it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Self

from tarsia.serve import wire


class Conversation:
    """The events of one request, in their order: an asynchronous iterator that ends when the request is over.

    Leaving it (``async with``, or ``close``) before that cancels the request. ``left`` is called once with the
    conversation and whether it was over.
    """

    def __init__(self, id_: str, choices: int, left: Callable[[Conversation, bool], None]) -> None:
        self.id = id_
        self._open = choices  # choices that are not complete
        self._left: Callable[[Conversation, bool], None] | None = left
        self._events: deque[wire.RequestEvent] = deque()
        self._more = asyncio.Event()

    @property
    def over(self) -> bool:
        """Whether nothing more will be said."""
        return self._open <= 0

    def hear(self, event: wire.RequestEvent) -> None:
        """Something was said of it."""
        if self._open <= 0:
            return
        self._events.append(event)
        self._more.set()
        if isinstance(event, wire.Done):
            self._open -= 1
        if self._open <= 0 or isinstance(event, wire.Failed):
            self._open = 0
            self.close()

    def close(self) -> None:
        """Nobody waits any more; what was heard can still be read."""
        left, self._left = self._left, None
        if left is not None:
            left(self, self.over)
        self._open = 0
        self._more.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> wire.RequestEvent:
        while not self._events:
            if self.over:
                raise StopAsyncIteration
            self._more.clear()
            await self._more.wait()
        return self._events.popleft()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()
