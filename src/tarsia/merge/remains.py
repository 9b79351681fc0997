"""How much of an intended change is there after a weight was rounded: measured by site, and in all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tarsia.core.errors import MergeError

SAMPLED = 8
"""Rows of a large weight, evenly spaced, that what remains is measured on, and as many that change most."""
WHOLE = 1 << 16
"""Numbers of a weight that is measured whole: of a larger one that takes longer than to fold it."""

_AT_ONCE = 1 << 20
"""Numbers that are looked at together."""
EPSILON = 2.0**-23
"""What computing in float32 moves a number by, as a share of it: sums in another order differ so."""


@dataclass(frozen=True, slots=True)
class Remains:
    """Sums over ``count`` numbers of a change d that was intended, and of what the stored numbers hold of it.

    ``was`` are the numbers that the file would hold with no change: those before, rounded as the changed ones are.
    ``intended`` is |d|^2, ``along`` <stored - was, d>, ``astray`` |stored - was - d|^2, ``noise``
    |stored - (before + d)|^2, ``weight`` |before|^2. ``sample`` is the number of rows that were looked at; None: all.
    """

    count: int
    intended: float
    along: float
    astray: float
    noise: float
    weight: float
    sample: int | None = None

    @classmethod
    def of(cls, before: Tensor, exact: Tensor, stored: Tensor, was: Tensor | None = None) -> Remains:
        """From the numbers before, those intended and those written, of one shape; without ``was`` those before."""
        given = (before, exact, stored) if was is None else (before, exact, stored, was)
        flat = [t.detach().reshape(-1) for t in given]
        found = NOTHING
        for first in range(0, flat[0].numel(), _AT_ONCE):
            found += cls._piece(*(t[first : first + _AT_ONCE] for t in flat))
        return found

    @classmethod
    def _piece(cls, before: Tensor, exact: Tensor, stored: Tensor, was: Tensor | None = None) -> Remains:
        """In float64; all products are one of matrices, for a few numbers' sake that is what takes time."""
        held = torch.empty(4 if was is None else 6, before.numel(), dtype=torch.float64)
        base, change, changed, off = held[:4]
        base.copy_(before)
        off.copy_(stored).sub_(change.copy_(exact))
        change -= base
        torch.add(change, off, out=changed)
        if was is not None:
            changed.copy_(stored).sub_(held[5].copy_(was))
            torch.sub(changed, change, out=held[4])
        sums = (held @ held.T).tolist()
        astray = 3 if was is None else 4
        return cls(before.numel(), sums[1][1], sums[1][2], sums[astray][astray], sums[3][3], sums[0][0])

    def spread(self, rows: int, sample: int, intended: float) -> Remains:
        """What ``sample`` of ``rows`` rows say of all of them, whose change is known: ``intended``.

        The share and what strays are those of the sample; where nothing of a change is seen there, nothing is left.
        """
        more, change = rows / sample, intended / self.intended if self.intended else 0.0
        return Remains(
            round(self.count * more),
            intended,
            self.along * change,
            self.astray * change if self.intended else intended,
            self.noise * more,
            self.weight * more,
            sample,
        )

    def __add__(self, other: Remains) -> Remains:
        return Remains(
            self.count + other.count,
            self.intended + other.intended,
            self.along + other.along,
            self.astray + other.astray,
            self.noise + other.noise,
            self.weight + other.weight,
        )

    @property
    def values(self) -> dict[str, float | int | None]:
        """As a record has them; ``share`` is None where no change was intended, so none was measured."""
        share = self.share if self.intended else None
        return {"share": share, "size": self.size, "stray": self.stray, "sample": self.sample}

    @property
    def share(self) -> float:
        """The part of the change that is left: its projection on what was intended. 1 where none was."""
        return self.along / self.intended if self.intended else 1.0

    @property
    def stray(self) -> float:
        """What rounding did beside the change, as a share of it: |stored - was - d| / |d|. 0 where none was intended.

        Where numbers lie on no grid, a change far below its steps is kept in the mean, by a few numbers that move a
        whole step: the share is 1, and this is large. Where all of it is lost this is 1.
        """
        return math.sqrt(self.astray / self.intended) if self.intended else 0.0

    @property
    def clean(self) -> float:
        """The part of what differs from ``was``, by squares, that is the change and not strayed. 1 where none was."""
        return self.intended / (self.intended + self.astray) if self.intended else 1.0

    @property
    def size(self) -> float:
        """The change as a share of the weight, |d| / |before|; 0 where there is no weight."""
        return math.sqrt(self.intended / self.weight) if self.weight else 0.0

    @property
    def off(self) -> float:
        """The root of the mean square of what rounding moved a number by: in the file, and at least float32's own."""
        return math.sqrt((self.noise + EPSILON**2 * (self.weight + self.intended)) / self.count) if self.count else 0.0


NOTHING = Remains(0, 0.0, 0.0, 0.0, 0.0, 0.0)


def check_rounded(name: str, exact: Tensor, stored: Tensor) -> None:
    """Raise MergeError where a number of ``stored`` is further from the exact one than rounding to its dtype explains.

    What float32 makes of the sums before it is allowed on top, as a share of the largest number.
    """
    form = torch.finfo(stored.dtype)
    exact, stored = exact.detach().reshape(-1), stored.detach().reshape(-1)
    slack: float | None = None
    for first in range(0, exact.numel(), _AT_ONCE):
        meant = exact[first : first + _AT_ONCE]
        off = torch.sub(stored[first : first + _AT_ONCE], meant).abs_()
        size = meant.abs()
        if slack is None:
            largest = size if len(size) == len(exact) else exact.abs()
            slack = 64 * EPSILON * float(largest.max()) + form.smallest_normal * form.eps
        if not bool((off <= size.mul_(0.51 * form.eps).add_(slack)).all()):
            raise MergeError(
                f"What would be written of {name} is not what its fold is.",
                given=f"a number is {float(off.max()):.4g} off",
                allowed=f"what rounding to {str(stored.dtype).removeprefix('torch.')} does",
                do="report this; nothing was left behind",
            )


def of_all(parts: Mapping[str, Remains]) -> Remains:
    """Of all parameters together, each as its numbers weigh."""
    return sum(parts.values(), NOTHING)


def worst(parts: Mapping[str, Remains], count: int = 3) -> list[tuple[str, Remains]]:
    """The changed parameters that keep least of their change."""
    changed = [(name, one) for name, one in parts.items() if one.intended]
    return sorted(changed, key=lambda held: held[1].share)[:count]


def sampled(shape: Sequence[int], squares: Tensor) -> Tensor | None:
    """Which rows of a weight of ``shape`` [out, in] a sample takes, whose changes have the ``squares`` [out].

    int64: some evenly spaced from the first to the last, and those that change most: a change in few rows is seen.
    None: all, where the weight is small.
    """
    rows = shape[0]
    if rows * shape[1] <= WHOLE or rows <= 2 * SAMPLED:
        return None
    even = (round(place * (rows - 1) / (SAMPLED - 1)) for place in range(SAMPLED))
    return torch.tensor(sorted({*even, *squares.topk(SAMPLED, sorted=False).indices.tolist()}))
