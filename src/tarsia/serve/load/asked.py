"""What a load test asks: adapters and pictures by Zipf's law, prompts of a given length, all of it from one seed."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, count
from typing import Any, Final

WORDS: Final = (
    "the a red blue green small large round square left right above below near far first last old new bright dark "
    "house tree river cat dog bird car road table chair lamp window door hand stone glass paper water light sound "
    "one two three four five many few some all none is was has had can may must and or but with without"
)
"""Common words, of about one token each in most vocabularies."""

SIDE: Final = 96
"""Pixels of a drawn picture's sides."""


@dataclass(frozen=True, slots=True)
class Question:
    """One request: its number, whom it asks (a model's name), about which picture (None: none) and in which words."""

    number: int
    model: str
    picture: int | None
    prompt: str

    @property
    def same(self) -> tuple[str, int | None, str]:
        """What decides the answer: equal for two questions that must be answered alike."""
        return self.model, self.picture, self.prompt


@dataclass(frozen=True, slots=True)
class Mix:
    """What is asked for. ``models`` from the most asked to the least; ``pictures`` 0: none are shown.

    ``zipf``: the n-th of them is asked for in proportion to n ** -zipf (0: all alike), pictures too. ``pictured`` is
    the share of questions that show one. ``prompts`` are so many different ones, of about ``words`` tokens each.
    """

    models: tuple[str, ...]
    zipf: float = 1.1
    pictures: int = 16
    pictured: float = 1.0
    prompts: int = 16
    words: int = 24
    seed: int = 0

    def questions(self) -> Iterator[Question]:
        """Without an end; the same for the same mix."""
        drawn = random.Random(self.seed)
        models, pictures = shares(len(self.models), self.zipf), shares(self.pictures, self.zipf)
        prompts = [self._prompt(i) for i in range(self.prompts)]
        for number in count():
            model = drawn.choices(self.models, cum_weights=models)[0]
            shown = self.pictures > 0 and drawn.random() < self.pictured
            picture = drawn.choices(range(self.pictures), cum_weights=pictures)[0] if shown else None
            yield Question(number, model, picture, drawn.choice(prompts))

    def _prompt(self, i: int) -> str:
        drawn = random.Random(f"prompt {self.seed} {i}")
        return " ".join(["Say", "what", *drawn.choices(WORDS.split(), k=max(1, self.words - 3)), "?"])


def shares(many: int, zipf: float) -> Sequence[float]:
    """Zipf's law: the cumulated weights of the first, the second, ..."""
    return list(accumulate((n + 1) ** -zipf for n in range(many)))


@lru_cache(maxsize=256)
def picture(number: int) -> bytes:
    """The PNG file of a picture of ``SIDE`` by ``SIDE``: coloured shapes, drawn by its number."""
    from PIL import Image, ImageDraw

    drawn = random.Random(f"picture {number}")

    def colour() -> tuple[int, int, int]:
        return drawn.randrange(256), drawn.randrange(256), drawn.randrange(256)

    image = Image.new("RGB", (SIDE, SIDE), colour())
    pen = ImageDraw.Draw(image)
    for _ in range(8):
        (left, right), (top, bottom) = (sorted(drawn.sample(range(SIDE), 2)) for _ in range(2))
        drawn.choice((pen.rectangle, pen.ellipse))((left, top, right, bottom), fill=colour())
    held = io.BytesIO()
    image.save(held, "PNG")
    return held.getvalue()


def body(question: Question, max_tokens: int) -> dict[str, Any]:
    """The question as OpenAI's chat completions take it: greedy, streamed, with usage at the end."""
    content: list[dict[str, Any]] = []
    if question.picture is not None:
        url = "data:image/png;base64," + base64.b64encode(picture(question.picture)).decode()
        content.append({"type": "image_url", "image_url": {"url": url}})
    content.append({"type": "text", "text": question.prompt})
    return {
        "model": question.model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
