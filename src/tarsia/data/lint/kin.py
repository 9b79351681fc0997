"""Which of many pictures are the same, and which nearly so."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tarsia.data.lint import near
from tarsia.data.lint.looks import Look


@dataclass(frozen=True, slots=True)
class Kin:
    """``of`` is, for each picture, the first one of the same pixels: None for unreadable and for empty ones.

    ``near`` is, for each of these firsts, the others that are nearly the same.
    """

    of: tuple[int | None, ...]
    near: Mapping[int, tuple[int, ...]]


def kin(looks: Sequence[Look]) -> Kin:
    """Compare all pictures with each other, but only those of which some band of the hashes is equal (``near``)."""
    firsts: dict[bytes, int] = {}
    for place, look in enumerate(looks):
        if not look.refusal and not look.empty:
            firsts.setdefault(look.content, place)
    places = list(firsts.values())
    hashes = np.array([looks[p].phash for p in places], dtype=np.uint64)
    thumbnails = np.frombuffer(b"".join(looks[p].thumbnail for p in places), dtype=np.uint8)
    others: dict[int, list[int]] = defaultdict(list)
    for i, j in near.near(hashes, thumbnails.reshape(len(places), 3 * near.SIDE**2)).tolist():
        others[places[i]].append(places[j])
        others[places[j]].append(places[i])
    of = tuple(firsts.get(look.content) if look.content else None for look in looks)
    return Kin(of, {place: tuple(sorted(found)) for place, found in others.items()})
