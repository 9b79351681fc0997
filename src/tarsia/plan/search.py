"""Which variants of a recipe fit: every one takes a rehearsal of seconds, so few of them are looked at.

Along a ladder memory falls, so that the least rung that fits is found by halving. A combination that does not fit even
with all that changes no number needs more; one that fits needs nothing more.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from math import prod
from typing import Final

from tarsia.plan import sacrifices
from tarsia.plan.proposal import CLEARLY, Figures, Proposal, best
from tarsia.plan.sacrifices import Change
from tarsia.plan.variants import Enough, Rehearsals
from tarsia.train.recipe import LEAST_BUDGET

PROPOSALS: Final = 6
SAVES: Final = 0.01
MISSING: Final = 5
"""Share of the memory that a change must save to be looked at in other combinations, and of what is missing as a
multiple of that."""
SLACK: Final = 1.25
LOWER: Final = 2.5
"""What two changes save together, as a multiple at most of what each saves alone; and what all lower rungs of a ladder
save, as a multiple of its first. (Three quarters of a side leave 56 % of the pixels, one quarter 6 %.)"""
LEFT: Final = 8
"""Of the states of a paged optimiser one in so many stays where memory is scarcest."""


@dataclass
class Search:
    """Looks at combinations until all that can be among the proposals are known, or nothing is left.

    ``good`` are those that fit, ``useless`` the kinds of change that save nothing here.
    """

    rehearsals: Rehearsals
    budget: int
    good: list[Proposal] = field(default_factory=list)
    useless: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        held = self.rehearsals
        recipe = held.recipe
        self.limit: int = int(self.budget / (1 + held.margin))
        self.splits = sacrifices.split(recipe).rungs
        ladders = (sacrifices.checkpointing(recipe), sacrifices.features(recipe))
        self.extras = {ladder.kind: ladder.rungs[0] for ladder in ladders if ladder.rungs}
        self.ladders = sacrifices.numbers(recipe, held.known)
        self.none = (0,) * len(self.ladders)
        figures = held.as_it_is.figures
        self.pages = figures.states >= max(SAVES * figures.total, LEFT * LEAST_BUDGET)
        self.least: frozenset[str] = frozenset()

    def run(self) -> str:
        """Search. Returns what ended it before it was through; "" where nothing did."""
        held = self.rehearsals
        if self._fits(held.as_it_is):
            self.good = [held.as_it_is]
            return ""
        try:
            self._search()
        except Enough:
            return f"{held.most} rehearsals" if len(held.tried) >= held.most else "the time limit"
        return ""

    @property
    def proposals(self) -> tuple[Proposal, ...]:
        """The best of what was found to fit."""
        return tuple(best(self.good)[:PROPOSALS])

    @property
    def all(self) -> int:
        """How many combinations there are."""
        exact: int = (len(self.splits) + 1) * 2 ** (len(self.extras) + self.pages)
        return exact * prod([len(ladder.rungs) + 1 for ladder in self.ladders])

    def _fits(self, proposal: Proposal | None) -> bool:
        return proposal is not None and proposal.figures.total <= self.limit

    def _search(self) -> None:
        self._choose_extras()
        self._choose_least()
        self._exact(self.none)
        if self.good and min(proposal.lost for proposal in self.good) <= CLEARLY:
            self._refine()
            return  # nothing that gives up more could be clearly faster
        if self.good:
            _, saved = self._savings(0, frozenset())
            for place in saved:
                self._exact(self._first(place))
        else:
            self._climb()
        self._refine()

    def _choose_extras(self) -> None:
        """Leave out what can not be done here, or saves nothing."""
        whole = self.rehearsals.as_it_is.figures
        for kind in list(self.extras):
            alone = self._look(self.none, 0, frozenset({kind}))
            if alone is None:
                del self.extras[kind]
            elif not self._helps(whole, alone.figures):
                del self.extras[kind]
                self.useless.append(kind)

    def _helps(self, ground: Figures, changed: Figures) -> bool:
        """Whether a change saves in a phase that takes too much: a share of all, or of what is missing there."""
        return any(
            held - changed.phases.get(phase, 0) >= SAVES * min(held, MISSING * (held - self.limit))
            for phase, held in ground.phases.items()
            if held > self.limit
        )

    def _choose_least(self) -> None:
        """With which extras single rows take least: computing a single row twice need not save anything."""
        top = len(self.splits)
        sets = {frozenset[str](), frozenset(self.extras), *(frozenset({kind}) for kind in self.extras)}
        totals = {extras: self._look(self.none, top, extras) for extras in sorted(sets, key=sorted)}
        able = {extras: found.figures.total for extras, found in totals.items() if found is not None}
        self.least = min(able, key=lambda extras: (able[extras], len(extras)))

    def _climb(self) -> None:
        """Of what changes numbers the least that fits, step by step: what does not fit needs more."""
        phases, saved = self._savings(len(self.splits), self.least)
        everything = tuple(len(ladder.rungs) if place in saved else 0 for place, ladder in enumerate(self.ladders))
        if self._look(everything, len(self.splits), self.least) is not None and not self._least_fits(everything):
            return
        able: list[tuple[int, ...]] = []
        waiting = [(self._weight(self._first(place)), self._first(place)) for place in saved]
        heapq.heapify(waiting)
        seen = {numbers for _, numbers in waiting}
        while waiting and len(able) < PROPOSALS:
            _, numbers = heapq.heappop(waiting)
            if any(all(a <= b for a, b in zip(held, numbers, strict=True)) for held in able):
                continue  # it gives up more than one that fits
            if not self._hopeless(numbers, phases, saved) and self._least_fits(numbers):
                able.append(numbers)
                self._exact(numbers)
                continue
            for place in saved:
                raised = self._raised(numbers, place)
                if raised is not None and raised not in seen:
                    seen.add(raised)
                    heapq.heappush(waiting, (self._weight(raised), raised))

    def _savings(self, split: int, extras: frozenset[str]) -> tuple[dict[str, int], dict[int, dict[str, int]]]:
        """Bytes of each phase with these changes, which change no number, and what the first rung of each ladder saves
        beside them. Ladders that save nothing have no entry."""
        ground = self._look(self.none, split, extras)
        assert ground is not None
        phases = dict(ground.figures.phases)
        saved: dict[int, dict[str, int]] = {}
        for place, ladder in enumerate(self.ladders):
            alone = self._look(self._first(place), split, extras)
            if alone is None:
                continue
            if not self._helps(ground.figures, alone.figures):
                self.useless.append(ladder.kind)
                continue
            saved[place] = {phase: held - alone.figures.phases.get(phase, 0) for phase, held in phases.items()}
        return phases, saved

    def _hopeless(self, numbers: tuple[int, ...], phases: dict[str, int], saved: dict[int, dict[str, int]]) -> bool:
        """Whether these can not save enough in some phase, from what each saves alone, counted generously."""
        pages = self.rehearsals.as_it_is.figures.states if self.pages else 0
        for phase, held in phases.items():
            less = sum(
                max(0, saved[place].get(phase, 0)) * SLACK * (1.0 if level == 1 else LOWER)
                for place, level in enumerate(numbers)
                if level
            )
            if held - less - pages > self.limit:
                return True
        return False

    def _least_fits(self, numbers: tuple[int, ...]) -> bool:
        """Whether these fit with everything that changes no number."""
        top = len(self.splits)
        found = self._look(numbers, top, self.least)
        if self._fits(found) or found is None or not self.pages:
            return self._fits(found)
        return self._fits(self._look(numbers, top, self.least, self._scarce(found)))

    def _scarce(self, found: Proposal) -> int:
        """The least budget of a paged optimiser with these states."""
        return max(1, found.figures.states // LEFT)

    def _exact(self, numbers: tuple[int, ...]) -> None:
        """Of what changes no number the least that makes these fit: for each set of extras the least split."""
        reached: dict[frozenset[str], int] = {}
        for extras, paged in self._sets():
            marks = extras | ({"paging"} if paged else frozenset())
            below = [level for held, level in reached.items() if held <= marks]
            top = min(below) - 1 if below else len(self.splits)
            level = self._lowest(numbers, extras, paged, top) if top >= 0 else None
            if level is not None:
                reached[marks] = level

    def _sets(self) -> Iterator[tuple[frozenset[str], bool]]:
        kinds = sorted(self.extras)
        for count in range(len(kinds) + 1):
            for extras in combinations(kinds, count):
                yield frozenset(extras), False
                if self.pages:
                    yield frozenset(extras), True

    def _lowest(self, numbers: tuple[int, ...], extras: frozenset[str], paged: bool, top: int) -> int | None:
        """The first split up to ``top`` that fits, by halving; None where not even that does."""

        def fit_at(split: int) -> Proposal | None:
            found = self._look(numbers, split, extras)
            if paged and found is not None:
                if found.figures.total - found.figures.states > self.limit:
                    return None
                found = self._look(numbers, split, extras, self._scarce(found))
            return found if self._fits(found) else None

        held = fit_at(top)
        if held is None:
            return None
        low, high = 0, top
        while low < high:
            middle = (low + high) // 2
            found = fit_at(middle)
            if found is None:
                low = middle + 1
            else:
                held, high = found, middle
        self.good.append(held)
        return high

    def _refine(self) -> None:
        """Give the best what room is left: more states that stay, rows sorted where that is faster."""
        for proposal in best(self.good)[:PROPOSALS]:
            if proposal.figures.paged:
                self._widen(proposal)
        rungs = sacrifices.grouped(self.rehearsals.recipe).rungs
        for proposal in best(self.good)[:PROPOSALS] if rungs else ():
            recipe = proposal.recipe
            if recipe.batch > 1 and recipe.accumulate > 1 and recipe.batching == "plain":
                found = self.rehearsals.look((*proposal.changes, *rungs), {**proposal.levels, "grouped": 1})
                if self._fits(found) and found is not None and found.figures.seconds < proposal.figures.seconds:
                    self.good = [found if held is proposal else held for held in self.good]

    def _widen(self, proposal: Proposal) -> None:
        figures = proposal.figures
        held = figures.states - figures.paged
        wider = min(figures.states, held + int(0.9 * (self.limit - figures.total)))
        changes = tuple(
            sacrifices.paging(self.rehearsals.recipe, wider, figures.states) if change.kind == "paging" else change
            for change in proposal.changes
        )
        found = self.rehearsals.look(changes, dict(proposal.levels))
        if self._fits(found) and found is not None:
            self.good = [found if other is proposal else other for other in self.good]

    def _look(self, numbers: tuple[int, ...], split: int, extras: frozenset[str], budget: int = 0) -> Proposal | None:
        changes: list[Change] = [self.splits[split - 1]] if split else []
        levels = {"micro-batch": split} if split else {}
        for kind in sorted(extras):
            changes.append(self.extras[kind])
            levels[kind] = 1
        for ladder, level in zip(self.ladders, numbers, strict=True):
            if level:
                changes.append(ladder.rungs[level - 1])
                levels[ladder.kind] = level
        if budget:
            bare = self._look(numbers, split, extras)
            states = 0 if bare is None else bare.figures.states
            changes.append(sacrifices.paging(self.rehearsals.recipe, budget, states))
            levels["paging"] = 1
        return self.rehearsals.look(tuple(changes), levels)

    def _first(self, place: int) -> tuple[int, ...]:
        """The first rung of the ladder at this place, and nothing else."""
        return tuple(int(place == other) for other in range(len(self.ladders)))

    def _raised(self, numbers: tuple[int, ...], place: int) -> tuple[int, ...] | None:
        """One rung more on the ladder at this place; None where there is none."""
        if numbers[place] == len(self.ladders[place].rungs):
            return None
        return (*numbers[:place], numbers[place] + 1, *numbers[place + 1 :])

    def _weight(self, numbers: tuple[int, ...]) -> int:
        rungs = zip(self.ladders, numbers, strict=True)
        return sum([ladder.rungs[level - 1].weight for ladder, level in rungs if level])
