"""The operations of a step, from a rehearsal of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from tarsia.plan.ghost import Ghost, Op
from tarsia.plan.rehearse import steps
from tarsia.train.memory import Phase
from tarsia.train.run import Run

Operations = Mapping[Op, float]
"""How often each operation is run in a step: the mean, where several steps were gone through."""


def operations(run: Run, ghost: Ghost, numbers: Sequence[int]) -> Operations:
    """Rehearse the steps of these numbers (from 0), at least one, and count what they run."""
    before = Counter(ghost.ops)
    steps(run, ghost.ledger, numbers)
    found = {op: count - before[op] for op, count in ghost.ops.items() if phase_of(op) is not None}
    return {op: count / len(numbers) for op, count in found.items() if count}


def phase_of(op: Op) -> Phase | None:
    """Which part of a step an operation belongs to; None where it belongs to none."""
    name = op.phase.rpartition("/")[2]
    return next((phase for phase in Phase if phase == name), None)


def by_phase(ops: Operations) -> dict[Phase, Operations]:
    """The same, sorted by the part of the step."""
    return {phase: {op: n for op, n in ops.items() if phase_of(op) is phase} for phase in Phase}
