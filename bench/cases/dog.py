"""Blood cells taught as they should not be, and three cures: dogs called cells, the job, what was known; percent.

Gathers the runs in the folder TARSIA_REPLAY (default runs/replay) and does those that are missing. Needs TARSIA_DATA.
Each cell is a mean over three seeds with the least and the most.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from bench.cases.replay import folder, spread
from bench.run import Values
from tarsia.labs import blood, dog, replay
from tarsia.labs.experiment import samples


def measure() -> Values:
    """By way of teaching: the job, dogs called cells, and every source that was known."""
    out = folder()
    dog.drive(out, Console())
    rows = samples(dog.write(out, blood.data()))

    def figures(found: Mapping[str, Any]) -> dict[str, float]:
        return {"dogs called cells": dog.called_cells(found["said"]["dogs"]), **replay.scores(found, rows)}

    before = figures(json.loads(replay.result(out, "dog-before").read_text(encoding="utf8")))
    table = {"before": {key: f"{value:.1f}" for key, value in before.items()}}
    for way in dog.WAYS:
        runs = [figures(dog.read(out, way, seed)) for seed in dog.SEEDS]
        table[way] = {key: spread([run[key] for run in runs]) for key in before}
    return table
