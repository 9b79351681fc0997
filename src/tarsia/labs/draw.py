"""Pictures of results: what was asked, what was said before and after, and how much of each source is right."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tarsia.data import Sample
from tarsia.evaluate import Report, Row

COLOURS = ("#9aa0a6", "#c4553b", "#2f6f5e", "#b58a2e", "#4a6fa5")


SHOWN = 3
"""Pictures of each source."""


def panels(path: Path, shown: Mapping[str, Sequence[Sample]], before: Report, after: Mapping[str, Report]) -> None:
    """Pictures of each shown source with every model's answer, over bars of each source's free accuracy.

    The first rows on which the models do not agree are shown.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    reports = {"before": before, **after}
    figure = plt.figure(figsize=(12, 6.6), dpi=110)
    room = {"left": 0.05, "right": 0.99, "top": 0.93, "bottom": 0.1}
    halves = figure.add_gridspec(2, 1, height_ratios=(1, 1.15), hspace=0.5, **room)
    grid = halves[0].subgridspec(1, SHOWN * len(shown), wspace=0.08)
    for i, (source, samples) in enumerate(shown.items()):
        rows = {name: next(r for r in report.results if r.source == source).rows for name, report in reports.items()}
        for j, number in enumerate(_telling(list(rows.values()))):
            axes = figure.add_subplot(grid[SHOWN * i + j])
            axes.imshow(samples[number].pictures[0].load())
            axes.axis("off")
            axes.set_title(_wrap(samples[number].messages[0].text, 24), fontsize=8.5, loc="left", parse_math=False)
            for k, answers in enumerate(rows.values()):
                row = answers[number]
                text = f"{'✓' if row.free_score == 1 else '✗'} {_short(row.said)}"
                look: dict[str, Any] = {"fontsize": 8.5, "va": "top", "color": COLOURS[k], "parse_math": False}
                axes.text(0, -0.06 - 0.13 * k, text, transform=axes.transAxes, **look)
    bars(figure.add_subplot(halves[1]), reports)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial)
    plt.close(figure)
    os.replace(partial, path)


def _telling(reports: Sequence[Sequence[Row]]) -> list[int]:
    """The first rows that are right for some and wrong for others, then the first of the rest."""
    numbers = range(len(reports[0]))
    differing = [n for n in numbers if len({rows[n].free_score for rows in reports}) > 1]
    return [*differing, *(n for n in numbers if n not in differing)][:SHOWN]


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
    axes.legend(frameon=False, ncols=len(reports), loc="upper center", bbox_to_anchor=(0.5, -0.1))


def _wrap(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:2])


def _short(text: str) -> str:
    text = "".join(letter if letter.isprintable() else "·" for letter in text)  # a model may say anything
    return text if len(text) <= 26 else text[:25] + "…"
