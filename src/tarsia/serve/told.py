"""What is said of requests, and counted of them: the engine's events as messages, and the figures of them all."""

from __future__ import annotations

import heapq
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from tarsia.serve import wire
from tarsia.serve.request import Event

_ADAPTERS: Final = 100
"""How many adapters have counts of their own in the figures."""


@dataclass(slots=True)
class Count:
    """What was asked of one adapter, and what it said."""

    requests: int = 0
    running: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(eq=False)
class Open:
    """A request that is not over: how many of its ``choices`` are not, and what counts it."""

    choices: int
    routed: Mapping[str, Any] | None = None
    count: Count | None = None


@dataclass(eq=False)
class Counts:
    """Counts by adapter; "" is the bare base."""

    by_adapter: dict[str, Count] = field(default_factory=dict)

    def hear(self, request: Open, told: wire.RequestEvent) -> bool:
        """Count what is told of a request; whether it is over with that."""
        if isinstance(told, wire.Started):
            name = "" if told.adapter is None else told.adapter.name
            count = request.count = self.by_adapter.setdefault(name, Count())
            count.requests += 1
            count.running += 1
            count.prompt_tokens += told.prompt_tokens
        elif isinstance(told, wire.Done):
            request.choices -= 1
            if request.count is not None:
                request.count.completion_tokens += told.completion_tokens
        return isinstance(told, wire.Failed) or request.choices == 0

    def over(self, request: Open) -> None:
        """A request has left, however it ended."""
        if request.count is not None:
            request.count.running -= 1

    def stats(self, told: Mapping[str, int], reading: int) -> wire.Stats:
        """The figures of now; ``told`` are the engine's and the shelf's own."""
        figures: dict[str, Any] = {name: value for name, value in told.items() if name in wire.Stats.model_fields}
        first = heapq.nlargest(_ADAPTERS, self.by_adapter.items(), key=lambda item: item[1].requests)
        figures["adapters"] = {name: asdict(count) for name, count in first}
        figures["step_seconds"] = told.get("step_microseconds", 0) / 1e6
        figures |= {"reading": reading, "process_bytes": resident()}
        return wire.Stats.model_validate(figures)


def message(event: Event, routed: Mapping[str, Any] | None) -> wire.RequestEvent:
    """What the engine says, as it is sent. Raises ValidationError for what is no event."""
    data = dict(event.data)
    match event.kind:
        case "started":
            return wire.Started(id=event.id, routed=None if routed is None else dict(routed), **data)
        case "text":
            told = data.pop("logprobs", None)
            logprobs = None if told is None else [_finite(each) for each in told]
            return wire.Text.model_validate(
                {"id": event.id, "tokens": len(data.pop("ids", ())), "logprobs": logprobs, **data}
            )
        case "done":
            return wire.Done(id=event.id, **data)
        case "failed":
            return wire.Failed.about(event.id, data["error"])


def _finite(told: Mapping[str, Any]) -> dict[str, Any]:
    top = [{**each, "logprob": wire.finite(each["logprob"])} for each in told.get("top", ())]
    return {**told, "logprob": wire.finite(told["logprob"]), "top": top}


def resident() -> int:
    """Bytes of memory that this process has; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
