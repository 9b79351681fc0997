"""The plan as a picture: what lives in memory from moment to moment, by what it is for."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from tarsia.plan.foretell import Plan
from tarsia.plan.ledger import Category

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS: Final = 1600
_INK: Final = "#23201c"
COLOURS: Final = {
    Category.WEIGHTS: "#8d9a9b",
    Category.QUANTISED: "#6b7b8c",
    Category.KERNELS: "#b3a99a",
    Category.PATCHES: "#2f6f5e",
    Category.STATES: "#5a9f86",
    Category.GRADIENTS: "#c9a227",
    Category.INPUTS: "#d9c8a9",
    Category.CACHE: "#7a6ea8",
    Category.ACTIVATIONS: "#c4553b",
    Category.LOSS: "#e08e6d",
    Category.TEMPORARY: "#eed3c4",
}


def picture(plan: Plan, budget: int | None = None) -> bytes:
    """A PNG file: live bytes of tensors over the rehearsed run, stacked by category, phases named, peak marked."""
    import numpy
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    moments = _moments(plan)
    stacked = _stacks(plan, moments)
    figure = Figure(figsize=(12, 5.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shown = [category for category in COLOURS if stacked[category].any()]
    x = numpy.arange(len(moments))
    axes.stackplot(
        x,
        [stacked[category] / 1e9 for category in shown],
        colors=[COLOURS[category] for category in shown],
        labels=[str(category) for category in shown],
        step="post",
        linewidth=0,
    )
    _name_phases(axes, plan, moments)
    _mark(axes, plan, moments, budget)
    axes.set_xlim(0, len(moments) - 1)
    axes.set_xticks([])
    axes.set_ylabel("GB of tensors", color=_INK)
    gone = ", ".join(str(number + 1) for number in plan.survey.steps)
    gone = f"operations, one after the other: steps {gone} of {plan.work.steps}, then what is saved"
    axes.set_xlabel(gone, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    methods = " + ".join(part.method for part in plan.recipe.parts)
    title = axes.set_title(f"{plan.recipe.model}, {methods}: what lives in memory, operation by operation", loc="left")
    title.set_parse_math(False)
    held = io.BytesIO()
    figure.savefig(held, format="png", metadata={"Software": None})
    return held.getvalue()


def _moments(plan: Plan) -> Any:
    """The moments of the run that are drawn: of each short span the one at which most lives."""
    import numpy

    kept = numpy.concatenate([numpy.arange(stretch.begin, stretch.end) for stretch in plan.stretches])
    line = numpy.asarray(plan.line)[kept]
    edges = numpy.unique(numpy.linspace(0, len(line), min(POINTS, len(line)) + 1).astype(int))
    found = [begin + int(line[begin:end].argmax()) for begin, end in pairwise(edges)]
    return kept[found]


def _stacks(plan: Plan, moments: Any) -> dict[Category, Any]:
    """Bytes of each category at these moments."""
    import numpy

    end = plan.rehearsal.end
    changes = {category: numpy.zeros(end + 2, dtype=numpy.int64) for category in Category}
    for block in plan.rehearsal.blocks:
        if block.born <= end:
            held = changes[block.category or Category.TEMPORARY]
            held[block.born] += block.size
            held[min(block.died, end + 1)] -= block.size
    return {category: change.cumsum()[moments] for category, change in changes.items()}


def _name_phases(axes: Axes, plan: Plan, moments: Any) -> None:
    import numpy

    top = plan.live / 1e9
    for number, stretch in enumerate(plan.stretches):
        begin, end = numpy.searchsorted(moments, (stretch.begin, stretch.end))
        if end - begin > len(moments) / 300:
            axes.axvline(begin, color="#ffffff", lw=0.8)
        if end - begin > len(moments) / 40:
            height = top * (1.04 if number % 2 else 1.09)
            axes.text((begin + end) / 2, height, stretch.phase, ha="center", fontsize=8, color=_INK)
    axes.set_ylim(0, top * 1.16)


def _mark(axes: Axes, plan: Plan, moments: Any, budget: int | None) -> None:
    import numpy

    peak = plan.peak
    x = int(numpy.searchsorted(moments, peak.moment))
    axes.plot([x], [peak.peak / 1e9], "o", color=_INK, ms=5, zorder=5)
    side = "right" if x > len(moments) / 2 else "left"
    text = f" {peak.peak / 1e9:.3g} GB, {peak.phase} "
    axes.text(x, peak.peak / 1e9, text, ha=side, va="center", fontsize=9, color=_INK, weight="bold")
    if budget is not None:
        axes.axhline(budget / 1e9, color="#a11", lw=1.2, ls="--")
