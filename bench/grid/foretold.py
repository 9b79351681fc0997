"""The one place where the grid asks the plan."""

from __future__ import annotations

from typing import Any, Final

from tarsia.plan import plan

UNRECORDED: Final = ("load",)
"""Phases of a plan that the grid's record leaves out (``bench.grid.measure.live_bytes``)."""


def foretold(recipe: Any) -> dict[str, Any]:
    """What is planned of a recipe, in bytes.

    ``live`` is the most of tensors once the base is open, ``step`` in a step, ``process`` of the whole process: None
    where the plan says nothing of it, which is counted.
    """
    found = plan(recipe).as_json()
    phases = {name: peak for name, peak in found["phases"].items() if name not in UNRECORDED}
    return {"process": None, **found, "live": max(phases.values())}
