"""Ten tasks as ten full checkpoints, and as ten adapters of one base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from tarsia.labs import ten
from tarsia.labs.frame.chapter import Bound, Chapter, Desk, Found
from tarsia.labs.frame.page import COLOURS, GREY
from tarsia.labs.frame.tables import Cell
from tarsia.labs.ten import RANK, TEN, Measured

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MIB: Final = 2**20
_OPENED: Final = "checkpoint: opened from its files"
_COPIED: Final = "checkpoint: its weights copied from memory"
_HELD: Final = "adapter: held, made to act"
_READ: Final = "page: read from the library"
_PAGE: Final = "page: held"
FASTER: Final = 100.0
"""Times by which going to an adapter that is held is faster than opening a checkpoint."""
SOONER: Final = 10.0
"""Times by which a server reads another adapter's page sooner than it would open a checkpoint."""
SMALLER: Final = {"mini-1": 4.0, "SmolLM2": 5.0}
"""Times by which ten checkpoints are more bytes on disk than the base and ten adapters."""


def measure(desk: Desk) -> Found:
    """mini-1, and SmolLM2 where it is here, of which two checkpoints are written."""
    models = {"mini-1": ("mini-1", TEN)}
    if "smol" in desk.folders:
        models["SmolLM2"] = (str(desk.folders["smol"]), 2)
    found = {}
    for i, (name, (model, made)) in enumerate(models.items()):

        def show(what: str, i: int = i, name: str = name) -> None:
            desk.show(i / len(models), f"{name}: {what}")

        found[name] = ten.measure(model, made, desk.work / name, show)
    return compared(found)


def compared(found: Mapping[str, Measured]) -> Found:
    """Bytes and milliseconds by model, and the ratios that the claim is about."""
    rows: dict[str, Mapping[str, Cell]] = {}
    series: dict[str, Sequence[float]] = {}
    for name, one in found.items():
        many, few = TEN * one.checkpoint, one.checkpoint + TEN * one.adapter
        rows[f"disk: {name}"] = {
            "one checkpoint, MiB": round(one.checkpoint / _MIB, 2),
            "one adapter, MiB": round(one.adapter / _MIB, 2),
            "ten checkpoints, MiB": round(many / _MIB, 1),
            "base and ten adapters, MiB": round(few / _MIB, 1),
            "times fewer": round(many / few, 2),
        }
        rows[f"memory: {name}"] = {
            "ten models, MiB": round(TEN * one.weights / _MIB, 1),
            "base and ten adapters, MiB": round((one.weights + TEN * one.patches) / _MIB, 1),
            "times fewer": round(TEN * one.weights / (one.weights + TEN * one.patches), 2),
            "numbers of an adapter": one.trained,
            "checkpoints that were written": one.made,
        }
        for way, seconds in one.times.items():
            rows.setdefault(f"switch: {way}", {})
            rows[f"switch: {way}"] = {**rows[f"switch: {way}"], f"{name}, ms": _figure(1000 * seconds)}
        rows[f"faster: {name}"] = {
            "than opening a checkpoint": round(one.times[_OPENED] / one.times[_HELD]),
            "than copying its weights": round(one.times[_COPIED] / one.times[_HELD], 1),
            "a page that is read": round(one.times[_OPENED] / one.times[_READ]),
        }
        rows[f"alike: {name}"] = {
            "same likeliest token, % of positions": round(100 * one.agreement, 2),
            "largest difference of a logit, % of the largest": round(100 * one.apart, 3),
        }
        series |= {f"{name} disk": [many / _MIB, few / _MIB], f"{name} ms": [1000 * s for s in one.times.values()]}
    return Found(rows, series, {name: one.base for name, one in found.items()})


def _figure(value: float) -> float:
    """Three figures."""
    return float(f"{value:.3g}")


def draw(found: Found, figure: Figure) -> None:
    """Bytes of both forms, and the time of a switch by way, on a scale of powers of ten."""
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.9))
    names = [name.removesuffix(" disk") for name in found.series if name.endswith(" disk")]
    for i, name in enumerate(names):
        many, few = found.series[f"{name} disk"]
        left.bar(i - 0.19, many, 0.36, color=COLOURS[1], label="ten checkpoints" if not i else "")
        left.bar(i + 0.19, few, 0.36, color=COLOURS[0], label="a base, ten adapters" if not i else "")
        for x, value in ((i - 0.19, many), (i + 0.19, few)):
            left.text(x, value * 1.06, f"{value:,.0f}", ha="center", fontsize=8)
    left.set_yscale("log")
    left.set_ylim(top=left.get_ylim()[1] * 3)
    left.set_xticks(range(len(names)), names)
    left.set_title("MiB on disk")
    left.legend(frameon=False, loc="upper left", fontsize=8)
    ways = [row.removeprefix("switch: ") for row in found.rows if row.startswith("switch: ")]
    for i, name in enumerate(names):
        for k, value in enumerate(found.series[f"{name} ms"]):
            place = k + 0.19 * (2 * i - len(names) + 1)
            colour = COLOURS[1] if ways[k].startswith("checkpoint") else COLOURS[0]
            right.barh(place, value, 0.34, color=colour, alpha=1.0 if not i else 0.6)
            said = f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
            right.text(value * 1.15, place, f"{said} ms, {name}", va="center", fontsize=8)
    right.set_xscale("log")
    right.set_xlim(right=right.get_xlim()[1] * 20)
    right.axvline(1000 / 50, color=GREY, lw=1, ls=":")
    right.text(1000 / 50 * 1.1, len(ways) - 0.55, "one turn of a loop at 50 Hz", color=GREY, fontsize=8)
    right.set_yticks(range(len(ways)), [way.replace(": ", ":\n", 1) for way in ways])
    right.invert_yaxis()
    right.set_title("milliseconds to the next task")


TEXT: Final = f"""
"If an enterprise needs 10 distinct task-specific models, full fine-tuning requires saving 10 distinct checkpoints;
switching requires unloading and reloading." So it does, and here is what either takes. Ten adapters are drawn (LoRA of
rank {RANK} on every linear layer of the decoder and of the projector; bytes and times do not depend on what was
learnt), and each is folded into a checkpoint of its own (`tarsia fold`), so that both forms hold the same ten tasks:

{{{{ table("alike") }}}}
A checkpoint is in the type of its base's files, so what is between mini-1's two forms is the rounding of the folded
weights to 16 bits; SmolLM2's files are in 32. On disk an adapter is its factors at 32 bits a number, its probe and its
card:

{{{{ table("disk") }}}}
In memory, at 32 bits a number, if all ten are to be there at once:

{{{{ table("memory") }}}}
An adapter of the same rank is a smaller part of a larger model (the chapter [count](count.md)): for 7 billion numbers
ten checkpoints of 14 GB stand against one and ten adapters of 0.4 to 0.7 % of its numbers.

To go to the next task, median of {ten.ROUNDS} turns, on one machine, files in the page cache:

{{{{ table("switch", "to the next task") }}}}
*Opened from its files* is what a server does that holds one model; *copied from memory* is the least that a change of
all weights can take: another model, whole and in memory already, is copied over the first. *Read from its files*
takes an adapter of the same make from its folder, with every check of `load`, and copies its numbers over those that
are attached (`tarsia.adapter.swap`). *Made to act* is `activate` among ten that are held; *four in one batch* is
`routed`: every row goes its own way and nothing is switched at all. A *page* is an adapter as `tarsia serve` keeps it:
read from the library when it is asked for and there is no room for two, or held until a request asks for it; each was
proved when it was read first. How many times faster than to open a checkpoint it is to let an adapter act that is held,
and to read a page:

{{{{ table("faster") }}}}
{{% if "smol" not in lacking %}}
Of SmolLM2 two checkpoints were written, and ten of their size are reckoned with.
{{% else %}}
SmolLM2 was not measured here: `--with smol=FOLDER` does.
{{% endif %}}
"""

CHAPTER: Final = Chapter(
    name="ten",
    title="Ten checkpoints, or ten adapters",
    question="What do ten tasks take on disk and in memory, and how long does it take to go from one to the next?",
    claim=f"Ten checkpoints of mini-1 are at least {SMALLER['mini-1']:g} times the bytes of a base and ten adapters of "
    f"rank {RANK} (of SmolLM2 {SMALLER['SmolLM2']:g} times), and an adapter that is held acts at least {FASTER:g} "
    "times sooner than a checkpoint is opened, in at most 2 ms; a server reads another adapter's page at least "
    f"{SOONER:g} times sooner, and goes to one that it holds in at most 0.5 ms; both forms have the same likeliest "
    "token at 95 % of the positions or more.",
    bounds=(
        Bound("mini-1: times fewer bytes on disk", "disk: mini-1", "times fewer", SMALLER["mini-1"]),
        Bound("SmolLM2: times fewer bytes on disk", "disk: SmolLM2", "times fewer", SMALLER["SmolLM2"], uses="smol"),
        Bound("mini-1: times sooner", "faster: mini-1", "than opening a checkpoint", FASTER),
        Bound("SmolLM2: times sooner", "faster: SmolLM2", "than opening a checkpoint", FASTER, uses="smol"),
        Bound("mini-1: a switch, ms", f"switch: {_HELD}", "mini-1, ms", 0, 2),
        Bound("SmolLM2: a switch, ms", f"switch: {_HELD}", "SmolLM2, ms", 0, 2, uses="smol"),
        Bound("mini-1: a page is read times sooner", "faster: mini-1", "a page that is read", SOONER),
        Bound("SmolLM2: a page is read times sooner", "faster: SmolLM2", "a page that is read", SOONER, uses="smol"),
        Bound("mini-1: a page that is held, ms", f"switch: {_PAGE}", "mini-1, ms", 0, 0.5),
        Bound("SmolLM2: a page that is held, ms", f"switch: {_PAGE}", "SmolLM2, ms", 0, 0.5, uses="smol"),
        Bound("mini-1: same token, %", "alike: mini-1", "same likeliest token, % of positions", 95, 100),
        Bound("SmolLM2: same token, %", "alike: SmolLM2", "same likeliest token, % of positions", 95, 100, uses="smol"),
    ),
    measure=measure,
    draw=draw,
    picture="bytes of ten checkpoints and of a base with ten adapters; the time of a switch by way, logarithmic",
    text=TEXT,
    order=160,
    minutes=3.0,
    size=(11, 4.2),
    uses=("smol",),
)
"""The times are of the machine that wrote the page; the ratios are what carries over."""
