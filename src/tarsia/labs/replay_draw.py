"""The pictures of the replay curve: python -m tarsia.labs.replay_draw OUT FOLDER, after tarsia.labs.replay OUT.

FOLDER/replay.png has the curves, FOLDER/replay-shifts.png rows of each shift.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from tarsia.labs import replay
from tarsia.labs.experiment import samples
from tarsia.labs.shifts import SHIFTS, Shift

LOOKS: Mapping[str, Mapping[str, Any]] = {
    "sampled": {"color": "#2f6f5e", "marker": "o", "linestyle": "-"},
    "weighted": {"color": "#c4553b", "marker": "s", "linestyle": "--"},
}
SHOWN = 3
"""Rows of each shift that are shown."""

Curve = Mapping[float, Sequence[float]]
"""A value of every seed, by share of replay."""


def curves(path: Path, table: Mapping[str, Mapping[str, Mapping[str, Curve]]]) -> None:
    """Forgetting above, the job below, one column a shift; means over the seeds, and from the least to the most.

    ``table`` is shift -> "forgotten" or "job" -> mode -> curve.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(2, len(table), figsize=(3.1 * len(table), 5.4), dpi=110, sharex=True, squeeze=False)
    room = _room([values["job"] for values in table.values()])
    for column, (shift, values) in enumerate(table.items()):
        for row, what in enumerate(("forgotten", "job")):
            axes = grid[row][column]
            for mode, curve in values[what].items():
                _line(axes, curve, mode)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        grid[0][column].set_title(SHIFTS[shift].title, fontsize=10, loc="left")
        grid[0][column].axhline(3, color="#999999", linewidth=0.8, linestyle=":")
        grid[0][column].set_ylim(bottom=min(0, grid[0][column].get_ylim()[0]))
        grid[1][column].set_ylim(*room)
        grid[1][column].set_xlabel("replay, %")
        grid[1][column].set_xticks(range(len(replay.SHARES)), [f"{100 * share:g}" for share in sorted(replay.SHARES)])
    grid[0][0].set_ylabel("points forgotten")
    grid[1][0].set_ylabel("the job, % right")
    grid[0][0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    _save(figure, path)


def _line(axes: Any, curve: Curve, mode: str) -> None:
    at = [sorted(replay.SHARES).index(share) + (0.06 if mode == "weighted" else -0.06) for share in sorted(curve)]
    values = [curve[share] for share in sorted(curve)]
    middle = [mean(found) for found in values]
    low = [m - min(found) for m, found in zip(middle, values, strict=True)]
    high = [max(found) - m for m, found in zip(middle, values, strict=True)]
    axes.errorbar(at, middle, (low, high), label=mode, markersize=4, linewidth=1.4, elinewidth=0.9, **LOOKS[mode])


def _room(jobs: Sequence[Mapping[str, Curve]]) -> tuple[float, float]:
    """The same axis for all jobs."""
    least = min(value for curves in jobs for curve in curves.values() for found in curve.values() for value in found)
    return max(0.0, 10 * ((least - 5) // 10)), 101.0


def shifts(path: Path, out: Path, shown: Sequence[Shift]) -> None:
    """The first held-out rows of each shift: picture, question, right answer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(SHOWN, len(shown), figsize=(3.1 * len(shown), 2.35 * SHOWN), dpi=110, squeeze=False)
    for column, shift in enumerate(shown):
        rows = [row for some in samples(replay.tasks(out, shift, "held-out")).values() for row in some[:SHOWN]]
        rows = rows[:: max(1, len(rows) // SHOWN)][:SHOWN]
        for line, row in enumerate(rows):
            axes = grid[line][column]
            axes.imshow(row.pictures[0].load())
            axes.axis("off")
            text = f"{row.messages[0].text}\n{row.messages[-1].text}"
            axes.set_title(text, fontsize=7.2, parse_math=False)
        grid[0][column].text(0.5, 1.42, shift.title, transform=grid[0][column].transAxes, ha="center", fontsize=10)
    figure.tight_layout()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".partial-{os.getpid()}.png")
    figure.savefig(partial)
    plt.close(figure)
    os.replace(partial, path)


def draw(out: Path, folder: Path) -> None:
    """Both pictures, from the results in ``out``."""
    found = replay.Results.read(out)
    curves(folder / "replay.png", {name: found.curves(name) for name in found.shifts})
    shifts(folder / "replay-shifts.png", out, [SHIFTS[name] for name in found.shifts])


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
