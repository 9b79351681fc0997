"""Where the adapter is put: in the tower, the projector or the language model, against what is new in a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from tarsia.core.errors import ConfigError
from tarsia.evaluate.bootstrap import paired
from tarsia.labs import placing
from tarsia.labs.frame.chapter import Bound, Chapter, Desk, Found
from tarsia.labs.frame.page import COLOURS, GREY
from tarsia.labs.frame.tables import Cell
from tarsia.labs.placing import BOTH, JOBS, KINDS, KNOWN, PLACED, STEPS
from tarsia.labs.runs import Scores, mean
from tarsia.labs.shift_radar import normal, radar
from tarsia.labs.trials import Chosen

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AHEAD: Final = 10.0
"""Points by which a LoRA in the tower has to lead one in the language model on the radar's screen."""
ENOUGH: Final = 90.0
"""Percent that the projector or the language model alone has to reach on the new form."""
_SHOWN: Final = 1


def measure(desk: Desk) -> Found:
    """Train every run that has no result yet, then compare."""
    names: list[str] = []

    def show(name: str) -> None:
        names.append(name)
        desk.show(min(1.0, len(names) / 50), name)

    trials = placing.desk(desk.work, show)
    return compared(placing.found(trials), {job: trials.before(job) for job in JOBS})


def compared(chosen: Mapping[tuple[str, str], Chosen], before: Mapping[str, Scores]) -> Found:
    """Accuracy in percent by job and place, and the differences that the claim is about, in points.

    Raises ConfigError where the runs stand on different bases.
    """
    bases = set().union(*(held.bases for held in chosen.values()))
    if len(bases) > 1:
        raise ConfigError(
            "The runs stand on different bases.", given=", ".join(sorted(bases)), do="remove them and run again"
        )
    base = {job: 100 * mean(scores["held-out"]["right"]) for job, scores in before.items()}
    rows: dict[str, Mapping[str, Cell]] = {
        f"accuracy: {job}": {"base": round(base[job], 2)}
        | {kind: round(chosen[job, kind].accuracy, 2) for kind in PLACED[job]}
        for job in STEPS
    }
    rows["known: normal light, plain answer"] = {"base": round(base[KNOWN], 2)}
    trained = {kind: held.trained for (_, kind), held in chosen.items()}
    rows |= {f"trained: {kind}": {"numbers": trained[kind]} for kind in KINDS}
    for job in STEPS:
        for kind in PLACED[job]:
            held = chosen[job, kind]
            tried: dict[str, Cell] = {f"{rate:g}": round(share, 1) for rate, share in sorted(held.rates.items())}
            rows[f"rates: {job}, {kind}"] = tried | {"chosen": f"{held.rate:g}", "seeds": len(held.results)}
    rows["visual, less language: vision"] = _difference(chosen["visual", "language"], chosen["visual", "vision"])
    alone = max(("projector", "language"), key=lambda kind: chosen["format", kind].accuracy)
    reached = chosen["format", alone].accuracy
    rows["format, alone: the better"] = {
        "which": alone,
        "accuracy": round(reached, 2),
        f"of {BOTH}'s, %": round(100 * reached / max(chosen["format", BOTH].accuracy, 1e-9), 2),
    }
    rows["measured: each"] = {"rows": len(before[KNOWN]["held-out"]["right"])}
    rows |= {f"steps: {job}": {"steps": steps} for job, steps in STEPS.items()}
    series = {f"{job} {kind}": held.accuracies for (job, kind), held in chosen.items()}
    return Found(rows, series, {"mini-1": bases.pop()})


def _difference(less: Chosen, more: Chosen) -> Mapping[str, Cell]:
    """Points, each row a mean over the seeds, with the interval of a paired bootstrap over rows."""
    means = [[mean(row) for row in zip(*held.rights, strict=True)] for held in (less, more)]
    points = paired(means[0], means[1]).scaled(100)
    return {"points": round(points.mean, 2), "from": round(points.low, 2), "to": round(points.high, 2)}


def draw(found: Found, figure: Figure) -> None:
    """The same thing in both lights, and every seed's accuracy by place, for both jobs."""
    grid = figure.add_gridspec(2, 3, width_ratios=(0.62, 1.5, 1.5))
    lights = {"normal light": normal(_SHOWN), "the radar's screen": radar(_SHOWN)}
    for i, (name, (picture, thing)) in enumerate(lights.items()):
        axes = figure.add_subplot(grid[i, 0])
        axes.imshow(picture.convert("L"), cmap="gray", vmin=80 if i else 0, vmax=176 if i else 255)
        axes.set_title(f"{name}: {thing.position}", fontsize=9)
        axes.set_axis_off()
    titles = {"visual": "new pictures, plain answer", "format": "known pictures, answer in JSON"}
    for j, (job, title) in enumerate(titles.items()):
        axes = figure.add_subplot(grid[:, 1 + j])
        for i, kind in enumerate(PLACED[job]):
            shares, colour = found.series[f"{job} {kind}"], COLOURS[list(KINDS).index(kind)]
            axes.bar(i, mean(shares), 0.62, color=colour, alpha=0.85)
            axes.plot([i] * len(shares), shares, "o", color="white", mec=colour, ms=5)
            axes.text(i, max(shares) + 2.5, f"{mean(shares):.0f}", ha="center", fontsize=9)
        base = float(found.rows[f"accuracy: {job}"]["base"])
        axes.axhline(base, color=GREY, lw=1, ls="--")
        axes.text(len(PLACED[job]) - 0.5, base + 1, "base", color=GREY, ha="right", va="bottom", fontsize=8)
        axes.set_xticks(range(len(PLACED[job])), [kind.replace(" and ", "\nand ") for kind in PLACED[job]])
        axes.set_ylim(0, 112)
        axes.set_title(f"{title}, % right")


TEXT: Final = """
An adapter can only mend what lies on its way. Two jobs ask the same question of the same things, "Where is the
circle?", and each has one thing new:

- *visual*: the pictures are a radar's screen, the answers are as ever. The screen is drawn after synthetic-aperture
  radar: speckle, levelled so that a thing is as bright and as rough as its ground; what tells them apart is along
  which axis the speckle's grains are long. The tower learnt from photographs, digits and flat shapes, where grain means
  nothing, and gives little of it on.
- *format*: the pictures are as ever, the answer is JSON: `{"at": "top left"}`.

What both differ from, normal light and a plain answer, the base has right in
{{ value("known: normal light, plain answer", "base") }} % of the rows, so on the screen language has nothing to learn
but how the pictures look. LoRA goes on all linear layers of the tower, of the decoder, or of both at half the rank; the
projector is trained whole:

{{ table("trained") }}
Each is trained for the same steps ({{ value("steps: visual", "steps", "d") }} on the screen,
{{ value("steps: format", "steps", "d") }} on the form, 4 rows each) at the best of the same rates, chosen by the first
seed on validation rows. Right is an answer that equals the held-out row's, of
{{ value("measured: each", "rows", "d") }} rows, a mean over the seeds; percent, where a guess among four places has 25
on the screen:

{{ table("accuracy") }}
On the screen, row by row, less what the LoRA in the language model has; points, with the 95 % interval of a paired
bootstrap over rows:

{{ table("visual, less language") }}
On the form the better of projector and language alone:

{{ table("format, alone") }}
Validation accuracy by learning rate, first seed, and how many seeds were run at the chosen one:

{{ table("rates") }}
mini-1 is small-scale, and the screen was made for this. Other drawings (bright shapes under strong speckle, the fringes
of an interferogram) were too hard for every place in so few steps. With shorter grains a LoRA in the language model
stayed at a guess, and one in the tower got ahead only in more steps than these; the grains as they are leave something
for the language model to find in what the frozen tower gives: it is behind, not blind. So this shows that such a shift
exists and which place mends it, not how common it is.
"""

CHAPTER: Final = Chapter(
    name="where",
    title="Where to put the adapter",
    question="Which part of the model has to be trained for new pictures, and which for a new form of answer?",
    claim=f"On a radar's screen, which the tower has never seen, a LoRA in the tower is at least {AHEAD:g} points "
    f"ahead of one in the language model; for a new form of answer the projector or the language model alone reaches "
    f"at least {ENOUGH:g} %, and at least {ENOUGH:g} % of what tower and language reach together.",
    bounds=(
        Bound("screen: vision less language, points", "visual, less language: vision", "points", AHEAD),
        Bound("form: projector or language alone, %", "format, alone: the better", "accuracy", ENOUGH),
        Bound("form: of both together, %", "format, alone: the better", f"of {BOTH}'s, %", ENOUGH),
        Bound("the base in normal light, %", "known: normal light, plain answer", "base", ENOUGH),
    ),
    measure=measure,
    draw=draw,
    picture="one thing in both lights; accuracy by the adapter's place on both jobs, a dot a seed",
    text=TEXT,
    order=100,
    minutes=25.0,
    size=(11, 4.4),
)
"""The claim is of the two shifts as they are drawn here."""
