"""Blood smears (BCCD) as questions: which cell is this, and how many are there; CIFAR-10 photographs beside them."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from tarsia.base import pictures, texts
from tarsia.labs.sources import Asked

CELLS: Mapping[str, str] = {"RBC": "a red blood cell", "WBC": "a white blood cell", "Platelets": "a platelet"}
"""The data set's labels and the answers that they stand for."""

_WINDOW = 220
"""Side of the windows in which cells are counted, in pixels of the 640 x 480 smear."""


def _smears(path: Path) -> Iterator[tuple[Image.Image, list[dict[str, Any]]]]:
    for row in pq.read_table(path).to_pylist():
        with Image.open(io.BytesIO(row["image"]["bytes"])) as picture:
            yield picture.convert("RGB"), row["boxes"]


def cells(path: Path, each: int, seed: int = 0) -> Iterator[Asked]:
    """Square crops around single cells, at most ``each`` of a kind, in a mixed order."""
    rng = random.Random(f"cells {seed}")
    found: dict[str, list[Image.Image]] = {label: [] for label in CELLS}
    for picture, boxes in _smears(path):
        for box in boxes:
            side = 1.3 * max(box["xmax"] - box["xmin"], box["ymax"] - box["ymin"])
            x, y = (box["xmin"] + box["xmax"]) / 2, (box["ymin"] + box["ymax"]) / 2
            crop = picture.crop(tuple(round(v) for v in (x - side / 2, y - side / 2, x + side / 2, y + side / 2)))
            found[box["label"]].append(crop.resize((pictures.SIZE, pictures.SIZE), Image.Resampling.BICUBIC))
    rows = [(label, crop) for label, crops in found.items() for crop in rng.sample(crops, min(each, len(crops)))]
    rng.shuffle(rows)
    for label, crop in rows:
        yield "What cell is this?", CELLS[label], (crop,)


def counts(path: Path, windows: int, seed: int = 0) -> Iterator[Asked]:
    """Windows of a smear, and how many red blood cells have their middle in each (zero to ten)."""
    rng = random.Random(f"counts {seed}")
    for picture, boxes in _smears(path):
        for _ in range(windows):
            left, top = rng.randint(0, picture.width - _WINDOW), rng.randint(0, picture.height - _WINDOW)
            cells = [box for box in boxes if box["label"] == "RBC"]
            middles = [((b["xmin"] + b["xmax"]) / 2 - left, (b["ymin"] + b["ymax"]) / 2 - top) for b in cells]
            number = sum(0 <= x < _WINDOW and 0 <= y < _WINDOW for x, y in middles)
            if number < len(pictures.NUMBERS):
                shown = picture.crop((left, top, left + _WINDOW, top + _WINDOW))
                shown = shown.resize((pictures.SIZE, pictures.SIZE), Image.Resampling.BICUBIC)
                yield "How many red blood cells are there?", pictures.NUMBERS[number], (shown,)


def photographs(path: Path, count: int, seed: int = 0, only: str | None = None) -> Iterator[Asked]:
    """CIFAR-10 photographs and what they show, all classes or ``only`` one."""
    shots, labels = pictures.photographs(path)
    rows = [i for i, label in enumerate(labels) if only is None or pictures.PHOTOGRAPHS[label] == only]
    for i in random.Random(f"photographs {seed}").sample(rows, min(count, len(rows))):
        yield "What is this?", texts.article(pictures.PHOTOGRAPHS[labels[i]]), (Image.fromarray(shots[i]),)
