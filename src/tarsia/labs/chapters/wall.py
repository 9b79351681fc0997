"""The memory wall: the texts' figures as sums, and the sums against what models really hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from tarsia.labs.frame.chapter import Bound, Chapter, Desk, Found
from tarsia.labs.frame.page import COLOURS, GREY
from tarsia.labs.held import Rows, activations, counted, four_bits, moments, stepped, ten, whole
from tarsia.plan import sums
from tarsia.plan.figure import GIGA, Figure, Verdict
from tarsia.plan.sums import JOBS
from tarsia.plan.wall import rows as figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture


def told() -> Rows:
    """The figures and their lines."""
    found: Rows = {}
    for held in figures():
        found[f"figure: {held.name}"] = {
            "the texts print": held.printed or "nothing",
            "GB": held.gigabytes,
            "verdict": str(held.verdict),
        }
        found[f"words: {held.name}"] = {
            "text": held.text,
            "formula": held.formula,
            "note": held.note,
            "assumed": ", ".join(f"{name} {value}" for name, value in held.assumed.items()),
        }
        for line in held.lines:
            found[f"{held.name}: {line.what}"] = {"formula": line.formula, "GB": line.bytes / GIGA}
    said = [held for held in figures() if held.verdict is not Verdict.UNSAID]
    plain = [held for held in said if "QLoRA," not in held.name]
    found["verdicts: figures as printed"] = {
        "judged": len(plain),
        "hold": sum(held.verdict is Verdict.HOLDS for held in plain),
    }
    return found


def measure(desk: Desk) -> Found:
    """The sums, then everything of them that can be measured."""
    found = told() | counted(desk)
    desk.show(0.4, "a model trained whole")
    found |= whole() | activations() | four_bits() | moments()
    steps = (("checkpointing, one pass", True, 1), ("checkpointing, two passes", True, 2), ("two passes", False, 2))
    for i, (name, checkpointing, accumulation) in enumerate(steps):
        desk.show(0.55 + 0.08 * i, f"a QLoRA's step: {name}")
        found |= stepped(name, checkpointing, accumulation)
    found |= ten(desk)
    return Found(found | worst(found))


def worst(found: Rows) -> Rows:
    """How far the formulas are from what was measured, at most."""
    exact = ("numbers", "whole", "held", "kept", "4 bits")
    apart = [abs(float(row["apart"])) for name, row in found.items() if name.partition(":")[0] in exact]
    steps = [abs(float(row["apart, %"])) for name, row in found.items() if name.startswith("step: ")]
    most: Rows = {}
    if apart:
        most["exact: formulas that count"] = {"number": len(apart), "most apart": max(apart)}
    if steps:
        most["steps: all"] = {"most apart, %": max(steps)}
    return most


BASE: Final = (
    sums.WEIGHTS,
    sums.CODES,
    sums.CONSTANTS,
    sums.REST,
    "the base, once",
    f"{JOBS} checkpoints",
    "constants in float32",
)
KINDS: Final[Mapping[str, tuple[str, ...]]] = {
    "weights": BASE,
    "adapters": (sums.ADAPTERS, f"{JOBS} adapters"),
    "gradients": (sums.GRADIENTS,),
    "master copy": (sums.MASTER,),
    "Adam's moments": (sums.FIRST, sums.SECOND),
    "activations": (sums.ACTIVATIONS, sums.PEAK, sums.ONCE),
}
"""The colours of the picture: what they stand for, and the lines of the sums that are that."""
PANELS: Final[Mapping[str, tuple[str, float | None, tuple[str, ...]]]] = {
    "a": (
        "7 and 14 billion, every parameter trained (line: 80 GB)",
        80,
        ("7B, mixed precision", "7B, float32", "14B, weights and Adam in float32", "14B, a step in float32"),
    ),
    "b": ("65 and 70 billion", None, ("70B, mixed precision", "65B, full 16-bit training", "70B in bfloat16")),
    "d": ("ten jobs", None, (f"7B, {JOBS} checkpoints", f"7B, {JOBS} adapters")),
    "c": (
        "QLoRA (line: 48 GB)",
        48,
        (
            "65B QLoRA",
            "65B QLoRA, adapters in float32",
            "65B QLoRA, adapters of rank 16 in float32",
            "65B QLoRA, constants in float32",
            "65B QLoRA, without checkpointing",
            "65B QLoRA, 4 rows of 528 tokens",
            "65B QLoRA, 16 rows a batch",
            "70B QLoRA",
            "72B VLM, QLoRA",
        ),
    ),
    "e": ("constants at 65B; hatched: what nesting leaves of them", None, ("65B, double quantisation",)),
}
"""Every figure in one panel: its title, where a line stands, the figures."""


def draw(found: Found, picture: Picture) -> None:
    """Every figure as a bar of what it is made of, in GB."""
    from matplotlib.patches import Patch

    panels = picture.subplot_mosaic([["a", "c"], ["b", "c"], ["d", "e"]], height_ratios=(4, 3, 2))
    for name, (title, line, names) in PANELS.items():
        bars(found, panels[name], names)
        panels[name].set_title(title)
        if line is not None:
            panels[name].axvline(line, color=COLOURS[1], lw=1, ls="--")
    handles = [Patch(color=colour, label=kind) for kind, colour in zip(KINDS, COLOURS, strict=True)]
    picture.legend(handles=handles, loc="outside lower center", ncols=len(KINDS), frameon=False)


def bars(found: Found, axes: Axes, names: Sequence[str]) -> None:
    """One bar a figure; constants that are given up end the bar where what is left of them does."""
    ends = []
    for place, name in enumerate(names):
        end = 0.0
        for (kind, lines), colour in zip(KINDS.items(), COLOURS, strict=True):
            width = sum(float(found.rows[row]["GB"]) for what in lines if (row := f"{name}: {what}") in found.rows)
            axes.barh(place, width, 0.62, left=end, color=colour, label=kind)
            end += width
        given = found.rows.get(f"{name}: constants nested", {"GB": 0.0})["GB"]
        if given:
            axes.barh(place, -float(given), 0.62, color="white", hatch="//", edgecolor=GREY)
        shown = found.rows[f"figure: {name}"]
        mark = "" if shown["verdict"] == Verdict.HOLDS else f"  {shown['verdict']}"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        label = f"{float(shown['GB']):.4g}{mark}"
        axes.annotate(label, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8, bbox=box)
        ends.append(end)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max(ends))


def section(held: Figure) -> str:
    """One figure's part of the page; a note only where there is one."""
    name = held.name
    says = (
        f'{held.source[:1].upper()}{held.source[1:]}: {{{{ value("words: {name}", "text", "") }}}}. '
        if held.text
        else ""
    )
    note = f'\n{{{{ value("words: {name}", "note", "") }}}}\n' if held.note else ""
    return f"""### {name}

{says}Ours: {{{{ value("figure: {name}", "GB", ".4g") }}}} GB,
**{{{{ value("figure: {name}", "verdict", "") }}}}**. Assumed: {{{{ value("words: {name}", "assumed", "") }}}}.

    {{{{ value("words: {name}", "formula", "") }}}}

{{{{ table("{name}") }}}}
{note}"""


TEXT: Final = """
What the texts say of memory, each figure from what it assumes. 1 GB is 10^9 bytes. `tarsia plan --wall` prints the same
sums, and takes a model or a number of one's own (`--wall 13B`).

{{ table("figure") }}
Of the {{ value("verdicts: figures as printed", "judged", "") }} that a text prints,
{{ value("verdicts: figures as printed", "hold", "") }} follow from what they assume. Double quantisation saves
{{ value("figure: 65B, double quantisation", "GB", ".2f") }} GB at 65 billion parameters, not 0.5: half a *bit* a
parameter is what the constants took before. And a QLoRA of 65B is under 48 GB as it is assumed here (adapters in
bfloat16 with moments in float32, one row of 512 tokens at a time, checkpointing), while each of the departures below
but a smaller rank puts it over: the rows of its authors' own script, too, which fit a card of 48 GiB. torch's own AdamW
keeps the moments of an adapter in bfloat16 in {{ value("adamw: a moment of a bfloat16 parameter", "bytes", "") }} bytes
a number, not 4; the paper's optimiser keeps 4.

## Measured

A sum is worth what its formulas are. {{ value("exact: formulas that count", "number", "") }} of them are compared with
what is really there, and are at most {{ value("exact: formulas that count", "most apart", ".0f") }} apart: the table's
models as Transformers builds them (without their numbers),

{{ table("numbers") }}
a small LLaMA of 3.3 million parameters, of which every one is trained, in bytes of its tensors' storages,

{{ table("held") }}

{{ table("whole") }}
what autograd keeps from its forward pass for the backward pass, in bytes,

{{ table("kept") }}
and its linear layers in Tarsia's 4 bits, in bytes:

{{ table("4 bits") }}
A whole QLoRA, its second step on a CPU, everything that torch's allocator holds at the highest moment, in bytes. In a
step of one pass gradients come as activations go, so that they are never there together; the sums of 65B are those of a
step of many:

{{ table("step", "small QLoRA") }}
Ten jobs learnt by mini-1, as files, rank 16 on the language model's linear layers, in bytes. mini-1 is small, so an
adapter is a larger part of it than of a model of 7 billion:

{{ table("disk") }}
## Figure by figure

""" + "\n".join(section(held) for held in figures())

CHAPTER: Final = Chapter(
    name="wall",
    title="The memory wall",
    question="Do the texts' figures of memory follow from what they assume?",
    claim=(
        "All figures of memory that the texts print follow from their assumptions (112 GB for 7B in mixed precision "
        "and in float32, 168 for 14B, 140 for 70B in bfloat16, 280 for ten checkpoints of 28) but one, which is "
        "3.03 GB and not 0.5; a QLoRA of 65B takes 45.4 GB, and over 48 with adapters or constants in float32, its "
        "authors' 4 rows of 528 tokens, or no checkpointing; the formulas are exact to the byte on small models, and a "
        "QLoRA's highest moment is within 1 %."
    ),
    bounds=(
        Bound("GB, 7B in mixed precision", "figure: 7B, mixed precision", "GB", 112, 112),
        Bound("GB, 7B in float32", "figure: 7B, float32", "GB", 112, 112),
        Bound("GB, 14B: weights and Adam", "figure: 14B, weights and Adam in float32", "GB", 168, 168),
        Bound("GB, 14B: a step", "figure: 14B, a step in float32", "GB", 224.001, 300),
        Bound("GB, 70B in bfloat16", "figure: 70B in bfloat16", "GB", 140, 140),
        Bound("GB, ten checkpoints", f"figure: 7B, {JOBS} checkpoints", "GB", 280, 280),
        Bound("GB, ten adapters and their base", f"figure: 7B, {JOBS} adapters", "GB", 28, 29),
        Bound("GB, 65B QLoRA", "figure: 65B QLoRA", "GB", 45.3, 45.4),
        Bound("... adapters in float32", "figure: 65B QLoRA, adapters in float32", "GB", 48.001, 49),
        Bound("... constants in float32", "figure: 65B QLoRA, constants in float32", "GB", 48.001, 49),
        Bound("... without checkpointing", "figure: 65B QLoRA, without checkpointing", "GB", 48.001, 60),
        Bound("... 4 rows of 528 tokens", "figure: 65B QLoRA, 4 rows of 528 tokens", "GB", 48.001, 51.5),
        Bound("... 16 rows a batch", "figure: 65B QLoRA, 16 rows a batch", "GB", 48.001, 60),
        Bound("GB saved by double quantisation", "figure: 65B, double quantisation", "GB", 3.025, 3.035),
        Bound("formulas that count, most apart", "exact: formulas that count", "most apart", 0, 0),
        Bound("a QLoRA's step, most apart, %", "steps: all", "most apart, %", 0, 1),
        Bound("ten checkpoints' files, % more", f"disk: {JOBS} checkpoints", "more than numbers, %", 0, 1),
        Bound("ten adapters' files, % more", f"disk: {JOBS} adapters", "more than numbers, %", 0, 5),
    ),
    measure=measure,
    draw=draw,
    picture="every figure of the texts as a bar of weights, adapters, gradients, master copy, moments and activations",
    text=TEXT,
    order=72,
    minutes=0.5,
    size=(13.0, 6.8),
)
