"""Room for pages: a budget of bytes, pins, and which page is given up when there is none."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


@dataclass(eq=False)
class Held(Generic[Value]):
    """Something that has room: ``value`` is None while it is made."""

    bytes: int
    value: Value | None = None
    pins: int = 0


class Tier(Generic[Key, Value]):
    """At most ``budget`` bytes of values. What is not pinned is given up, the least recently used first.

    ``gone`` is told of every value that is given up or taken out.
    """

    def __init__(self, budget: int, gone: Callable[[Value], None] = lambda value: None) -> None:
        self.budget, self._gone = budget, gone
        self._held: OrderedDict[Key, Held[Value]] = OrderedDict()
        self.bytes = self.pinned = self.evictions = 0

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: Key) -> bool:
        return key in self._held

    def get(self, key: Key) -> Value | None:
        """What is there, now the most recently used."""
        held = self._held.get(key)
        if held is None:
            return None
        self._held.move_to_end(key)
        return held.value

    def pin(self, key: Key) -> None:
        """Keep it until as many `release` as `pin` were called."""
        held = self._held[key]
        self.pinned += 0 if held.pins else held.bytes
        held.pins += 1

    def release(self, key: Key) -> None:
        """Take one pin back."""
        held = self._held[key]
        if held.pins < 1:
            raise ValueError(f"{key} is not pinned")
        held.pins -= 1
        self.pinned -= 0 if held.pins else held.bytes

    @property
    def free(self) -> int:
        """Bytes that could be had, by giving up whatever is not pinned."""
        return self.budget - self.pinned

    def reserve(self, key: Key, count: int) -> bool:
        """Make room of ``count`` bytes for ``key``, pinned once; False, with nothing given up, where there is none."""
        if key in self._held:
            raise ValueError(f"{key} is there already")
        if count > self.free:
            return False
        while self.bytes + count > self.budget:
            oldest = next(key for key, held in self._held.items() if not held.pins)
            self.take(oldest)
            self.evictions += 1
        self._held[key] = Held(count, pins=1)
        self.bytes += count
        self.pinned += count
        return True

    def put(self, key: Key, value: Value, count: int) -> None:
        """Lay ``value`` into the room that was reserved, and give back what it does not take.

        Raises ValueError where it takes more.
        """
        held = self._held[key]
        if count > held.bytes:
            raise ValueError(f"{key} takes {count} bytes, more than the {held.bytes} that were reserved")
        self.bytes -= held.bytes - count
        self.pinned -= held.bytes - count if held.pins else 0
        held.bytes, held.value = count, value

    def take(self, key: Key) -> None:
        """Take it out, pinned or not."""
        held = self._held.pop(key)
        self.bytes -= held.bytes
        self.pinned -= held.bytes if held.pins else 0
        if held.value is not None:
            self._gone(held.value)

    def order(self) -> tuple[Key, ...]:
        """All keys, the least recently used first."""
        return tuple(self._held)
