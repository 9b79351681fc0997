"""Memory for what clients send, shared so that nobody can take all of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tarsia.core.errors import TarsiaError
from tarsia.serve.http.errors import AGAIN, Refusal


@dataclass(eq=False)
class Room:
    """At most ``most`` bytes, of which a tenant may hold as many as are still free beside it: alone half of them, and
    who comes next finds room (Choudhury and Hahne 1998, dynamic queue length thresholds, with alpha = 1).
    """

    most: int
    held: int = 0
    _by_tenant: Counter[str] = field(default_factory=Counter)

    def take(self, tenant: str, count: int) -> None:
        """Set bytes aside. Raises Refusal (429) where that would be more than the tenant's share."""
        own, free = self._by_tenant[tenant] + count, self.most - self.held - count
        if own > free:
            error = TarsiaError("Too much is being read at once.", do="come again")
            raise Refusal(429, error, code="overloaded", again=AGAIN, close=True)
        self._by_tenant[tenant] = own
        self.held += count

    def give(self, tenant: str, count: int) -> None:
        """Give bytes back that were taken."""
        self.held -= count
        self._by_tenant[tenant] -= count
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]


@dataclass(eq=False)
class Share:
    """What one request holds of a room."""

    room: Room
    tenant: str
    held: int = 0

    def take(self, count: int) -> None:
        """Hold more. Raises Refusal (429), and holds what it held."""
        self.room.take(self.tenant, count)
        self.held += count

    def leave(self) -> None:
        """Hold nothing any more; to leave twice is the same."""
        count, self.held = self.held, 0
        self.room.give(self.tenant, count)
