"""A load as one picture: how long answers took, what went through over time, and how adapters fared."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from tarsia.serve.load.client import Answered
from tarsia.serve.load.figures import Figures, flow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.ticker import MaxNLocator

_GREEN: Final = "#2f6f5e"
_RED: Final = "#c4553b"
_BLUE: Final = "#4a6fa5"
_GREY: Final = "#9aa0a6"
_FEW: Final = 30
"""Adapters that are drawn on an even scale."""


def picture(answered: Sequence[Answered], found: Figures) -> bytes:
    """An SVG file of four plots."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(
        {"svg.hashsalt": "load", "svg.fonttype": "path", "axes.titlesize": 11, "axes.titlelocation": "left"}
    ):
        figure = Figure(figsize=(11, 6.8), layout="constrained")
        FigureCanvasSVG(figure)
        (waiting, time), (adapters, share) = figure.subplots(2, 2)
        _waiting(waiting, answered)
        _time(time, answered)
        _adapters(adapters, found)
        _shares(share, found)
        for axes in (waiting, time, adapters, share):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#ece7de", lw=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(labelsize=9)
        held = io.BytesIO()
        figure.savefig(held, format="svg", metadata={"Date": None, "Creator": None})
    return held.getvalue()


def _waiting(axes: Axes, answered: Sequence[Answered]) -> None:
    good = [one for one in answered if not one.error]
    for label, values, colour in (
        ("to the first text", [one.waited for one in good], _GREEN),
        ("to the end", [one.ended - one.began for one in good], _BLUE),
    ):
        held = sorted(1000 * value for value in values if value is not None)
        if held:
            shares = [100 * (i + 1) / len(held) for i in range(len(held))]
            axes.step(held, shares, where="post", color=colour, lw=1.8, label=label)
    axes.set_title("share of answers, %, by then")
    axes.set_xlabel("ms", fontsize=9)
    axes.set_ylim(0, 101)
    if good:
        axes.set_xscale("log")
        _plain(axes.xaxis)
        axes.legend(frameon=False, fontsize=9, loc="upper left")


def _time(axes: Axes, answered: Sequence[Answered]) -> None:
    middles, tokens, running = flow(answered)
    axes.fill_between(middles, tokens, step="mid", color=_GREEN, alpha=0.25, lw=0)
    axes.step(middles, tokens, where="mid", color=_GREEN, lw=1.4)
    axes.set_title("tokens a second, and requests under way (grey)")
    axes.set_xlabel("seconds", fontsize=9)
    axes.set_ylim(bottom=0)
    beside = axes.twinx()
    beside.step(middles, running, where="mid", color=_GREY, lw=1.2)
    beside.set_ylim(0, 1.15 * max(running, default=1.0) or 1.0)
    beside.spines[["top"]].set_visible(False)
    beside.tick_params(labelsize=9, colors=_GREY)
    failed = [one.ended for one in answered if one.error]
    if failed:
        axes.plot(failed, [0] * len(failed), "x", color=_RED, ms=6, clip_on=False, label="failed")
        axes.legend(frameon=False, fontsize=9)


def _adapters(axes: Axes, found: Figures) -> None:
    """Whether an adapter that is seldom asked for waits longer."""
    held = [(i + 1, 1000 * one.first.middle) for i, one in enumerate(found.adapters) if one.first.middle is not None]
    axes.plot([x for x, _ in held], [y for _, y in held], "o", color=_GREEN, ms=4, alpha=0.7, mew=0)
    axes.set_title("median ms to the first text, by adapter")
    if held:
        _ranked(axes, len(found.adapters))
        axes.set_ylim(bottom=0)


def _shares(axes: Axes, found: Figures) -> None:
    ranks = range(1, len(found.adapters) + 1)
    axes.plot(ranks, [one.asked for one in found.adapters], color=_BLUE, lw=1.8, label="asked")
    failed = [(i, one.failed) for i, one in zip(ranks, found.adapters, strict=True) if one.failed]
    if failed:
        axes.plot([x for x, _ in failed], [y for _, y in failed], "x", color=_RED, label="failed")
    axes.set_title("requests by adapter")
    _ranked(axes, len(found.adapters))
    if len(found.adapters) > _FEW:
        axes.set_yscale("log")
        _plain(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(_whole())
    axes.legend(frameon=False, fontsize=9)


def _plain(axis: Axis) -> None:
    """Numbers as they are written, not as powers of ten."""
    axis.set_major_formatter("{x:g}")
    low, high = axis.get_view_interval()
    axis.set_minor_formatter("{x:g}" if high < 12 * low else "")


def _whole() -> MaxNLocator:
    """Marks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)


def _ranked(axes: Axes, count: int) -> None:
    """Adapters along, the most asked first: a few by their places, many by the place's order."""
    axes.set_xlabel("adapter, the most asked first", fontsize=9)
    if count > _FEW:
        axes.set_xscale("log")
        _plain(axes.xaxis)
    else:
        axes.xaxis.set_major_locator(_whole())
