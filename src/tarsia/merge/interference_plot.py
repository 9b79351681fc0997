"""An interference report as one picture: what each pair shares, and where in the model it does."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from tarsia.merge.interference import Interference, Place

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS: Final = ("#4a6fa5", "#c4553b", "#2f6f5e", "#b58a2e", "#7d5ba6", "#9aa0a6", "#3f8f9b", "#8a6414")
COMPONENTS: Final = {"vision": "#4a6fa5", "projector": "#b58a2e", "language": "#2f6f5e"}
_INK: Final = "#23201c"
_SCALES: Final = {"conflict": (0.0, 30.0, "OrRd"), "cosine": (-1.0, 1.0, "RdBu"), "rows": (0.0, 1.0, "Greens")}
"""The same colour for the same number on every page: two that have nothing to do with each other lose about 15 %."""


def chance(adapters: int) -> float:
    """What so many changes of one size that have nothing to do with each other lose: (1 - n^(-1/2)) / 2."""
    return (1 - 1 / math.sqrt(adapters)) / 2


def picture(report: Interference) -> bytes:
    """A PNG file: pairs above, layers below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    side = max(2.6, 0.62 * len(report.adapters))
    figure = Figure(figsize=(11, side + 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(2, 1, height_ratios=(side, 4.2))
    above, below = halves
    matrices = above.subplots(1, 3)
    _matrix(matrices[0], report, "conflict", "lost to each other, %", 100)
    _matrix(matrices[1], report, "cosine", "cosine", 1)
    _matrix(matrices[2], report, "rows", "overlap of what they read", 1)
    lost, shared = below.subplots(2, 1, sharex=True)
    places = _ordered(report)
    _layers(lost, places, [100 * place.conflict for place in places], "lost by all, %")
    height = 100 * chance(len(report.adapters))
    lost.set_ylim(0, max(lost.get_ylim()[1], 1.22 * height))
    lost.axhline(height, color=_INK, lw=0.8, ls=":")
    lost.annotate("chance, at one size", (0, height), xytext=(0, 3), textcoords="offset points", fontsize=8)
    _overlaps(shared, places)
    held = io.BytesIO()
    figure.savefig(held, format="png", metadata={"Software": None})
    return held.getvalue()


def _matrix(axes: Axes, report: Interference, field: str, title: str, unit: float) -> None:
    """One number a pair, everywhere: a square with the adapters on both sides."""
    names = report.adapters
    values = [[float("nan")] * len(names) for _ in names]
    for pair in report.whole.pairs:
        found = getattr(pair, field)
        i, j = names.index(pair.first), names.index(pair.second)
        values[i][j] = values[j][i] = float("nan") if found is None else unit * found
    least, most, colours = _SCALES[field]
    axes.imshow(values, cmap=colours, vmin=least, vmax=most)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            text = "" if value != value else f"{value:.1f}" if unit == 100 else f"{value:+.2f}".replace("+", "")
            dark = value == value and abs(value) > 0.62 * most
            axes.text(j, i, text, ha="center", va="center", fontsize=8.5, color="white" if dark else _INK)
    short = [_short(name) for name in names]
    axes.set_xticks(range(len(names)), short, rotation=30, ha="right", fontsize=8.5)
    axes.set_yticks(range(len(names)), short, fontsize=8.5)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)
    axes.set_title(title, fontsize=10)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _ordered(report: Interference) -> list[Place]:
    """Layers as what is read goes through them; parts without layers stand for themselves."""
    layered = {place.component for place in report.layers}
    found: list[Place] = []
    for component in COMPONENTS:
        found += sorted((p for p in report.layers if p.component == component), key=lambda p: p.layer or 0)
        found += [p for p in report.components if p.component == component and component not in layered]
    return found


def _layers(axes: Axes, places: Sequence[Place], heights: Sequence[float], title: str) -> None:
    colours = [COMPONENTS[str(place.component)] for place in places]
    axes.bar(range(len(places)), heights, 0.8, color=colours)
    axes.set_ylabel(title, fontsize=9)
    axes.set_ylim(0, 1.22 * max([100 * chance(2), *heights]))
    _plain(axes)
    for component in dict.fromkeys(str(place.component) for place in places):
        at = next(i for i, place in enumerate(places) if place.component == component)
        axes.annotate(
            component, (at - 0.4, 1), xycoords=("data", "axes fraction"), fontsize=9, va="bottom",
            color=COMPONENTS[component],
        )  # fmt: skip


def _overlaps(axes: Axes, places: Sequence[Place]) -> None:
    """The mean over pairs of both overlaps, and what chance gives, layer by layer."""
    lines: Any = (("rows", "o", "what they read"), ("columns", "s", "what they write"))
    for field, mark, label in lines:
        axes.plot(range(len(places)), [_mean(p, field) for p in places], mark, ms=5, color=_INK, alpha=0.8, label=label,
                  mfc=_INK if field == "rows" else "white")  # fmt: skip
    least = [max(_mean(p, "rows_chance"), _mean(p, "columns_chance")) for p in places]
    axes.step(range(len(places)), least, where="mid", color="#c4553b", lw=1, label="chance, at most")
    axes.set_ylabel("overlap, mean of pairs", fontsize=9)
    axes.set_ylim(0, 1.03)
    axes.set_xticks(range(len(places)), ["" if p.layer is None else str(p.layer) for p in places], fontsize=8)
    axes.set_xlabel("layer", fontsize=9)
    axes.legend(frameon=False, fontsize=8.5, ncols=3, loc="upper right")
    _plain(axes)


def _mean(place: Place, field: str) -> float:
    found = [value for pair in place.pairs if (value := getattr(pair, field)) is not None]
    return sum(found) / len(found) if found else float("nan")


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e8e3da", lw=0.8)
    axes.set_axisbelow(True)


def _short(name: str, most: int = 18) -> str:
    text = "".join(c if c.isprintable() else "." for c in name)
    return text if len(text) <= most else f"...{text[-most + 3 :]}"
