"""`near-duplicate` of tarsia lint on real pictures: which edited copies are found, and what else is called a copy.

Two sets, read from TARSIA_DATA: the first 2,000 test photographs of CIFAR-10 (32 x 32) and the smears that BCCD
trains on (640 x 480). Each edit is made of every picture. "found" is the share, in percent, of the copies that are
paired with their own original; "false pairs" are a copy and another original that are no pair themselves. The rows
"as they are" count the pairs among the originals alone.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance

from bench.run import Values
from tarsia.data.lint import near
from tarsia.labs import blood

PHOTOGRAPHS: Final = 2000


def _resized(times: float) -> Callable[[Image.Image], Image.Image]:
    return lambda p: p.resize((round(p.width * times), round(p.height * times)), Image.Resampling.BICUBIC)


def _encoded(picture: Image.Image) -> Image.Image:
    held = io.BytesIO()
    picture.save(held, "JPEG", quality=75)
    return Image.open(held).convert("RGB")


def _shrunk(picture: Image.Image) -> Image.Image:
    return _encoded(_resized(7 / 8)(picture))


EDITS: Final[Mapping[str, Callable[[Image.Image], Image.Image]]] = {
    "re-encoded, JPEG 75": _encoded,
    "7/8 of the size, then JPEG 75": _shrunk,
    "half size": _resized(0.5),
    "double size": _resized(2.0),
    "brighter by 15 %": lambda p: ImageEnhance.Brightness(p).enhance(1.15),
    "darker by 15 %": lambda p: ImageEnhance.Brightness(p).enhance(0.85),
    "15 % more contrast": lambda p: ImageEnhance.Contrast(p).enhance(1.15),
}


def measure() -> Values:
    """By set of pictures and edit."""
    folder = blood.data()
    table: dict[str, dict[str, float | int | str]] = {}
    for name, file, rows in (("CIFAR-10", "cifar10-test.parquet", PHOTOGRAPHS), ("BCCD", "bccd-train.parquet", None)):
        originals = _read(folder / file, rows)
        seen = [_seen(picture) for picture in originals]
        table[f"{name}, as they are"] = _line(seen, [])
        for edit, make in EDITS.items():
            table[f"{name}, {edit}"] = _line(seen, [_seen(make(picture)) for picture in originals])
    return table


def _read(path: Path, rows: int | None) -> list[Image.Image]:
    held = pq.read_table(path, columns=["image"]).slice(0, rows)["image"].to_pylist()
    return [Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in held]


Seen = tuple[int, np.ndarray]


def _seen(picture: Image.Image) -> Seen:
    return near.phash(picture), near.thumbnail(picture)


def _line(originals: Sequence[Seen], copies: Sequence[Seen]) -> dict[str, float | int | str]:
    """Copies found and false pairs; without copies the pairs among the originals."""
    hashes, thumbnails = zip(*originals, *copies, strict=True)
    pairs = near.near(np.array(hashes, dtype=np.uint64), np.stack(thumbnails)).tolist()
    n = len(originals)
    known = {(i, j) for i, j in pairs if j < n}
    if not copies:
        return {"pictures": n, "pairs among them": len(known)}
    across = [(i, j - n) for i, j in pairs if i < n <= j]
    own = sum(i == j for i, j in across)
    false = sum(i != j and (min(i, j), max(i, j)) not in known for i, j in across)
    return {"pictures": n, "found, %": round(100 * own / n, 1), "false pairs": false}
