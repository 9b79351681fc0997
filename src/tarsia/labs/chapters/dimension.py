"""How many directions a job needs: training in random subspaces of the weights, against LoRA's count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from tarsia.core.errors import ConfigError
from tarsia.labs import subspace
from tarsia.labs.frame.chapter import Bound, Chapter, Desk, Found
from tarsia.labs.frame.page import COLOURS, GREY
from tarsia.labs.frame.tables import Cell
from tarsia.labs.runs import BATCH, Scores, mean
from tarsia.labs.subspace import FULL, KINDS, SEEDS, SIZES, STEPS, TASKS
from tarsia.labs.trials import Chosen

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENOUGH: Final = 0.9
"""The share of full training's accuracy at which a dimension counts as enough (arXiv:1804.08838, section 2)."""
SHARE: Final = 10.0
"""What d90 may be, in percent of the weights."""


def measure(desk: Desk) -> Found:
    """Train every run that has no result yet, then compare."""
    names: list[str] = []

    def show(name: str) -> None:
        names.append(name)
        desk.show(min(1.0, len(names) / 60), name)

    trials = subspace.desk(desk.work, show)
    return compared(subspace.found(trials), {job: trials.before(job) for job in TASKS}, subspace.lora())


def enough(accuracies: Mapping[int, float], whole: float) -> int:
    """The least dimension that reaches ENOUGH of ``whole``. Raises KeyError where none does."""
    reached = [size for size, accuracy in sorted(accuracies.items()) if accuracy >= ENOUGH * whole]
    if not reached:
        raise KeyError(f"no dimension reaches {ENOUGH:.0%} of {whole}")
    return reached[0]


def compared(chosen: Mapping[tuple[str, str], Chosen], before: Mapping[str, Scores], lora: int) -> Found:
    """Accuracy in percent by dimension and task, and d90 beside the numbers that ``lora`` trains.

    Raises ConfigError where runs stand on different bases.
    """
    bases = set().union(*(held.bases for held in chosen.values()))
    if len(bases) > 1:
        raise ConfigError(
            "The runs stand on different bases.", given=", ".join(sorted(bases)), do="remove them and run again"
        )
    rows: dict[str, Mapping[str, Cell]] = {
        "accuracy: base": {job: round(100 * mean(before[job]["held-out"]["right"]), 2) for job in TASKS}
    }
    series: dict[str, list[float]] = {"sizes": [float(size) for size in SIZES]}
    for kind in KINDS:
        trained = chosen[next(iter(TASKS)), kind].trained
        name = kind if kind.startswith("d=") else f"{kind} ({trained:,})"
        rows[f"accuracy: {name}"] = {job: round(chosen[job, kind].accuracy, 2) for job in TASKS}
        rows[f"rates: {kind}"] = {job: f"{chosen[job, kind].rate:g}" for job in TASKS}
        series |= {f"{job} {kind}": chosen[job, kind].accuracies for job in TASKS}
    for job in TASKS:
        whole = chosen[job, FULL]
        by_size = {chosen[job, kind].trained: chosen[job, kind].accuracy for kind in KINDS if kind.startswith("d=")}
        needed = enough(by_size | {whole.trained: whole.accuracy}, whole.accuracy)
        rows[f"d90: {job}"] = {
            "full training, %": round(whole.accuracy, 2),
            "nine tenths of it, %": round(ENOUGH * whole.accuracy, 2),
            "d90": needed,
            "of the weights, %": round(100 * needed / whole.trained, 4),
            "LoRA trains": lora,
            "d90 of LoRA's, %": round(100 * needed / lora, 3),
        }
    rows["measured: each"] = {
        "rows": len(before[next(iter(TASKS))]["held-out"]["right"]),
        "seeds": len(SEEDS),
        "weights": chosen[next(iter(TASKS)), FULL].trained,
    }
    return Found(rows, series, {"mini-1": bases.pop()})


def draw(found: Found, figure: Figure) -> None:
    """Accuracy against the dimension, for each task, with nine tenths of full training's and LoRA's point."""
    for axes, job, colour in zip(figure.subplots(1, len(TASKS)), TASKS, COLOURS, strict=False):
        sizes = found.series["sizes"]
        means = [mean(found.series[f"{job} d={size:.0f}"]) for size in sizes]
        axes.plot(sizes, means, "-", color=colour, lw=1.3, label="random subspace")
        for size in sizes:
            shares = found.series[f"{job} d={size:.0f}"]
            axes.plot([size] * len(shares), shares, "o", color=colour, ms=4)
        row = found.rows[f"d90: {job}"]
        whole = float(row["full training, %"])
        axes.axhline(whole, color=GREY, lw=1)
        axes.axhline(float(row["nine tenths of it, %"]), color=GREY, lw=1, ls="--")
        axes.text(sizes[0], whole + 1, "all weights", color=GREY, fontsize=8)
        axes.text(sizes[0], float(row["nine tenths of it, %"]) - 5, "nine tenths of it", color=GREY, fontsize=8)
        axes.axvline(float(row["d90"]), color=COLOURS[3], lw=1, ls=":")
        axes.axvline(float(row["LoRA trains"]), color=COLOURS[4], lw=1, label="count of LoRA, rank 8")
        axes.set_xscale("log")
        axes.set_ylim(0, 106)
        axes.set_xlabel("numbers that are trained")
        axes.set_title(f"{job}: right, % (d90 = {row['d90']:,})")
        axes.legend(frameon=False, loc=(0.3, 0.05))


TEXT: Final = f"""
LoRA rests on a finding: fine-tuning needs few directions. It was measured by training in a random subspace
(arXiv:1804.08838, for fine-tuning arXiv:2012.13255), theta = theta0 + P z, where P is a fixed random matrix and z, of d
numbers, is all that is trained. The least d that reaches nine tenths of what training all weights reaches is called
d90.

Here theta is every weight of the decoder's linear layers of mini-1,
{{{{ value("measured: each", "weights", ",d") }}}} numbers, and P has one entry in each row, +1 or -1, in a random
column: a sparse random projection with orthogonal columns, each a direction of many weights, that needs no memory for a
matrix. The papers use dense, sparse and Fastfood projections; this is the sparsest one. Full training is the same code
with P = 1. All runs have {STEPS} steps of {BATCH} rows and one seed; full training has the better of two rates on
validation rows, all subspaces have one rate. Right is an answer that equals the held-out row's, of
{{{{ value("measured: each", "rows", "d") }}}} rows; percent:

{{{{ table("accuracy", "trained") }}}}
{{{{ table("d90", "task") }}}}
d90 is read off a coarse grid, so the true one lies between it and the size before, and a better rate for a subspace
could lower it. With more steps it may be smaller too: in so few, how fast a subspace learns counts as well.
A subspace that is drawn at random is no good use of its numbers as such: it is told nothing of the layers. LoRA's
numbers are laid out by them, so its count and d90 are not one quantity; they are set beside each other to show how far
both are from the count of the weights. mini-1 is small-scale: in the papers d90 falls as models grow, and what is
measured here says nothing of the count for a large model.

Learning rates that were taken:

{{{{ table("rates", "trained") }}}}
"""

CHAPTER: Final = Chapter(
    name="dimension",
    title="The intrinsic dimension of a job",
    question="In how small a random subspace of the weights can a job be learnt?",
    claim=f"On both tasks 90 % of full training's accuracy is reached in a random subspace of at most {SHARE:g} % of "
    "the weights, and with fewer numbers than LoRA of rank 8 trains.",
    bounds=tuple(
        bound
        for job in TASKS
        for bound in (
            Bound(f"{job}: d90, % of the weights", f"d90: {job}", "of the weights, %", 0, SHARE),
            Bound(f"{job}: d90, % of what LoRA trains", f"d90: {job}", "d90 of LoRA's, %", 0, 100),
        )
    ),
    measure=measure,
    draw=draw,
    picture="accuracy against the dimension of the random subspace on two tasks, a dot a seed, and LoRA's count",
    text=TEXT,
    order=120,
    minutes=15.0,
)
"""The claim is of mini-1 and of these two tasks."""
