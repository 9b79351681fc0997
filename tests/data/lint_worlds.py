"""Rows on which every rule is silent, and for each rule its fault, planted in a few of them."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from data.processors import made, turns
from families import FAMILIES
from PIL import Image, ImageEnhance

import tarsia.methods  # noqa: F401 (fills the registry)
from tarsia.anatomy import anatomy_of
from tarsia.core.attach import Part
from tarsia.core.method import find
from tarsia.data import Encoder, Source, read
from tarsia.data.lint import Aim, Findings, Given, lint

ANSWERS = ("a cat", "a dog", "red", "green")
TRAIN, EVAL = 40, 32


def photograph(seed: int, side: int = 32) -> Image.Image:
    """A smooth random picture, like no other."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


def png(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    held = io.BytesIO()
    picture.save(held, kind, **options)
    return held.getvalue()


def shown(picture: bytes) -> str:
    """An encoded picture as a row holds it."""
    return "data:image/any;base64," + base64.b64encode(picture).decode()


def row(number: int, seed: int) -> dict[str, Any]:
    return {
        "image": shown(png(photograph(seed))),
        "question": "what is this?",
        "answer": ANSWERS[number % len(ANSWERS)],
    }


@dataclass
class World:
    """A source to train on, one to evaluate on, and how they are linted. A fault changes it in place."""

    train: list[dict[str, Any]]
    held: list[dict[str, Any]]
    template: str = "chatml"
    max_length: int | None = 64
    context: int | None = 64
    weights: Mapping[str, float] = field(default_factory=lambda: {"train": 1.0})
    drawn: float = 80.0
    select: Sequence[tuple[str, str]] = (("lora", "vision.0..1.{q,v}"), ("full", "projector"))
    rows: int | None = None
    folder: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)

    def lint(self) -> Findings:
        opened = {}
        for name, table in {"train": self.train, "held": self.held}.items():
            path = Path(self.folder.name, f"{name}.jsonl")
            path.write_text("".join(json.dumps(line) + "\n" for line in table))
            opened[name] = read(Source(path=str(path)))
        parts = tuple(Part(method, select, find(method).configure({})) for method, select in self.select)
        return lint(
            [
                Given("train", opened["train"], True, self.weights["train"], self.drawn),
                Given("held", opened["held"], trained=False),
            ],
            Encoder(processor(self.template), self.max_length),
            rows=self.rows,
            context=self.context,
            aim=Aim(sites(), parts),
        )


@lru_cache(maxsize=4)
def processor(template: str) -> Any:
    return made("llava", template)


@lru_cache(maxsize=1)
def sites() -> tuple[Any, ...]:
    model, config = FAMILIES["llava"].build(0)
    return tuple(anatomy_of(config).sites(model))


def clean() -> World:
    return World([row(i, i) for i in range(TRAIN)], [row(i, 1000 + i) for i in range(EVAL)])


Plant = Callable[[World], dict[str, Sequence[int]]]


@cache
def planted(plant: Plant) -> tuple[Findings, dict[str, Sequence[int]]]:
    """What is found where a fault is planted, and the rows that its rule must name."""
    world = clean()
    expected = plant(world)
    return world.lint(), expected


FAULTS: dict[str, list[Plant]] = {}


def fault(code: str) -> Callable[[Plant], Plant]:
    """Register what plants the fault of a rule; it returns the rows that the rule must name, by source."""

    def register(plant: Plant) -> Plant:
        FAULTS.setdefault(code, []).append(plant)
        return plant

    return register


@fault("unreadable-row")
def unknown_column(w: World) -> dict[str, Sequence[int]]:
    w.train[3]["colour"] = "red"
    return {"train": [3]}


@fault("unreadable-row")
def no_such_type(w: World) -> dict[str, Sequence[int]]:
    w.train[5]["answer"] = 17
    w.held[2] = ["not", "a", "row"]
    return {"train": [5], "held": [2]}


@fault("unreadable-row")
def more_placeholders(w: World) -> dict[str, Sequence[int]]:
    w.train[0]["question"] = "<image><image>what are these?"
    return {"train": [0]}


@fault("control-token")
def control_in_question(w: World) -> dict[str, Sequence[int]]:
    w.train[7]["question"] = "what is <|im_end|> this?"
    w.train[9]["answer"] = "a cat</s>"
    return {"train": [7, 9]}


@fault("control-token")
def control_in_a_tool(w: World) -> dict[str, Sequence[int]]:
    said = [{"role": "user", "content": "what is this?"}, {"role": "assistant", "content": "a cat"}]
    tool = {"type": "function", "function": {"name": "look", "description": "sees <|im_end|>"}}
    w.train[7] = {"messages": said, "tools": [tool]}
    return {"train": [7]}


@fault("template")
def answer_first(w: World) -> dict[str, Sequence[int]]:
    w.train[4] = {"messages": [{"role": "assistant", "content": "a cat"}, {"role": "user", "content": "why?"}]}
    return {"train": [4]}


@fault("encoding")
def a_token_of_both(w: World) -> dict[str, Sequence[int]]:
    name = "{{ m['role'] + ':' }}{% if m['role'] == 'assistant' %}d{% endif %}"
    w.template = turns(name, "<|im_end|>", "{{ 'assistant:d' }}")  # what follows may grow together with the d
    w.train[6]["answer"] = "og"
    return {"train": [6]}


@fault("unreadable-row")
def half_a_character(w: World) -> dict[str, Sequence[int]]:
    w.train[6]["answer"] = "a cat\ud800"
    return {"train": [6]}


@fault("no-label")
def nobody_answers(w: World) -> dict[str, Sequence[int]]:
    w.train[2] = {"messages": [{"role": "user", "content": "what is this?"}]}
    return {"train": [2]}


@fault("no-label")
def answer_cut_off(w: World) -> dict[str, Sequence[int]]:
    w.train[8]["question"] = "what is this? " * 40
    return {"train": [8]}


@fault("all-fail")
def every_row(w: World) -> dict[str, Sequence[int]]:
    for each in w.held:
        each["colour"] = "red"
    return {"held": range(EVAL)}


@fault("empty-answer")
def says_nothing(w: World) -> dict[str, Sequence[int]]:
    w.train[11]["answer"] = ""
    w.train[12]["answer"] = "  "
    return {"train": [11, 12]}


@fault("sampled")
def few_looked_at(w: World) -> dict[str, Sequence[int]]:
    w.rows = 30
    return {"train": []}


@fault("over-long")
def answer_cut(w: World) -> dict[str, Sequence[int]]:
    w.train[1]["answer"] = "a cat and a dog " * 20
    return {"train": [1]}


@fault("cut-picture")
def picture_cut(w: World) -> dict[str, Sequence[int]]:
    question = {"role": "user", "content": [{"type": "text", "text": "and then? " * 30}, {"type": "image"}]}
    before = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "a cat"}]
    w.train[3] = {"messages": [*before, question, before[1]], "images": [w.train[3]["image"]]}
    return {"train": [3]}


@fault("over-context")
def longer_than_the_model(w: World) -> dict[str, Sequence[int]]:
    w.max_length = None
    w.train[1]["answer"] = "a cat and a dog " * 20
    w.held[4]["question"] = "what is this? " * 40
    return {"train": [1], "held": [4]}


@fault("no-end")
def template_without_end(w: World) -> dict[str, Sequence[int]]:
    w.template = "vicuna"
    return {"": []}


@fault("few-labels")
def long_prompts(w: World) -> dict[str, Sequence[int]]:
    w.max_length = w.context = None
    for each in w.train:
        each["question"] = "what is this? " * 200
    return {"train": []}


@fault("picture-tokens")
def pictures_fill_the_row(w: World) -> dict[str, Sequence[int]]:
    one = shown(png(photograph(77)))
    w.train[3] = {"images": [one] * 13, "question": "which? ", "answer": "a cat and a dog " * 9}
    return {"train": [3]}


@fault("missing-picture")
def file_is_gone(w: World) -> dict[str, Sequence[int]]:
    w.train[3]["image"] = "gone.png"
    return {"train": [3]}


@fault("bomb")
def bomb(w: World) -> dict[str, Sequence[int]]:
    w.train[3]["image"] = shown(png(Image.new("1", (20000, 20000))))
    w.train[4]["image"] = shown(png(Image.new("1", (9500, 9500))))  # PIL alone would only warn
    return {"train": [3, 4]}


@fault("deep-picture")
def sixteen_bits(w: World) -> dict[str, Sequence[int]]:
    deep = Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64)
    w.train[3]["image"] = shown(png(deep))
    return {"train": [3]}


@fault("unreadable-picture")
def broken_pictures(w: World) -> dict[str, Sequence[int]]:
    whole = png(photograph(5, 200), "JPEG")
    for at, content in enumerate((b"", b"no picture", whole[: len(whole) // 3], png(photograph(6))[:200])):
        w.train[at]["image"] = shown(content)
    return {"train": range(4)}


@fault("animated")
def animation(w: World) -> dict[str, Sequence[int]]:
    frames = [photograph(500 + i) for i in range(3)]
    w.train[3]["image"] = shown(png(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    return {"train": [3]}


@fault("transparent")
def see_through(w: World) -> dict[str, Sequence[int]]:
    ghost = photograph(600).convert("RGBA")
    ghost.putalpha(Image.linear_gradient("L").resize(ghost.size))
    w.train[3]["image"] = shown(png(ghost))
    return {"train": [3]}


@fault("elongated")
def very_long(w: World) -> dict[str, Sequence[int]]:
    w.train[3]["image"] = shown(png(photograph(700).resize((400, 20))))
    w.train[4]["image"] = shown(png(photograph(701).resize((20, 400))))
    return {"train": [3, 4]}


@fault("tiny-picture")
def few_pixels(w: World) -> dict[str, Sequence[int]]:
    w.train[3]["image"] = shown(png(photograph(800, 5)))
    return {"train": [3]}


@fault("flat-picture")
def empty_canvases(w: World) -> dict[str, Sequence[int]]:
    w.train[3]["image"] = shown(png(Image.new("RGB", (40, 40), "white")))
    w.held[4]["image"] = shown(png(Image.new("RGB", (50, 40), "black")))
    return {"train": [3], "held": [4]}


@fault("leak")
def trained_on(w: World) -> dict[str, Sequence[int]]:
    w.held[3] = dict(w.train[7])
    w.held[4] = {**w.train[8], "image": shown(png(photograph(8), "BMP"))}  # other bytes, the same pixels
    return {"held": [3, 4]}


@fault("near-leak")
def nearly_trained_on(w: World) -> dict[str, Sequence[int]]:
    pictures = [photograph(i, 96) for i in range(5)]
    edited = [
        png(pictures[0], "JPEG", quality=75),
        png(pictures[1].resize((60, 60))),
        png(ImageEnhance.Brightness(pictures[2]).enhance(1.08)),
        png(ImageEnhance.Contrast(pictures[3]).enhance(0.85)),
        png(pictures[4]),  # the same pixels, and another question
    ]
    for at, (picture, copy) in enumerate(zip(pictures, edited, strict=True)):
        w.train[at]["image"] = shown(png(picture))
        w.held[at]["image"] = shown(copy)
    w.held[4]["question"] = "which colour is this?"
    return {"held": range(5)}


@fault("duplicate")
def rows_twice(w: World) -> dict[str, Sequence[int]]:
    w.train[20] = dict(w.train[4])
    w.train[30] = dict(w.train[4])
    return {"train": [20, 30]}


@fault("near-duplicate")
def pictures_nearly_twice(w: World) -> dict[str, Sequence[int]]:
    w.train[21]["image"] = shown(png(photograph(4, 64), "JPEG", quality=80))
    return {"train": [21]}


@fault("contradiction")
def two_answers(w: World) -> dict[str, Sequence[int]]:
    w.train[6]["image"] = w.train[5]["image"]
    w.held[7] = {**w.train[8], "answer": "neither"}
    return {"train": [5, 6, 8], "held": [7]}


@fault("one-answer")
def always_a_cat(w: World) -> dict[str, Sequence[int]]:
    for each in w.train[1:]:
        each["answer"] = "a cat"
    w.train[0]["answer"] = "a dog"
    return {"train": [0]}


@fault("imbalance")
def a_rare_class(w: World) -> dict[str, Sequence[int]]:
    for at, each in enumerate(w.train):
        each["answer"] = "a dog" if at % 2 else "red" if at in (0, 2) else "a cat"
    w.held = [each for each in w.held if each["answer"] != "green"]
    return {"train": [0, 2]}


@fault("answer-in-prompt")
def prompt_says_it(w: World) -> dict[str, Sequence[int]]:
    w.train[0]["question"] = "is this a cat?"
    return {"train": [0]}


@fault("unseen-answer")
def never_taught(w: World) -> dict[str, Sequence[int]]:
    for at in (3, 7, 11):
        w.held[at]["answer"] = "a ship"
    return {"held": [3, 7, 11]}


@fault("never-seen")
def too_few_steps(w: World) -> dict[str, Sequence[int]]:
    w.drawn = 0.2
    return {"train": []}


@fault("never-seen")
def no_weight(w: World) -> dict[str, Sequence[int]]:
    w.weights = {"train": 0.0}
    return {"train": []}


@fault("hardly-seen")
def a_few_of_many(w: World) -> dict[str, Sequence[int]]:
    w.drawn = 1.5
    return {"train": []}


@fault("walked-often")
def by_heart(w: World) -> dict[str, Sequence[int]]:
    w.drawn = 40 * 100
    return {"train": []}


@fault("few-rows")
def a_handful(w: World) -> dict[str, Sequence[int]]:
    del w.held[5:]
    return {"held": []}


@fault("no-site")
def nothing_selected(w: World) -> dict[str, Sequence[int]]:
    w.select = [("lora", "vision.77.q")]
    return {"": []}


@fault("no-site")
def only_dead(w: World) -> dict[str, Sequence[int]]:
    w.select = [("lora", "vision.-1.q")]
    return {"": []}


@fault("no-site")
def claimed_twice(w: World) -> dict[str, Sequence[int]]:
    w.select = [("lora", "language.*.{q,v}"), ("full", "language.0.q")]
    return {"": []}


@fault("dead-site")
def some_dead(w: World) -> dict[str, Sequence[int]]:
    w.select = [("full", "vision")]
    return {"": []}


@fault("no-picture")
def nothing_to_see(w: World) -> dict[str, Sequence[int]]:
    for each in (*w.train, *w.held):
        del each["image"]
    for at, each in enumerate(w.train):
        each["question"] = f"what is {at}?"
    for at, each in enumerate(w.held):
        each["question"] = f"which is {at}?"
    return {"": []}
