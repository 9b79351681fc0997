"""What lies between two versions: recipe, data, results, base, sites, and how far apart their tensors are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tarsia.library import card
from tarsia.library.card import Card, flat
from tarsia.library.record import Version
from tarsia.library.store import Library

if TYPE_CHECKING:
    from torch import Tensor

    from tarsia.adapter import Patched


@dataclass(frozen=True, slots=True)
class Distance:
    """How far apart two patches of one site are: ||a - b|| / ||a|| and the cosine between them, Frobenius.

    ``of`` is "weight", where both are low-rank updates and the changes of the weight are compared (two pairs of factors
    may differ and change it alike), or "tensors", where the numbers themselves are. Both numbers are None where a patch
    is nothing but zeros or the two can not be compared; ``of`` then says why.
    """

    site: str
    of: str
    relative: float | None
    cosine: float | None


@dataclass(frozen=True, slots=True)
class Difference:
    """Two versions; entries of their cards that differ, as {"recipe": {"steps": (3, 5)}}, None where one has none.

    ``only``: sites that one of them alone has. ``distances``: of the sites that both have, empty where ``same``.
    """

    versions: tuple[Version, Version]
    same: bool
    entries: Mapping[str, Mapping[str, tuple[Any, Any]]]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    distances: tuple[Distance, ...]


def differ(library: Library, first: str, second: str, tensors: bool = True) -> Difference:
    """Compare two versions; ``tensors`` opens the files (every hash is checked) and imports torch."""
    (a, of_a), (b, of_b) = card.read(library, first), card.read(library, second)
    shared = [path for path in of_a.sites if path in of_b.sites]
    only = tuple(p for p in of_a.sites if p not in of_b.sites), tuple(p for p in of_b.sites if p not in of_a.sites)
    same = a.hash == b.hash
    opened = tensors and not same
    distances = _distances(library, (a.reference, b.reference), shared) if opened else ()
    return Difference((a, b), same, _entries(of_a, of_b), only, distances)


def _entries(a: Card, b: Card) -> dict[str, dict[str, tuple[Any, Any]]]:
    found: dict[str, dict[str, tuple[Any, Any]]] = {}
    for section in ("parts", "recipe", "data", "results", "forgetting", "base"):
        one, two = (
            flat({section: list(v) if isinstance(v, tuple) else v}) for v in (getattr(a, section), getattr(b, section))
        )
        changed = {
            key.partition(".")[2] or key: (one.get(key), two.get(key))
            for key in [*one, *(key for key in two if key not in one)]
            if one.get(key) != two.get(key)
        }
        if changed:
            found[section] = changed
    return found


def _distances(library: Library, references: tuple[str, str], shared: list[str]) -> tuple[Distance, ...]:
    from tarsia.library.opening import open_adapter

    a, b = (open_adapter(library, reference).patches for reference in references)
    return tuple(_distance(path, a[path], b[path]) for path in shared)


def _distance(site: str, a: Patched, b: Patched) -> Distance:
    import torch

    from tarsia.core.method import find

    if find(a.method).thin and find(b.method).thin:
        (up, down), (other, below) = _factors(a), _factors(b)
        if up.shape[0] != other.shape[0] or down.shape[1] != below.shape[1]:
            return Distance(site, "other shapes", None, None)
        # with the small triangles of QR, so that equal updates come out as equal, not as what rounding leaves of them
        left = torch.linalg.qr(torch.cat([up, other], 1), mode="r")[1]
        right = torch.linalg.qr(torch.cat([down, below]).t(), mode="r")[1]
        rank = up.shape[1]
        return _apart(site, "weight", left[:, :rank] @ right[:, :rank].t(), left[:, rank:] @ right[:, rank:].t())
    if a.method != b.method:
        return Distance(site, f"{a.method} and {b.method}", None, None)
    if {k: v.shape for k, v in a.tensors.items()} != {k: v.shape for k, v in b.tensors.items()}:
        return Distance(site, "other shapes", None, None)
    one, two = (torch.cat([p.tensors[key].double().flatten() for key in sorted(a.tensors)]) for p in (a, b))
    return _apart(site, "tensors", one, two)


def _factors(patched: Patched) -> tuple[Tensor, Tensor]:
    """Up [out, r] and down [r, in] in float64, with the scale in the first."""
    factors = patched.factors
    return factors["B"].double() * float(patched.constants["scale"]), factors["A"].double()


def _apart(site: str, of: str, a: Tensor, b: Tensor) -> Distance:
    norm, other = float(a.norm()), float(b.norm())
    if not norm or not other:
        return Distance(site, f"{of}: nothing but zeros", None, None)
    return Distance(site, of, float((a - b).norm()) / norm, float((a * b).sum()) / (norm * other))
