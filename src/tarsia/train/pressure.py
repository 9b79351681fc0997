"""A step that runs out of memory is done again without the optimiser's states beside it, where those can leave.

One huge picture would end a run that has room for all others. The states are not needed before the update, so they
leave, what the failed attempt held is let go, and it is made again: from the same random state and without gradients,
so the curve is the one that a larger memory would give. The states come back for the update.

Memory running out is noticed where the system says so: on a GPU, and on a processor under a limit that refuses
(``ulimit -d``, overcommitting switched off). A container's limit kills without asking; a budget is what helps there.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from tarsia.core.errors import TrainingError
from tarsia.train.heap import give_back, out_of_memory
from tarsia.train.paged import PagedAdamW

if TYPE_CHECKING:
    from tarsia.train.run import Run

_T = TypeVar("_T")


def relieved(run: Run, attempt: Callable[[], _T], what: str = "", numbers: Sequence[int] = ()) -> _T:
    """What ``attempt`` gives, which may be made twice: it begins without gradients and leaves random numbers alone
    where it fails. A second one is told through the optimiser's news.

    ``what`` it is, and the ``numbers`` of its rows in the stream; left out, they are the next step's. Raises
    TrainingError, naming the rows, where there is not enough memory for the second either, or for the first where no
    states can leave.
    """
    try:
        return attempt()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        first = _said(error)
        if not isinstance(run.optimiser, PagedAdamW) or not run.optimiser.form.paged:
            raise _refusal(run, what, numbers, f"{first}; nothing could leave the memory", paged=False) from error
    # out here the failed attempt's tensors are let go: nothing holds the error any more
    run.optimiser.zero_grad(set_to_none=True)
    gc.collect()
    freed = run.optimiser.leave()
    give_back(run.device)
    left = f"{freed:,} bytes of the optimiser's states left" if freed else "no states were there that could leave"
    try:
        found = attempt()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise _refusal(run, what, numbers, f"{_said(error)}; {left}, and it was tried again", paged=True) from error
    give_back(run.device)  # for the states to come back to
    run.optimiser.told.append(
        f"{what or _step(run)} ran out of memory ({first}): {left}, what was freed went back to the system, and it was "
        "done again with the same numbers."
    )
    return found


def _step(run: Run) -> str:
    return f"Step {run.step + 1}"


def _refusal(run: Run, what: str, numbers: Sequence[int], tried: str, *, paged: bool) -> TrainingError:
    size = run.recipe.batch * run.recipe.accumulate
    titles = list(run.digests)
    rows = [run.mixture.row(n) for n in numbers or range(run.step * size, (run.step + 1) * size)]
    names = ", ".join(f"row {row} of {titles[source]}" for source, row in rows)
    do = "lower batch (and raise accumulate), set checkpointing: true or a smaller resolution, or look at these rows"
    return TrainingError(
        f"{what or _step(run)} does not fit into memory.",
        given=f"{names}; {tried}",
        do=do if paged else f"set optimiser.paged: true, so that its states can leave; or {do}",
    )


def _said(error: BaseException) -> str:
    """The first line of an allocator's message that says how much was asked for."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = next((line for line in lines if "allocate" in line), lines[0])
    return line[line.find("tried to allocate") :] if "tried to allocate" in line else line[:200]
