"""The dog that becomes a disease: how blood cells are best not taught, and three cures, one by one.

    TARSIA_DATA=FOLDER python -m tarsia.labs.dog OUT

High rank on vision and language, ten epochs of few rows, nothing mixed in; then the same with one thing changed.
OUT is that of ``tarsia.labs.replay``, whose general rows it shares. FOLDER holds bccd-*.parquet and cifar10-*.parquet.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tarsia.adapter import open_base
from tarsia.core.errors import ConfigError
from tarsia.labs import blood, replay, replay_rows, smears, sources
from tarsia.labs.experiment import PLACE, samples
from tarsia.train import Recipe

MODEL = "mini-1"
EACH = 50
"""Crops of each kind of cell to train on."""
EPOCHS = 10
BATCH = 8
DOGS = 100
SEEDS = (1, 2, 3)
_RATE = 1e-3
_VISION = "vision.*.{q,k,v,o,up,down}"
_LANGUAGE = "language.*.{q,k,v,o,gate,up,down}"


@dataclass(frozen=True, slots=True)
class Way:
    """How the cells are taught: the rank, where it is put, and the share of the rows that are general."""

    rank: int = 64
    selects: tuple[str, ...] = (_VISION, _LANGUAGE)
    share: float = 0.0


WAYS: Mapping[str, Way] = {
    "as it should not be": Way(),
    "10 % mixed in": Way(share=0.1),
    "rank 4": Way(rank=4),
    "language frozen": Way(selects=(_VISION,)),
}


def name(way: str, seed: int) -> str:
    """What a run's result is called."""
    return f"dog-{way.replace(' ', '-').replace('%', 'percent')}-seed-{seed}"


def write(out: Path, data: Path) -> dict[str, Path]:
    """Write the rows that are not there yet. Returns the files to measure on, by source."""
    replay.write(out, (), "train", data)
    replay.write(out, (), "held-out", data)
    rows = {
        "train/disease-cells": smears.cells(data / "bccd-train.parquet", EACH),
        "held-out/disease-cells": smears.cells(data / "bccd-test.parquet", 69),
        "held-out/disease-dogs": replay_rows.dogs(data, DOGS),
    }
    for file, some in rows.items():
        if not (path := out / f"{file}.parquet").exists():
            sources.write(path, some)
    own = {kind: out / "held-out" / f"disease-{kind}.parquet" for kind in ("cells", "dogs")}
    return own | replay.general(out)


def recipe(way: Way, seed: int, out: Path) -> Recipe:
    """Ten epochs of the cells, whatever is mixed in."""
    rows = EACH * len(smears.CELLS) * EPOCHS / (1 - way.share)
    train: list[dict[str, Any]] = [
        {"path": str(out / "train" / "disease-cells.parquet"), "name": "cells", "weight": 1 - way.share}
    ]
    if way.share:
        train.append({"path": str(out / "train" / "general.parquet"), "name": "general", "weight": way.share})
    lora = {"method": "lora", "rank": way.rank, "alpha": 2.0 * way.rank, "lr": _RATE}
    return Recipe.of(
        {
            **PLACE,
            "model": MODEL,
            "parts": [{**lora, "select": select} for select in way.selects],
            "data": {"train": train},
            "steps": round(rows / BATCH),
            "batch": BATCH,
            "warmup": 0.06,
            "save_every": 1000,
            "seed": seed,
            "out": str(out / "training" / f"dog-{way.rank}-{len(way.selects)}-{round(100 * way.share)}-{seed}"),
        }
    )


def perform(way: str, seed: int, out: Path, measured: Mapping[str, Path]) -> dict[str, Any]:
    """One run, trained and measured."""
    made = recipe(WAYS[way], seed, out)
    found = replay.trained(made, measured, {"cells": 8, "dogs": 12})
    shutil.rmtree(made.out)
    return {"way": way, "seed": seed, "recipe": _described(WAYS[way]), **found}


def before(measured: Mapping[str, Path]) -> dict[str, Any]:
    """What the base itself says."""
    host = open_base(MODEL, dtype=PLACE["precision"], device=PLACE["device"])
    return {"recipe": None, "said": replay.answers(host, samples(measured), {"cells": 8, "dogs": 12})}


def drive(out: Path, console: Console, seeds: Sequence[int] = SEEDS) -> None:
    """Do what has no result yet and no other process is at."""
    data = blood.data()
    with replay.claimed(out / "rows", wait=True):
        measured = write(out, data)
    replay.once(out, "dog-before", lambda: before(measured))
    for seed in seeds:
        for way in WAYS:
            done = replay.once(out, name(way, seed), lambda way=way, seed=seed: perform(way, seed, out, measured))
            if done is not None:
                console.print(f"{time.strftime('%H:%M:%S')} dog, {way}, seed {seed}: {done['seconds']} s")


def read(out: Path, way: str, seed: int) -> dict[str, Any]:
    """A result. Raises ConfigError where it is missing or of another way than is described now."""
    path = replay.result(out, name(way, seed))
    if not path.exists():
        raise ConfigError("A run has no result yet.", given=str(path), do=f"python -m tarsia.labs.dog {out}")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf8"))
    if found["recipe"] != _described(WAYS[way]):
        raise ConfigError("A result is of another recipe.", given=str(path), do="remove it and run again")
    return found


def called_cells(said: Sequence[str]) -> float:
    """Percent of answers that speak of blood."""
    cells = smears.CELLS.values()
    return 100 * sum(text in cells or "cell" in text or "platelet" in text for text in said) / len(said)


def _described(way: Way) -> dict[str, Any]:
    plain = {**asdict(way), "selects": list(way.selects)}
    return {**plain, "rate": _RATE, "each": EACH, "epochs": EPOCHS, "batch": BATCH}


if __name__ == "__main__":
    drive(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/replay"), Console())
