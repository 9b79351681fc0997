"""All that a worker has, and what it asks of each: the seams between the worker and what it serves with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tarsia.core.errors import TarsiaError
from tarsia.serve import wire
from tarsia.serve.desk import Read
from tarsia.serve.request import Event, Prompt, Request, Sampling


class Engine(Protocol):
    """What the worker asks of ``serve.engine.Engine``."""

    @property
    def idle(self) -> bool: ...
    def submit(self, request: Request) -> None: ...
    def cancel(self, id_: str) -> None: ...
    def abort(self, error: TarsiaError) -> list[Event]: ...
    def step(self) -> list[Event]: ...
    def stats(self) -> Mapping[str, int]: ...


class Ticket(Protocol):
    """An adapter that is on its way, as ``serve.pages`` has it."""

    @property
    def page(self) -> object | None: ...
    @property
    def error(self) -> TarsiaError | None: ...
    def release(self) -> None: ...


class Shelf(Protocol):
    """What the worker asks of the adapters that can be served."""

    def models(self) -> Sequence[wire.Model]: ...
    def bring(self, name: str, source: str) -> Ticket: ...
    def alias(self, name: str, source: str) -> None: ...
    def drop(self, name: str) -> None: ...
    def want(self, reference: str) -> Ticket: ...
    def stats(self) -> Mapping[str, int]: ...


@dataclass(frozen=True)
class Choice:
    """What the router chose: an adapter's reference, None for the bare base; ``facts`` are told to the client."""

    adapter: str | None
    facts: Mapping[str, Any]


class Route(Protocol):
    """Chooses an adapter for a prompt among names that match the patterns ``may`` (None: all).

    It is called on the engine's thread, between two steps.
    """

    def __call__(self, prompt: Prompt, may: Sequence[str] | None) -> Choice: ...


class Prepare(Protocol):
    """Makes what a request's sampling needs ahead of its first token."""

    def __call__(self, sampling: Sampling) -> None: ...


@dataclass(frozen=True, eq=False)
class House:
    """All that a worker has: made by ``serve.opening.opened``, or by tests."""

    engine: Engine
    shelf: Shelf
    read: Read
    prepare: Prepare
    ready: wire.Ready
    route: Route | None = None
