"""Which ways the compiled kernel does whole: from the changes as they are, factors too, without a stack of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from tarsia.merge import kernel
from tarsia.merge.delta import Delta
from tarsia.merge.sparsify import kept

if TYPE_CHECKING:
    from tarsia.merge.ways import Way


def merged(way: Way, deltas: Sequence[Delta], weights: Tensor, seeds: Sequence[int]) -> Delta | None:
    """The deltas of one matrix made one by ``way``, in float32 as its reference; None where the reference must.

    Deltas that leave the weight have no number that is kept, votes or counts, and are left out. Raises MergeError
    where one holds an infinity or a NaN.
    """
    rule = _rule(way)
    here = kernel.library() if rule is not None else None
    moving = [(delta, float(w), seed) for delta, w, seed in zip(deltas, weights, seeds, strict=True) if not delta.still]
    if here is None or rule is None or any(delta.whole is not None and delta.whole.ndim != 2 for delta, _, _ in moving):
        return None
    changes = [_change(delta) for delta, _, _ in moving]
    if not all(map(kernel.suited, changes)):
        return None
    masks = _masks(here, way, changes, [seed for _, _, seed in moving])
    scaled = [w for _, w, _ in moving]
    ones = [1.0] * len(changes)
    if way.combine == "sum":
        return Delta(whole=here.total(changes, masks, scaled).double())
    votes, shares = ({"after": ones, "before": scaled}[rule[0]], {"count": ones, "weights": scaled}.get(rule[1]))
    return Delta(whole=here.elect(changes, masks, votes, scaled, shares or [0.0] * len(changes)).double())


def _rule(way: Way) -> tuple[str, str] | None:
    """How votes and shares are weighed; None for a way that the kernel does not do."""
    if way.align != "none" or way.sparsify not in ("none", "magnitude", "dare"):
        return None
    options = {"elect": "total", "weigh": "after", "normalise": "count", **way.options}
    if way.combine == "ties" and options["elect"] == "total":
        return options["weigh"], options["normalise"]
    return ("after", "none") if way.combine == "sum" and way.sparsify != "none" else None


def _change(delta: Delta) -> kernel.Change:
    if delta.up is not None and delta.down is not None:
        return delta.up.float(), delta.down.float()
    assert delta.whole is not None
    return delta.whole.float()


def _masks(here: kernel.Kernel, way: Way, changes: Sequence[kernel.Change], seeds: Sequence[int]) -> list[kernel.Mask]:
    density = way.options.get("density", 1.0)
    if way.sparsify == "none" or density >= 1:
        return [kernel.EVERYTHING] * len(changes)
    if way.sparsify == "dare":
        return [kernel.Mask(key=seed, density=density) for seed in seeds]
    rows, columns = kernel.shape_of(changes[0])
    return here.thresholds(changes, kept(rows * columns, density))
