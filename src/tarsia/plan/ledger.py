"""The life of every block of memory in a stretch of computation: when it came, how large it was, when it went."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Final

from torch import Tensor, UntypedStorage


class Category(StrEnum):
    """What a block of memory is for."""

    WEIGHTS = "weights"
    QUANTISED = "quantised"
    PATCHES = "patches"
    GRADIENTS = "gradients"
    STATES = "states"
    KERNELS = "kernels"
    INPUTS = "inputs"
    ACTIVATIONS = "activations"
    LOSS = "loss"
    CACHE = "cache"
    TEMPORARY = "temporary"


FOREVER: Final = 1 << 62
"""When a block goes that is still there at the end."""


@dataclass(slots=True, eq=False)
class Block:
    """One storage: ``size`` in bytes, the moments of its birth and death, and what it is for, once that is known."""

    size: int
    born: int
    phase: str
    op: str
    died: int = FOREVER
    category: Category | None = None
    ghost: bool = False
    width: int = 0
    """The last size of the tensor that it was made for."""
    outside: bool = False
    """Whether it lies elsewhere than in memory of torch's allocator: in numpy's, or in a file that is mapped."""

    def at(self, moment: int) -> bool:
        """Whether it is there."""
        return self.born <= moment < self.died


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a phase begins."""

    moment: int
    phase: str


@dataclass(slots=True, eq=False)
class Ledger:
    """Blocks in the order of their birth. A moment is the number of births and deaths before it."""

    blocks: list[Block] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    now: int = 0
    phase: str = ""
    _held: dict[int, Block] = field(default_factory=dict)
    _watches: dict[int, weakref.ref[UntypedStorage]] = field(default_factory=dict)

    def block(self, tensor: Tensor) -> Block | None:
        """The block of a tensor's storage, where it has been seen."""
        return self._held.get(tensor.untyped_storage()._cdata)

    def see(self, tensor: Tensor, op: str, category: Category | None = None) -> Block:
        """Note a tensor's storage; nothing happens where it is known already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        found = self._held.get(key)
        if found is None:
            found = Block(storage.nbytes(), self.now, self.phase, op, category=category)
            found.width = tensor.shape[-1] if tensor.ndim else 1
            found.outside = not storage.resizable()
            self._note(found)
            self._held[key] = found
            self._watches[key] = weakref.ref(storage, partial(self._gone, key, found))
        return found

    def _gone(self, key: int, block: Block, _: object) -> None:
        if self._held.get(key) is block:
            del self._held[key], self._watches[key]
        block.died = self.now
        self.now += 1

    def restart(self) -> None:
        """Forget what was noted up to now. What is there is noted again when it arrives."""
        self._absent = {id(block): block for block in self._held.values()}
        self.blocks.clear()
        self._heirs.clear()
        self.marks[:] = [Mark(0, self.phase)]
        self.now = 0

    def arrive(self, tensor: Tensor, category: Category) -> Block | None:
        """Note a tensor that was there before the ledger began again; None where its storage has arrived already."""
        block = self.see(tensor, "read")
        if self._absent.pop(id(block), None) is None:
            return None
        block.category = category
        self._note(block)
        return block

    def rest(self) -> None:
        """Note all that was there before the ledger began again and has not arrived."""
        for block in self._held.values():
            if self._absent.pop(id(block), None) is not None:
                self._note(block)
        self._absent.clear()

    def _note(self, block: Block) -> None:
        block.born, block.phase = self.now, self.phase
        self.now += 1
        self.blocks.append(block)

    def scratch(self, size: int, op: str) -> None:
        """Note memory that an operation takes and gives back before it ends."""
        if size:
            self.blocks.append(Block(size, self.now, self.phase, op, self.now + 1, Category.TEMPORARY))
            self.now += 2

    def taken_over(self, new: Tensor, old: Tensor) -> None:
        """Say that ``new`` lies where ``old`` lay, if nobody else holds that."""
        self._heirs.append((self._held[new.untyped_storage()._cdata], self._held[old.untyped_storage()._cdata]))

    _heirs: list[tuple[Block, Block]] = field(default_factory=list)
    _absent: dict[int, Block] = field(default_factory=dict)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What is noted inside belongs to ``phase``."""
        before, self.phase = self.phase, phase
        self.marks.append(Mark(self.now, phase))
        try:
            yield
        finally:
            self.phase = before
            self.marks.append(Mark(self.now, before))

    def begin(self, phase: str) -> None:
        """What is noted from here on, until what is around it ends, belongs to ``phase``."""
        self.phase = phase
        self.marks.append(Mark(self.now, phase))

    def label(self, tensors: Iterable[Tensor], category: Category) -> int:
        """Say what these are for. Returns their bytes, each storage counted once."""
        found = {id(block): block for tensor in tensors if (block := self.block(tensor)) is not None}
        for block in found.values():
            block.category = category
        return sum(block.size for block in found.values())

    def settled(self) -> tuple[Block, ...]:
        """All blocks up to now. An heir is born when what it took over goes: in place, as where nobody looks on."""
        for heir, old in self._heirs:
            # nothing came between them: the old one was the sum's alone
            if old.died == heir.born + 1:
                heir.born, old.died = old.died, heir.born
        self._heirs.clear()
        return tuple(self.blocks)


def live(blocks: Sequence[Block], end: int) -> list[int]:
    """Live bytes after each moment 0..end."""
    changes = [0] * (end + 2)
    for block in blocks:
        changes[block.born] += block.size
        if block.died <= end:
            changes[block.died] -= block.size
    total, found = 0, []
    for change in changes[: end + 1]:
        total += change
        found.append(total)
    return found
