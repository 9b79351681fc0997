"""Torch's caching allocator for CUDA, on sizes alone: what it hands out and what it takes from the device.

A request is rounded up to 512 bytes. Up to 1 MiB it comes from the small pool, whose segments are of 2 MiB, else from
the large one, whose segments are of 20 MiB for requests below 10 MiB, and of the request in whole 2 MiB above. The
smallest free block that holds it is taken, at the lowest address among equals; what is over is cut off where it is at
least 512 bytes (small pool) or more than 1 MiB (large pool). Freed blocks merge with free neighbours of their segment;
segments stay. With expandable segments a pool is one range of addresses, mapped as it is needed in pages of 2 or 20
MiB, and all that is over is cut off; the free block before what is not mapped counts as the largest of all.
(c10/cuda/CUDACachingAllocator.cpp; its defaults, one stream, memory that suffices.)

Not measured on a GPU: it follows the source.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from tarsia.plan.ledger import Block

MIB: Final = 2**20
GRAIN: Final = 512
"""Every request is of so many bytes times a whole number (kMinBlockSize)."""
SMALL: Final = MIB
"""The largest request of the small pool (kSmallSize)."""
SMALL_SEGMENT: Final = 2 * MIB
LARGE_SEGMENT: Final = 20 * MIB
OWN_SEGMENT: Final = 10 * MIB
"""Requests from which a segment is made for one alone (kMinLargeAlloc)."""
WHOLE: Final = 2 * MIB
"""Such segments are of whole ones of these (kRoundLarge)."""
GAP: Final = 1 << 50
"""Between two segments, so that their blocks never merge."""


def rounded(size: int) -> int:
    """Bytes that a request of ``size`` above 0 takes at least."""
    return max(GRAIN, -(-size // GRAIN) * GRAIN)


def segment_of(size: int) -> int:
    """Bytes that are taken from the device for a rounded request that nothing free holds."""
    if size <= SMALL:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < OWN_SEGMENT else -(-size // WHOLE) * WHOLE


@dataclass(slots=True)
class _Pool:
    """Free blocks by size and address, and by where they begin and end; ``least`` is what is worth cutting off."""

    small: bool
    least: int
    by_size: list[tuple[int, int]] = field(default_factory=list)
    begins: dict[int, int] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)
    mapped: int = 0

    def add(self, begin: int, end: int) -> None:
        """A free block, merged with those that touch it."""
        if begin in self.ends:
            first = self.ends[begin]
            self.take(first, begin)
            begin = first
        if end in self.begins:
            last = self.begins[end]
            self.take(end, last)
            end = last
        insort(self.by_size, (end - begin, begin))
        self.begins[begin], self.ends[end] = end, begin

    def take(self, begin: int, end: int) -> None:
        """Free no more."""
        del self.by_size[bisect_left(self.by_size, (end - begin, begin))]
        del self.begins[begin], self.ends[end]

    def best(self, size: int, last: int | None) -> tuple[int, int] | None:
        """The smallest free block of at least ``size``, the one that ends at ``last`` only where there is no other."""
        place = bisect_left(self.by_size, (size, -1))
        fits = self.by_size[place : place + 2]
        blocks = [(begin, begin + held) for held, begin in fits]
        return next((block for block in blocks if block[1] != last), blocks[0] if blocks else None)


class Allocator:
    """``allocated`` and ``reserved`` bytes now, and the most of each so far.

    ``allocated`` are the blocks as they were handed out: with what was too little to be cut off.
    """

    def __init__(self, expandable: bool = False) -> None:
        self.expandable = expandable
        self.allocated = self.reserved = self.most_allocated = self.most_reserved = 0
        self._pools = (_Pool(True, GRAIN), _Pool(False, GRAIN if expandable else SMALL + 1))
        self._held: dict[int, tuple[int, _Pool]] = {}
        self._segments = 0

    def allocate(self, size: int) -> int:
        """Hand out ``size`` bytes, more than 0. Returns their address."""
        if size <= 0:
            raise ValueError(f"{size} bytes")
        wanted = rounded(size)
        pool = self._pools[wanted > SMALL]
        found = self._free(pool, wanted) or self._new(pool, wanted)
        begin, end = found
        pool.take(begin, end)
        if end - begin - wanted >= pool.least:
            pool.add(begin + wanted, end)
            end = begin + wanted
        self._held[begin] = (end, pool)
        self.allocated += end - begin
        self.most_allocated = max(self.most_allocated, self.allocated)
        return begin

    def free(self, address: int) -> None:
        """Take a block back. Raises KeyError for an address that nothing was handed out at."""
        end, pool = self._held.pop(address)
        self.allocated -= end - address
        pool.add(address, end)

    def _free(self, pool: _Pool, wanted: int) -> tuple[int, int] | None:
        return pool.best(wanted, GAP * (1 + pool.small) + pool.mapped if self.expandable else None)

    def _new(self, pool: _Pool, wanted: int) -> tuple[int, int]:
        """More from the device: a segment, or pages behind those that the pool has."""
        if not self.expandable:
            self._segments += 1
            begin, size = self._segments * GAP, segment_of(wanted)
            pool.add(begin, begin + size)
        else:
            first = GAP * (1 + pool.small)
            last = first + pool.mapped
            page = SMALL_SEGMENT if pool.small else LARGE_SEGMENT
            begin = pool.ends.get(last, last)
            size = -(-(wanted - (last - begin)) // page) * page
            pool.mapped += size
            pool.add(last, last + size)
        self.reserved += size
        self.most_reserved = max(self.most_reserved, self.reserved)
        return begin, pool.begins[begin]


@dataclass(frozen=True, slots=True)
class Taken:
    """The most bytes handed out, and taken from the device, over blocks that came and went."""

    allocated: int
    reserved: int


def replay(blocks: Sequence[Block], end: int, expandable: bool = False, first: Sequence[int] = ()) -> Taken:
    """Hand out and take back ``blocks`` in the order of their moments up to ``end``.

    ``first`` are sizes that are taken before all and stay: workspaces.
    """
    device = Allocator(expandable)
    for size in first:
        device.allocate(size)
    places: dict[int, int] = {}
    changes = [(b.born, 1, n) for n, b in enumerate(blocks) if b.size and b.born <= end]
    changes += [(b.died, 0, n) for n, b in enumerate(blocks) if b.size and b.died <= end]
    for _, arrives, n in sorted(changes):
        if arrives:
            places[n] = device.allocate(blocks[n].size)
        else:
            device.free(places.pop(n))
    return Taken(device.most_allocated, device.most_reserved)
