"""What every method of the registry reaches with how many numbers, on one job."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import correlation
from typing import TYPE_CHECKING, Final

from tarsia.adapter import open_outline
from tarsia.core.errors import ConfigError
from tarsia.labs import trade
from tarsia.labs.frame.chapter import Bound, Chapter, Desk, Found
from tarsia.labs.frame.page import COLOURS, GREY
from tarsia.labs.frame.tables import Cell
from tarsia.labs.runs import BATCH, Scores, mean
from tarsia.labs.trade import JOB, STEPS, WHOLE
from tarsia.labs.trials import Chosen

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW: Final = 10.0
"""Percent of what full training trains that the few may have at most."""
NEAR: Final = 95.0
"""Percent of full training's accuracy that the best of the few has to reach."""
LESS: Final = 5.0
"""How many times fewer numbers a method has that is nevertheless ahead."""
AHEAD: Final = 5.0
"""By how many points."""


def measure(desk: Desk) -> Found:
    """Train every run that has no result yet, then compare."""
    names: list[str] = []

    def show(name: str) -> None:
        names.append(name)
        desk.show(min(1.0, len(names) / 60), name)

    trials = trade.desk(desk.work, show)
    before = trials.before(JOB)
    size = sum(p.numel() for p in open_outline("mini-1", processor=False).model.parameters())
    return compared(trade.found(trials), before, size)


def compared(reached: Mapping[str, Chosen | str], before: Scores, size: int) -> Found:
    """Numbers, share of the base's ``size`` parameters and accuracy in percent, by method.

    Raises ConfigError where the runs stand on different bases.
    """
    measured = {method: held for method, held in reached.items() if not isinstance(held, str)}
    bases = set().union(*(held.bases for held in measured.values()))
    if len(bases) > 1:
        raise ConfigError(
            "The runs stand on different bases.", given=", ".join(sorted(bases)), do="remove them and run again"
        )
    rows: dict[str, Mapping[str, Cell]] = {}
    series: dict[str, list[float]] = {}
    for method, held in sorted(measured.items(), key=lambda pair: pair[1].trained):
        rows[f"method: {method}"] = {
            "numbers": held.trained,
            "of mini-1, %": round(100 * held.trained / size, 3),
            "accuracy": round(held.accuracy, 2),
            "of full's, %": round(100 * held.accuracy / max(measured[WHOLE].accuracy, 1e-9), 1),
            "rate": f"{held.rate:g}",
        }
        series[method] = [100 * held.trained / size, held.accuracy]
    rows |= {f"refused: {method}": {"says": held} for method, held in reached.items() if isinstance(held, str)}
    rows["before: base"] = {"accuracy": round(100 * mean(before["held-out"]["right"]), 2)}
    rows["few: the best"] = _few(measured)
    rows["order: fewer and ahead"] = _ahead(measured)
    rows["measured: each"] = {
        "methods": len(measured),
        "refused": len(reached) - len(measured),
        "rows": len(before["held-out"]["right"]),
    }
    return Found(rows, series, {"mini-1": bases.pop()})


def _few(measured: Mapping[str, Chosen]) -> Mapping[str, Cell]:
    """The most accurate of the methods that train at most FEW percent of what full training does."""
    whole = measured[WHOLE]
    few = {method: held for method, held in measured.items() if held.trained <= FEW / 100 * whole.trained}
    if not few:
        return {"method": "none", "of full's numbers, %": 0.0, "of full's accuracy, %": 0.0}
    best = max(few, key=lambda method: few[method].accuracy)
    return {
        "method": best,
        "of full's numbers, %": round(100 * few[best].trained / whole.trained, 3),
        "of full's accuracy, %": round(100 * few[best].accuracy / max(whole.accuracy, 1e-9), 2),
    }


def _ahead(measured: Mapping[str, Chosen]) -> Mapping[str, Cell]:
    """Of all pairs of which one has LESS times fewer numbers, the one in which it leads by most; and how number and
    accuracy go together over all methods."""
    pairs = [
        (a.accuracy - b.accuracy, small, large)
        for small, a in measured.items()
        for large, b in measured.items()
        if LESS * a.trained <= b.trained
    ]
    lead, small, large = max(pairs, default=(-math.inf, "none", "none"))
    together = _spearman([(float(held.trained), held.accuracy) for held in measured.values()])
    return {"fewer": small, "than": large, "points ahead": round(lead, 2), "rank correlation": round(together, 3)}


def _spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's rank correlation; equal values share their mean rank. 0 where one side does not vary."""
    ranks = [_ranks([pair[side] for pair in pairs]) for side in (0, 1)]
    return correlation(*ranks) if all(len(set(side)) > 1 for side in ranks) else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    return [order.index(value) + 0.5 * (order.count(value) - 1) for value in values]


def draw(found: Found, figure: Figure) -> None:
    """Share of the parameters, logarithmic, against accuracy: a dot and a name a method."""
    axes = figure.subplots()
    shares = {name.removeprefix("method: "): row for name, row in found.rows.items() if name.startswith("method: ")}
    placed: list[tuple[float, float]] = []
    for i, (method, row) in enumerate(shares.items()):
        x, y = float(row["of mini-1, %"]), float(row["accuracy"])
        axes.plot(x, y, "o", ms=7, color=COLOURS[i % 5])
        high = y + 1.5
        # a name that would lie on another goes above it
        while any(abs(math.log10(x / a)) < 0.5 and abs(high - b) < 4 for a, b in placed):
            high += 1
        axes.annotate(method, (x, y), (x * 1.07, high), fontsize=8, color=COLOURS[i % 5])
        placed.append((x, high))
    base = float(found.rows["before: base"]["accuracy"])
    axes.axhline(base, color=GREY, lw=1, ls="--")
    axes.text(1, base + 1, "base", color=GREY, fontsize=8, ha="right", transform=axes.get_yaxis_transform())
    axes.set_xscale("log")
    axes.set_ylim(-3, 122)
    axes.margins(x=0.12)
    axes.set_xlabel("numbers that are trained, % of mini-1's parameters")
    axes.set_title(f"{JOB}: held-out rows right, %")


TEXT: Final = f"""
Every method that Tarsia knows, on one job of mini-1: belts in infrared, what the thing on it is made of. All have
{STEPS} steps of {BATCH} rows, one seed and one learning rate, set by hand for its kind, not searched. Each goes where
it goes by itself in the decoder (LoRA's family and full training on the linear layers), prompts of vision in the tower,
BitFit on the biases of tower and projector (mini-1's decoder has none). Options are each method's usual ones. Right is
an answer that equals the held-out row's, of {{{{ value("measured: each", "rows", "d") }}}} rows; percent:

{{{{ table("method") }}}}
The base has {{{{ value("before: base", "accuracy") }}}} %.

{{% if value("measured: each", "refused") != "0" %}}
What does not apply here says so:

{{{{ table("refused") }}}}
{{% endif %}}
The best of those that train at most {FEW:g} % of what full training does:

{{{{ table("few") }}}}
How little the number alone says: the pair with {LESS:g} times fewer numbers on one side in which that side leads by
most, and Spearman's correlation of number and accuracy over all methods:

{{{{ table("order") }}}}
One job, one seed, few steps and one rate a method on a small-scale model: the shape of the trade, not a ranking. A
method that is behind here may only be slower, or want another rate: prompts and VeRA are known to need more steps.
"""

CHAPTER: Final = Chapter(
    name="methods",
    title="Parameters against accuracy",
    question="How many numbers does each method train, and what does it reach with them?",
    claim=f"A method with at most {FEW:g} % of full training's numbers reaches {NEAR:g} % of its accuracy, and the "
    f"number alone does not order them: one with {LESS:g} times fewer than another is at least {AHEAD:g} points ahead.",
    bounds=(
        Bound("best of the few, % of full's accuracy", "few: the best", "of full's accuracy, %", NEAR),
        Bound("fewer numbers and ahead, points", "order: fewer and ahead", "points ahead", AHEAD),
        Bound("methods that are measured", "measured: each", "methods", 12),
    ),
    measure=measure,
    draw=draw,
    picture="share of the parameters against accuracy, a dot a method",
    text=TEXT,
    order=130,
    minutes=20.0,
    size=(9, 5),
)
"""The claim is of this job and these steps."""
