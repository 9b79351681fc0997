"""Pictures that are nearly the same: found by a perceptual hash, proved by their thumbnails.

The hash is the signs of 64 low cosine coefficients against their median (pHash: Zauner 2010, section
3.2.1, without the row and column of the mean). Two pictures are near where at most ``DISTANCE`` bits differ
and their 16 x 16 colour thumbnails, less their mean, have a correlation of at least ``LIKENESS``. The hash alone
calls different cells of one smear alike, the thumbnails alone different crops of one colour; both together
hold on photographs and smears (bench/cases/near_copies.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DISTANCE: Final = 6
LIKENESS: Final = 0.985
SIDE: Final = 16
_FEW: Final = 64  # of many pictures with one hash only so many are compared with the others
_BLOCK: Final = 1 << 20
_COMPARED: Final = 1 << 12  # pairs of thumbnails that are held as float64 at a time: 25 MB each side

Hashes = NDArray[np.uint64]
Pairs = NDArray[np.int64]
_N = np.arange(32)
_COSINES = np.cos(np.pi * (2 * _N[None, :] + 1) * _N[1:9, None] / 64)


def phash(picture: Image.Image) -> int:
    """64 bits that re-encoding, resizing and a change of brightness hardly move."""
    grey = np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.BILINEAR), dtype=np.float64)
    low = (_COSINES @ grey @ _COSINES.T).ravel()
    return int(np.packbits(low > np.median(low)).view(">u8")[0])


def thumbnail(picture: Image.Image) -> NDArray[np.uint8]:
    """uint8 [16 * 16 * 3], what ``alike`` compares."""
    return np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.uint8).ravel()


def alike(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Correlation, -1..1, of thumbnails [n, 768] with others [n, 768]; 0 where one is of one colour."""
    x, y = (t.astype(np.float64) - t.mean(axis=1, keepdims=True) for t in (a, b))
    size = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    likeness: NDArray[np.float64] = np.zeros(len(x))
    np.divide((x * y).sum(axis=1), size, out=likeness, where=size > 0)
    return likeness


def close(hashes: Hashes, distance: int = DISTANCE) -> Pairs:
    """Every pair i < j of *different* hashes that differ in at most ``distance`` bits: int64 [pairs, 2], sorted.

    Exact: of ``distance + 1`` bands of bits at least one is equal in such a pair, so only pairs that share
    a band are looked at (Norouzi, Punjani, Fleet 2012). ``hashes`` must be distinct.
    """
    edges = np.linspace(0, 64, distance + 2).astype(int)
    found: list[Pairs] = [np.empty((0, 2), np.int64)]
    for first, last in pairwise(edges):
        band = (hashes >> np.uint64(first)) & np.uint64((1 << int(last - first)) - 1)
        for i, j in _same(band):
            near = np.bitwise_count(hashes[i] ^ hashes[j]) <= distance
            found.append(np.stack([i[near], j[near]], axis=1))
    pairs = np.sort(np.concatenate(found), axis=1)
    return np.unique(pairs, axis=0)


def _same(values: NDArray[np.uint64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """All pairs of places with one value, in blocks."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=values[order[:1]] + np.uint64(1)))
    left: list[NDArray[np.int64]] = []
    right: list[NDArray[np.int64]] = []
    held = 0
    for members in np.split(order, starts[1:]):
        for k in range(len(members) - 1):
            left.append(np.full(len(members) - k - 1, members[k]))
            right.append(members[k + 1 :])
            held += len(members) - k - 1
            if held > _BLOCK:
                yield np.concatenate(left), np.concatenate(right)
                left, right, held = [], [], 0
    if held:
        yield np.concatenate(left), np.concatenate(right)


def near(hashes: Hashes, thumbnails: NDArray[np.uint8]) -> Pairs:
    """Pairs i < j of pictures that are nearly the same, int64 [pairs, 2], sorted.

    ``hashes`` [n], ``thumbnails`` [n, 768]. Of more than 64 pictures with one hash, the first 64 stand for all
    when pairs are looked for, so that a thousand empty frames do not make a million pairs.
    """
    if not len(hashes):
        return np.empty((0, 2), np.int64)
    distinct, inverse = np.unique(hashes, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(inverse[order])) + 1)
    pairs = [_proved(m[:_FEW], m, thumbnails) for m in members if len(m) > 1]
    for a, b in close(distinct):
        pairs += [
            _proved(members[a][:_FEW], members[b], thumbnails),
            _proved(members[b][:_FEW], members[a], thumbnails),
        ]
    both = np.sort(np.concatenate([np.empty((0, 2), np.int64), *pairs]), axis=1)
    return np.unique(both, axis=0)


def _proved(few: NDArray[np.int64], others: NDArray[np.int64], thumbnails: NDArray[np.uint8]) -> Pairs:
    i, j = np.repeat(few, len(others)), np.tile(others, len(few))
    i, j = i[i != j], j[i != j]
    same = np.zeros(len(i), dtype=bool)
    for start in range(0, len(i), _COMPARED):
        block = slice(start, start + _COMPARED)
        same[block] = alike(thumbnails[i[block]], thumbnails[j[block]]) >= LIKENESS
    return np.stack([i[same], j[same]], axis=1)
