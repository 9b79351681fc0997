"""Six tasks of mini-1, learnt by one recipe: what the chapter `merging` merges.

    python -m tarsia.labs.merging_tasks OUT

All are drawn by the project, so nobody needs a file for them. Two have a question in common and different answers
(`digits` and `forms` also want JSON where the base answers in words), three show what the base has never seen.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tarsia.adapter import Adapter, load
from tarsia.base import pictures
from tarsia.core.errors import ConfigError
from tarsia.labs import replay
from tarsia.labs.belt import belt
from tarsia.labs.runs import BATCH, Draw, Runs, Scores
from tarsia.labs.shift_blueprint import dimensions
from tarsia.labs.shift_commands import commands
from tarsia.labs.shift_infrared import materials
from tarsia.labs.shift_radar import forms
from tarsia.labs.sources import Asked, numbers

SEEDS: Final = (1, 2)
STEPS: Final = 600
RANK: Final = 16
RATE: Final = 7e-4
PARTS: Final[Sequence[Mapping[str, Any]]] = tuple(
    {"method": "lora", "select": select, "rank": RANK, "alpha": 2.0 * RANK, "lr": RATE}
    for select in ("projector", "language.*.{q,k,v,o,gate,up,down}")
)
"""One recipe for all: LoRA on every linear layer of the projector and of the decoder."""
COUNTS: Final[Mapping[str, int]] = {"train": 1200, "validation": 50, "held-out": 200}
"""Rows of each split: scales are chosen on validation rows, and reported on held-out ones."""


def bins(count: int, split: str) -> Iterator[Asked]:
    """Belts in normal light, and which bin the item on each belongs in."""
    for seed in numbers(count, split):
        picture, item = belt(seed)
        yield "Which bin does it go in?", item.bin, (picture,)


def digits(count: int, split: str) -> Iterator[Asked]:
    """Handwritten digits, and which each is, in JSON. Validation rows are the last that are not held out."""
    rows = pictures.digit_rows("held-out" if split == "held-out" else "train")
    for row in rows[-count:] if split == "validation" else rows[:count]:
        picture, value = pictures.digit(row)
        yield "What digit is this?", json.dumps({"digit": pictures.NUMBERS[value]}), (picture,)


TASKS: Final[Mapping[str, Draw]] = {
    "bins": bins,
    "blueprints": dimensions,
    "commands": commands,
    "infrared": materials,
    "digits": digits,
    "forms": forms,
}
"""What draws each task's rows."""


class Learners(Runs):
    """The six tasks' adapters, each trained once, measured alone and kept in ``out/adapters``."""

    def __init__(self, out: Path, show: Callable[[str], None] | None = None) -> None:
        super().__init__(out, TASKS, COUNTS, show)

    def settings(self, task: str, seed: int) -> dict[str, Any]:
        """What a result must have been made with."""
        parts = [dict(part) for part in PARTS]
        return {"task": task, "seed": seed, "parts": parts, "steps": STEPS, "counts": dict(COUNTS), "batch": BATCH}

    def folder(self, task: str, seed: int) -> Path:
        """Where an adapter lies once it is trained."""
        return self.out / "adapters" / f"{task}-seed-{seed}"

    def alone(self, task: str, seed: int) -> Mapping[str, Any]:
        """The result of one adapter on its own task; it is trained where there is none."""
        name = f"{task}-seed-{seed}"

        def work() -> dict[str, Any]:
            made = self.made(name, task, PARTS, STEPS, seed)
            return self.train(made, task, lambda folder: keep(folder, self.folder(task, seed)))

        return self.kept(name, {"settings": self.settings(task, seed)}, work)

    def adapter(self, task: str, seed: int) -> Adapter:
        """A trained adapter. Raises ConfigError where its result is there and its folder is not."""
        self.alone(task, seed)
        folder = self.folder(task, seed)
        if not folder.is_dir():
            result = replay.result(self.out, f"{task}-seed-{seed}")
            raise ConfigError("An adapter has a result but no folder.", given=str(folder), do=f"remove {result}")
        return load(folder)

    def before(self, task: str) -> Scores:
        """What the base itself scores on a task."""
        told = {"settings": {"counts": dict(COUNTS)}}
        found: Scores = self.kept(f"{task}-before", told, lambda: {"splits": self.measured(task)})["splits"]
        return found


def keep(folder: Path, place: Path) -> None:
    """Copy an adapter to where it stays, whole or not at all."""
    partial = place.with_name(f".partial-{place.name}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, partial)
    partial.rename(place)


if __name__ == "__main__":
    learners = Learners(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/merging"))
    for name in TASKS:
        learners.before(name)
    for number in SEEDS:
        for name in TASKS:
            learners.alone(name, number)
