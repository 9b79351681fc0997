"""Four ways in which a job can differ from what the base knows, each with one recipe for every share of replay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tarsia.labs import shift_infrared, smears
from tarsia.labs.replay_rows import MEASURED
from tarsia.labs.shift_blueprint import dimensions
from tarsia.labs.shift_commands import commands
from tarsia.labs.sources import Asked

Rows = Callable[[str, Path | None], Mapping[str, Iterable[Asked]]]
"""The rows of a split (train, validation, held-out) by source; the folder of TARSIA_DATA, or None."""


@dataclass(frozen=True, slots=True)
class Shift:
    """A job: its rows, and how it is trained. ``needs_data`` where it is made of the files in TARSIA_DATA."""

    name: str
    title: str
    rows: Rows
    recipe: Mapping[str, Any]
    longest: int
    """Most tokens of an answer."""
    needs_data: bool = False


def _counts(split: str) -> int:
    return 1200 if split == "train" else MEASURED


def _blood(split: str, data: Path | None) -> Mapping[str, Iterable[Asked]]:
    assert data is not None
    file = {"train": "train", "validation": "val", "held-out": "test"}[split]
    return {"cells": smears.cells(data / f"bccd-{file}.parquet", 400 if split == "train" else 69)}


def _infrared(split: str, _: Path | None) -> Mapping[str, Iterable[Asked]]:
    count = _counts(split)
    half = count // 2
    return {"materials": shift_infrared.materials(half, split), "bins": shift_infrared.bins(count - half, split)}


def _commands(split: str, _: Path | None) -> Mapping[str, Iterable[Asked]]:
    return {"commands": commands(_counts(split), split)}


def _blueprints(split: str, _: Path | None) -> Mapping[str, Iterable[Asked]]:
    return {"dimensions": dimensions(_counts(split), split)}


def _recipe(rate: float, projector: float, steps: int, batch: int, vision: float = 0.0) -> dict[str, Any]:
    """LoRA on all linear layers of the decoder (and of the tower, at the rate ``vision``), the projector whole."""
    lora = {"method": "lora", "rank": 8, "alpha": 16.0}
    parts = [
        {"method": "full", "select": "projector", "lr": projector},
        {**lora, "select": "language.*.{q,k,v,o,gate,up,down}", "lr": rate},
    ]
    if vision:
        parts.insert(0, {**lora, "select": "vision.*.{q,k,v,o,up,down}", "lr": vision})
    return {"model": "mini-1", "parts": parts, "steps": steps, "batch": batch, "warmup": 0.06, "save_every": 1000}


SHIFTS: Mapping[str, Shift] = {
    shift.name: shift
    for shift in (
        Shift("blood", "blood cells", _blood, _recipe(4e-4, 1e-4, 360, 4), 8, needs_data=True),
        Shift("infrared", "infrared belt", _infrared, _recipe(1e-3, 1e-4, 320, 4), 8),
        Shift("commands", "robot commands", _commands, _recipe(1.6e-3, 1e-4, 440, 4), 40),
        Shift("blueprints", "blueprints", _blueprints, _recipe(1.8e-3, 2e-4, 440, 4), 8),
    )
}
