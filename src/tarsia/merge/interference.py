"""What adapters would take from each other if they were summed: a report before they are merged.

Signs: at every number of a weight the weighted changes are added up; what has not the sum's sign is lost there, as TIES
counts it (arXiv:2306.01708, section 3). ``conflict`` is its share of all that changes, by magnitude. Two changes of one
size whose numbers have nothing to do with each other lose (sqrt 2 - 1) / (2 sqrt 2) = 14.6 %.

Subspaces: the directions that hold nine tenths of a change's square, on the side of what comes out (columns) and of
what goes in (rows). ``columns`` and ``rows`` are the mean squared cosines of the principal angles between two such
(Bjorck and Golub, 1973), 0 where all are at right angles and 1 where one holds the other; chance's stand beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from tarsia.adapter.host import Host, Outline
from tarsia.adapter.value import Adapter
from tarsia.core.errors import MergeError
from tarsia.core.method import find
from tarsia.core.site import Component
from tarsia.merge.belonging import common
from tarsia.merge.between import Sums, site_sums
from tarsia.merge.delta import Grounds, delta_of

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
    grounds = Grounds.of(base, common(adapters, base))
    held = tuple(adapters.values())
    found: dict[str, Sums] = {}
    skipped = []
    for path in (path for path in grounds.sites if any(path in one.patches for one in held)):
        patches = [one.patches.get(path) for one in held]
        if any(one is not None and not find(one.method).folds for one in patches):
            skipped.append(path)
            continue
        deltas = [None if one is None else delta_of(one, grounds, path) for one in patches]
        found[path] = site_sums([None if d is None else d.scaled(w) for d, w in zip(deltas, shares, strict=True)])
    if not any(float(sums.shared.triu(1).sum()) for sums in found.values()):
        raise MergeError(
            "No two of these adapters change the same weight, so there is nothing between them.",
            given=", ".join(names),
            do="merge them with task_arithmetic: it loses nothing",
        )
    return _report(names, shares, grounds, found, skipped)


def _report(
    names: tuple[str, ...],
    weights: tuple[float, ...],
    grounds: Grounds,
    found: Mapping[str, Sums],
    skipped: Sequence[str],
) -> Interference:
    by_component: dict[Component, Sums] = {}
    by_layer: dict[tuple[Component, int], Sums] = {}
    for path, sums in found.items():
        site = grounds.sites[path]
        none = Sums.none(len(names))
        by_component[site.component] = by_component.get(site.component, none) + sums
        if site.layer is not None:
            key = (site.component, site.layer)
            by_layer[key] = by_layer.get(key, none) + sums
    every = Sums.none(len(names))
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


def _place(name: str, component: Component | None, layer: int | None, sums: Sums, names: tuple[str, ...]) -> Place:
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


def _pair(i: int, j: int, sums: Sums, names: tuple[str, ...]) -> Pair:
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
