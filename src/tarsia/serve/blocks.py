"""The memory of keys and values, in blocks: which are free, whose are shared, and what was read before.

A block that is full is known by all that its contents depend on: the tokens up to its end, the pictures among them and
the adapter. Who begins a row with the same finds it here. Blocks that nobody uses keep their contents until they are
needed for others, those that were used last for longest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256

import numpy as np


class Blocks:
    """``count`` blocks of ``size`` tokens each, numbered from 0."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self.forgotten = 0
        """Blocks whose contents could have been found, and gave way to others."""
        self._free = list(range(count - 1, -1, -1))
        self._users = [0] * count
        self._known: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that can be taken now."""
        return len(self._free) + len(self._idle)

    def needed(self, tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-tokens // self.size)

    def take(self, count: int) -> list[int] | None:
        """So many blocks, whose contents are nothing; None, and nothing is taken, where there are not as many."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            self.forgotten += not self._free
            block = self._free.pop() if self._free else self._forget(next(iter(self._idle)))
            self._users[block] = 1
            taken.append(block)
        return taken

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks known by these keys, up to the first that is not; all are in use from now on."""
        found = []
        for key in keys:
            block = self._known.get(key)
            if block is None:
                break
            self._users[block] += 1
            self._idle.pop(block, None)
            found.append(block)
        return found

    def know(self, block: int, key: bytes) -> None:
        """Let a full block be found by ``key``; where another is already, that one stays."""
        if key not in self._known and block not in self._keys:
            self._known[key] = block
            self._keys[block] = key

    def give(self, blocks: Sequence[int]) -> None:
        """Nobody uses these, as far as whoever took or found them is concerned. The last are the first to go."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._keys:
                self._idle[block] = None
            else:
                self._free.append(block)

    def clear(self) -> None:
        """Forget what the blocks hold that nobody uses."""
        while self._idle:
            self._free.append(self._forget(next(iter(self._idle))))

    def _forget(self, block: int) -> int:
        del self._idle[block]
        del self._known[self._keys.pop(block)]
        return block


def chain(
    root: bytes, ids: Sequence[int], pictures: Sequence[int], keys: Sequence[bytes], size: int, skip: int
) -> list[bytes]:
    """The keys of a row's full blocks of ``size`` tokens.

    ``root`` stands for all that is not in the row: the adapter. ``pictures`` tells which picture each of ``ids`` is of
    (-1: none), ``keys`` what each picture is. ``skip`` tokens of the first blocks are the adapter's own lead.
    """
    made, last = [], sha256(root).digest()
    owners, tokens = np.asarray(pictures, dtype=np.int64), np.asarray(ids, dtype=np.int64)
    for end in range(size, skip + len(tokens) + 1, size):
        start, stop = max(0, end - size - skip), max(0, end - skip)
        digest = sha256(last)
        digest.update(tokens[start:stop].tobytes())
        digest.update(owners[start:stop].tobytes())
        for one in np.unique(owners[start:stop]):
            digest.update(keys[one] if one >= 0 else b"-")
        last = digest.digest()
        made.append(last)
    return made
