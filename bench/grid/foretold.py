"""The one place where the grid asks the plan."""

from __future__ import annotations

from typing import Any, Final

from tarsia.plan import plan
from tarsia.plan.heap import process

UNRECORDED: Final = ("load",)
"""Phases of a plan that the grid's record leaves out (``bench.grid.measure.live_bytes``)."""


def foretold(recipe: Any, before: int) -> dict[str, Any]:
    """What is planned of a recipe, in bytes.

    ``live`` is the most of tensors once the base is open, ``step`` in a step, ``process`` of the whole process,
    which held ``before`` bytes before it did anything.
    """
    planned = plan(recipe)
    found = planned.as_json()
    phases = {name: peak for name, peak in found["phases"].items() if name not in UNRECORDED}
    return {**found, "live": max(phases.values()), "process": process(planned, before).peak}
