"""A tiny base in a folder, rows in files, and recipes for them: a run takes well under a second."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data.processors import made, picture
from families import CELL, FAMILIES

from tarsia.train.events import Event, Step
from tarsia.train.loop import fit
from tarsia.train.recipe import Recipe

ANSWERS = ("a cat", "a dog", "red", "red and green", "a bird, a ship", "4")


def base(folder: Path, **overrides: Any) -> Path:
    """Write a LLaVA of 16 image tokens a picture, with its processor."""
    processor = made("llava", "chatml")
    processor.patch_size = CELL
    tokenizer = processor.tokenizer
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    options = {
        "text_config": {"vocab_size": len(tokenizer), **ids},
        "image_token_index": processor.image_token_id,
        **overrides,
    }
    model, _ = FAMILIES["llava"].build(0, **options)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def rows(path: Path, count: int = 12, pictures: Sequence[int] = (1, 0, 2)) -> Path:
    """Write rows with pictures in files beside it."""
    lines = []
    for row in range(count):
        names = []
        for i in range(pictures[row % len(pictures)]):
            names.append(f"{path.stem}-{row}-{i}.png")
            picture(shade=7 * row + i + 1).save(path.parent / names[-1])
        question = "what is this? " * (1 + row % 3)
        lines.append({"images": names, "question": question, "answer": ANSWERS[row % len(ANSWERS)]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def world(folder: Path) -> dict[str, Any]:
    """A base, two sources and the values of a recipe that trains all three components, each with a method."""
    return {
        "model": str(base(folder / "base")),
        "parts": [
            {"method": "full", "select": "projector", "lr": 1e-3},
            {"method": "lora", "select": "vision.*.{q,v}", "lr": 3e-3, "rank": 2},
            {"method": "lora", "select": "language.*.{q,v}", "lr": 1e-2, "rank": 2, "dropout": 0.1},
        ],
        "data": {
            "train": [
                {"path": str(rows(folder / "task.jsonl")), "weight": 0.8},
                {"path": str(rows(folder / "talk.jsonl", 5, (0,))), "weight": 0.2},
            ]
        },
        "steps": 8,
        "batch": 2,
        "accumulate": 2,
        "warmup": 2,
        "save_every": 3,
        "threads": 1,
        "device": "cpu",
        "precision": "float32",
        "out": str(folder / "out"),
    }


def recipe(values: dict[str, Any], *overrides: str) -> Recipe:
    return Recipe.of(values, overrides)


def run(values: dict[str, Any], *overrides: str, **keywords: Any) -> list[Event]:
    return list(fit(recipe(values, *overrides), **keywords))


def curve(events: Sequence[Event]) -> list[Step]:
    return [event for event in events if isinstance(event, Step)]


def dying(calls_to_live: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What wraps functions so that this process is killed at the call after so many, counted over all of them."""
    left = [calls_to_live]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **keywords)

        return call

    return counted


def starter(work: Callable[..., None]) -> Callable[..., Any]:
    """What starts ``work`` in a process that has imported everything already and trained nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.small", "transformers.models.llava.modeling_llava", "tarsia.train.loop"])

    def started(*args: Any, **keywords: Any) -> Any:
        process = context.Process(target=work, args=args, kwargs=keywords)
        process.start()
        return process

    return started


def until(events: Iterator[Event], step: int) -> None:
    """Go on to ``step`` and stop there, as an interrupt does."""
    for event in events:
        if isinstance(event, Step) and event.step == step:
            break
    events.close()


def drive(events: Iterator[Event], act: Callable[[Event], None]) -> None:
    """Do something after each event, before the run goes on."""
    for event in events:
        act(event)
