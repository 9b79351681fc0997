"""The plan of a run: what it will take of memory, when, and for what."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final

import torch

from tarsia.plan import cuda
from tarsia.plan.heap import IN_STEP, Process, process, standing
from tarsia.plan.ledger import Block, Category, Mark, live
from tarsia.plan.operations import Operations, operations
from tarsia.plan.rehearse import Outline, Rehearsal, ending, rehearsing, settle, steps
from tarsia.plan.survey import Drawn, Survey, survey
from tarsia.plan.time import Speeds, StepTime, predict
from tarsia.train.exact import threads
from tarsia.train.paged import PagedAdamW
from tarsia.train.recipe import Recipe

SURVEY: Final = "survey"
"""What the plan does for itself, and no run does."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """One phase of the run: from which moment to which, the most bytes live in it, and when that was."""

    phase: str
    begin: int
    end: int
    peak: int
    moment: int


@dataclass(frozen=True, slots=True)
class Work:
    """What a step computes: how often each operation is run, how many tensors are trained; and how many steps.

    ``paged`` are the bytes of the optimiser's states that leave the device's memory and come back in each.
    """

    operations: Operations
    tensors: int
    steps: int
    paged: int = 0


@dataclass(frozen=True)
class Plan:
    """What a run of ``recipe`` will take, from a rehearsal of its largest steps and of all around them.

    All sizes are bytes. ``survey`` says which rows it rests on, ``before`` what the process holds as the run begins.
    """

    recipe: Recipe
    outline: Outline
    rehearsal: Rehearsal
    survey: Survey
    work: Work
    before: int
    gpu: int | None = None
    """The major number of the capability of the GPU that it computes on; None: a processor."""

    def time(self, speeds: Speeds) -> StepTime:
        """Seconds of a typical step on a machine or a card."""
        rows = self.recipe.batch * self.recipe.accumulate
        work = self.work
        return predict(work.operations, speeds, tensors=work.tensors, rows=rows, per_row=self.survey.seconds)

    @cached_property
    def line(self) -> list[int]:
        """Live bytes of tensors after each moment."""
        return live(self.rehearsal.blocks, self.rehearsal.end)

    @cached_property
    def stretches(self) -> tuple[Stretch, ...]:
        """The run's phases in their order."""
        return tuple(_stretches(self.rehearsal.marks, self.line))

    @property
    def peak(self) -> Stretch:
        """The phase that takes most."""
        return max(self.stretches, key=lambda stretch: stretch.peak)

    @property
    def live(self) -> int:
        """The most bytes of tensors at once, over the whole run: mapped weights too."""
        return self.peak.peak

    @property
    def on_processor(self) -> bool:
        """Whether the run computes on a processor."""
        return self.gpu is None

    @property
    def total(self) -> int:
        """What the device must have: the process's memory on a processor, reserved memory and context on a GPU."""
        return self.process.peak if self.gpu is None else self.device.total

    @cached_property
    def device(self) -> cuda.Device:
        """What the run takes of a GPU."""
        return cuda.device(self.rehearsal, cuda.USUAL if self.gpu is None else self.gpu)

    @cached_property
    def process(self) -> Process:
        """The whole process, from what it holds as the run begins."""
        return process(self, self.before)

    @property
    def step(self) -> Stretch:
        """The phase of a step that takes most: what a run compares with what it measures."""
        return max((s for s in self.stretches if s.phase in IN_STEP), key=lambda stretch: stretch.peak)

    @property
    def phases(self) -> dict[str, int]:
        """The most bytes of each phase, by its name."""
        return _highest(self.stretches)

    def at(self, moment: int) -> dict[Category, int]:
        """Bytes by category at a moment; those that are nothing are left out."""
        found = dict.fromkeys(Category, 0)
        for block in self.rehearsal.blocks:
            if block.at(moment):
                found[block.category or Category.TEMPORARY] += block.size
        return {category: size for category, size in found.items() if size}

    @property
    def categories(self) -> dict[Category, int]:
        """Bytes by category at the peak of the steps."""
        return self.at(self.step.moment)

    @property
    def gradients(self) -> int:
        """Bytes of all gradients, as the update finds them."""
        update = [s for s in self.stretches if s.phase == "update"]
        return self.at(update[-1].begin).get(Category.GRADIENTS, 0) if update else 0

    @property
    def _whole(self) -> dict[str, Any]:
        """What is beside the tensors, as plain values."""
        if self.gpu is not None:
            return asdict(self.device)
        found = self.process
        return {"process": found.peak, "process_phases": dict(found.phases), "process_parts": dict(found.parts)}

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "live": self.live,
            "phase": self.peak.phase,
            "step": self.step.peak,
            "step_phase": self.step.phase,
            "phases": self.phases,
            "categories": {str(category): size for category, size in self.categories.items()},
            "gradients_at_update": self.gradients,
            **self._whole,
            "steps": list(self.survey.steps),
            "whole": self.survey.whole,
        }


def plan(recipe: Recipe, outline: Outline | None = None, drawn: Drawn | None = None, before: int | None = None) -> Plan:
    """Rehearse a recipe. No weight is loaded. Raises as ``tarsia.train.fit`` does, and PlanError.

    ``drawn`` is what an earlier plan saw of the same rows (``Survey.drawn``), in as many to a step and as large.
    ``before`` are the bytes that the process holds as the run begins; None: what this one holds once it has planned,
    as ``tarsia train`` does in the same process.
    """
    from tarsia.plan.ledger import Ledger

    gpu = cuda.major_of(recipe.device)
    outline = outline or Outline.of(recipe.model)
    ledger = Ledger()
    # forked: a base draws numbers as it is built
    with threads(recipe.threads), torch.random.fork_rng([]), rehearsing(recipe, outline, ledger, gpu) as (run, ghost):
        with ledger.during(SURVEY):
            found = survey(run, drawn)
            if 0 not in found.steps:
                settle(run, ledger)
        if run.schedule.steps > 1:
            # the optimiser's states are there from the second step on: whichever is typical, the first comes first
            steps(run, ledger, [n for n in found.steps if n == 0 or n != found.typical])
        counted = operations(run, ghost, (found.typical,))
        ending(run, ledger)
        rehearsed = Rehearsal.of(run, ghost)
        tensors = sum(1 for patch in run.patches.values() for _ in patch.parameters())
        optimiser = run.optimiser
        away = optimiser.bytes - optimiser.resident if isinstance(optimiser, PagedAdamW) else 0
        work = Work(counted, tensors, run.schedule.steps, away)
    del run, ghost
    gc.collect()
    return Plan(recipe, outline, _sorted(rehearsed), found, work, standing() if before is None else before, gpu)


def peaks(rehearsal: Rehearsal) -> dict[str, int]:
    """The most bytes of tensors in each phase of a rehearsal, by its name."""
    return _highest(_stretches(rehearsal.marks, live(rehearsal.blocks, rehearsal.end)))


def _highest(stretches: Iterable[Stretch]) -> dict[str, int]:
    found: dict[str, int] = {}
    for stretch in stretches:
        found[stretch.phase] = max(found.get(stretch.phase, 0), stretch.peak)
    return found


def _stretches(marks: Sequence[Mark], line: Sequence[int]) -> Iterable[Stretch]:
    last = len(line) - 1
    for mark, end in zip(marks, (*(m.moment for m in marks[1:]), last), strict=True):
        if mark.phase not in ("", SURVEY) and end > mark.moment:
            inside = range(mark.moment, end)
            moment = max(inside, key=line.__getitem__)
            yield Stretch(mark.phase, mark.moment, end, line[moment], moment)


def _sorted(rehearsal: Rehearsal) -> Rehearsal:
    """The same, where every block has a category: those that were not named by what they are, by when they live."""
    forward = [mark.moment for mark in rehearsal.marks if mark.phase == "forward"]
    backward = [mark.moment for mark in rehearsal.marks if mark.phase == "backward"]
    for block in rehearsal.blocks:
        if block.category is None:
            block.category = _category(block, forward, backward, rehearsal.vocabulary)
    return rehearsal


def _category(block: Block, forward: Sequence[int], backward: Sequence[int], vocabulary: int) -> Category:
    if block.phase == "step" and any(block.at(moment) for moment in forward):
        return Category.INPUTS
    if block.phase in IN_STEP and block.width == vocabulary:
        return Category.LOSS
    if block.phase == "forward" and any(block.at(moment) for moment in backward):
        return Category.ACTIVATIONS
    return Category.TEMPORARY
