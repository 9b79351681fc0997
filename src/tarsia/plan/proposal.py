"""A recipe that fits, with what it gives up: what is planned of it, what it is worth beside others, as a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import yaml

from tarsia.core.errors import ConfigError, PlanError
from tarsia.plan.foretell import Plan
from tarsia.plan.ledger import Category
from tarsia.plan.overhead import Overhead
from tarsia.plan.sacrifices import Change, Values
from tarsia.plan.time import Speeds
from tarsia.plan.work import Kind, Work
from tarsia.train.disk import write_synced, writing
from tarsia.train.reading import parse_value
from tarsia.train.recipe import Recipe

CLEARLY: Final = 1.1
"""From which ratio of two times one of them is clearly longer: less than that a plan can not tell apart."""
PAGED: Final[Mapping[bool, float]] = {True: 5e8, False: 1.2e10}
"""Bytes of states a second that leave or come back: to a disk from a processor's memory; over PCIe 4 from a GPU's."""


_OVERHEAD: Final = Overhead(forward=1e-5, backward=1e-5, update=1e-6, step=1e-3)


@dataclass(frozen=True, slots=True)
class Nominal:
    """A machine that nobody measured: good for the ratio of two times alone."""

    error: float = 0.5
    basis: str = "operations counted, 10 for each byte that is moved: no machine was measured"
    page: float = 0.0
    waits: bool = True
    overhead: Overhead = _OVERHEAD

    def seconds(self, work: Work) -> float:
        """What takes longer, arithmetic or memory."""
        return 0.0 if work.kind is Kind.NOTHING else max(work.flops / 1e11, work.bytes / 1e10)


@dataclass(frozen=True, slots=True)
class Need:
    """What of a plan has to fit: the most bytes of each phase, and what they are for at the highest moment."""

    phases: Callable[[Plan], Mapping[str, int]]
    parts: Callable[[Plan], Mapping[str, int]]


def _phases(plan: Plan) -> Mapping[str, int]:
    if plan.on_processor:
        return plan.process.phases
    beside = plan.total - plan.live
    return {phase: held + beside for phase, held in plan.phases.items()}


def _parts(plan: Plan) -> Mapping[str, int]:
    return plan.process.parts if plan.on_processor else _tensors(plan)


def _tensors(plan: Plan) -> Mapping[str, int]:
    return {str(category): held for category, held in plan.at(plan.peak.moment).items()}


OF_DEVICE: Final = Need(_phases, _parts)
"""All that the device must have: the whole process on a processor."""
OF_TENSORS: Final = Need(lambda plan: plan.phases, _tensors)
"""The tensors alone."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What is planned of one recipe: bytes at most in each phase, seconds of a step, numbers that are trained.

    ``parts`` are what the bytes are for at the highest moment, ``states`` all of the optimiser's, of which ``paged``
    leave and come back in every step.
    """

    phases: Mapping[str, int]
    parts: Mapping[str, int]
    seconds: float
    steps: int
    trained: int
    states: int
    paged: int

    @classmethod
    def of(cls, plan: Plan, need: Need, speeds: Speeds) -> Figures:
        """Of a plan."""
        pages = plan.work.paged
        travel = 2 * pages / PAGED[plan.on_processor]
        return cls(
            phases=need.phases(plan),
            parts=need.parts(plan),
            seconds=plan.time(speeds).seconds + travel,
            steps=plan.work.steps,
            trained=sum(line.trained for line in plan.rehearsal.coverage),
            states=plan.categories.get(Category.STATES, 0) + pages,
            paged=pages,
        )

    @property
    def total(self) -> int:
        """Bytes at most."""
        return max(self.phases.values())

    @property
    def phase(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda name: self.phases[name])


@dataclass(frozen=True)
class Proposal:
    """A recipe as plain ``values``, the ``changes`` that made it of another, and what is planned of it.

    ``was`` are the figures of that other one. ``levels`` is the rung of each change, by its kind.
    """

    values: Values
    changes: tuple[Change, ...]
    levels: Mapping[str, int]
    figures: Figures
    was: Figures

    @cached_property
    def recipe(self) -> Recipe:
        """As ``tarsia train`` takes it."""
        return Recipe.of(self.values)

    @property
    def name(self) -> str:
        """For a file."""
        return slug(self.changes) or "as-it-is"

    @property
    def text(self) -> str:
        """What is changed."""
        return "; ".join(change.text for change in self.changes) or "nothing: the recipe fits as it is"

    @property
    def slower(self) -> float:
        """Time of a step, as a multiple of that of the recipe as it was."""
        return self.figures.seconds / self.was.seconds

    @property
    def lost(self) -> float:
        """The same, where being faster is no gain."""
        return max(1.0, self.slower)

    @property
    def weight(self) -> int:
        """How much the numbers change: 0 where they stay but for the last bits."""
        return sum(change.weight for change in self.changes)

    @property
    def gives_up(self) -> tuple[str, ...]:
        """What each change costs, in words; then time, trained numbers and traffic, in figures."""
        now, was = self.figures, self.was
        found = [change.gives_up for change in self.changes]
        if now.trained != was.trained:
            found.append(f"{now.trained:,} of {was.trained:,} numbers are trained ({now.trained / was.trained:.0%})")
        if now.paged:
            found.append(f"{now.paged / 1e6:,.1f} MB of states leave and come back in every step")
        if self.changes:
            found.append(f"a step takes {self.slower:.2f} times as long")
        return tuple(found)

    @property
    def order(self) -> tuple[int, float, int]:
        """Best first: what changes no number before what does, less time lost before more, fewer changes."""
        return (self.weight, self.lost, len(self.changes))

    def beats(self, other: Proposal) -> bool:
        """Whether nobody would want ``other``: it gives up as much of the numbers or more, and gains no time."""
        ours, theirs = _numbers(self), _numbers(other)
        if any(level > theirs.get(kind, 0) for kind, level in ours.items()):
            return False
        if ours != theirs:
            return self.lost <= CLEARLY * other.lost
        fewer = self.levels != other.levels and all(n <= other.levels.get(kind, 0) for kind, n in self.levels.items())
        return (fewer and self.lost <= CLEARLY * other.lost) or CLEARLY * self.lost < other.lost


def _numbers(proposal: Proposal) -> dict[str, int]:
    """The rungs of those changes that change numbers."""
    weighing = {change.kind for change in proposal.changes if change.weight}
    return {kind: level for kind, level in proposal.levels.items() if kind in weighing}


def best(found: Sequence[Proposal]) -> list[Proposal]:
    """Those that none of the others beats, the best first."""
    return sorted((p for p in found if not any(other.beats(p) for other in found)), key=lambda p: p.order)


def slug(changes: Sequence[Change]) -> str:
    """A name for a file."""
    return "-".join(change.slug for change in changes)


def applied(values: Values, changes: Sequence[Change]) -> dict[str, Any]:
    """The values after all changes, in a folder of their own."""
    made = dict(values)
    for change in changes:
        made = change.apply(made)
    return made | ({"out": f"{values['out']}-{slug(changes)}"} if changes else {})


class _Dumper(yaml.SafeDumper):
    """YAML that ``tarsia.train.reading`` reads as it was."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        same = parse_value(text) == text
    except ConfigError:
        same = True  # no value by itself: it will be put in quotes anyhow
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if same else '"')


_Dumper.add_representer(str, _text)


def as_yaml(proposal: Proposal, budget: int, basis: str) -> str:
    """The recipe as YAML, under comments that say what is planned of it and what it gives up.

    Raises PlanError where that would not be read as the same recipe.
    """
    now, steps = proposal.figures, proposal.figures.steps
    lines = [
        f"For {budget / 1e9:.4g} GB: {proposal.text}.",
        f"Planned: {now.total / 1e9:.4g} GB at most, in {now.phase}; a step takes {proposal.slower:.2f} times as long "
        f"as before the changes ({now.seconds:.3g} s, {steps} steps: {basis}).",
        *(f"Gives up: {text}." for text in proposal.gives_up),
    ]
    body = yaml.dump(dict(proposal.values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    if Recipe.of(parse_value(body)) != proposal.recipe:
        raise PlanError("The proposal can not be written as YAML.", given=proposal.text)
    return "".join(f"# {line}\n" for line in lines) + body


def write(proposals: Sequence[Proposal], folder: Path, budget: int, basis: str) -> list[Path]:
    """Write each proposal into ``folder`` as a recipe, numbered from the best on. Returns the files.

    Raises PlanError where another file is in the way, TrainingError where the disk refuses.
    """
    texts = {
        folder / f"{number}-{proposal.name}.yaml": as_yaml(proposal, budget, basis).encode()
        for number, proposal in enumerate(proposals, 1)
    }
    with writing("The proposals", folder, "give --write a folder that can be written to"):
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            if path.exists() and path.read_bytes() != text:
                raise PlanError("Another file is in the way.", given=path, do="choose another folder for --write")
        for path, text in texts.items():
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            write_synced(partial, text)
            os.replace(partial, path)
    return list(texts)
