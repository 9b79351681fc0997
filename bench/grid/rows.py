"""Questions about drawn pictures, as JSONL with PNG files beside it: lengths, sizes and contents follow from a seed."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image

SHAPES: Final = ((1.0, 1.0), (1.0, 0.75), (0.75, 1.0), (1.0, 0.5), (0.6, 0.9))
"""Width and height of a picture, as shares of the resolution; each picture has one of them."""


@dataclass(frozen=True, slots=True)
class Rows:
    """``count`` rows; row i has ``pictures[i % len(pictures)]`` pictures. Lengths are in words.

    ``uneven`` is how far a text may be from its length, as a share of it.
    """

    count: int
    pictures: tuple[int, ...]
    resolution: int
    question: int
    answer: int
    uneven: float

    def write(self, folder: Path, seed: int) -> Path:
        """Write rows.jsonl and its pictures into ``folder``; the same seed gives the same bytes."""
        chance = random.Random(seed)
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for row in range(self.count):
            names = [f"{row}-{i}.png" for i in range(self.pictures[row % len(self.pictures)])]
            for name in names:
                drawn(chance, self.resolution).save(folder / name)
            texts = [_words(chance, self._length(chance, mean)) for mean in (self.question, self.answer)]
            lines.append({"images": names, "question": texts[0], "answer": texts[1]})
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf8")
        return path

    def _length(self, chance: random.Random, mean: int) -> int:
        return max(1, round(mean * chance.uniform(1 - self.uneven, 1 + self.uneven)))


def drawn(chance: random.Random, resolution: int) -> Image.Image:
    """A gradient under noise, RGB, of one of SHAPES."""
    width, height = (max(28, round(resolution * share)) for share in chance.choice(SHAPES))
    bands: Sequence[Image.Image] = [
        Image.linear_gradient("L").resize((width, height)),
        Image.frombytes("L", (width, height), chance.randbytes(width * height)),
        Image.new("L", (width, height), chance.randrange(256)),
    ]
    return Image.merge("RGB", chance.sample(bands, 3))


def _words(chance: random.Random, count: int) -> str:
    letters = string.ascii_lowercase
    return " ".join("".join(chance.choices(letters, k=chance.randint(2, 6))) for _ in range(count))
