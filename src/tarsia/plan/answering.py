"""What is done with a base beside training, without numbers: answering, scoring answers, folding an adapter into it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Final

from torch import nn

from tarsia.core.attach import detach, merge
from tarsia.core.errors import ConfigError
from tarsia.data import Sample, read
from tarsia.evaluate import score
from tarsia.evaluate.chat import Chat, reference
from tarsia.evaluate.choose import chances
from tarsia.evaluate.evaluate import MOST_ANSWERS
from tarsia.evaluate.generate import say
from tarsia.plan.ghost import Ghost
from tarsia.plan.ledger import Block, Category, Ledger, live
from tarsia.plan.rehearse import Outline, Rehearsal, prepared
from tarsia.plan.workspace import Workspace
from tarsia.train.recipe import Recipe
from tarsia.train.run import NAME, Run

PROMPT: Final = "prompt"
TOKEN: Final = "token"
SCORE: Final = "score"
FOLD: Final = "fold"
TOKENS: Final = 6
"""Tokens that are really gone through: the first reads the prompt, the next ones show by how much each takes more."""


@contextmanager
def opened(recipe: Recipe, outline: Outline, ledger: Ledger) -> Iterator[tuple[Run, Ghost]]:
    """The base with the recipe's patches, as whoever loads the adapter has it, without numbers."""
    with Ghost(ledger, Workspace(ledger)) as ghost:
        run = prepared(recipe, outline, ghost)
        try:
            yield run, ghost
        finally:
            detach(run.model, NAME)


def generating(recipe: Recipe, outline: Outline, max_new_tokens: int = 32, batch: int = 16) -> Rehearsal:
    """Answer the largest rows of ``data.eval`` (of ``data.train`` where there are none), so many at once."""
    ledger = Ledger()
    with opened(recipe, outline, ledger) as (run, ghost):
        for rows in _largest(_samples(recipe)[0], batch):
            _answer(run, ghost, rows, max_new_tokens, batch)
        return Rehearsal.of(run, ghost)


def evaluating(recipe: Recipe, outline: Outline, max_new_tokens: int = 32, batch: int = 16) -> Rehearsal:
    """Answer and score the largest rows, as ``tarsia.evaluate.evaluate`` does. Raises as it does, and PlanError."""
    ledger = Ledger()
    samples, choice = _samples(recipe)
    with opened(recipe, outline, ledger) as (run, ghost):
        for rows in _largest(samples, batch):
            _answer(run, ghost, rows, max_new_tokens, batch)
            with ledger.during(SCORE), _believed():
                chances(run.host, rows, choice, batch)
        return Rehearsal.of(run, ghost)


def folding(recipe: Recipe, outline: Outline) -> Rehearsal:
    """Fold the recipe's adapter into the base: the base's own tensors are kept beside, so that it can be undone."""
    ledger = Ledger()
    with opened(recipe, outline, ledger) as (run, ghost):
        with ledger.during(FOLD):
            merge(run.model)
            own = [p for p in run.model.parameters() if ledger.block(p) is not None]
            ledger.label((p for p in own if _born_in(ledger, p, FOLD)), Category.WEIGHTS)
        return Rehearsal.of(run, ghost)


def _born_in(ledger: Ledger, parameter: nn.Parameter, phase: str) -> bool:
    block = ledger.block(parameter)
    return block is not None and block.phase == phase


def _samples(recipe: Recipe) -> tuple[list[Sample], tuple[str, ...]]:
    """The rows to evaluate on, and the answers to choose from where they are few."""
    rows = [sample for source in recipe.data.eval or recipe.data.train for sample in read(source)]
    if not rows:
        raise ConfigError("There is no row to answer.", do="give data.eval a source with rows")
    references = tuple(sorted({reference(row) for row in rows}))
    return rows, references if len(references) <= MOST_ANSWERS else ()


def _largest(samples: Sequence[Sample], batch: int) -> list[list[Sample]]:
    """The batch with the most text and the one with the most pixels, of those that rows are answered in."""
    letters = [sum(len(message.text) for message in sample.messages) for sample in samples]
    pixels = [sum(math.prod(picture.sides()) for picture in sample.pictures) for sample in samples]
    by_pictures: dict[int, list[int]] = {}
    for number, sample in enumerate(samples):
        by_pictures.setdefault(len(sample.pictures), []).append(number)
    found: dict[tuple[int, ...], None] = {}
    for size in (letters, pixels):
        groups = [sorted(numbers, key=lambda n: -size[n])[:batch] for numbers in by_pictures.values()]
        found[tuple(max(groups, key=lambda group: sum(size[n] for n in group)))] = None
    return [[samples[n] for n in numbers] for numbers in found]


def _answer(run: Run, ghost: Ghost, rows: Sequence[Sample], max_new_tokens: int, batch: int) -> None:
    """The first tokens of an answer; the last of them takes as much more as all that follow would."""
    ledger = ghost.ledger
    ghost.chosen = _word(run)
    begun: list[int] = []

    def calls(*_: Any) -> None:
        ledger.begin(TOKEN if begun else PROMPT)
        begun.append(ledger.now)

    handle = run.model.register_forward_pre_hook(calls)
    try:
        with ledger.during(PROMPT):
            say(run.host, rows, min(TOKENS, max_new_tokens), batch)
            end = ledger.now
    finally:
        handle.remove()
    line = live(ledger.settled(), end)
    peaks = [max(line[first:last]) for first, last in pairwise([*begun, end])]
    if max_new_tokens > TOKENS:
        more = max(0, peaks[-1] - peaks[-2]) * (max_new_tokens - TOKENS)
        ledger.blocks.append(Block(more, begun[-1], TOKEN, "as many tokens more", end, Category.CACHE))


def _word(run: Run) -> int:
    """A token that ends no answer."""
    ends = Chat(run.host).ends
    return next(n for n in range(len(ends) + 1) if n not in ends)


@contextmanager
def _believed() -> Iterator[None]:
    """Numbers that nobody knows are within any tolerance of one another."""
    module: Any = score
    given = module.tolerance
    module.tolerance = lambda model: math.inf
    try:
        yield
    finally:
        module.tolerance = given
