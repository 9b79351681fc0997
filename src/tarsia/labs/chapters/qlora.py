"""The same job learnt whole, by LoRA, and by LoRA over a base in 4 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from tarsia.core.errors import ConfigError
from tarsia.evaluate.bootstrap import Interval, mean_of_means, paired
from tarsia.labs import parity, replay
from tarsia.labs.frame.chapter import Bound, Chapter, Desk, Found
from tarsia.labs.frame.page import COLOURS, GREY
from tarsia.labs.frame.tables import Cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS: Final = 1.0
"""What QLoRA may be away from LoRA, in points of accuracy."""

Rights = Mapping[tuple[str, str], Sequence[Sequence[float]]]
"""By job and kind: for each seed 1 or 0 for each row."""


def measure(desk: Desk) -> Found:
    """Train and measure every run that has no result yet, then compare."""
    parity.drive(desk.work, show=desk.show)
    results = {run: _result(desk, run) for run in parity.RUNS}
    rights = {
        (job, kind): [results[parity.Run(job, kind, seed)]["right"] for seed in parity.SEEDS]
        for job in parity.JOBS
        for kind in parity.KINDS
    }
    found = compared(rights)
    bases = {str(result["base"]) for result in results.values()}
    if len(bases) > 1:
        raise ConfigError(
            "The runs stand on different bases.", given=", ".join(sorted(bases)), do=f"remove {desk.work} and run again"
        )
    return Found(found.rows, found.series, {"mini-1": bases.pop()})


def _result(desk: Desk, run: parity.Run) -> dict[str, Any]:
    """What a run measured. Raises ConfigError where its base was in another form than the run's name says."""
    found: dict[str, Any] = replay.stored(desk.work, run.name)
    if bool(found["quantised"]) != (run.kind == "QLoRA"):
        raise ConfigError(
            "A run's base was in another form than it should have been.",
            given=f"{run.name}: {found['quantised'] or 'not quantised'}",
            do="remove its result and run it again",
        )
    return found


def compared(rights: Rights) -> Found:
    """Accuracy in percent by job and kind, and the paired differences to LoRA in points."""
    rows: dict[str, Mapping[str, Cell]] = {}
    series: dict[str, Sequence[float]] = {}
    for (job, kind), seeds in rights.items():
        shares = [100 * _mean(right) for right in seeds]
        series[f"{job} {kind}"] = shares
        rows.setdefault(f"accuracy: {job}", {})
        rows[f"accuracy: {job}"] = {**rows[f"accuracy: {job}"], kind: round(_mean(shares), 2)}
    for kind in ("QLoRA", "full"):
        means = {job: (_rows(rights[job, "LoRA"]), _rows(rights[job, kind])) for job in parity.JOBS}
        found = {job: paired(*both) for job, both in means.items()}
        gaps = [[b - a for a, b in zip(*both, strict=True)] for both in means.values()]
        found["all three"] = mean_of_means(gaps, span=(-1.0, 1.0))
        rows |= {f"{kind} less LoRA: {job}": _row(value) for job, value in found.items()}
    count = {len(right) for seeds in rights.values() for right in seeds}
    rows["measured: each"] = {"rows": max(count), "seeds": len(parity.SEEDS)}
    return Found(rows, series)


def _rows(seeds: Sequence[Sequence[float]]) -> list[float]:
    """Each row's mean over the seeds."""
    return [_mean(values) for values in zip(*seeds, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _row(value: Interval) -> Mapping[str, Cell]:
    points = value.scaled(100)
    return {"points": round(points.mean, 2), "from": round(points.low, 2), "to": round(points.high, 2)}


def draw(found: Found, figure: Figure) -> None:
    """Every seed's accuracy by job and kind, and QLoRA's difference with its interval."""
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    for k, kind in enumerate(parity.KINDS):
        for j, job in enumerate(parity.JOBS):
            shares = found.series[f"{job} {kind}"]
            place = j + 0.22 * (k - 1)
            left.plot([place] * len(shares), shares, "o", color=COLOURS[k], ms=5, alpha=0.7, label=None if j else kind)
            left.plot([place - 0.07, place + 0.07], [_mean(shares)] * 2, color=COLOURS[k], lw=2)
    left.set_xticks(range(len(parity.JOBS)), list(parity.JOBS))
    left.set_title("answers that are right, % (dots: seeds, lines: their means)")
    left.legend(frameon=False, loc="lower right")
    names = [*parity.JOBS, "all three"]
    for i, name in enumerate(names):
        row = {key: float(value) for key, value in found.rows[f"QLoRA less LoRA: {name}"].items()}
        right.plot([row["from"], row["to"]], [i, i], color=COLOURS[2], lw=2)
        right.plot(row["points"], i, "o", color=COLOURS[2])
    right.axvspan(-POINTS, POINTS, color=GREY, alpha=0.15, lw=0)
    right.axvline(0, color=GREY, lw=0.8)
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.set_title("QLoRA less LoRA, points")


TEXT: Final = """
Three jobs of the [replay curve](../replay.md), without replay: belts in infrared (another look), orders that are
answered with a command in JSON (another form), dimensions on blueprints (both). Each is learnt by mini-1 in three
ways, with {{ value("measured: each", "seeds", "d") }} seeds and the same rows, steps and batches:

- *full*: every number of the decoder's linear layers is trained;
- *LoRA*: rank 8 on the same layers, over the base in float32;
- *QLoRA*: the same over a base whose decoder and vision tower are in NF4, scales nested, at LoRA's own learning rates.

The projector is trained whole, in 16 bits or more, in all three. Right is an answer that equals the held-out row's, of
{{ value("measured: each", "rows", "d") }} rows; percent:

{{ table("accuracy") }}
Row by row, each row's mean over the seeds, with the 95 % interval of a paired bootstrap over rows; points:

{{ table("QLoRA less LoRA") }}
and for all numbers of the decoder:

{{ table("full less LoRA") }}
This is parity of what a small model learns, on jobs that it learns well. It says nothing of what a large model
knows besides: rounding moves that too, and `tarsia forgetting` measures it. The learning rates of *full* were chosen
on validation rows of one seed among three, LoRA's for the replay curve, before QLoRA was there.
"""

CHAPTER: Final = Chapter(
    name="qlora",
    title="QLoRA, LoRA, and all of the numbers",
    question="Does a base in 4 bits cost accuracy of what is learnt over it?",
    claim=f"On each of three jobs QLoRA's accuracy, mean of three seeds, is within {POINTS:g} point of LoRA's.",
    bounds=(
        *(Bound(f"{job}, points", f"QLoRA less LoRA: {job}", "points", -POINTS, POINTS) for job in parity.JOBS),
        Bound("the three together, points", "QLoRA less LoRA: all three", "points", -POINTS, POINTS),
    ),
    measure=measure,
    draw=draw,
    picture="accuracy by job and way of learning, a dot a seed; QLoRA's difference to LoRA with its interval",
    text=TEXT,
    order=60,
    minutes=45.0,
    size=(11, 4.2),
)
