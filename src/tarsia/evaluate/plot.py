"""A forgetting report as one picture: accuracy, divergence and the task's vocabulary, source by source."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from tarsia.evaluate.bootstrap import Interval
from tarsia.evaluate.divergence import OWN, REFERENCES
from tarsia.evaluate.forgetting import ForgettingReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEFORE: Final = "#9aa0a6"
AFTER: Final = "#c4553b"
BETTER: Final = "#2f6f5e"
_INK: Final = "#23201c"


def picture(report: ForgettingReport) -> bytes:
    """A PNG file: one line a source, tasks first; what was lost in red, what was gained in green."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sources = (*report.task, *report.general)
    figure = Figure(figsize=(11, 1.5 + 0.46 * len(sources)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    wide, narrow, leak = figure.subplots(1, 3, sharey=True, width_ratios=(2.2, 1, 1))
    at = dict(zip(sources, range(len(sources), 0, -1), strict=True))
    _accuracies(wide, report, at)
    _divergences(narrow, report, at)
    _leaks(leak, report, at)
    wide.set_yticks(list(at.values()), [_plain(name) for name in at])
    wide.set_ylim(0.4, len(sources) + 0.6)
    for label in wide.get_yticklabels():
        label.set_parse_math(False)
    for label in wide.get_yticklabels()[: len(report.task)]:
        label.set_fontweight("bold")
    for axes in (wide, narrow, leak):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False, labelsize=9)
        axes.grid(axis="x", color="#e8e3da", lw=0.8)
        axes.set_axisbelow(True)
        if report.task:
            axes.axhline(len(report.general) + 0.5, color="#d6cfc3", lw=0.8)
    held = io.BytesIO()
    figure.savefig(held, format="png", metadata={"Software": None})
    return held.getvalue()


def _accuracies(axes: Axes, report: ForgettingReport, at: dict[str, int]) -> None:
    for before, after in zip(report.before.results, report.after.results, strict=True):
        y, pair = at[before.source], (100 * before.free.mean, 100 * after.free.mean)
        colour = AFTER if pair[1] < pair[0] else BETTER
        axes.plot(pair, (y, y), color=colour, lw=2.2, alpha=0.55, solid_capstyle="butt", zorder=2)
        _dot(axes, before.free.scaled(100), y + 0.11, BEFORE)
        _dot(axes, after.free.scaled(100), y - 0.11, colour)
    axes.set_xlim(-3, 103)
    _title(axes, "free answers right, %", "grey: the base; 95 % intervals")


def _dot(axes: Axes, found: Interval, y: float, colour: str) -> None:
    axes.plot((found.low, found.high), (y, y), color=colour, lw=1, zorder=3)
    axes.plot([found.mean], [y], "o", color=colour, ms=6, zorder=4)


def _divergences(axes: Axes, report: ForgettingReport, at: dict[str, int]) -> None:
    for kind, shift, colour in ((REFERENCES, 0.17, "#4a6fa5"), (OWN, -0.17, "#9db4d3")):
        held = [found for found in report.divergence if found.forced == kind]
        _bars(axes, [at[f.source] + shift for f in held], [f.kl for f in held], 0.3, colour)
    axes.set_xlim(left=0)
    _title(axes, "KL(base || adapted), nats a token", "dark: on references; light: on its own answers")


def _leaks(axes: Axes, report: ForgettingReport, at: dict[str, int]) -> None:
    if report.vocabulary is None:
        axes.text(0.5, 0.5, "no task was given", transform=axes.transAxes, ha="center", color=BEFORE, fontsize=9)
    else:
        for k, (shift, colour) in enumerate(((0.17, BEFORE), (-0.17, "#b58a2e"))):
            shares = {name: 100 * pair[k] for name, pair in report.vocabulary.by_source.items()}
            axes.barh([at[name] + shift for name in shares], list(shares.values()), 0.3, color=colour)
        axes.set_xlim(0, max(10.0, 1.1 * axes.get_xlim()[1]))
    _title(axes, "answers in the task's words, %", "grey: the base")


def _bars(axes: Axes, y: Sequence[float], values: Sequence[Interval], height: float, colour: str) -> None:
    means = [v.mean for v in values]
    errors: Any = ([v.mean - v.low for v in values], [v.high - v.mean for v in values])
    axes.barh(y, means, height, xerr=errors, color=colour, error_kw={"lw": 0.8, "ecolor": _INK, "alpha": 0.6})


def _title(axes: Axes, text: str, small: str) -> None:
    axes.set_title(text, fontsize=10, loc="left", color=_INK, pad=20)
    axes.text(0, 1, small, transform=axes.transAxes, fontsize=8, color="#766f66", va="bottom")


def _plain(text: str) -> str:
    return text if len(text) <= 28 else text[:27] + "\N{HORIZONTAL ELLIPSIS}"
