"""Sixty jobs whose pictures are made of factors: ten kinds of thing before six cameras, in many conditions.

A *job* is a kind and a camera, and what an adapter is trained for. Its pictures differ in light, ground, sensor and
turn, the *conditions*, which say nothing of the job. Each job has conditions of its own that it is trained in, others
that settings are chosen on, and others that are looked at once, at the end. Kinds that no job has are strangers.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from tarsia.base import pictures
from tarsia.base.pictures import SIZE
from tarsia.labs import smears
from tarsia.labs.belt import belt
from tarsia.labs.shift_blueprint import blueprint
from tarsia.labs.shift_infrared import infrared
from tarsia.labs.shift_radar import radar

Split = Literal["train", "development", "held-out"]

KINDS: Final = ("circle", "star", "plastic", "cardboard", "digit", "blueprint", "RBC", "infrared", "chart", "rings")
STRANGERS: Final[Mapping[str, tuple[str, ...]]] = {
    "development": ("page", "tiles", "dog", "airplane"),
    "first look": ("radar", "bricks", "horse", "truck"),
    "held-out": ("weave", "blots", "cat", "ship"),
}
"""Kinds that no job has: those that settings are chosen on, those that were held out until a first look at them did not
bear the claim out, and those that are looked at once."""
NEAR: Final[Mapping[str, tuple[str, ...]]] = {
    "development": ("square", "paper", "WBC"),
    "held-out": ("triangle", "metal", "Platelets"),
}
"""Kinds that no job has, and that differ from one that a job has by no more than a form or a material."""
CAMERAS: Final[Mapping[str, tuple[float, float, float]]] = {
    "plain": (1.0, 1.0, 1.0),
    "warm": (1.2, 1.0, 0.6),
    "cool": (0.6, 0.95, 1.2),
    "green": (0.65, 1.2, 0.7),
    "rose": (1.2, 0.65, 1.1),
    "scope": (1.0, 1.0, 1.0),
}
"""What a camera multiplies red, green and blue with; the scope sees through a round hole."""
LIGHTS: Final[Mapping[str, float]] = {"dark": 0.65, "dim": 0.82, "day": 1.0, "bright": 1.18}
GROUNDS: Final = ("even", "slope", "vignette", "bars")
SENSORS: Final = ("clean", "grainy", "blurred")
TURNS: Final = (0, 90, 180, 270)
_START: Final[Mapping[str, int]] = {"train": 0, "development": 20_000_000, "held-out": 30_000_000}
_SHARES: Final[Mapping[str, tuple[float, float]]] = {
    "train": (0.0, 0.6),
    "development": (0.6, 0.8),
    "held-out": (0.8, 1.0),
}


@dataclass(frozen=True, slots=True)
class Job:
    """One adapter's pictures: things of a kind before a camera."""

    kind: str
    camera: str

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.camera}".lower()


@dataclass(frozen=True, slots=True)
class Condition:
    """What a picture of any job may look like besides."""

    light: str
    sensor: str
    turn: int


JOBS: Final = tuple(Job(kind, camera) for kind, camera in product(KINDS, CAMERAS))
CONDITIONS: Final = tuple(Condition(*each) for each in product(LIGHTS, SENSORS, TURNS))


def conditions(job: Job, split: Split) -> tuple[Condition, ...]:
    """The conditions of a job's split: half of all to train in, a quarter to choose on, a quarter held out."""
    digest = hashlib.sha256(job.name.encode()).digest()
    order = list(CONDITIONS)
    random.Random(digest).shuffle(order)
    half, rest = len(order) // 2, len(order) // 4
    cut = {"train": (0, half), "development": (half, half + rest), "held-out": (half + rest, len(order))}[split]
    return tuple(order[cut[0] : cut[1]])


def shots(job: Job, split: Split, count: int, data: Path, seed: int = 0) -> list[Image.Image]:
    """``count`` pictures of a job under its conditions of a split; none is in two splits. A seed draws others."""
    rng = random.Random(f"{job.name} {split} {seed}")
    allowed = conditions(job, split)
    things = thing(job.kind, split, count, data, seed)
    return [taken(each, job.camera, rng.choice(allowed), rng) for each in things]


def strange(kind: str, split: Split, count: int, data: Path, seed: int = 0) -> list[Image.Image]:
    """``count`` pictures of a kind that no job has, before the jobs' cameras and under any condition."""
    rng = random.Random(f"{kind} strange {split} {seed}")
    things = thing(kind, split, count, data, seed)
    return [taken(each, rng.choice(tuple(CAMERAS)), rng.choice(CONDITIONS), rng) for each in things]


def thing(kind: str, split: Split, count: int, data: Path, seed: int) -> list[Image.Image]:
    """Pictures of a kind as they come, SIZE x SIZE RGB."""
    if kind in _FOUND:
        pool = _FOUND[kind](data, kind)
        low, high = (round(share * len(pool)) for share in _SHARES[split])
        rows = list(range(low, high))
        rng = random.Random(f"{kind} {split} {seed}")
        many = rows * (count // len(rows) + 1)
        return [pool[i] for i in rng.sample(many, count)]
    start = _START[split] + 1_000_000 * seed
    return [_drawn(kind, start + i) for i in range(count)]


def taken(picture: Image.Image, camera: str, condition: Condition, rng: random.Random) -> Image.Image:
    """The picture as a camera takes it in a condition; the ground and small changes of each are drawn."""
    noise = np.random.default_rng(rng.getrandbits(32))
    pixels = np.asarray(picture.rotate(condition.turn), dtype=np.float64)
    pixels = pixels * _shade(rng.choice(GROUNDS), rng)[..., None]
    pixels = pixels * LIGHTS[condition.light] * rng.uniform(0.95, 1.05)
    pixels = pixels * np.array(CAMERAS[camera]) * noise.uniform(0.96, 1.04, 3)
    if camera == "scope":
        pixels = _through(pixels, rng)
    if condition.sensor == "grainy":
        pixels = pixels + noise.normal(0, 8, pixels.shape)
    shown = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return shown.filter(ImageFilter.GaussianBlur(0.8)) if condition.sensor == "blurred" else shown


def _shade(ground: str, rng: random.Random) -> NDArray[np.float64]:
    """What the light of a place multiplies each pixel with, [SIZE, SIZE]."""
    across, down = np.meshgrid(np.linspace(-1, 1, SIZE), np.linspace(-1, 1, SIZE))
    if ground == "slope":
        angle = rng.uniform(0, 2 * np.pi)
        return np.asarray(1 + 0.25 * (np.cos(angle) * across + np.sin(angle) * down))
    if ground == "vignette":
        return np.asarray(1.05 - 0.3 * (across**2 + down**2))
    if ground == "bars":
        return np.asarray(1 + 0.13 * np.sign(np.sin(8 * across + rng.uniform(0, 6))))
    return np.ones((SIZE, SIZE))


def _through(pixels: NDArray[np.float64], rng: random.Random) -> NDArray[np.float64]:
    """What is seen through a round hole near the middle, whose rim shines a little."""
    across, down = np.meshgrid(np.linspace(-1, 1, SIZE), np.linspace(-1, 1, SIZE))
    far = np.hypot(across - rng.uniform(-0.06, 0.06), down - rng.uniform(-0.06, 0.06))[..., None]
    radius = rng.uniform(0.84, 0.92)
    return np.asarray(np.where(far < radius, pixels, 0.08 * pixels) + 90 * (abs(far - radius) < 0.035))


def _drawn(kind: str, number: int) -> Image.Image:
    rng = random.Random(f"{kind} {number}")
    if kind in pictures.SHAPES:
        return _shape(kind, rng)
    if kind == "blueprint":
        return blueprint(number)[0]
    if kind == "infrared":
        return infrared(number)[0]
    if kind == "radar":
        return radar(number)[0]
    if kind in _PLAIN:
        return _PLAIN[kind](rng)
    attempt = number * 64
    while (found := belt(attempt))[1].material != kind:
        attempt += 1
    return found[0]


def _shape(kind: str, rng: random.Random) -> Image.Image:
    """One shape of any colour anywhere on an uneven ground."""
    side = 3 * SIZE
    ground = rng.randint(80, 170)
    canvas = Image.new("RGB", (side, side), tuple(ground + rng.randint(-15, 15) for _ in range(3)))
    draw = ImageDraw.Draw(canvas)
    radius = rng.uniform(0.22, 0.3) * side
    x, y = (rng.uniform(0.36, 0.64) * side for _ in range(2))
    colours = [c for c in pictures.COLOURS.values() if max(abs(v - ground) for v in c) > 50]
    colour = tuple(max(0, min(255, c + rng.randint(-14, 14))) for c in rng.choice(colours))
    if kind == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    else:
        draw.polygon(pictures.outline(kind, x, y, radius, rng.uniform(-12, 12)), fill=colour)
    return pictures.soften(canvas, rng, noise=4.0)


def _page(rng: random.Random) -> Image.Image:
    """Lines of print on paper."""
    tone, ink = rng.randint(200, 245), rng.randint(10, 70)
    canvas = Image.new("RGB", (3 * SIZE, 3 * SIZE), (tone, tone, tone - rng.randint(0, 20)))
    draw = ImageDraw.Draw(canvas)
    pitch = rng.randint(14, 22)
    for y in range(rng.randint(6, 16), 3 * SIZE - 8, pitch):
        x = 10
        while x < 3 * SIZE - 20:
            width = rng.randint(6, 34)
            draw.rectangle((x, y, min(x + width, 3 * SIZE - 10), y + pitch // 3), fill=(ink, ink, ink))
            x += width + 7
    return pictures.soften(canvas, rng, noise=4.0)


def _tiles(rng: random.Random) -> Image.Image:
    """A floor of tiles in two colours."""
    side, (one, two) = rng.randint(18, 40), [tuple(rng.randint(30, 230) for _ in range(3)) for _ in range(2)]
    canvas = Image.new("RGB", (3 * SIZE, 3 * SIZE), one)
    draw = ImageDraw.Draw(canvas)
    for i, j in product(range(12), range(12)):
        if (i + j) % 2:
            draw.rectangle((i * side, j * side, (i + 1) * side - 1, (j + 1) * side - 1), fill=two)
    return pictures.soften(canvas, rng, noise=4.0)


def _chart(rng: random.Random) -> Image.Image:
    """Columns of a chart on a light ground."""
    tone = rng.randint(215, 250)
    canvas = Image.new("RGB", (3 * SIZE, 3 * SIZE), (tone, tone, tone))
    draw = ImageDraw.Draw(canvas)
    colour = tuple(rng.randint(30, 200) for _ in range(3))
    count = rng.randint(4, 8)
    width = 160 // count
    for i in range(count):
        draw.rectangle((18 + i * width, rng.randint(20, 150), 14 + (i + 1) * width, 172), fill=colour)
    draw.line((14, 12, 14, 174, 182, 174), fill=(40, 40, 40), width=4)
    return pictures.soften(canvas, rng, noise=4.0)


def _rings(rng: random.Random) -> Image.Image:
    """Rings around a place, as waves on water."""
    across, down = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
    far = np.hypot(across - rng.uniform(8, 56), down - rng.uniform(8, 56))
    wave = np.sin(far * rng.uniform(0.5, 1.1))[..., None]
    tone = rng.randint(80, 160)
    levels = np.array([tone + rng.randint(-10, 10) for _ in range(3)]) + rng.uniform(35, 70) * wave
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def _bricks(rng: random.Random) -> Image.Image:
    """A wall of bricks."""
    high, wide = rng.randint(18, 30), rng.randint(40, 64)
    canvas = Image.new("RGB", (3 * SIZE, 3 * SIZE), (rng.randint(150, 200),) * 3)
    draw = ImageDraw.Draw(canvas)
    red, green = rng.randint(130, 190), rng.randint(50, 90)
    for i, j in product(range(12), range(-1, 6)):
        x, shade = j * wide + (i % 2) * wide // 2, rng.randint(-18, 18)
        fill = (red + shade, green + shade, green + shade - 10)
        draw.rectangle((x, i * high, x + wide - 5, (i + 1) * high - 5), fill=fill)
    return pictures.soften(canvas, rng, noise=4.0)


def _weave(rng: random.Random) -> Image.Image:
    """Cloth: bands across each other."""
    pitch = rng.randint(16, 34)
    one, two = (tuple(rng.randint(40, 220) for _ in range(3)) for _ in range(2))
    canvas = Image.new("RGB", (3 * SIZE, 3 * SIZE), (30, 30, 30))
    draw = ImageDraw.Draw(canvas)
    for i, j in product(range(13), range(13)):
        upright = (i + j) % 2 == 0
        x, y, gap = i * pitch, j * pitch, pitch // 5
        box = (x + gap, y, x + pitch - gap, y + pitch) if upright else (x, y + gap, x + pitch, y + pitch - gap)
        draw.rectangle(box, fill=one if upright else two)
    return pictures.soften(canvas, rng, noise=4.0)


def _blots(rng: random.Random) -> Image.Image:
    """Ink that has run on paper."""
    tone = rng.randint(190, 240)
    canvas = Image.new("RGB", (3 * SIZE, 3 * SIZE), (tone, tone, tone - 8))
    draw = ImageDraw.Draw(canvas)
    ink = tuple(rng.randint(10, 110) for _ in range(3))
    for _ in range(rng.randint(9, 18)):
        x, y, r = rng.randint(0, 3 * SIZE), rng.randint(0, 3 * SIZE), rng.randint(6, 26)
        draw.ellipse((x - r, y - r * rng.uniform(0.5, 1.5), x + r, y + r * rng.uniform(0.5, 1.5)), fill=ink)
    return pictures.soften(canvas.filter(ImageFilter.GaussianBlur(4)), rng, noise=4.0)


_PLAIN: Final = {
    "weave": _weave,
    "blots": _blots,
    "page": _page,
    "tiles": _tiles,
    "chart": _chart,
    "rings": _rings,
    "bricks": _bricks,
}


@lru_cache(maxsize=1)
def _photographs(data: Path) -> Mapping[str, Sequence[Image.Image]]:
    shown, labels = pictures.photographs(data / "cifar10-test.parquet")
    kinds: dict[str, list[Image.Image]] = {name: [] for name in pictures.PHOTOGRAPHS}
    for picture, label in zip(shown, labels, strict=True):
        kinds[pictures.PHOTOGRAPHS[label]].append(Image.fromarray(picture))
    return kinds


@lru_cache(maxsize=1)
def _cells(data: Path) -> Mapping[str, Sequence[Image.Image]]:
    kinds: dict[str, list[Image.Image]] = {label: [] for label in smears.CELLS}
    names = {words: label for label, words in smears.CELLS.items()}
    for name in ("train", "test"):
        for _, answer, (picture,) in smears.cells(data / f"bccd-{name}.parquet", 250):
            kinds[names[answer]].append(picture)
    return kinds


@lru_cache(maxsize=1)
def _digits() -> Sequence[Image.Image]:
    rows = (*pictures.digit_rows("train"), *pictures.digit_rows("held-out"))
    return [pictures.digit(row)[0] for row in rows]


def _of_photographs(data: Path, kind: str) -> Sequence[Image.Image]:
    return _photographs(data)[kind]


def _of_cells(data: Path, kind: str) -> Sequence[Image.Image]:
    return _cells(data)[kind]


def _of_digits(data: Path, kind: str) -> Sequence[Image.Image]:
    return _digits()


_FOUND: Final[Mapping[str, Callable[[Path, str], Sequence[Image.Image]]]] = {
    **dict.fromkeys(("airplane", "dog", "truck", "horse", "cat", "ship"), _of_photographs),
    **dict.fromkeys(smears.CELLS, _of_cells),
    "digit": _of_digits,
}
"""Kinds that are not drawn but found, and where."""
