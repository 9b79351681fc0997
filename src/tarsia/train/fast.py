"""What makes a step cheaper and changes nothing else, entered for a whole run, and said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tarsia.train.heap import kept_heap
from tarsia.train.lean import lean
from tarsia.train.loss import followed, plain_head

FOLLOWED = "The model changes what its head gives (a soft cap, a scale), so all logits of a batch are made at once."


@contextmanager
def fast(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """Compute in the cheap ways inside. Gives a line for each that acts, and for each that does not: why."""
    with lean(model) as found, kept_heap() as kept:
        taken = ", ".join(f"{count} {name}" for name, count in found.taken.items())
        lines = [f"in one pass each: {taken}" if taken else "no module is of a class that is computed in one pass"]
        if found.refused:
            lines.append(f"as the model has them, for the numbers differ: {', '.join(found.refused)}")
        if not plain_head(model):
            lines.append("all logits at once: the head is patched, trained, watched or not linear")
        elif followed(model):
            lines.append(FOLLOWED)
        else:
            lines.append("loss by chunks through the frozen head")
        lines.append("freed memory is kept" if kept else "freed memory is not kept: the C library can not be told to")
        yield tuple(lines)
