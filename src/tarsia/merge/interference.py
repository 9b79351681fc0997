"""What adapters would take from each other if they were summed: a report before they are merged.

Signs: at every number of a weight the weighted changes are added up; what has not the sum's sign is lost there, as TIES
counts it (arXiv:2306.01708, section 3). ``conflict`` is its share of all that changes, by magnitude. Two changes of one
size whose numbers have nothing to do with each other lose (sqrt 2 - 1) / (2 sqrt 2) = 14.6 %.

Subspaces: the directions that hold nine tenths of a change's square, on the side of what comes out (columns) and of
what goes in (rows). ``columns`` and ``rows`` are the mean squared cosines of the principal angles between two such
(Bjorck and Golub, 1973), 0 where all are at right angles and 1 where one holds the other; chance's stand beside them.

Of factors nothing of a weight's size is made for cosines and angles; signs go through it a tile at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from tarsia.adapter.fingerprint import Fingerprint
from tarsia.adapter.host import Host, Outline
from tarsia.adapter.value import Adapter
from tarsia.core.errors import MergeError
from tarsia.core.method import find
from tarsia.core.site import Component
from tarsia.merge.delta import Delta, Grounds, delta_of
from tarsia.merge.thin import spectrum

ENERGY: Final = 0.9
"""Share of a change's square that its subspace holds."""
WIDEST: Final = 64
"""Directions of a subspace, at most."""
TILE: Final = 1 << 20
"""Numbers of a weight that are looked at together."""

_FROZEN = ConfigDict(frozen=True, extra="forbid")


class Pair(BaseModel):
    """Two adapters at the ``sites`` that both change. ``cosine`` is of all these changes as one vector.

    ``conflict`` is what the two alone would lose, 0 to 1. Overlaps are means over the sites whose weights are matrices,
    None where there is none.
    """

    model_config = _FROZEN

    first: str
    second: str
    sites: int
    cosine: float
    conflict: float
    columns: float | None
    rows: float | None
    columns_chance: float | None
    rows_chance: float | None


class Place(BaseModel):
    """A part of the model: the whole, a component, one of its layers, or a site (``name`` is its path then).

    ``norms`` are the changes' Frobenius norms, adapter by adapter, weights applied. ``conflict`` is the share that all
    adapters together lose, ``entries`` the share of the numbers changed by more than one where one loses.
    """

    model_config = _FROZEN

    name: str
    component: Component | None
    layer: int | None
    sites: int
    norms: tuple[float, ...]
    conflict: float
    entries: float
    pairs: tuple[Pair, ...]


class Interference(BaseModel):
    """The report: everywhere, by component, by layer and by site.

    ``skipped`` are sites where a patch is no change of a weight (a bottleneck, a prompt): nothing is told of them.
    """

    model_config = _FROZEN

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    whole: Place
    components: tuple[Place, ...]
    layers: tuple[Place, ...]
    sites: tuple[Place, ...]
    skipped: tuple[str, ...]

    def json_text(self) -> str:
        """The whole report as one JSON object on one line."""
        return self.model_dump_json()


@dataclass(eq=False)
class _Sums:
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
    def none(cls, n: int) -> _Sums:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        square = (zeros(n, n) for _ in range(6))
        return cls(next(square), zeros(n), zeros(n), zeros(2), *square, zeros(4, n, n))

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(**{name: value + getattr(other, name) for name, value in vars(self).items()})


def interference(
    adapters: Mapping[str, Adapter], base: Host | Outline, weights: Sequence[float] | None = None
) -> Interference:
    """Hold two adapters or more, by name, beside each other, one site at a time.

    ``weights`` are those of the sum that is thought of (None: 1 each). Raises MergeError for fewer than two adapters,
    for weights that are none, and where no two change the same weight; BaseMismatch where their bases differ.
    """
    names = tuple(adapters)
    shares = tuple(1.0 for _ in names) if weights is None else tuple(float(w) for w in weights)
    if len(names) < 2 or len(shares) != len(names) or 0 in shares:
        raise MergeError(
            "Interference is between two adapters or more, each of a weight that is not 0.",
            given=f"{len(names)} adapters, weights {list(shares)}",
        )
    grounds = Grounds.of(base, _fingerprint(adapters, base))
    held = tuple(adapters.values())
    found: dict[str, _Sums] = {}
    skipped = []
    for path in (path for path in grounds.sites if any(path in one.patches for one in held)):
        patches = [one.patches.get(path) for one in held]
        if any(one is not None and not find(one.method).folds for one in patches):
            skipped.append(path)
            continue
        deltas = [None if one is None else delta_of(one, grounds, path) for one in patches]
        found[path] = _site([None if d is None else d.scaled(w) for d, w in zip(deltas, shares, strict=True)])
    if not any(float(sums.shared.triu(1).sum()) for sums in found.values()):
        raise MergeError(
            "No two of these adapters change the same weight, so there is nothing between them.",
            given=", ".join(names),
            do="merge them with task_arithmetic: it loses nothing",
        )
    return _report(names, shares, grounds, found, skipped)


def _fingerprint(adapters: Mapping[str, Adapter], base: Host | Outline) -> Fingerprint | None:
    """The base that all belong to, None where none says. Raises BaseMismatch where they, or ``base``, disagree."""
    known = {name: one.fingerprint for name, one in adapters.items() if one.fingerprint is not None}
    for (first, mark), (second, other) in combinations(known.items(), 2):
        mark.check(other, mine=first, theirs=second)
    for name, mark in known.items():
        if isinstance(base, Host):
            mark.check(base.fingerprint, mine=name, theirs=base.name)
    return next(iter(known.values()), None)


def _site(deltas: Sequence[Delta | None]) -> _Sums:
    """All that is told of one site."""
    sums = _Sums.none(len(deltas))
    sums.sites = 1
    changes = {i: one for i, delta in enumerate(deltas) if delta is not None and (one := _weight(delta)) is not None}
    for i, one in changes.items():
        sums.inner[i, i] = one.norm**2
    for (i, one), (j, other) in combinations(changes.items(), 2):
        sums.inner[i, j] = product(one, other)
        sums.both[i, j], sums.both[j, i] = one.norm**2, other.norm**2
        sums.shared[i, j] = 1
    if changes:
        _signs(changes, sums)
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


def _signs(changes: Mapping[int, Delta], sums: _Sums) -> None:
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


def _subspaces(changes: Mapping[int, Delta], sums: _Sums) -> None:
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
    return torch.linalg.svdvals(one.T @ other).clamp(max=1.0)


def _report(
    names: tuple[str, ...],
    weights: tuple[float, ...],
    grounds: Grounds,
    found: Mapping[str, _Sums],
    skipped: Sequence[str],
) -> Interference:
    by_component: dict[Component, _Sums] = {}
    by_layer: dict[tuple[Component, int], _Sums] = {}
    for path, sums in found.items():
        site = grounds.sites[path]
        none = _Sums.none(len(names))
        by_component[site.component] = by_component.get(site.component, none) + sums
        if site.layer is not None:
            key = (site.component, site.layer)
            by_layer[key] = by_layer.get(key, none) + sums
    every = _Sums.none(len(names))
    for sums in found.values():
        every = every + sums
    return Interference(
        adapters=names,
        weights=weights,
        whole=_place("everywhere", None, None, every, names),
        components=tuple(_place(str(c), c, None, sums, names) for c, sums in by_component.items()),
        layers=tuple(_place(f"{c}.{layer}", c, layer, sums, names) for (c, layer), sums in by_layer.items()),
        sites=tuple(
            _place(path, grounds.sites[path].component, grounds.sites[path].layer, sums, names)
            for path, sums in found.items()
        ),
        skipped=tuple(skipped),
    )


def _place(name: str, component: Component | None, layer: int | None, sums: _Sums, names: tuple[str, ...]) -> Place:
    norms = sums.inner.diagonal().clamp_min(0).sqrt()
    pairs = [_pair(i, j, sums, names) for i, j in combinations(range(len(names)), 2) if sums.shared[i, j]]
    return Place(
        name=name,
        component=component,
        layer=layer,
        sites=sums.sites,
        norms=tuple(map(float, norms)),
        conflict=_share(sums.lost.sum(), sums.mass.sum()),
        entries=_share(sums.entries[1], sums.entries[0]),
        pairs=tuple(pairs),
    )


def _pair(i: int, j: int, sums: _Sums, names: tuple[str, ...]) -> Pair:
    matrices = float(sums.matrices[i, j])
    angles = [float(value[i, j]) / matrices if matrices else None for value in sums.angles]
    both = (sums.both[i, j] * sums.both[j, i]).sqrt()
    return Pair(
        first=names[i],
        second=names[j],
        sites=int(sums.shared[i, j]),
        cosine=float(sums.inner[i, j] / both) if both else 0.0,
        conflict=_share(sums.pair_lost[i, j], sums.pair_mass[i, j]),
        columns=angles[0],
        rows=angles[1],
        columns_chance=angles[2],
        rows_chance=angles[3],
    )


def _share(part: Tensor, of: Tensor) -> float:
    return float(part / of) if of else 0.0
