"""One request from its place in the queue to its end, and who leaves before it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from starlette.types import Receive

from tarsia.core.errors import ServeError
from tarsia.serve.conversation import Conversation
from tarsia.serve.http.errors import AGAIN, Refusal
from tarsia.serve.http.gate import Ticket
from tarsia.serve.http.limits import Seat
from tarsia.serve.http.metrics import NONE, Metrics
from tarsia.serve.http.models import Asked, sourced
from tarsia.serve.http.service import Service
from tarsia.serve.request import AUTO
from tarsia.serve.supervise import State
from tarsia.serve.wire import Done, Failed, Generate, RequestEvent, Started, Text

_T = TypeVar("_T")
_OVER: Final = 1.0
"""Seconds after its time that a request is left, should the worker not say so."""
_OUTCOMES: Final = {504: "timeout", 503: "lost", 500: "failed"}


class Gone(Exception):
    """The client has left: nobody is answered."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """What ``work`` comes to. Raises Gone, with the work cancelled and cleared away, where the client leaves before."""
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait([doing, leaving], return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise Gone
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def unready(service: Service) -> Refusal | None:
    """Why no request is taken now (503); None where it is."""
    if service.state is State.READY:
        return None
    said = {
        State.STARTING: "The server opens its base.",
        State.LOST: "The worker was lost, and another one starts.",
        State.DRAINING: "The server is shutting down.",
    }.get(service.state, "The server does not serve any more.")
    return Refusal(503, f"{said} Come again.", code=f"not_ready_{service.state.value}", again=AGAIN)


@dataclass(eq=False)
class Run:
    """A request that has a seat. ``seconds`` is how long anybody waits for it; ``close`` has to be called, once."""

    ticket: Ticket
    asked: Asked
    seat: Seat
    metrics: Metrics
    seconds: float
    choices: int = 1
    begun: float = field(default_factory=time.monotonic)
    outcome: str = "cancelled"
    _conversation: Conversation | None = None
    _started: Started | None = None
    _first: float | None = None
    _last: float = 0.0
    _said: dict[int, int] = field(default_factory=dict)
    _reasons: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.metrics.queue.inc()

    @property
    def completion(self) -> int:
        """Tokens that were said."""
        return sum(self._said.values())

    async def begin(self, service: Service, command: Generate, pictures: Sequence[bytes]) -> Started:
        """Ask, and wait until it is begun: who answers is known. Raises Refusal."""
        if (refusal := unready(service)) is not None:
            raise refusal
        try:
            self._conversation = await service.generate(command, pictures)
        except ServeError as error:
            raise unready(service) or self._refusal(error) from None
        event = await self._next()
        if not isinstance(event, Started):
            raise Refusal(500, "The worker answered before it began.", code="internal_error")
        self.asked.check(self.seat.key, event)
        event = self._started = sourced(self.seat.key, event)
        self.metrics.queue.dec()
        self.metrics.running.inc()
        return event

    async def events(self) -> AsyncIterator[Text | Done]:
        """What is said, until every choice is done. Raises Refusal."""
        open_ = self._conversation is not None and self._started is not None
        choices = 0
        while open_:
            event = await self._next()
            if isinstance(event, Text):
                self._said[event.choice] = self._said.get(event.choice, 0) + event.tokens
                self._last = time.monotonic()
                if self._first is None and (event.text or event.tokens):
                    self._first = self._last
                yield event
            elif isinstance(event, Done):
                self._said[event.choice] = event.completion_tokens
                self._reasons[event.choice] = event.reason
                choices += 1
                open_ = choices < self.choices
                if not open_:
                    self.outcome = "ok"
                yield event
            else:
                raise Refusal(500, "The worker began an answer twice.", code="internal_error")

    async def _next(self) -> RequestEvent:
        assert self._conversation is not None
        try:
            async with asyncio.timeout(max(0.0, self.begun + self.seconds + _OVER - time.monotonic())):
                event = await anext(self._conversation)
        except TimeoutError:
            raise Refusal(504, f"The answer took more than {self.seconds:g} s.", code="timeout") from None
        except StopAsyncIteration:
            raise Refusal(503, "The worker ended the answer before its end.", code="worker_lost", again=AGAIN) from None
        if isinstance(event, Failed):
            if event.kind == "unknown_adapter" and self.asked.adapter == AUTO and not self.seat.key.base:
                raise Refusal.abstained()
            raise self._refusal(event.error)
        return event

    def _refusal(self, error: ServeError) -> Refusal:
        if error.kind == "unknown_adapter":
            return Refusal.unknown(error if self.seat.key.unbounded else None)
        return Refusal.of(error)

    def failed(self, refusal: Refusal) -> None:
        """It ends with an error."""
        self.outcome = _OUTCOMES.get(refusal.status, "refused")
        self.ticket.facts["code"] = refusal.code

    def close(self) -> None:
        """Leave it: the worker is told where it is not over, the seat is free, metrics and log have it."""
        try:
            if self._conversation is not None:
                self._conversation.close()
        finally:
            self._tell()

    def _tell(self) -> None:
        started, now = self._started, time.monotonic()
        (self.metrics.queue if started is None else self.metrics.running).dec()
        prompt = 0 if started is None else started.prompt_tokens
        self.seat.spend(prompt + self.completion)
        self.seat.leave()
        by = None if started is None else started.adapter
        label = NONE if started is None else self.metrics.label(None if by is None else by.name)
        self.metrics.requests.labels(label, self.outcome).inc()
        self.metrics.whole.observe(now - self.begun)
        for kind, count in (("prompt", prompt), ("completion", self.completion)):
            self.metrics.tokens.labels(label, kind).inc(count)
        if self._first is not None:
            self.metrics.first.observe(self._first - self.begun)
            if self.completion > 1:
                self.metrics.each.observe((self._last - self._first) / (self.completion - 1))
        self.ticket.facts.update(
            adapter=None if by is None else f"{by.name}@{by.version}#{by.hash[:24]}",
            routed=started is not None and started.routed is not None,
            prompt_tokens=prompt,
            cached_tokens=0 if started is None else started.cached_tokens,
            completion_tokens=self.completion,
            first_seconds=None if self._first is None else self._first - self.begun,
            reasons=sorted(set(self._reasons.values())),
            outcome=self.outcome,
        )
