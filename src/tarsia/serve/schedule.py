"""Whose turn it is: requests wait by tenant, and the tenant that has had least for its share comes first.

What a tenant has had is counted in tokens, those that were read and those that were written, over its weight
(arXiv:2401.00588, virtual token counters). Who comes anew begins with as much as the least of those who wait, so that
nobody saves up while away. Within a tenant the oldest comes first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """Something that waits for its turn."""

    @property
    def tenant(self) -> str:
        """Whose it is."""
        ...

    @property
    def weight(self) -> float:
        """The tenant's share against others'."""
        ...


W = TypeVar("W", bound=Waiting)


@dataclass(slots=True)
class _Line(Generic[W]):
    weight: float
    had: float
    waiting: deque[W] = field(default_factory=deque)
    running: int = 0


class Queue(Generic[W]):
    """Requests that wait, and what each tenant has had."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Line[W]] = {}

    def __len__(self) -> int:
        return sum(len(line.waiting) for line in self._tenants.values())

    def __iter__(self) -> Iterator[W]:
        for line in self._tenants.values():
            yield from line.waiting

    def add(self, one: W) -> None:
        """Let ``one`` wait behind its tenant's others."""
        line = self._tenants.get(one.tenant)
        if line is None:
            line = self._tenants[one.tenant] = _Line(one.weight, 0.0)
        if not line.waiting and not line.running:
            active = [other.had for other in self._tenants.values() if other.waiting or other.running]
            line.had = max(line.had, min(active, default=0.0))
        line.weight = one.weight
        line.waiting.append(one)

    def turns(self) -> Iterator[W]:
        """What waits, in the order in which it should be begun; `begin` may be called meanwhile."""
        passed: dict[str, int] = {}
        while True:
            open_ = [
                (line.had, name) for name, line in self._tenants.items() if len(line.waiting) > passed.get(name, 0)
            ]
            if not open_:
                return
            name = min(open_)[1]
            line, at = self._tenants[name], passed.get(name, 0)
            one, length = line.waiting[at], len(line.waiting)
            yield one
            passed[name] = at + (len(line.waiting) == length)

    def begin(self, one: W) -> None:
        """``one`` waits no longer: it runs."""
        line = self._tenants[one.tenant]
        line.waiting.remove(one)
        line.running += 1

    def again(self, one: W) -> None:
        """``one`` does not run for now: it waits before its tenant's others."""
        line = self._tenants[one.tenant]
        line.running -= 1
        line.waiting.appendleft(one)

    def drop(self, gone: Callable[[W], bool]) -> list[W]:
        """Take out of what waits all that is ``gone``."""
        out: list[W] = []
        for line in self._tenants.values():
            lost = [one for one in line.waiting if gone(one)]
            for one in lost:
                line.waiting.remove(one)
            out += lost
        self._forget()
        return out

    def charge(self, tenant: str, tokens: int) -> None:
        """Count tokens that a tenant has had."""
        line = self._tenants[tenant]
        line.had += tokens / line.weight

    def end(self, one: W) -> None:
        """``one`` runs no longer."""
        self._tenants[one.tenant].running -= 1
        self._forget()

    def _forget(self) -> None:
        """Tenants without anything here are forgotten once all are: their counts meant something against each other."""
        if not any(line.waiting or line.running for line in self._tenants.values()):
            self._tenants.clear()
