"""What the changes of one site have to do with each other, in sums that add up over sites.

Of factors nothing of a weight's size is made for products and angles; signs go through it a tile at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

import torch
from torch import Tensor

from tarsia.merge.delta import Delta
from tarsia.merge.thin import spectrum

ENERGY: Final = 0.9
"""Share of a change's square that its subspace holds."""
WIDEST: Final = 64
"""Directions of a subspace, at most."""
TILE: Final = 1 << 20
"""Numbers of a weight that are looked at together."""


@dataclass(eq=False)
class Sums:
    """What adds up over sites. n adapters: all are [n], [n, n], or numbers."""

    inner: Tensor
    mass: Tensor
    lost: Tensor
    entries: Tensor
    """Numbers that more than one changes, and those of them where one loses."""
    both: Tensor
    pair_mass: Tensor
    pair_lost: Tensor
    shared: Tensor
    matrices: Tensor
    angles: Tensor
    """[4, n, n]: overlap of columns, of rows, and what chance gives of each; summed over sites."""
    sites: int = 0

    @classmethod
    def none(cls, n: int) -> Sums:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        return cls(
            inner=zeros(n, n),
            mass=zeros(n),
            lost=zeros(n),
            entries=zeros(2),
            both=zeros(n, n),
            pair_mass=zeros(n, n),
            pair_lost=zeros(n, n),
            shared=zeros(n, n),
            matrices=zeros(n, n),
            angles=zeros(4, n, n),
        )

    def __add__(self, other: Sums) -> Sums:
        return Sums(**{name: value + getattr(other, name) for name, value in vars(self).items()})


def site_sums(deltas: Sequence[Delta | None]) -> Sums:
    """All that is told of one site."""
    sums = Sums.none(len(deltas))
    sums.sites = 1
    changes = {i: one for i, delta in enumerate(deltas) if delta is not None and (one := _weight(delta)) is not None}
    for i, one in changes.items():
        sums.inner[i, i] = one.norm**2
    for (i, one), (j, other) in combinations(changes.items(), 2):
        sums.inner[i, j] = product(one, other)
        sums.both[i, j], sums.both[j, i] = one.norm**2, other.norm**2
        sums.shared[i, j] = 1
    if changes:
        signs(changes, sums)
    _subspaces({i: one for i, one in changes.items() if _matrix(one)}, sums)
    return sums


def _weight(delta: Delta) -> Delta | None:
    """What a patch changes of the weight, or, where that stays, of the bias; None where it changes nothing."""
    if not delta.still and delta.norm > 0:
        return Delta(delta.up, delta.down, delta.whole)
    if delta.bias is not None and bool(delta.bias.any()):
        return Delta(whole=delta.bias)
    return None


def _matrix(delta: Delta) -> bool:
    return delta.factored or (delta.whole is not None and delta.whole.ndim == 2)


def product(one: Delta, other: Delta) -> float:
    """Sum over all numbers of the one change times the other, from factors where there are some."""
    if one.up is not None and one.down is not None and other.up is not None and other.down is not None:
        return float(((one.up.T @ other.up) * (one.down @ other.down.T)).sum())
    if one.up is None and one.whole is not None and other.up is not None and other.down is not None:
        return float(((one.whole @ other.down.T) * other.up).sum())
    if one.up is not None:
        return product(other, one)
    assert one.whole is not None and other.whole is not None
    return float((one.whole * other.whole).sum())


def signs(changes: Mapping[int, Delta], sums: Sums) -> None:
    """Which sign wins at each number, and what is lost to it: a tile of rows at a time, in float32."""
    length, width = _sizes(next(iter(changes.values())))
    step = max(1, TILE // max(1, width * len(changes)))
    for start in range(0, length, step):
        tile = torch.stack([_rows(delta, slice(start, start + step)) for delta in changes.values()])
        size = tile.abs()
        losing = (tile.sign() != tile.sum(0).sign()) & (tile != 0)
        shared = (tile != 0).sum(0) > 1
        sums.entries += torch.tensor([int(shared.sum()), int((losing.any(0) & shared).sum())], dtype=torch.float64)
        for k, i in enumerate(changes):
            sums.mass[i] += float(size[k].sum(dtype=torch.float64))
            sums.lost[i] += float((size[k] * losing[k]).sum(dtype=torch.float64))
        for (k, i), (m, j) in combinations(enumerate(changes), 2):
            apart = tile[k].sign() * tile[m].sign() < 0
            # the smaller of two loses; of two that cancel each other neither has the sum's sign
            less = torch.minimum(size[k], size[m]) * apart * (1 + (size[k] == size[m]).float())
            sums.pair_lost[i, j] += float(less.sum(dtype=torch.float64))
            sums.pair_mass[i, j] += float((size[k] + size[m]).sum(dtype=torch.float64))


def _sizes(delta: Delta) -> tuple[int, int]:
    """Rows of a change, and numbers in each."""
    if delta.up is not None and delta.down is not None:
        return len(delta.up), delta.down.shape[1]
    assert delta.whole is not None
    return len(delta.whole), delta.whole.numel() // len(delta.whole)


def _rows(delta: Delta, rows: slice) -> Tensor:
    """Rows of a change, [rows, the rest], in float32."""
    if delta.up is not None and delta.down is not None:
        return delta.up[rows].float() @ delta.down.float()
    assert delta.whole is not None
    return delta.whole[rows].float().flatten(1) if delta.whole.ndim > 1 else delta.whole[rows].float()[:, None]


def _subspaces(changes: Mapping[int, Delta], sums: Sums) -> None:
    bases = {i: subspaces(delta) for i, delta in changes.items()} if len(changes) > 1 else {}
    for i, j in combinations(bases, 2):
        sums.matrices[i, j] += 1
        for side in (0, 1):
            one, other = bases[i][side], bases[j][side]
            sums.angles[side, i, j] += float(cosines(one, other).square().mean())
            sums.angles[side + 2, i, j] += max(one.shape[1], other.shape[1]) / one.shape[0]


def subspaces(delta: Delta) -> tuple[Tensor, Tensor]:
    """Orthonormal bases [out, k] and [in, k] of the directions that hold ``ENERGY`` of a change, at most ``WIDEST``."""
    found = spectrum(delta, WIDEST)
    held = found.values.square().cumsum(0) / found.norm**2
    count = min(WIDEST, len(held), int((held < ENERGY).sum()) + 1)
    return found.left[:, :count], found.right[:count].T


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """Cosines of the principal angles between two subspaces, from orthonormal bases [n, k] and [n, m]: min(k, m)."""
    found: Tensor = torch.linalg.svdvals(one.T @ other)
    return found.clamp(max=1.0)
