"""A low-rank update that is added to a product inside the kernel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """``scale`` low up^T, added to a product of the shape [m, lines].

    ``low`` [m, rank] is contiguous, ``up`` [lines, rank] has any strides; both in the dtype of the product. LoRA's way
    there has low = x A^T and up = B, its way back low = dy B and up = A^T (`tarsia.core.linear`).
    """

    low: Tensor
    up: Tensor
    scale: float


def factors(update: Update | None) -> tuple[Tensor | None, Tensor | None, tuple[float, int, int, int], int]:
    """What a kernel takes: low, up; the scale, the rank, up's strides; the rank that a tile has room for."""
    if update is None:
        return None, None, (0.0, 0, 0, 0), 16
    rank = update.low.shape[-1]
    room = max(16, 1 << (rank - 1).bit_length())
    return update.low, update.up, (float(update.scale), rank, update.up.stride(0), update.up.stride(1)), room
