"""The one place where the grid asks the plan."""

from __future__ import annotations

from typing import Any

from tarsia.plan import plan


def foretold(recipe: Any) -> dict[str, Any]:
    """The planned peaks of a recipe in bytes: ``live``, of tensors, and ``process``, of the whole process."""
    found = plan(recipe)
    return {"live": found.live, "process": None, **found.as_json()}
