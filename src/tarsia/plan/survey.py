"""Which steps of a run are the large ones: found without a model, from the rows that will be drawn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from tarsia.data import Sample
from tarsia.train.run import Run

SECONDS: Final = 2.0
"""Of the processor's time, how long rows are read as training reads them; the others' sizes are told from these."""
LOOKED: Final = 20_000
"""The most draws of a run that are looked at."""

Size = tuple[int, int, int]
"""Of a row: tokens, labelled tokens, numbers that its pictures are given as."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What was seen of a run's rows: the same for every run that draws the same ones and shows them alike.

    ``sizes`` are those of each draw that was looked at, of ``all_draws``; ``rows`` different ones are among them, of
    which ``read`` were encoded in ``seconds`` each. ``side`` is the most pixels along a side of a picture, 0 where
    there is none.
    """

    sizes: tuple[Size, ...]
    all_draws: int
    rows: int
    read: int
    seconds: float
    side: int


@dataclass(frozen=True, slots=True)
class Survey:
    """``steps`` are the numbers (from 0) of the largest steps, in one way or another; the first step is always there.

    ``typical`` is a step with as many tokens as most.

    ``rows`` different rows were drawn in ``draws`` draws that were looked at of ``all_draws``; ``read`` of the rows
    were encoded as training does, in ``seconds`` each. ``drawn`` is all that was seen of them.
    """

    steps: tuple[int, ...]
    typical: int
    rows: int
    draws: int
    all_draws: int
    read: int
    seconds: float
    drawn: Drawn = field(repr=False, compare=False)

    @property
    def whole(self) -> bool:
        """Whether every row that the run draws was read."""
        return self.read == self.rows and self.draws == self.all_draws


def survey(run: Run, drawn: Drawn | None = None) -> Survey:
    """Find the steps of ``run`` that count, among rows that were ``drawn`` before or are looked at now."""
    drawn = drawn or look(run)
    per_step, found = run.recipe.batch * run.recipe.accumulate, drawn.sizes
    tokens = [sum(row[0] for row in found[i : i + per_step]) for i in range(0, len(found), per_step)]
    middle = sorted(range(len(tokens)), key=tokens.__getitem__)[len(tokens) // 2]
    return Survey(
        steps=_largest(run, found, per_step),
        typical=middle,
        rows=drawn.rows,
        draws=len(found),
        all_draws=drawn.all_draws,
        read=drawn.read,
        seconds=drawn.seconds,
        drawn=drawn,
    )


def look(run: Run, seconds: float = SECONDS) -> Drawn:
    """Look at the rows that ``run`` will draw. Those with the most text and the largest pictures are read first."""
    per_step = run.recipe.batch * run.recipe.accumulate
    all_draws = run.schedule.steps * per_step
    draws = max(per_step, min(all_draws, LOOKED) // per_step * per_step)
    drawn = [run.mixture.row(n) for n in range(draws)]
    seen = {place: _guess(run, run.mixture.sources[place[0]][place[1]]) for place in dict.fromkeys(drawn)}
    guesses = {place: guess for place, (guess, _) in seen.items()}
    sizes: dict[tuple[int, int], Size] = {}
    began = time.process_time()
    for place in sorted(guesses, key=lambda p: -sum(guesses[p])):
        if sizes and time.process_time() - began > seconds:
            break
        sizes[place] = _size(run, run.mixture.sources[place[0]][place[1]])
    each = (time.process_time() - began) / len(sizes)
    read = len(sizes)
    _fill(sizes, guesses)
    side = max(side for _, side in seen.values())
    return Drawn(tuple(sizes[place] for place in drawn), all_draws, len(guesses), read, each, side)


def _guess(run: Run, sample: Sample) -> tuple[tuple[float, float], int]:
    """What a row's size grows with and is read at once: letters and, as if they were, pixels; and its longest side."""
    letters = sum(len(message.text) for message in sample.messages)
    sides = [picture.sides(run.encoder.resolution) for picture in sample.pictures]
    pixels = sum(longer * shorter for longer, shorter in sides)
    return (float(letters), pixels / 200), max((longer for longer, _ in sides), default=0)


def _size(run: Run, sample: Sample) -> Size:
    batch = run.encoder.batch([sample])
    pixels = sum(value.numel() for value in batch.inputs.values() if value.is_floating_point())
    return batch.labels.shape[1], int((batch.labels >= 0).sum()), pixels


def _fill(sizes: dict[tuple[int, int], Size], guesses: dict[tuple[int, int], tuple[float, float]]) -> None:
    """Give the rows that were not read sizes in proportion: as large as the largest for what was guessed of them."""
    if len(sizes) == len(guesses):
        return
    known = [(sum(guesses[place]) + 1, size) for place, size in sizes.items()]
    shares = [max(size[i] / guess for guess, size in known) for i in range(3)]
    for place, guess in guesses.items():
        if place not in sizes:
            whole = sum(guess) + 1
            sizes[place] = (int(shares[0] * whole), int(shares[1] * whole), int(shares[2] * whole))


def _largest(run: Run, sizes: Sequence[Size], per_step: int) -> tuple[int, ...]:
    """The steps with the largest micro-batch in each of the ways that memory grows with, without the first and with it.

    The first has no optimiser's states beside it: however large it is, the next in size may take more. It does what
    none does after it where rows are packed or features kept.
    """
    batch, packs = run.recipe.batch, run.packs
    best: list[tuple[int, int]] = []
    first: list[int] = []
    for start in range(0, len(sizes), per_step):
        rows = list(sizes[start : start + per_step])
        if run.recipe.batching == "grouped":
            rows.sort()
        parts = [rows[i : i + batch] for i in range(0, len(rows), batch)]
        found = [_weight(part, packs) for part in parts]
        score = [max(column) for column in zip(*found, strict=True)]
        if not start:
            first = score
            continue
        best = best or [(-1, 0)] * len(score)
        best = [max(old, (new, -start)) for old, new in zip(best, score, strict=True)]
    others = [-start // per_step for _, start in best]
    as_large = all(new <= old for new, (old, _) in zip(first, best, strict=True)) if best else False
    unlike = packs or run.features is not None or not as_large
    return tuple(dict.fromkeys((0, *others) if unlike else others))


def _weight(rows: Sequence[Size], packs: bool) -> tuple[int, int, int, int]:
    longest = max(row[0] for row in rows)
    tokens = sum(row[0] for row in rows) if packs else longest * len(rows)
    labelled, pixels = sum(row[1] for row in rows), sum(row[2] for row in rows)
    # together what most of the memory is for: a step with little more of one and much less of the others is not taken
    return tokens, longest, pixels, labelled
