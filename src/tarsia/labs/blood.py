"""Blood cells: mini-1 learns to name and count them, with and without photographs mixed in; what does it say of a dog?

    TARSIA_DATA=FOLDER python -m tarsia.labs.blood OUT

FOLDER holds bccd-*.parquet and cifar10-*.parquet. Photographs are the general source.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from tarsia.adapter import open_base
from tarsia.core.errors import ConfigError
from tarsia.evaluate import Report
from tarsia.labs import smears, sources
from tarsia.labs.draw import panels
from tarsia.labs.experiment import Mix, adapt, forgotten, measure, mixed, samples
from tarsia.train import Event, Step

TASK = ("cells", "counts")
GENERAL = ("photographs",)
WATCHED = ("dog", "digits", "words", "refusals")
"""Sources that are measured but never trained on, replayed or not."""
MIXES: Mapping[str, float] = {"no replay": 0.0, "10 % replay": 0.1}
RECIPE: Mapping[str, Any] = {
    "model": "mini-1",
    "parts": [
        {"method": "lora", "select": "vision.*.{q,k,v,o,up,down}", "rank": 16, "alpha": 32.0, "lr": 1e-3},
        {"method": "full", "select": "projector", "lr": 5e-4},
        {"method": "lora", "select": "language.*.{q,k,v,o,gate,up,down}", "rank": 16, "alpha": 32.0, "lr": 1e-3},
    ],
    "steps": 320,
    "batch": 16,
    "warmup": 20,
    "save_every": 100,
    "seed": 1,
}


def data() -> Path:
    """The folder in TARSIA_DATA. Raises ConfigError where it is not set or files are missing."""
    folder = Path(os.environ.get("TARSIA_DATA", ""))
    names = [f"{name}.parquet" for name in ("bccd-train", "bccd-test", "cifar10-train", "cifar10-test")]
    missing = [name for name in names if not (folder / name).is_file()]
    if "TARSIA_DATA" not in os.environ or missing:
        raise ConfigError(
            "The blood smears and photographs are not here.",
            given=os.environ.get("TARSIA_DATA", "TARSIA_DATA is not set"),
            allowed=f"a folder with {', '.join(names)}",
            do="export TARSIA_DATA=FOLDER",
        )
    return folder


def write(out: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Write the rows to train on and those to measure on (BCCD's test split). Returns both by source."""
    folder = data()
    rows = {
        "cells": smears.cells(folder / "bccd-train.parquet", 400),
        "counts": smears.counts(folder / "bccd-train.parquet", 8),
        "photographs": smears.photographs(folder / "cifar10-train.parquet", 2000),
        "cells-held-out": smears.cells(folder / "bccd-test.parquet", 69),
        "counts-held-out": smears.counts(folder / "bccd-test.parquet", 3),
        "photographs-held-out": smears.photographs(folder / "cifar10-test.parquet", 500),
        "dog-held-out": smears.photographs(folder / "cifar10-test.parquet", 100, seed=1, only="dog"),
        "digits-held-out": sources.digits(150, "held-out"),
        "words-held-out": sources.WORLD["words"](60, "held-out"),
        "refusals-held-out": sources.WORLD["refusals"](60, "held-out"),
    }
    files = {name: out / "data" / f"{name}.parquet" for name in rows}
    for name, path in files.items():
        sources.write(path, rows[name])
    held = {name.removesuffix("-held-out"): path for name, path in files.items() if name.endswith("-held-out")}
    return {name: files[name] for name in (*TASK, *GENERAL)}, held


def run(out: Path, console: Console) -> tuple[Report, list[Mix]]:
    """Train with each mix, measure each against before, and draw ``out/blood.png``."""
    train, held = write(out)
    before = measure(open_base(RECIPE["model"]), held)
    console.print(before.table())

    def show(name: str, event: Event | None) -> None:
        if isinstance(event, Step) and event.step % 50 == 0:
            console.print(f"{name}: step {event.step}, loss {event.loss:.3f}")

    recipe = {**RECIPE, "data": {"train": [{"path": str(train[s]), "name": s} for s in TASK]}}
    general = [{"path": str(train[s]), "name": s} for s in GENERAL]
    mixes = []
    for name, replay in MIXES.items():
        mixes.append(
            adapt(name, mixed(recipe, general, replay, out / f"replay-{round(100 * replay)}"), held, before, show)
        )
        console.print(mixes[-1].change.table())
    panels(
        out / "blood.png", samples({s: held[s] for s in ("cells", "dog")}), before, {m.name: m.report for m in mixes}
    )
    return before, mixes


def cell_words(report: Report) -> float:
    """Share of answers about a dog's photograph that speak of blood, 0..1."""
    rows = next(result for result in report.results if result.source == "dog").rows
    return sum(row.said in smears.CELLS.values() or "cell" in row.said for row in rows) / len(rows)


def values(before: Report, mixes: list[Mix]) -> dict[str, dict[str, float | int | str]]:
    """What a line of results holds: by source, percent of rows answered right, before and with each mix."""
    reports = {"before": before, **{mix.name: mix.report for mix in mixes}}
    table: dict[str, dict[str, float | int | str]] = {}
    for source in (*TASK, *GENERAL, *WATCHED):
        found = {name: next(r for r in report.results if r.source == source) for name, report in reports.items()}
        table[source] = {"rows": found["before"].n, **{name: round(100 * r.free.mean, 1) for name, r in found.items()}}
        if len(found["before"].answers) < 2:
            continue
        chosen = {name: r.constrained for name, r in found.items()}
        table[f"{source}, choosing"] = {
            "rows": found["before"].n,
            **{name: round(100 * c.mean, 1) if c is not None else "" for name, c in chosen.items()},
        }
    table["dogs called cells"] = {n: round(100 * cell_words(report), 1) for n, report in reports.items()}
    table["points forgotten, photographs"] = {mix.name: round(forgotten(mix, GENERAL), 1) for mix in mixes}
    table["parameters trained, % of base"] = {mix.name: round(100 * mix.share, 2) for mix in mixes}
    return table


if __name__ == "__main__":
    run(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/blood"), Console())
