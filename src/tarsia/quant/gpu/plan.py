"""Which kernel multiplies, and with which tiles: a function of the shapes and the GPU alone.

Nothing is timed here. A tuner that picks by the clock may pick anew in another process; the sums are then added in
another order, and a run that is repeated has other bits. ``bench/cases/quant_gpu.py`` times the alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

ARENA: Final = 64 << 20
"""Bytes of a slice of the weight that is unpacked for torch's product. 4096 x 4096 numbers of 16 bits are 32 MiB."""

BLOCKS: Final = (32, 64, 128, 256)
"""Numbers to a scale that the products take; others are unpacked first."""

NUMBERS: Final = 8192
"""That one program unpacks."""

LONGEST_RANK: Final = 128
"""Up to which rank a low-rank update is added inside the kernel: its factors are held in registers whole."""

_SPLITS: Final = 8
_BEHIND: Final = 3  # programs to a multiprocessor that hide each other's waiting


@dataclass(frozen=True, slots=True)
class Tiles:
    """What one program of a kernel holds, and how many share a sum."""

    rows: int
    """Rows of the weight."""
    blocks: int
    """Blocks of each row, at a time or in all: what the sum does not run over is fixed."""
    batch: int
    """Rows of x."""
    splits: int
    """Into how many parts the sum is cut, each a program's; a second kernel adds them, first to last."""
    warps: int
    stages: int


def few(dtype: torch.dtype, capability: int) -> int:
    """Up to how many rows of x the packed weight is multiplied; above, it is unpacked and torch multiplies.

    ``capability`` is the GPU's major number. Where memory and matrix units are fastest (9, 10), unpacking costs least;
    float32 has no matrix unit that keeps all its bits.
    """
    if dtype is torch.float32:
        return 16
    return 32 if capability in (9, 10) else 64


def vector(rows: int, blocks: int, block: int, processors: int) -> Tiles:
    """Tiles for one row of x and a weight of ``rows`` rows of ``blocks`` blocks, on a GPU of ``processors``."""
    held = max(1, 1024 // block)
    return Tiles(8, held, 1, _splits(-(-rows // 8), -(-blocks // held), processors), warps=4, stages=1)


def forward(m: int, rows: int, blocks: int, block: int, processors: int) -> Tiles:
    """Tiles for x W^T with ``m`` rows of x."""
    held = max(1, 128 // block)
    programs = -(-rows // 64) * -(-m // _batch(m))
    return Tiles(64, held, _batch(m), _splits(programs, -(-blocks // held), processors), warps=4, stages=3)


def backward(m: int, rows: int, blocks: int, block: int, processors: int) -> Tiles:
    """Tiles for y W with ``m`` rows of y: the sum runs over the weight's rows."""
    held = max(1, 128 // block)
    programs = -(-blocks // held) * -(-m // _batch(m))
    return Tiles(32, held, _batch(m), _splits(programs, -(-rows // 32), processors), warps=4, stages=3)


def _batch(m: int) -> int:
    """Rows of x in a tile: the smallest that the matrix units take, 16, to 64."""
    return 16 if m <= 16 else 32 if m <= 32 else 64


def _splits(programs: int, steps: int, processors: int) -> int:
    """Parts of a sum of ``steps`` so that every processor has programs enough, of at least four steps each."""
    wanted = -(-_BEHIND * processors // programs)
    return max(1, min(wanted, steps // 4, _SPLITS))


def slices(lines: int, size: int, itemsize: int, step: int) -> tuple[tuple[int, int], ...]:
    """``lines`` of ``size`` numbers in equal runs that the arena holds, each of whole ``step`` lines: (first, last)."""
    parts = max(1, -(-lines * size * itemsize // ARENA))
    length = max(step, -(-lines // parts // step) * step)
    return tuple((first, min(first + length, lines)) for first in range(0, lines, length))
