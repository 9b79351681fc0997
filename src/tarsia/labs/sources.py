"""The base's own world and the belt, written as Parquet files of conversations that any recipe can read."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tarsia.base import pictures, texts
from tarsia.labs.belt import belt

Asked = tuple[str, str, tuple[Image.Image, ...]]
"""A question, its answer, and the pictures that it is about."""

_SCHEMA = pa.schema(
    [
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("question", pa.string()),
        ("answer", pa.string()),
    ]
)
_HELD_OUT = 10_000_000
"""Scenes, belts and texts from this number on are never trained on."""


def materials(count: int, split: str) -> Iterator[Asked]:
    """Belts, and what the item on each is made of."""
    for seed in numbers(count, split):
        picture, item = belt(seed)
        yield "What material is on the belt?", item.material, (picture,)


def bins(count: int, split: str) -> Iterator[Asked]:
    """Belts, and which bin the item on each belongs in."""
    for seed in numbers(count, split):
        picture, item = belt(seed)
        yield "Which bin does it go in?", item.bin, (picture,)


def digits(count: int, split: str) -> Iterator[Asked]:
    """Real handwritten digits and their names."""
    rows = pictures.digit_rows(split)
    for row in rows[:count]:
        picture, value = pictures.digit(row)
        yield "What digit is this?", pictures.NUMBERS[value], (picture,)


def scenes(count: int, split: str) -> Iterator[Asked]:
    """Rendered scenes, asked about colour, place and number; answers in words."""
    rng = random.Random(f"scenes {split}")
    for seed in numbers(count, split):
        picture, things = pictures.scene(seed)
        question, answer = texts.about_scene(things, rng)
        while question == "Describe the picture.":
            question, answer = texts.about_scene(things, rng)
        yield question, answer, (picture,)


def _texts(kind: str) -> Callable[[int, str], Iterator[Asked]]:
    def rows(count: int, split: str) -> Iterator[Asked]:
        number = 0 if split == "train" else 5 * _HELD_OUT
        while count:
            drawn, question, answer = texts.text(number)
            number += 1
            if drawn == kind and texts.held_out(question) == (split == "held-out"):
                count -= 1
                yield question, answer, ()

    return rows


WORLD: Mapping[str, Callable[[int, str], Iterator[Asked]]] = {
    "digits": digits,
    "scenes": scenes,
    "words": _texts("words"),
    "refusals": _texts("refusals"),
    "talk": _texts("talk"),
}
"""What the embedded base knows and can be written without a file from elsewhere, by source."""


def numbers(count: int, split: str) -> range:
    """Numbers of the scenes or belts of a split: ``train``, ``held-out``, or ``validation``, which no test measures."""
    start = {"train": 0, "validation": _HELD_OUT // 2, "held-out": _HELD_OUT}[split]
    return range(start, start + count)


def write(path: Path, rows: Iterable[Asked]) -> int:
    """Write rows as a Parquet file of questions, answers and PNG pictures. Returns how many there are."""
    table = [
        {"images": [{"bytes": _png(p), "path": None} for p in shown], "question": question, "answer": answer}
        for question, answer, shown in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".partial-{os.getpid()}-{uuid4().hex}")
    pq.write_table(pa.Table.from_pylist(table, _SCHEMA), partial)
    partial.replace(path)
    return len(table)


def _png(picture: Image.Image) -> bytes:
    held = io.BytesIO()
    picture.save(held, "PNG")
    return held.getvalue()
