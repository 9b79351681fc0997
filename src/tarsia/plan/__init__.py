"""Memory and time of a run, foretold before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tarsia.plan.foretell import Plan, plan
    from tarsia.plan.rehearse import Outline

__all__ = ["Outline", "Plan", "plan"]


def __getattr__(name: str) -> Any:
    # sums on paper (`tarsia.plan.wall`) need no torch
    if name not in __all__:
        raise AttributeError(name)
    from tarsia.plan.foretell import Plan, plan
    from tarsia.plan.rehearse import Outline

    return {"Outline": Outline, "Plan": Plan, "plan": plan}[name]
