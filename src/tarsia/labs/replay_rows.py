"""What the base knows, as general sources: rows that are replayed, rows that choose a recipe, rows that are reported.

A text is a question that comes again and again, so its rows are parted by the question's checksum, as the base's
training parts them: checksum modulo ten 0 is held out of the base, too. Of refusals and talk there are only about ten
such questions each, which is too few to measure with: for these two, questions with 8 and 9 are kept from replay too.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from tarsia.base import texts
from tarsia.labs import smears, sources
from tarsia.labs.sources import Asked

REPLAYED: Mapping[str, int] = {
    "photographs": 600,
    "scenes": 600,
    "words": 225,
    "digits": 45,
    "refusals": 15,
    "talk": 15,
}
"""Rows of each general source that replay draws from: more of what is easily lost, fewer of what never is."""
MEASURED = 100
"""Rows of each general source that are measured, where there are so many."""
_TEXTS = ("words", "refusals", "talk")
_SPLITS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "words": {"train": (2, 3, 4, 5, 6, 7, 8, 9), "validation": (1,), "held-out": (0,)},
    "refusals": {"train": (2, 3, 4, 5, 6, 7), "validation": (1,), "held-out": (0, 8, 9)},
    "talk": {"train": (2, 3, 4, 5, 6, 7), "validation": (1,), "held-out": (0, 8, 9)},
}
_DRAWN = 40_000
"""Numbers of texts that are looked through: nearly every question occurs among them."""


def general(split: str, photographs: Path | None) -> dict[str, list[Asked]]:
    """Rows of every general source by name: ``train``, ``validation`` or ``held-out``.

    ``photographs`` is a folder with cifar10-train.parquet and cifar10-test.parquet; without it there are none.
    """
    train = split == "train"
    count = REPLAYED if train else dict.fromkeys(REPLAYED, MEASURED)
    rows = {"digits": _digits(split, count["digits"]), "scenes": list(sources.scenes(count["scenes"], split))}
    rows |= {kind: _texts(kind, split, count[kind]) for kind in _TEXTS}
    if photographs is not None:
        if train:
            rows["photographs"] = list(smears.photographs(photographs / "cifar10-train.parquet", count["photographs"]))
        else:
            both = list(smears.photographs(photographs / "cifar10-test.parquet", 2 * MEASURED))
            rows["photographs"] = both[:MEASURED] if split == "held-out" else both[MEASURED:]
    return rows


def _digits(split: str, count: int) -> list[Asked]:
    if split == "train":
        return list(sources.digits(count, "train"))
    rows = list(sources.digits(2 * MEASURED, "held-out"))
    return rows[:MEASURED] if split == "held-out" else rows[MEASURED:]


def _texts(kind: str, split: str, count: int) -> list[Asked]:
    """Rows of ``train`` as often as the base met them, of the other splits every question once."""
    wanted = _SPLITS[kind][split]
    rows = ((q, a, ()) for drawn, q, a in map(texts.text, range(_DRAWN)) if drawn == kind and residue(q) in wanted)
    if split == "train":
        return list(islice(rows, count))
    once: list[Asked] = list({row[0]: row for row in rows}.values())
    return random.Random(f"{kind} {split}").sample(once, min(count, len(once)))


def residue(question: str) -> int:
    """Checksum of a question modulo ten."""
    return zlib.crc32(question.encode()) % 10


def dogs(photographs: Path, count: int) -> Iterator[Asked]:
    """Photographs of dogs, of which none is replayed."""
    return smears.photographs(photographs / "cifar10-test.parquet", count, seed=1, only="dog")
