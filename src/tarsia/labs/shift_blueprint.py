"""Blueprints: a plate with a dimension line and a number on it, and how large the plate is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from tarsia.base.pictures import SIZE, soften
from tarsia.labs.sources import Asked, numbers

SIZES = tuple(range(1, 10))
"""The dimensions that occur, in centimetres."""

_SIDE = 3 * SIZE
_INK = (235, 240, 250)
_FONT = ImageFont.load_default(130)
_Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Part:
    """What is drawn: a plate (to no scale), and its one dimension, ``width`` or ``height``, in centimetres."""

    dimension: str
    size: int


def blueprint(seed: int) -> tuple[Image.Image, Part]:
    """Draw blueprint number ``seed``: SIZE x SIZE RGB, and the part on it."""
    rng = random.Random(f"blueprint {seed}")
    part = Part(rng.choice(("width", "height")), rng.choice(SIZES))
    ground = (rng.randint(18, 40), rng.randint(50, 80), rng.randint(120, 160))
    canvas = Image.new("RGB", (_SIDE, _SIDE), ground)
    draw = ImageDraw.Draw(canvas)
    grid = tuple(c + 12 for c in ground)
    for at in range(rng.randint(0, 23), _SIDE, 24):
        draw.line((at, 0, at, _SIDE), fill=grid, width=2)
        draw.line((0, at, _SIDE, at), fill=grid, width=2)
    short, long = (rng.randint(8, 13), rng.randint(48, 54)), (rng.randint(14, 30), rng.randint(160, 178))
    if part.dimension == "width":
        box = (long[0], short[0], long[1], short[1])
        _across(draw, box, part.size, rng)
    else:
        box = (_SIDE - short[1], long[0], _SIDE - short[0], long[1])
        _up(draw, box, part.size, rng)
    _plate(draw, box, rng)
    return soften(canvas, rng, noise=4.0), part


def dimensions(count: int, split: str) -> Iterator[Asked]:
    """Blueprints, and the dimension that is written on them."""
    for seed in numbers(count, split):
        picture, part = blueprint(seed)
        asked = "wide" if part.dimension == "width" else "high"
        yield f"How {asked} is the plate?", f"{part.size} cm", (picture,)


def _plate(draw: ImageDraw.ImageDraw, box: _Box, rng: random.Random) -> None:
    left, top, right, bottom = box
    if rng.random() < 0.5:
        draw.rectangle(box, outline=_INK, width=4)
    else:
        cut = rng.randint(9, 18)
        corners = ((left + cut, top), (right, top), (right, bottom), (left, bottom), (left, top + cut))
        draw.line((*corners, corners[0], corners[1]), fill=_INK, width=4)
    middle = (left + right) // 2, (top + bottom) // 2
    if rng.random() < 0.6:
        r = rng.randint(7, 12)
        draw.ellipse((middle[0] - r, middle[1] - r, middle[0] + r, middle[1] + r), outline=_INK, width=3)


def _across(draw: ImageDraw.ImageDraw, box: _Box, value: int, rng: random.Random) -> None:
    """The dimension line of the width, under the part, with its number under it."""
    left, _, right, bottom = box
    y = bottom + 14
    for x in (left, right):
        draw.line((x, bottom + 5, x, y + 6), fill=_INK, width=2)
    draw.line((left, y, right, y), fill=_INK, width=2)
    draw.text(((left + right) // 2 + rng.randint(-9, 9), y + 14), str(value), _INK, _FONT, "mt", stroke_width=3)


def _up(draw: ImageDraw.ImageDraw, box: _Box, value: int, rng: random.Random) -> None:
    """The dimension line of the height, left of the part, with its number left of it."""
    left, top, _, bottom = box
    x = left - 12
    for y in (top, bottom):
        draw.line((left - 5, y, x - 6, y), fill=_INK, width=2)
    draw.line((x, top, x, bottom), fill=_INK, width=2)
    draw.text((x - 14, (top + bottom) // 2 + rng.randint(-9, 9)), str(value), _INK, _FONT, "rm", stroke_width=3)
