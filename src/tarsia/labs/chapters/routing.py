"""Sixty adapters, and the base's own tower that chooses among them by the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tarsia.adapter import open_base
from tarsia.evaluate.bootstrap import interval
from tarsia.labs.experiment import PLACE
from tarsia.labs.frame.chapter import Bound, Chapter, Desk, Found
from tarsia.labs.frame.page import COLOURS, GREY
from tarsia.labs.frame.tables import Cell
from tarsia.labs.routing import CLOSE, FAR, SEEDS, TEST, TRAIN, Asked, Choices, ask, reliability, risk, routed, seen
from tarsia.labs.routing_answers import Answers, answers
from tarsia.labs.routing_jobs import COUNTS, STEPS, Workers
from tarsia.labs.routing_world import CAMERAS, CONDITIONS, JOBS, KINDS, NEAR, STRANGERS
from tarsia.labs.runs import mean
from tarsia.serve.route import STRANGE, UNSURE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RIGHT: Final = 95.0
"""Percent of known pictures whose adapter has to be chosen; one that is left to the base counts as wrong."""
LEFT: Final = 90.0
"""Percent of pictures of kinds that no job has which have to be left to the base."""
AHEAD: Final = 5.0
"""Points by which the router has to lead the nearest centroid, which may be right in at most HARD percent."""
HARD: Final = 90.0
_NEAREST: Final = "nearest centroid, never open"
_FREE: Final = {"always base": (0.0, 100.0), "oracle": (100.0, 100.0)}
"""Percent right and left to the base of what needs no picture."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Each seed's choices, the answers at the end, and the digest of the base."""

    asked: Sequence[Asked]
    answers: Answers
    base: str


def measure(desk: Desk) -> Found:
    """Train, look and choose; what was done before is taken from the desk."""
    names: list[str] = []

    def show(name: str) -> None:
        names.append(name)
        desk.show(min(1.0, len(names) / 460), name)

    data = desk.folders["data"]
    host = open_base("mini-1", dtype=PLACE["precision"], device=PLACE["device"])
    asked = []
    for seed in SEEDS:
        held = seen(host, seed, data, desk.work, show)
        asked.append(ask(routed(host, held.trained), held))
    told = answers(Workers(desk.work / "jobs", data, show))
    return compared(Measured(asked, told, host.fingerprint.weights))


def compared(m: Measured) -> Found:
    """Ways side by side, what is left to the base by kind, how sure it is, and what is answered at the end."""
    rows: dict[str, Mapping[str, Cell]] = {}
    for way in m.asked[0].right:
        right = _all([one.right[way] for one in m.asked])
        strange = way.removesuffix(", never open")
        known = strange == way
        rows[f"way: {way}"] = {
            **_within("right, %", right),
            "by seed": ", ".join(f"{100 * mean(one.right[way]):.1f}" for one in m.asked),
            "known, left to the base, %": _percent(_all([one.open[way] for one in m.asked])),
            "strangers left to the base, %": _percent(_kinds(m, way)) if known else 0.0,
        }
    for way, (right_, left) in _FREE.items():
        rows[f"way: {way}"] = {"right, %": right_, "strangers left to the base, %": left}
    far = _kinds(m, "router")
    rows["strangers: all"] = {
        **_within("left to the base, %", far),
        "by seed": ", ".join(
            f"{100 * mean([v for kind in one.strange['held-out']['router'].values() for v in kind]):.1f}"
            for one in m.asked
        ),
    }
    for group, ways in m.asked[0].strange.items():
        for kind in ways["router"]:
            rows[f"{group}: {kind}"] = {
                way: _percent(_all([one.strange[group][way][kind] for one in m.asked])) for way in ways
            }
    rows |= _ahead(m) | _sure(m) | _mistakes([pair for one in m.asked for pair in one.choices])
    for way, rights in m.answers.right.items():
        rows[f"answer: {way}"] = {**_within("right answers, %", rights)}
    rows["made: each"] = {"merged": m.answers.merged, "KiB of a card": round(m.answers.card / 1024, 1)}
    return Found(rows, _series(m), {"mini-1": m.base})


def _all(parts: Sequence[Sequence[float]]) -> list[float]:
    return [value for part in parts for value in part]


def _kinds(m: Measured, way: str) -> list[float]:
    return [value for one in m.asked for kind in one.strange["held-out"][way].values() for value in kind]


def _percent(values: Sequence[float]) -> float:
    return round(100 * mean(values), 2)


def _within(name: str, values: Sequence[float]) -> dict[str, Cell]:
    found = interval(values).scaled(100)
    return {name: round(found.mean, 2), "from": round(found.low, 2), "to": round(found.high, 2)}


def _ahead(m: Measured) -> dict[str, Mapping[str, Cell]]:
    """Points before the nearest centroid, which leaves nothing open here: that is how it is right most often."""
    points = [
        mine - theirs for one in m.asked for mine, theirs in zip(one.right["router"], one.right[_NEAREST], strict=True)
    ]
    found = interval(points, span=(-1.0, 1.0)).scaled(100)
    return {
        "ahead: of the nearest centroid": {
            "points": round(found.mean, 2), "from": round(found.low, 2), "to": round(found.high, 2)
        }
    }  # fmt: skip


def _sure(m: Measured) -> dict[str, Mapping[str, Cell]]:
    choices = [pair for one in m.asked for pair in one.choices]
    bins = reliability(choices)
    rows: dict[str, Mapping[str, Cell]] = {
        f"sure: {i + 1}": {"said, %": round(100 * said, 2), "right, %": round(100 * right, 2), "pictures": count}
        for i, (said, right, count) in enumerate(bins)
    }
    error = sum(abs(said - right) * count for said, right, count in bins) / len(choices)
    return {**rows, "calibration: all bins": {"points off on average": round(100 * error, 2)}}


def _mistakes(choices: Choices) -> dict[str, Mapping[str, Cell]]:
    """What is nearest to the pictures of each kind, in percent, whatever is then left to the base."""
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for name, choice in choices:
        by_kind.setdefault(name.rsplit("-", 1)[0], []).append((name, choice.nearest or ""))
    rows: dict[str, Mapping[str, Cell]] = {}
    for kind, pairs in by_kind.items():
        same = [one for one in pairs if one[1].rsplit("-", 1)[0] == kind]
        others = [near.rsplit("-", 1)[0] for _, near in pairs if near.rsplit("-", 1)[0] != kind]
        rows[f"nearest: {kind}"] = {
            "its job, %": round(100 * sum(name == near for name, near in pairs) / len(pairs), 1),
            "its kind, another camera, %": round(100 * sum(name != near for name, near in same) / len(pairs), 1),
            "another kind, %": round(100 * len(others) / len(pairs), 1),
            "most often": max(sorted(set(others)), key=others.count) if others else "",
        }
    return rows


def _series(m: Measured) -> dict[str, Sequence[float]]:
    choices = [pair for one in m.asked for pair in one.choices]
    curve = risk(choices)
    thin = curve[:: max(1, len(curve) // 200)]
    bins = reliability(choices)
    return {
        "covered": [100 * covered for covered, _ in thin],
        "wrong": [100 * wrong for _, wrong in thin],
        "said": [100 * said for said, _, _ in bins],
        "right": [100 * right for _, right, _ in bins],
    }


def draw(found: Found, figure: Figure) -> None:
    """Bars of every way, the curve of risk by coverage, and how often it is right where it says so."""
    bars, curve, sure = figure.subplots(1, 3, width_ratios=(1.5, 1, 0.9))
    ways = [name for name in found.rows if name.startswith("way: ")]
    for i, name in enumerate(ways):
        row = found.rows[name]
        for k, column in enumerate(("right, %", "strangers left to the base, %")):
            value = float(row[column])
            bars.barh(i + 0.2 * (2 * k - 1), value, 0.36, color=COLOURS[k], label=None if i else column)
            bars.text(value + 1, i + 0.2 * (2 * k - 1), f"{value:.1f}", va="center", fontsize=7)
    bars.set_yticks(range(len(ways)), [name.removeprefix("way: ") for name in ways], fontsize=8)
    bars.invert_yaxis()
    bars.set_xlim(0, 118)
    for at, colour in ((RIGHT, COLOURS[0]), (LEFT, COLOURS[1])):
        bars.axvline(at, color=colour, lw=0.8, ls=":")
    bars.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.4, 1.16), ncols=2)
    curve.plot(found.series["covered"], found.series["wrong"], color=COLOURS[0])
    curve.set_xlabel("known pictures that are answered, %")
    curve.set_title("of these wrong, %", fontsize=10)
    curve.set_ylim(bottom=0)
    sure.plot([0, 100], [0, 100], color=GREY, lw=0.8, ls=":")
    sure.plot(found.series["said"], found.series["right"], "-o", color=COLOURS[2], ms=4)
    sure.set_xlabel("confidence that is said, %")
    sure.set_title("right, %", fontsize=10)


TEXT: Final = f"""
{len(JOBS)} jobs are {len(KINDS)} kinds of thing ({", ".join(KINDS)}; some drawn, digits and red blood cells found)
before {len(CAMERAS)} cameras ({", ".join(CAMERAS)}). A picture of any job also has a light, a ground, a sensor and a
turn, which say nothing of its job. Of the {len(CONDITIONS)} combinations of light, sensor and turn each job has half to
be trained in, a quarter on which everything here was chosen (the signature, the directions, what is shrunk how much,
when to leave a picture to the base), and a quarter that is held out for this page. Each job's card says what
its {TRAIN} trained pictures look like to mini-1's own vision tower; {TEST} held-out pictures a job are asked, for each
of {len(SEEDS)} seeds. A seed asks its own, and trains on two of {len(SEEDS)} draws.
Kinds that no job has are strangers: those that settings were
chosen on ({", ".join(STRANGERS["development"])}) are others than those here
({", ".join(STRANGERS["held-out"])}; cats and ships are photographs), {FAR} pictures a kind and seed.

A known picture that is left to the base counts as wrong. *Never open* ways always name an adapter. Centroids and
logistic regression see all trained signatures and leave open what lies below {100 * STRANGE:g} % of these; the router
sees cards alone, and leaves open a picture as rare as {100 * STRANGE:g} % of the adapters' own, or of which it is less
than {100 * UNSURE:g} % sure. Intervals are of a bootstrap over pictures.

{{{{ table("way") }}}}
{{{{ table("ahead") }}}}
Strangers, percent left to the base:

{{{{ table("strangers") }}}}
{{{{ table("held-out") }}}}
A first look, with half as many trained pictures a job, did not bear the claim out: three quarters of
{", ".join(STRANGERS["first look"])} were left to the base (`LOG.md`).
So cards were made of {TRAIN} pictures, which helped with these and with those that settings were chosen on, and the
strangers above are others. How those of the first look
fare now (the known pictures that are asked were seen in that look too; nothing was chosen by them):

{{{{ table("first look") }}}}
Kinds that differ from a known one by a form or a material alone are another question, and mostly the tower does not
tell them apart ({{{{ value("near: {NEAR["held-out"][0]}", "router", ".0f") }}}} % of {NEAR["held-out"][0]}s are left to
the base). They are shown and not bound, {CLOSE} pictures a kind and seed:

{{{{ table("near") }}}}

## How sure it is

By bins of the confidence that it says, known pictures; on average it is
{{{{ value("calibration: all bins", "points off on average", ".2f") }}}} points off:

{{{{ table("sure") }}}}
What lies nearest to the pictures of each kind, whatever is then left to the base:

{{{{ table("nearest") }}}}

## What is answered

Every job has an adapter of mini-1 (LoRA in three layers, {STEPS} steps) that says in which bin a thing goes; each job
has its own bin, so an answer is right where the right adapter answers. Their real cards,
{{{{ value("made: each", "KiB of a card", ".1f") }}}} KiB on average of what pictures look like, make the router.
{COUNTS["held-out"]} held-out rows a job, one seed; the merged one is
{{{{ value("made: each", "merged") }}}}, the best of four on trained rows:

{{{{ table("answer") }}}}
mini-1's tower is small, and jobs here differ by what it can see; a tower that sees more would tell more apart. What a
router can not know is a picture that two jobs share: then the request has to name its adapter.
"""

CHAPTER: Final = Chapter(
    name="routing",
    title="Sixty adapters, chosen by the picture",
    question="Can a base's own vision tower tell which adapter a picture is for, and when it is for none?",
    claim=f"Among {len(JOBS)} adapters, by cards alone, pictures in held-out conditions get their adapter in at least "
    f"{RIGHT:g} % where the nearest centroid is right in at most {HARD:g} %, at least {AHEAD:g} points less; at least "
    f"{LEFT:g} % of pictures of unknown kinds are left to the base.",
    bounds=(
        Bound("known pictures right, %", "way: router", "right, %", RIGHT, 100),
        Bound("strangers left to the base, %", "strangers: all", "left to the base, %", LEFT, 100),
        Bound("points before the nearest centroid", "ahead: of the nearest centroid", "points", AHEAD),
        Bound("the nearest centroid, %", f"way: {_NEAREST}", "right, %", 0, HARD),
        Bound("confidence off, points", "calibration: all bins", "points off on average", 0, 5),
    ),
    measure=measure,
    draw=draw,
    picture="right and left to the base by way; error by coverage; right by confidence",
    text=TEXT,
    order=190,
    minutes=15.0,
    size=(13, 4.8),
    needs=("data",),
)
"""The claim is of these jobs before this tower."""
