"""How an optimiser's states lie in pages: pieces of tensors, one after the other, each with both of its moments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from tarsia.quant.eight_bits import BLOCK, blocks

Bits = Literal[32, 8]
CHUNK: Final = 1 << 18
"""Numbers of a tensor that are taken out of 8 bits at a time: what is beside the states then stays small."""
LINE: Final = 16
"""Float32 numbers in a processor's cache line: where pieces and moments begin, so that kernels see aligned memory."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Numbers ``begin`` to ``end`` of a tensor in the order of memory; their moments are at ``offset`` of a page."""

    tensor: int
    begin: int
    end: int
    offset: int
    bits: Bits
    last: bool
    """Whether the tensor ends here."""

    @property
    def count(self) -> int:
        return self.end - self.begin

    def moments(self, page: Tensor) -> tuple[Tensor, Tensor]:
        """Both moments in 32 bits: float32 [count] each, in the page itself."""
        second = self.offset + _aligned(self.count)
        return page[self.offset : self.offset + self.count], page[second : second + self.count]

    def codes(self, page: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In 8 bits, in the page: codes uint8 [count] and scales float32 [blocks] of each moment."""
        codes, scales = _aligned(-(-self.count // 4)), _aligned(blocks(self.count))
        found = []
        for start in (self.offset, self.offset + codes + scales):
            found.append(page[start : start + codes].view(torch.uint8)[: self.count])
            found.append(page[start + codes : start + codes + blocks(self.count)])
        return found[0], found[1], found[2], found[3]


@dataclass(frozen=True, slots=True)
class Page:
    """Pieces that come and go together; ``size`` in float32 numbers."""

    index: int
    size: int
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        return f"page {self.index}"


def room_for(count: int, bits: Bits) -> int:
    """Float32 numbers that both moments of ``count`` numbers take in a page."""
    if bits == 32:
        return 2 * _aligned(count)
    return 2 * (_aligned(-(-count // 4)) + _aligned(blocks(count)))


def lay(tensors: Sequence[tuple[int, Bits]], limit: int) -> tuple[Page, ...]:
    """Pages of at most ``limit`` float32 numbers for tensors of so many numbers and bits, in their order.

    A tensor is cut at multiples of 256 numbers, so that blocks of 8 bits stay whole and a kernel's vectors begin where
    they would in the whole tensor: the same bits come out.
    """
    assert limit >= room_for(BLOCK, 32), "a page holds a block"
    pages: list[Page] = []
    pieces: list[Piece] = []
    used = 0
    for tensor, (count, bits) in enumerate(tensors):
        begin = 0
        for end in _ends(count, bits):
            while begin < end:
                take = _fitting(end - begin, bits, limit - used)
                if not take:
                    pages.append(Page(len(pages), used, tuple(pieces)))
                    pieces, used = [], 0
                    continue
                pieces.append(Piece(tensor, begin, begin + take, used, bits, begin + take == count))
                used += room_for(take, bits)
                begin += take
    if pieces:
        pages.append(Page(len(pages), used, tuple(pieces)))
    return tuple(pages)


def _ends(count: int, bits: Bits) -> Iterator[int]:
    if bits == 8:
        yield from range(CHUNK, count, CHUNK)
    yield count


def _fitting(count: int, bits: Bits, room: int) -> int:
    """How many of ``count`` numbers fit into a page's ``room``: all, or a multiple of 256, or 0."""
    if room_for(count, bits) <= room:
        return count
    each = room_for(BLOCK, 32) if bits == 32 else BLOCK // 2 + 2
    take = max(0, (room if bits == 32 else room - 4 * LINE) // each * BLOCK)
    return min(take, (count - 1) // BLOCK * BLOCK)


def _aligned(count: int) -> int:
    return -(-count // LINE) * LINE
