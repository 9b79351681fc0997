"""A recycling belt seen from above: one item, its material, and the bin that it belongs in.

The embedded base has never seen it: it knows the words, not the look, and not which bin takes what.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFilter

from tarsia.base.pictures import SIZE, soften

BINS: Mapping[str, str] = {
    "glass": "the green bin",
    "metal": "the black bin",
    "paper": "the blue bin",
    "plastic": "the yellow bin",
    "cardboard": "the brown bin",
}
"""Material to bin: what the sorting plant decided, not what can be guessed."""

_SIDE = 3 * SIZE
_Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Item:
    """What lies on the belt."""

    material: str

    @property
    def bin(self) -> str:
        return BINS[self.material]


def belt(seed: int) -> tuple[Image.Image, Item]:
    """Draw belt number ``seed``: SIZE x SIZE RGB, and the item on it."""
    rng = random.Random(f"belt {seed}")
    item = Item(rng.choice(tuple(BINS)))
    canvas = _ground(rng)
    layer = Image.new("RGBA", (_SIDE, _SIDE))
    _DRAWN[item.material](layer, rng)
    scale = rng.uniform(0.8, 1.15)
    layer = layer.rotate(rng.uniform(0, 360), Image.Resampling.BICUBIC)
    side = int(_SIDE * scale)
    layer = layer.resize((side, side), Image.Resampling.BICUBIC)
    left, top = ((_SIDE - side) // 2 + rng.randint(-22, 22) for _ in range(2))
    shadow = Image.new("RGBA", layer.size, (0, 0, 0, 110))
    shadow.putalpha(layer.getchannel("A").point(lambda a: a * 0.45).filter(ImageFilter.GaussianBlur(5)))
    canvas.paste(shadow, (left + 7, top + 7), shadow)
    canvas.paste(layer, (left, top), layer)
    return soften(canvas, rng, noise=5.0), item


def _ground(rng: random.Random) -> Image.Image:
    tone = rng.randint(48, 78)
    canvas = Image.new("RGB", (_SIDE, _SIDE), (tone, tone, tone + 4))
    draw = ImageDraw.Draw(canvas)
    for y in range(rng.randint(0, 23), _SIDE, 24):
        draw.line((0, y, _SIDE, y), fill=(tone - 12,) * 3, width=3)
    rail = rng.randint(118, 150)
    for x in (0, _SIDE - 12):
        draw.rectangle((x, 0, x + 12, _SIDE), fill=(rail, rail, rail - 10))
    return canvas


def _tint(rng: random.Random, colour: _Colour, spread: int = 18) -> _Colour:
    r, g, b = (max(0, min(255, c + rng.randint(-spread, spread))) for c in colour)
    return r, g, b


def _bottle(draw: ImageDraw.ImageDraw, fill: tuple[int, ...], cap: tuple[int, ...]) -> None:
    draw.rounded_rectangle((72, 74, 120, 160), 13, fill=fill)
    draw.polygon(((78, 80), (114, 80), (104, 52), (88, 52)), fill=fill)
    draw.rectangle((87, 36, 105, 54), fill=cap)


def _glass(layer: Image.Image, rng: random.Random) -> None:
    draw = ImageDraw.Draw(layer)
    fill = (*_tint(rng, rng.choice(((60, 140, 80), (120, 80, 40), (170, 195, 190)))), 135)
    _bottle(draw, fill, fill)
    draw.line((81, 88, 81, 150), fill=(255, 255, 255, 215), width=5)
    draw.line((91, 40, 91, 54), fill=(255, 255, 255, 190), width=3)


def _metal(layer: Image.Image, rng: random.Random) -> None:
    draw = ImageDraw.Draw(layer)
    tone = rng.randint(150, 185)
    for x in range(66, 127):
        shine = abs((x - 66) / 60 - rng.uniform(0.32, 0.38))
        level = int(max(70, min(250, tone + 75 * (0.35 - shine) * 2)))
        draw.line((x, 58, x, 146), fill=(level, level, min(255, level + 6), 255))
    draw.ellipse((66, 48, 126, 68), fill=(tone + 40, tone + 40, tone + 44, 255), outline=(90, 90, 95, 255), width=3)
    draw.ellipse((66, 136, 126, 156), fill=(tone - 35, tone - 35, tone - 30, 255))


def _paper(layer: Image.Image, rng: random.Random) -> None:
    draw = ImageDraw.Draw(layer)
    corners = [
        (x + rng.randint(-12, 12), y + rng.randint(-12, 12)) for x, y in ((54, 50), (138, 50), (138, 146), (54, 146))
    ]
    draw.polygon(corners, fill=(*_tint(rng, (236, 234, 226), 8), 255))
    for y in range(70, 134, 11):
        draw.line((72, y, rng.randint(100, 122), y), fill=(150, 150, 155, 255), width=3)


def _plastic(layer: Image.Image, rng: random.Random) -> None:
    draw = ImageDraw.Draw(layer)
    fill = _tint(rng, rng.choice(((225, 60, 70), (60, 120, 225), (240, 240, 245), (245, 150, 40))))
    cap = _tint(rng, rng.choice(((30, 60, 160), (200, 30, 40), (30, 140, 60))))
    _bottle(draw, (*fill, 255), (*cap, 255))
    draw.rectangle((72, 100, 120, 128), fill=(*_tint(rng, rng.choice(((250, 230, 90), (90, 190, 230)))), 255))


def _cardboard(layer: Image.Image, rng: random.Random) -> None:
    draw = ImageDraw.Draw(layer)
    brown = _tint(rng, (176, 128, 80), 14)
    dark = tuple(int(c * 0.72) for c in brown)
    w, h = rng.randint(38, 52), rng.randint(34, 46)
    draw.rectangle((96 - w, 96 - h, 96 + w, 96 + h), fill=(*brown, 255), outline=(*dark, 255), width=4)
    draw.rectangle((96 - w, 92, 96 + w, 100), fill=(*_tint(rng, (205, 175, 130), 8), 255))
    draw.line((96 - w // 2, 96 - h, 96 - w // 2, 90), fill=(*dark, 255), width=3)


_DRAWN = {"glass": _glass, "metal": _metal, "paper": _paper, "plastic": _plastic, "cardboard": _cardboard}
