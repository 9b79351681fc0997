"""The plan of a run beside what it took: made before it begins, compared and kept when it ends."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tarsia.plan import Plan
    from tarsia.train.events import Event
    from tarsia.train.recipe import Recipe


@dataclass(slots=True)
class Foreseen:
    """``plan`` is None where the run could not be foretold, which has been said then.

    ``stepped``: whether the run made a step. One that is finished already has nothing new to compare.
    """

    plan: Plan | None
    stepped: bool = False
    seconds: float | None = None
    """Of all steps, where this machine was calibrated."""

    @classmethod
    def of(cls, recipe: Recipe, *, quiet: bool = False) -> Foreseen:
        """Plan a run, and say on stderr what it will take, or why that is not known; ``quiet``: warnings alone."""
        from tarsia.cli.machine import available_memory
        from tarsia.core.errors import TarsiaError
        from tarsia.plan import plan

        try:
            found = plan(recipe)
        except TarsiaError as error:
            # the run itself will say what is wrong with it
            print(f"not planned: {str(error).splitlines()[0]}", file=sys.stderr)
            return cls(None)
        except Exception as error:  # noqa: BLE001
            # a boundary: the run needs nothing of its plan, and would go on where a plan has a defect
            told = (str(error).splitlines() or [""])[0]
            said = f"{type(error).__name__}: {told}"
            print(f"not planned: a defect of the plan, please report: {said}", file=sys.stderr)
            return cls(None)
        seconds = _seconds(found)
        if not quiet:
            sizes = f"{_gb(found.step.peak)} GB of tensors in a step, {_gb(found.total)} GB in all"
            steps = "" if seconds is None else f", {seconds:.0f} s of steps"
            print(f"planned: {sizes}{steps}", file=sys.stderr)
        free = available_memory()
        if free is not None and found.on_processor and found.total > free:
            print(
                f"warning: that is more than the {_gb(free)} GB that are free here; "
                "`tarsia plan RECIPE --fit SIZE` says what would fit",
                file=sys.stderr,
            )
        return cls(found, seconds=None if quiet else seconds)

    def see(self, event: Event) -> None:
        """Compare and keep, once the run says what it took."""
        from tarsia.core.errors import PlanError
        from tarsia.plan.history import LARGE, compared, keep
        from tarsia.train.events import Finished, Memory, Step

        if isinstance(event, Step):
            self.stepped = True
        if isinstance(event, Finished) and self.stepped and self.seconds is not None:
            print(f"time of the steps: {self.seconds:.0f} s planned, {event.seconds:.0f} s taken", file=sys.stderr)
        if self.plan is None or not self.stepped or not isinstance(event, Memory):
            return
        entry = compared(self.plan, event)
        if entry is None:
            return
        for pair in entry.wrong:
            print(f"warning: the plan was off by more than {LARGE:.0%}: {pair.said}", file=sys.stderr)
        try:
            keep(entry)
        except PlanError as error:
            print(f"warning: {str(error).splitlines()[0]}", file=sys.stderr)


def _seconds(plan: Plan) -> float | None:
    from tarsia.core.errors import PlanError
    from tarsia.plan.calibrate import kept
    from tarsia.plan.time import Measured
    from tarsia.train.exact import threads

    if not plan.on_processor:
        return None
    try:
        with threads(plan.recipe.threads):
            held = kept()
    except PlanError as error:
        print(f"warning: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    return None if held is None else plan.time(Measured(held)).run(plan.work.steps)


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g}"
