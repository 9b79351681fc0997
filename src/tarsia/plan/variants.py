"""Rehearsals of a recipe's variants: each once, of each its figures alone, and no more than were asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from tarsia.adapter.reading import read_json
from tarsia.adapter.stored import stored_form
from tarsia.core.errors import TarsiaError
from tarsia.plan import sacrifices
from tarsia.plan.foretell import Plan, plan
from tarsia.plan.proposal import Figures, Need, Proposal, applied
from tarsia.plan.rehearse import Outline
from tarsia.plan.sacrifices import Change, Known
from tarsia.plan.survey import Drawn
from tarsia.plan.time import Speeds
from tarsia.train.recipe import Recipe

MARGIN: Final = {True: 0.05, False: 0.03}
"""How far above its plan a run may come, as a share of it: on a processor, and on a GPU. Proposals leave as much."""

Show = Callable[[int, str], None]
"""Hears how many rehearsals were begun, and of what the next one is."""


@dataclass(frozen=True, slots=True)
class Effort:
    """The most ``rehearsals`` of a search, and after how many ``seconds`` none is begun any more."""

    rehearsals: int = 48
    seconds: float = 180.0


EFFORT: Final = Effort()


class Enough(Exception):
    """No rehearsal is left."""


class Rehearsals:
    """Plans of a recipe's combinations, each rehearsed once and only its figures kept."""

    def __init__(
        self, recipe: Recipe, outline: Outline, speeds: Speeds, need: Need, effort: Effort, show: Show
    ) -> None:
        self.recipe, self.outline, self.speeds, self.need, self.show = recipe, outline, speeds, need, show
        self.most, self.until = effort.rehearsals, time.monotonic() + effort.seconds
        self.values = sacrifices.plain(recipe)
        self.before = 0
        self.drawn: dict[int | None, Drawn] = {}
        self.tried: dict[tuple[str, ...], Proposal | None] = {}
        self.refused: dict[str, str] = {}
        first = self._rehearse((), {})
        self.margin = MARGIN[first[0].on_processor]
        self.known = _known(first[0], outline)
        self.as_it_is = self.tried[()] = Proposal(self.values, (), {}, first[1], first[1])

    def look(self, changes: tuple[Change, ...], levels: dict[str, int]) -> Proposal | None:
        """What comes of these changes; None where they can not be made. Raises Enough."""
        key = tuple(change.text for change in changes)
        if key not in self.tried:
            if len(self.tried) >= self.most or time.monotonic() > self.until:
                raise Enough
            self.tried[key] = self._proposal(changes, levels)
        return self.tried[key]

    def _proposal(self, changes: tuple[Change, ...], levels: dict[str, int]) -> Proposal | None:
        values = applied(self.values, changes)
        try:
            _, figures = self._rehearse(changes, values)
        except TarsiaError as error:
            self.refused["; ".join(change.text for change in changes)] = error.what
            return None
        return Proposal(values, changes, levels, figures, self.as_it_is.figures)

    def _rehearse(self, changes: tuple[Change, ...], values: sacrifices.Values) -> tuple[Plan, Figures]:
        recipe = Recipe.of(values) if changes else self.recipe
        self.show(len(self.tried), "; ".join(change.text for change in changes) or "the recipe as it is")
        planned = plan(recipe, self.outline, self.drawn.get(recipe.resolution))
        self.drawn[recipe.resolution] = planned.survey.drawn
        # this process grows while it plans, which the run's own will not
        self.before = self.before or planned.before
        planned = replace(planned, before=self.before)
        return planned, Figures.of(planned, self.need, self.speeds)


def _known(found: Plan, outline: Outline) -> Known:
    stored = stored_form(read_json(outline.path / "config.json"), outline.path)
    return Known(found.survey.drawn.side, found.rehearsal.parameters, stored is not None)
