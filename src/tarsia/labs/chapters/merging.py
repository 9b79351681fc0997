"""Six adapters of mini-1 made one, by every way that is shipped, each tuned alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tarsia.core.errors import ConfigError
from tarsia.evaluate.bootstrap import interval
from tarsia.labs.frame.chapter import Bound, Chapter, Desk, Found
from tarsia.labs.frame.page import COLOURS, GREY
from tarsia.labs.frame.tables import Cell
from tarsia.labs.merging import DENSITIES, FIRST, SUM, Merging, Scores, Tuned
from tarsia.labs.merging_shipped import shipped
from tarsia.labs.merging_tasks import COUNTS, RANK, RATE, SEEDS, STEPS, TASKS
from tarsia.labs.merging_why import why
from tarsia.labs.runs import mean
from tarsia.merge.ways import WAYS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AHEAD: Final = 4.0
"""Points of normalised accuracy by which the best way has to lead TIES."""
COLLAPSED: Final = 20.0
"""Normalised accuracy, in percent, under which the sum at scale 1 is."""
TURNED: Final = 70.0
"""Percent of rows that a task keeps, on average, beside the other five at scale 1 where their directions are random."""
LEARNT: Final = 90.0
"""Percent that every adapter has to reach alone."""
_RIVAL: Final = "ties"

Rights = Mapping[str, Sequence[float]]
"""1 or 0 for each held-out row, by task."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured. ``held``: by way and seed each task's held-out rows, of ways that are like no other; of those
    that the claim is not about the first seed's alone.

    ``alone`` and ``before`` are held-out too: each adapter on its own task by seed, and the base.
    """

    tuned: Mapping[str, Tuned]
    held: Mapping[str, Sequence[Rights]]
    alone: Sequence[Rights]
    before: Rights
    why: Mapping[str, Any]
    shipped: float
    bases: frozenset[str]


def measure(desk: Desk) -> Found:
    """Train, tune and measure what has no result yet, then compare."""
    names: list[str] = []

    def show(name: str) -> None:
        names.append(name)
        desk.show(min(1.0, len(names) / 450), name)

    merging = Merging(desk.work, show)
    alone = [{task: merging.learners.alone(task, seed) for task in TASKS} for seed in SEEDS]
    before = {task: merging.base[task]["held-out"]["right"] for task in TASKS}
    reasons = why(merging)
    with merging.sighted():
        tuned = merging.tuned()
        best = chosen(tuned)
        told = {best, chosen(tuned, blind()), SUM, _RIVAL}
        held = {
            name: [_rights(merging.held_out(one, seed)) for seed in (SEEDS if name in told else SEEDS[:1])]
            for name, one in tuned.items()
            if one.like is None
        }
    agreed = shipped(merging, tuned[best], held[best][0])
    rights = [{task: one[task]["splits"]["held-out"]["right"] for task in TASKS} for one in alone]
    bases = frozenset(str(result["base"]) for one in alone for result in one.values())
    return compared(Measured(tuned, held, rights, before, reasons, agreed, bases))


def _rights(found: Scores) -> Rights:
    return {task: scores["right"] for task, scores in found.items()}


def chosen(tuned: Mapping[str, Tuned], only: Sequence[str] = tuple(WAYS)) -> str:
    """The way with the highest validation accuracy among ``only``: what is best on held-out rows is not looked at."""
    return max((name for name, one in tuned.items() if one.like is None and name in only), key=lambda n: top(tuned[n]))


def top(one: Tuned) -> float:
    """A way's validation accuracy at what suits it best, in percent."""
    return one.curves[one.choice][one.scale]


def blind() -> list[str]:
    """Ways that look at weights alone."""
    return [name for name, way in WAYS.items() if not way.combining.sees]


def normalised(rights: Rights, alone: Rights) -> float:
    """Percent: the mean over tasks of the accuracy as a share of what the task's own adapter has alone."""
    return 100 * mean([mean(rights[task]) / mean(alone[task]) for task in rights])


def compared(m: Measured) -> Found:
    """Normalised held-out accuracy by way, and what the claim is about. Raises ConfigError for several bases."""
    if len(m.bases) > 1:
        raise ConfigError(
            "The adapters stand on different bases.", given=", ".join(sorted(m.bases)), do="remove them and run again"
        )
    best, plain = chosen(m.tuned), chosen(m.tuned, blind())
    rows = {f"way: {name}": _way(m, name) for name in sorted(m.held, key=lambda name: -_mean(m, name))}
    for name, one in m.tuned.items():
        if one.like is not None:
            rows[f"same: {name}"] = {"makes the change of": one.like[0], "times": round(1 / one.like[1], 4)}
    rows |= _tasks(m, [best, plain, SUM, _RIVAL])
    for what, name in {"the best": best, "the best of those that look at weights alone": plain}.items():
        rows[f"ahead: {what}"] = {"way": name, **_ahead(m, name)}
    rows |= _reasons(m)
    rows["shipped: the best, from its files"] = {"rows with the same verdict, %": round(100 * m.shipped, 3)}
    rows["measured: each"] = {
        "validation rows": COUNTS["validation"],
        "held-out rows": COUNTS["held-out"],
        "seeds": len(m.alone),
        "ways": len(m.tuned),
        "changes": len(m.held),
    }
    series: dict[str, Sequence[float]] = {}
    for name in m.held:
        curve = m.tuned[name].curves[m.tuned[name].choice]
        series |= {f"{name} scales": list(curve), f"{name} curve": list(curve.values())}
        series[f"{name} held-out"] = _seeds(m, name)
    return Found(rows, series, {"mini-1": next(iter(m.bases))})


def _seeds(m: Measured, name: str) -> list[float]:
    return [normalised(rights, alone) for rights, alone in zip(m.held[name], m.alone, strict=False)]


def _mean(m: Measured, name: str) -> float:
    return mean(_seeds(m, name))


def _way(m: Measured, name: str) -> Mapping[str, Cell]:
    one, seeds = m.tuned[name], _seeds(m, name)
    gained = [mean(rights[task]) - mean(m.before[task]) for rights in m.held[name] for task in TASKS]
    return {
        "normalised, %": round(mean(seeds), 2),
        "by seed": ", ".join(f"{value:.1f}" for value in seeds),
        "points over the base": round(100 * mean(gained), 2),
        "scale": one.scale,
        "options": ", ".join(f"{option} {value:g}" for option, value in one.choice.options),
        "validation, %": round(top(one), 1),
    }


def _tasks(m: Measured, names: Sequence[str]) -> dict[str, Mapping[str, Cell]]:
    """Accuracy by task in percent: the base's, the adapters' alone, and some ways'."""

    def shares(rights: Sequence[Rights]) -> Mapping[str, Cell]:
        return {task: round(100 * mean([mean(one[task]) for one in rights]), 1) for task in TASKS}

    rows = {"accuracy: base": shares([m.before]), "accuracy: each adapter alone": shares(m.alone)}
    rows |= {f"accuracy: {name}": shares(m.held[name]) for name in dict.fromkeys(names)}
    rows["least: each adapter alone"] = {"%": min(float(v) for v in rows["accuracy: each adapter alone"].values())}
    rows["most: base"] = {"%": max(float(v) for v in rows["accuracy: base"].values())}
    return rows


def _ahead(m: Measured, name: str) -> Mapping[str, Cell]:
    """Points before TIES, each row's a mean over the seeds, with the interval of a bootstrap over rows."""
    points = []
    for task in TASKS:
        shares = [mean(alone[task]) for alone in m.alone]
        for row in range(len(m.before[task])):
            pairs = zip(m.held[name], m.held[_RIVAL], shares, strict=True)
            points.append(mean([(mine[task][row] - theirs[task][row]) / share for mine, theirs, share in pairs]))
    found = interval(points, span=None).scaled(100)
    return {"points before TIES": round(found.mean, 2), "from": round(found.low, 2), "to": round(found.high, 2)}


def _reasons(m: Measured) -> dict[str, Mapping[str, Cell]]:
    each, total = mean(m.why["each"]), m.why["sum"]
    curve = m.tuned[SUM].curves[m.tuned[SUM].choice]
    rows: dict[str, Mapping[str, Cell]] = {
        "size: the sum": {
            "norm, of one adapter's": round(total / each, 3),
            "if all were at right angles": round(len(TASKS) ** 0.5, 3),
            "mean cosine of two": round(m.why["alike"], 4),
            "normalised at scale 1, %": round(curve[1.0], 1),
            "at its best scale, %": round(max(curve.values()), 1),
        }
    }
    tasks = m.why["tasks"]
    for task in TASKS:
        held = tasks[task]
        rows[f"beside: {task}"] = {
            "the others, of its own": round(held["others"], 2),
            "turned, of its own": round(held["turned"], 2),
            "right with the others, %": round(100 * held["with others"], 1),
            "right with them turned, %": round(100 * held["with turned"], 1),
        }
    rows["beside, mean: six tasks"] = {
        key: round(mean([float(rows[f"beside: {task}"][key]) for task in TASKS]), 2)
        for key in rows[f"beside: {next(iter(TASKS))}"]
    }
    return rows


def draw(found: Found, figure: Figure) -> None:
    """Accuracy by scale for every way, accuracy of every way on held-out rows, and each task beside the others."""
    grid = figure.add_gridspec(1, 3, width_ratios=(1.25, 1.25, 0.9))
    ways = [row.removeprefix("way: ") for row in found.rows if row.startswith("way: ")]
    axes = figure.add_subplot(grid[0])
    shown = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(_named(found, ways))}
    for name in reversed(ways):
        colour = shown.get(name, GREY)
        scales, curve = found.series[f"{name} scales"], found.series[f"{name} curve"]
        label = name if name in shown else None
        axes.plot(scales, curve, "-o", color=colour, ms=3, lw=1.6 if label else 0.7, label=label)
    axes.axvline(1.0, color=GREY, lw=0.8, ls=":")
    axes.set_xscale("log")
    ticks = sorted({scale for name in ways for scale in found.series[f"{name} scales"]} - {0.8})
    axes.set_xticks(ticks, [f"{scale:g}" for scale in ticks], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("scale")
    axes.set_title("validation rows: normalised accuracy, %")
    axes.legend(frameon=False, fontsize=8)
    bars = figure.add_subplot(grid[1])
    for i, name in enumerate(ways):
        seeds = found.series[f"{name} held-out"]
        bars.barh(i, mean(seeds), 0.7, color=shown.get(name, GREY), alpha=0.85)
        bars.plot(seeds, [i] * len(seeds), "o", color="white", mec="black", ms=3)
    bars.set_yticks(range(len(ways)), ways, fontsize=8)
    bars.invert_yaxis()
    bars.set_title("held-out rows: normalised accuracy, %")
    last = figure.add_subplot(grid[2])
    for i, task in enumerate(TASKS):
        row = found.rows[f"beside: {task}"]
        for k, key in enumerate(("right with them turned, %", "right with the others, %")):
            value = float(row[key])
            place, label = i + 0.2 * (2 * k - 1), ("turned", "as they are")[k] if not i else ""
            last.barh(place, value, 0.36, color=COLOURS[k], label=label)
            last.text(value + 1, place, f"{value:.0f}", va="center", fontsize=8, color=COLOURS[k])
    last.set_yticks(range(len(TASKS)), list(TASKS))
    last.invert_yaxis()
    last.set_title("beside the other five, scale 1: right, %")
    last.set_xlim(0, 119)
    last.legend(frameon=False, fontsize=8, loc=(0.35, 0.48))


def _named(found: Found, ways: Sequence[str]) -> list[str]:
    """The ways that the picture names: the best, the best of weights alone, the sum, TIES, and what is next."""
    first = [
        str(found.rows[f"ahead: {what}"]["way"])
        for what in ("the best", "the best of those that look at weights alone")
    ]
    return list(dict.fromkeys([*first, SUM, _RIVAL, *ways]))[:5]


TEXT: Final = f"""
Six LoRAs of rank {RANK}, each trained for {STEPS} steps at a rate of {RATE:g} on one task, on every linear layer of
mini-1's decoder and of its projector, are made one adapter that is asked all six tasks. The tasks are drawn by the
project: which bin an item on a belt goes in, the number on a blueprint, an order to a robot answered in JSON, what an
infrared camera sees, a digit and a place in JSON that the base would say in words. The base alone and every adapter on
its own task, percent of {{{{ value("measured: each", "held-out rows", "d") }}}} held-out rows, mean of
{{{{ value("measured: each", "seeds", "d") }}}} seeds, and some of the ways below:

{{{{ table("accuracy") }}}}
*Normalised* accuracy is the mean over the tasks of the merged adapter's accuracy as a share of what the task's own
adapter has alone (arXiv:2410.19735).

## Every way, tuned alike

Each way is tried at the scales {", ".join(f"{scale:g}" for scale in FIRST)} and on along the same ladder until the best
has a worse one on either side; those with a density at {", ".join(f"{density:g}" for density in DENSITIES)}; all other
options likewise at the same few values. What is best on validation
rows ({{{{ value("measured: each", "validation rows", "d") }}}} a task) with the first seed's adapters is measured on
held-out rows: with these adapters, and for the ways that the claim is about with all seeds':

{{{{ table("way") }}}}
Some ways make the same change up to a factor, by their mathematics, and are measured once:

{{{{ table("same") }}}}
Against TIES at its own best, row by row, in points of normalised accuracy, with the 95 % interval of a bootstrap over
rows. The way is the one that is best on validation rows, once of all and once of those that look at nothing but
weights; *regmean* also looks at what layers are given when each adapter runs over the probe in its own folder, a few
rows of its task:

{{{{ table("ahead") }}}}
That the best one in a file is the best one in memory: merged by `tarsia.merge`, saved, loaded, put into a fresh model
and asked again:

{{{{ table("shipped") }}}}

## Why a sum at scale 1 collapses

{{{{ table("size") }}}}
Two adapters are nearly at right angles, number by number, so the sum is hardly longer than six independent changes
would be. That alone is not what breaks it. For each task, here is what the other five adapters add to a layer's output
on the task's own inputs, as a share of what its own adapter adds (median over layers), and the accuracy beside them at
scale 1; and the same with the other five *turned*: every change keeps its singular values, but its directions of inputs
and of outputs are drawn at random:

{{{{ table("beside") }}}}
{{{{ table("beside, mean") }}}}
Strangers of the same size do much less harm where their directions are random: six tasks of one model are learnt from
inputs that have much in common, so every adapter answers to the others' inputs too, and writes into the same few
directions of the output. A small scale makes this less, and each task's own change with it; ways that do better take
apart what is shared.

mini-1 is small-scale, and six tasks of which it knows nothing are far from it: its adapters change its answers from
never right to nearly always right. Merging is easier where a base half knows its tasks. How these came to be, and what
was tried before, is in `LOG.md`.
"""

CHAPTER: Final = Chapter(
    name="merging",
    title="Six adapters made one",
    question="Which way to merge keeps most of six adapters, and why does their plain sum keep so little?",
    claim=f"With every way tuned alike, the best one that is shipped is at least {AHEAD:g} points of normalised "
    f"accuracy ahead of TIES on six tasks of mini-1; the plain sum at scale 1 keeps at most {COLLAPSED:g} %, "
    f"though beside five others of the same size in random directions a task keeps at least {TURNED:g} %.",
    bounds=(
        Bound("the best way before TIES, points", "ahead: the best", "points before TIES", AHEAD),
        Bound("the least that the interval leaves of it", "ahead: the best", "from", 0.0),
        Bound("the sum at scale 1, %", "size: the sum", "normalised at scale 1, %", 0, COLLAPSED),
        Bound("beside five turned at random, %", "beside, mean: six tasks", "right with them turned, %", TURNED, 100),
        Bound("the worst adapter alone, %", "least: each adapter alone", "%", LEARNT, 100),
        Bound("the base at most, %", "most: base", "%", 0, 30),
        Bound(
            "the best from its files, % of rows",
            "shipped: the best, from its files",
            "rows with the same verdict, %",
            99.5,
            100,
        ),
    ),
    measure=measure,
    draw=draw,
    picture="accuracy by scale for each way; held-out accuracy of each way, a dot a seed; each task beside the others",
    text=TEXT,
    order=150,
    minutes=90.0,
    size=(13, 5.2),
)
"""The claim is of these six tasks and of this recipe."""
