"""Fewer numbers in each delta: by magnitude (TIES, arXiv:2306.01708, section 3) or at random (DARE, 2311.03099).

Pure functions of a stack [n, ...], one entry an adapter; each entry is trimmed by itself. These are the specification
of the native kernel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tarsia.core.errors import MergeError
from tarsia.merge.draws import kept_at


class Sparsify(Protocol):
    """One way to have fewer numbers: ``seeds`` are one number an entry of ``stack``, for what is drawn."""

    def __call__(self, stack: Tensor, density: float, seeds: Sequence[int]) -> Tensor:
        """A tensor like ``stack``."""
        ...


def kept(numbers: int, density: float) -> int:
    """How many of so many numbers are left at a density: int(density * numbers), as in PEFT and mergekit."""
    return int(density * numbers)


def check_density(density: float) -> None:
    """Raise MergeError for a share that is none, or that leaves nothing."""
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise MergeError(
            "A density is the share of numbers that are kept.",
            given=repr(density),
            allowed="above 0, at most 1",
            do="write 0.2 for a fifth, say",
        )


def not_finite() -> MergeError:
    """What is raised for an infinity or a NaN: no order of magnitudes has a place for it."""
    return MergeError(
        "What is to be merged holds numbers that are none.",
        given="an infinity or a NaN",
        allowed="finite numbers",
        do="train or export that adapter again",
    )


def thresholds(stack: Tensor, density: float) -> Tensor:
    """The magnitude of the ``kept``-th largest number of each entry of ``stack`` [n, ...]: [n]; inf where none is.

    Raises MergeError for an infinity or a NaN.
    """
    if not bool(stack.isfinite().all()):
        raise not_finite()
    magnitudes = stack.abs().flatten(1)
    count = kept(magnitudes.shape[1], density)
    if count == 0:
        return magnitudes.new_full((len(stack),), torch.inf)
    return torch.stack([row.topk(count, sorted=False).values.amin() for row in magnitudes])


def magnitude(stack: Tensor, density: float, seeds: Sequence[int] = ()) -> Tensor:
    """Each entry with its int(density * numbers) numbers of the largest magnitude, zeros elsewhere (2306.01708).

    Where magnitudes are equal at the threshold, those that come first in memory are kept, so exactly so many are.
    """
    if density >= 1:
        return stack
    rows = stack.flatten(1)
    count = kept(rows.shape[1], density)
    out = torch.zeros_like(rows)
    for row, level, into in zip(rows, thresholds(stack, density), out, strict=True):
        magnitudes = row.abs()
        above, level_ones = magnitudes > level, magnitudes == level
        spare = count - int(above.sum())
        if int(level_ones.sum()) > spare:
            level_ones &= level_ones.cumsum(0) <= spare
        into.copy_(row * (above | level_ones))
    return out.view_as(stack)


def dare(stack: Tensor, density: float, seeds: Sequence[int]) -> Tensor:
    """Each number kept with probability ``density`` and divided by it, so the mean stays (2311.03099).

    Entry i's mask is drawn from ``seeds[i]`` and the places of its numbers alone (`draws`): it does not depend on what
    else is merged, nor in which order.
    """
    masks = []
    for entry, seed in zip(stack, seeds, strict=True):
        masks.append(kept_at(seed, entry.numel(), density).view(entry.shape))
    return stack * torch.stack(masks) / density


def seed_for(seed: int, path: str, digest: bytes, what: str) -> int:
    """The seed of one adapter's mask at one tensor: from the user's, the place and the delta's own numbers."""
    text = f"{seed} {path} {what} ".encode() + digest
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little", signed=True)


SPARSIFY: dict[str, Callable[..., Tensor]] = {"magnitude": magnitude, "dare": dare}
"""Every way by name; ``none`` is none of them."""
