"""Where the adapter is put, against where the job differs from what the base knows: the runs of the chapter `where`.

    python -m tarsia.labs.placing OUT

The jobs ask one question about the same things: `visual` shows them on a radar's screen, `format` wants the answer in
JSON. Every place is trained for the same steps at the best of the same rates, and nearly as many numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tarsia.labs.runs import Draw
from tarsia.labs.shift_radar import forms, places, screens
from tarsia.labs.trials import Chosen, Trial, Trials

KNOWN: Final = "known"
JOBS: Final[Mapping[str, Draw]] = {"visual": screens, "format": forms, KNOWN: places}
"""What draws a job's rows; ``known`` is what both differ from, which is never trained."""
STEPS: Final[Mapping[str, int]] = {"visual": 200, "format": 80}
RATES: Final = (1.5e-3, 4e-3)
SEEDS: Final = (1, 2, 3)


def _lora(select: str, rank: int) -> dict[str, Any]:
    return {"method": "lora", "select": select, "rank": rank, "alpha": 2.0 * rank}


_VISION: Final = "vision.*.{q,k,v,o,up,down}"
_LANGUAGE: Final = "language.*.{q,k,v,o,gate,up,down}"
BOTH: Final = "vision and language"
KINDS: Final[Mapping[str, Sequence[dict[str, Any]]]] = {
    "vision": [_lora(_VISION, 8)],
    "projector": [{"method": "full", "select": "projector"}],
    "language": [_lora(_LANGUAGE, 8)],
    BOTH: [_lora(_VISION, 4), _lora(_LANGUAGE, 4)],
}


PLACED: Final[Mapping[str, Sequence[str]]] = {
    "visual": ("vision", "language"),
    "format": ("projector", "language", BOTH),
}
"""Where the adapter is put, by job."""
ONCE: Final = frozenset({("format", "projector"), ("format", BOTH)})
"""What is run with the first seed alone."""


def desk(out: Path, show: Callable[[str], None] | None = None) -> Trials:
    """The desk on which the runs are kept."""
    return Trials(out, JOBS, KINDS, show)


def seeds(job: str, kind: str) -> Sequence[int]:
    """The seeds of a place on a job."""
    return SEEDS[:1] if (job, kind) in ONCE else SEEDS


def found(trials: Trials) -> dict[tuple[str, str], Chosen]:
    """Every place on every job, each at its best rate. Trains what has no result."""
    return {
        (job, kind): trials.chosen(Trial(job, kind, 0.0, 0, steps), RATES, seeds(job, kind))
        for job, steps in STEPS.items()
        for kind in PLACED[job]
    }


if __name__ == "__main__":
    runs = desk(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/where"))
    for job in JOBS:
        runs.before(job)
    for (job, kind), chosen in found(runs).items():
        print(f"  {job} {kind}: {chosen.accuracy:.1f} % at {chosen.rate:g}", flush=True)
