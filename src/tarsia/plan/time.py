"""Seconds of a training step, from the operations that it consists of, before anything is loaded.

A step is its kernels (each by its kind, sizes and dtype), what Python and autograd take to issue each operation, the
update of the trained tensors, and the reading of its rows. Recomputation, accumulation and weights in 4 bits need no
rule of their own: the operations are those that are run.

    step = predict(ops, Measured(calibration), tensors=224, rows=8, per_row=0.004)
    step.seconds, step.low, step.high, step.basis
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Protocol

from tarsia.plan import cards
from tarsia.plan.calibrate import Calibration
from tarsia.plan.cards import Card
from tarsia.plan.operations import Operations, phase_of
from tarsia.plan.overhead import Overhead
from tarsia.plan.speeds import Kernels
from tarsia.plan.work import Kind, Work, work_of
from tarsia.train.memory import Phase

MODEL: Final = 0.2
"""How far a step may be from the sum of its parts where these were measured, as a share of it, to either side."""


class Speeds(Protocol):
    """How fast a device is: ``error`` is how far off a step may be, as a share of it; ``basis`` what it rests on."""

    @property
    def error(self) -> float: ...

    @property
    def basis(self) -> str: ...

    @property
    def overhead(self) -> Overhead: ...

    @property
    def page(self) -> float:
        """Seconds for a byte of memory that is touched for the first time."""
        ...

    @property
    def waits(self) -> bool:
        """Whether Python waits for each kernel, as on a processor; a GPU computes while the next one is issued."""
        ...

    def seconds(self, work: Work) -> float:
        """Seconds of one kernel."""
        ...


@dataclass(frozen=True)
class Measured:
    """A machine that was calibrated."""

    calibration: Calibration

    @property
    def error(self) -> float:
        """Of the sum, and of the measurements under it."""
        return math.hypot(MODEL, self.calibration.spread)

    @property
    def basis(self) -> str:
        """When it was measured, and how much it varied."""
        held = self.calibration
        return f"measured on this machine on {held.date[:10]}, where repeats differed by {held.spread:.0%}"

    @property
    def overhead(self) -> Overhead:
        """As it was measured."""
        return self.calibration.overhead

    @property
    def page(self) -> float:
        """As it was measured."""
        return self.calibration.page

    @property
    def waits(self) -> bool:
        """On a processor."""
        return not self.calibration.key.device.startswith("cuda")

    @cached_property
    def _kernels(self) -> Kernels:
        return Kernels.of(self.calibration.points)

    def seconds(self, work: Work) -> float:
        """From the grid of what was timed."""
        return self._kernels.seconds(work)


@dataclass(frozen=True, slots=True)
class OfCard:
    """A card that is not here: a roofline (Williams et al. 2009) under its peaks."""

    card: Card

    @property
    def error(self) -> float:
        """As the table says."""
        return cards.ERROR

    @property
    def basis(self) -> str:
        """The table and the share of the peak."""
        return self.card.basis

    @property
    def overhead(self) -> Overhead:
        """The same for every card: it is the processor's beside it."""
        return Overhead(forward=cards.LAUNCH, backward=cards.LAUNCH / 2, update=cards.LAUNCH, step=1e-3)

    @property
    def page(self) -> float:
        """Memory of a card is there as soon as it is taken."""
        return 0.0

    @property
    def waits(self) -> bool:
        """It does not."""
        return False

    def seconds(self, work: Work) -> float:
        """What takes longer, arithmetic or memory, but no less than a kernel takes."""
        if work.kind is Kind.NOTHING or not work.bytes:
            return 0.0
        peak = self.card.bf16 if work.dtype in ("bfloat16", "float16") else self.card.fp32
        arithmetic = work.flops / (peak * cards.PRODUCTS)
        return max(cards.KERNEL, arithmetic, work.bytes / (self.card.bandwidth * cards.MEMORY))


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one optimiser step, and what they are made of."""

    kernels: Mapping[Kind, float]
    issuing: float
    """Python, the dispatcher and autograd, over all operations."""
    update: float
    rows: float
    """Reading rows and turning them into tensors."""
    waits: bool
    page: float
    error: float
    basis: str
    unknown: Mapping[str, float] = field(default_factory=dict)
    """Operations that no table names, with how often they are run: they are counted by their bytes."""

    @property
    def seconds(self) -> float:
        """The whole step. A GPU computes while operations are issued: what takes longer counts."""
        computing = sum(self.kernels.values())
        both = computing + self.issuing if self.waits else max(computing, self.issuing)
        return both + self.update + self.rows

    @property
    def low(self) -> float:
        """The least that is to be expected."""
        return self.seconds / (1 + self.error)

    @property
    def high(self) -> float:
        """The most that is to be expected."""
        return self.seconds * (1 + self.error)

    def run(self, steps: int, fresh: int = 0) -> float:
        """Seconds of the steps of a whole run, which loading, evaluating and saving are not among.

        ``fresh`` bytes of memory are touched for the first time, all of them in the first steps.
        """
        return steps * self.seconds + fresh * self.page

    @property
    def doubts(self) -> tuple[str, ...]:
        """What is to be said beside the number."""
        if not self.unknown:
            return ()
        named = ", ".join(f"{count:g} {name}" for name, count in sorted(self.unknown.items()))
        return (f"Operations that are only known by their bytes: {named}.",)


def predict(ops: Operations, speeds: Speeds, *, tensors: int, rows: int = 0, per_row: float = 0.0) -> StepTime:
    """Seconds of a step that runs these operations so often, trains so many ``tensors`` and reads so many ``rows``.

    ``per_row`` is how many seconds it takes to read a row and make tensors of it: measured while planning.
    """
    kernels: defaultdict[Kind, float] = defaultdict(float)
    unknown: defaultdict[str, float] = defaultdict(float)
    issuing = 0.0
    overhead = speeds.overhead
    for op, count in ops.items():
        for work in work_of(op):
            kernels[work.kind] += count * speeds.seconds(work)
            if not work.known:
                unknown[op.name] += count
        phase = phase_of(op)
        if phase is not Phase.UPDATE:
            issuing += count * (overhead.backward if phase is Phase.BACKWARD else overhead.forward)
    return StepTime(
        kernels=dict(kernels),
        issuing=issuing,
        update=tensors * overhead.update + overhead.step,
        rows=rows * per_row,
        waits=speeds.waits,
        page=speeds.page,
        error=speeds.error,
        basis=speeds.basis,
        unknown=dict(unknown),
    )
