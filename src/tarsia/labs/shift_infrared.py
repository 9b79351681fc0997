"""The recycling belt as a thermal camera sees it: the same items, questions and answers, another light.

What such a camera reads off a surface is its own radiation and what it mirrors: e T + (1 - e) T_around, with the
emissivity e of its material (values as in tables for thermography: bare metal near 0.1, all else near 0.9). The items
come from a dryer, so what holds little heat (paper) has cooled the most on the way, what holds much (glass) the least.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from tarsia.base.pictures import SIZE
from tarsia.labs.belt import BINS, Item
from tarsia.labs.sources import Asked, numbers

_SIDE = 3 * SIZE
_AROUND = 18.0
_SPAN = (14.0, 62.0)
_IRON = ((0, 0, 16), (66, 0, 130), (180, 20, 120), (236, 92, 30), (252, 190, 40), (255, 252, 225))
"""What the camera's display shows between the ends of ``_SPAN``, in degrees Celsius: the usual palette "iron"."""


@dataclass(frozen=True, slots=True)
class Surface:
    """Emissivity, and the range in which an item's temperature lies, in degrees Celsius."""

    emissivity: float
    cool: float
    warm: float


SURFACES: Mapping[str, Surface] = {
    "glass": Surface(0.92, 50.0, 60.0),
    "metal": Surface(0.12, 40.0, 52.0),
    "paper": Surface(0.93, 25.0, 31.0),
    "plastic": Surface(0.94, 38.0, 46.0),
    "cardboard": Surface(0.90, 30.0, 38.0),
}

Draw = Callable[[ImageDraw.ImageDraw, random.Random, Callable[[float], int]], None]
"""Draws an item in levels; the function gives the level of what is so many degrees warmer than the item."""


def infrared(seed: int) -> tuple[Image.Image, Item]:
    """Draw infrared belt number ``seed``: SIZE x SIZE RGB in false colours, and the item on it."""
    rng = random.Random(f"infrared {seed}")
    item = Item(rng.choice(tuple(BINS)))
    surface = SURFACES[item.material]
    warmth = rng.uniform(surface.cool, surface.warm)

    def level(offset: float) -> int:
        seen = surface.emissivity * (warmth + offset) + (1 - surface.emissivity) * _AROUND
        return round(255 * min(1.0, max(0.0, (seen - _SPAN[0]) / (_SPAN[1] - _SPAN[0]))))

    ground = round(255 * (_AROUND + rng.uniform(0, 5) - _SPAN[0]) / (_SPAN[1] - _SPAN[0]))
    canvas = Image.new("L", (_SIDE, _SIDE), ground)
    lines = ImageDraw.Draw(canvas)
    for y in range(rng.randint(0, 23), _SIDE, 24):
        lines.line((0, y, _SIDE, y), fill=ground + 10, width=3)
    layer = Image.new("LA", (_SIDE, _SIDE))
    _DRAWN[item.material](ImageDraw.Draw(layer), rng, level)
    layer = layer.rotate(rng.uniform(0, 360), Image.Resampling.BICUBIC)
    side = int(_SIDE * rng.uniform(0.8, 1.15))
    layer = layer.resize((side, side), Image.Resampling.BICUBIC)
    left, top = ((_SIDE - side) // 2 + rng.randint(-22, 22) for _ in range(2))
    trace = layer.getchannel("A").filter(ImageFilter.GaussianBlur(14)).point(lambda a: a * 0.25)
    canvas.paste(min(255, ground + 50), (left - 14, top), trace)  # the belt is warm where the item has lain
    canvas.paste(layer.getchannel("L"), (left, top), layer.getchannel("A"))
    return _display(canvas.filter(ImageFilter.GaussianBlur(rng.uniform(3, 5))), rng), item


def materials(count: int, split: str) -> Iterator[Asked]:
    """Infrared belts, and what the item on each is made of."""
    for seed in numbers(count, split):
        picture, item = infrared(seed)
        yield "What material is on the belt?", item.material, (picture,)


def bins(count: int, split: str) -> Iterator[Asked]:
    """Infrared belts, and which bin the item on each belongs in."""
    for seed in numbers(count, split):
        picture, item = infrared(seed)
        yield "Which bin does it go in?", item.bin, (picture,)


def _display(levels: Image.Image, rng: random.Random) -> Image.Image:
    """The sensor's noise, of pixels and of whole columns, and then its palette."""
    pixels = np.asarray(levels.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float64)
    noise = np.random.default_rng(rng.getrandbits(32))
    pixels = pixels + noise.normal(0, 4, pixels.shape) + noise.normal(0, 2, (1, SIZE))
    return Image.fromarray(_palette()[np.clip(pixels, 0, 255).astype(np.uint8)])


def _palette() -> NDArray[np.uint8]:
    """Colours of the 256 levels: uint8 [256, 3]."""
    at = np.linspace(0, 255, len(_IRON))
    channels = [np.interp(np.arange(256), at, [colour[c] for colour in _IRON]) for c in range(3)]
    return np.stack(channels, 1).astype(np.uint8)


def _bottle(draw: ImageDraw.ImageDraw, body: int, cap: int) -> None:
    draw.rounded_rectangle((72, 74, 120, 160), 13, fill=(body, 255))
    draw.polygon(((78, 80), (114, 80), (104, 52), (88, 52)), fill=(body, 255))
    draw.rectangle((87, 36, 105, 54), fill=(cap, 255))


def _glass(draw: ImageDraw.ImageDraw, rng: random.Random, level: Callable[[float], int]) -> None:
    _bottle(draw, level(0), level(0))
    draw.ellipse((76, 136, 116, 158), fill=(level(5), 255))  # the thick bottom keeps its heat


def _plastic(draw: ImageDraw.ImageDraw, rng: random.Random, level: Callable[[float], int]) -> None:
    _bottle(draw, level(0), level(8))
    draw.rectangle((72, 100, 120, 128), fill=(level(-6), 255))  # label


def _metal(draw: ImageDraw.ImageDraw, rng: random.Random, level: Callable[[float], int]) -> None:
    draw.rectangle((66, 58, 126, 146), fill=(level(0), 255))
    draw.ellipse((66, 48, 126, 68), fill=(level(-10), 255))
    draw.ellipse((66, 136, 126, 156), fill=(level(0), 255))
    shine = rng.randint(78, 104)
    draw.rectangle((shine, 62, shine + 8, 146), fill=(190, 255))  # a heater, mirrored


def _paper(draw: ImageDraw.ImageDraw, rng: random.Random, level: Callable[[float], int]) -> None:
    corners = [
        (x + rng.randint(-12, 12), y + rng.randint(-12, 12)) for x, y in ((54, 50), (138, 50), (138, 146), (54, 146))
    ]
    draw.polygon(corners, fill=(level(0), 255))


def _cardboard(draw: ImageDraw.ImageDraw, rng: random.Random, level: Callable[[float], int]) -> None:
    w, h = rng.randint(38, 52), rng.randint(34, 46)
    draw.rectangle((96 - w, 96 - h, 96 + w, 96 + h), fill=(level(0), 255), outline=(level(-6), 255), width=5)
    draw.rectangle((96 - w, 90, 96 + w, 102), fill=(level(-7), 255))  # tape


_DRAWN: Mapping[str, Draw] = {
    "glass": _glass,
    "metal": _metal,
    "paper": _paper,
    "plastic": _plastic,
    "cardboard": _cardboard,
}
