"""Pictures of results: what was asked, what was said before and after, and how much of each source is right."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from tarsia.data import Sample
from tarsia.evaluate import Report

COLOURS = ("#9aa0a6", "#c4553b", "#2f6f5e", "#b58a2e", "#4a6fa5")


def panels(path: Path, shown: Mapping[str, Sequence[Sample]], before: Report, after: Mapping[str, Report]) -> None:
    """Four pictures of each shown source with every model's answer, over bars of each source's free accuracy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    reports = {"before": before, **after}
    figure = plt.figure(figsize=(12, 7.2), dpi=110)
    room = {"left": 0.05, "right": 0.99, "top": 0.94, "bottom": 0.13}
    halves = figure.add_gridspec(2, 1, height_ratios=(1.25, 1), hspace=0.62, **room)
    grid = halves[0].subgridspec(1, 4 * len(shown), wspace=0.18)
    for i, (source, rows) in enumerate(shown.items()):
        for j in range(4):
            axes = figure.add_subplot(grid[4 * i + j])
            axes.imshow(rows[j].pictures[0].load())
            axes.axis("off")
            axes.set_title(_wrap(rows[j].messages[0].text, 20), fontsize=8, loc="left")
            for k, (name, report) in enumerate(reports.items()):
                row = next(r for r in report.results if r.source == source).rows[j]
                right = row.free_score == 1
                text = f"{'✓' if right else '✗'} {name}: {_short(row.said)}"
                axes.text(0, -0.09 - 0.15 * k, text, transform=axes.transAxes, fontsize=7.5, va="top", color=COLOURS[k])
    bars(figure.add_subplot(halves[1]), reports)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial)
    plt.close(figure)
    os.replace(partial, path)


def bars(axes: object, reports: Mapping[str, Report]) -> None:
    """Free accuracy by source with 95 % intervals, one bar a report."""
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    names = [result.source for result in next(iter(reports.values())).results]
    width = 0.8 / len(reports)
    for k, (name, report) in enumerate(reports.items()):
        means = [100 * result.free.mean for result in report.results]
        low = [m - 100 * result.free.low for m, result in zip(means, report.results, strict=True)]
        high = [100 * result.free.high - m for m, result in zip(means, report.results, strict=True)]
        at = [i + (k - (len(reports) - 1) / 2) * width for i in range(len(names))]
        axes.bar(at, means, 0.92 * width, yerr=(low, high), color=COLOURS[k], label=name, error_kw={"lw": 0.8})
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("held-out rows answered right, %")
    axes.set_ylim(0, 105)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(reports), loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _wrap(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:2])


def _short(text: str) -> str:
    return text if len(text) <= 22 else text[:21] + "…"
