"""Forgetting and the job against the share of replay, on four shifts, in both modes, over three seeds.

Gathers the runs in the folder TARSIA_REPLAY (default runs/replay) and does those that are missing: needs TARSIA_DATA
and, from nothing, about two hours of one core. Each cell is a mean over the seeds with the least and the most.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

from rich.console import Console

from bench.run import Values
from tarsia.labs import replay
from tarsia.labs.experiment import samples
from tarsia.labs.replay import MODES, SEEDS, SHARES, Results, Run
from tarsia.labs.shifts import SHIFTS

Rows = dict[str, dict[str, float | int | str]]


def folder() -> Path:
    """Where the runs lie."""
    return Path(os.environ.get("TARSIA_REPLAY", "runs/replay"))


def measure() -> Values:
    """Tables by the word before the colon: bar, forgotten, job, lost, seen, fields, seeds, rows."""
    out = folder()
    replay.drive(out, Console())
    found = Results.read(out)
    return {
        **_bar(found),
        **_curves(found),
        **_lost(found),
        **_seen(found, out),
        **_fields(found, out),
        **_seeds(found),
        **_rows(found),
    }


def percent(share: float) -> str:
    """A share as a column's name."""
    return f"{100 * share:g} %"


def spread(values: Sequence[float]) -> str:
    """Mean, least and most."""
    return f"{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def _bar(found: Results) -> Rows:
    table: Rows = {}
    for shift in found.shifts:
        none = mean(map(found.forgotten, found.seeds(shift, 0.0, "none")))
        row: dict[str, float | int | str] = {"none": round(none, 1)}
        for mode in MODES:
            some = mean(map(found.forgotten, found.seeds(shift, 0.1, mode)))
            row[f"10 %, {mode}"] = round(some, 1)
            row[f"times less, {mode}"] = round(none / some, 1) if some > 0 else "all of it"
        table[f"bar: {SHIFTS[shift].title}"] = row
    return table


def _curves(found: Results) -> Rows:
    values = {"forgotten": found.forgotten, "job": found.job}
    return {
        f"{what}: {SHIFTS[shift].title}, {mode}": {
            percent(share): spread([value(run) for run in found.seeds(shift, share, mode)]) for share in sorted(SHARES)
        }
        for what, value in values.items()
        for shift in found.shifts
        for mode in MODES
    }


def _lost(found: Results) -> Rows:
    """Points lost by source, without replay and with 10 %."""
    table: Rows = {}
    for shift in found.shifts:
        for share, mode in ((0.0, "none"), *((0.1, mode) for mode in MODES)):
            runs = found.seeds(shift, share, mode)
            sources = found.lost(runs[0])
            label = f"lost: {SHIFTS[shift].title}, {f'10 % {mode}' if share else 'none'}"
            table[label] = {s: round(mean(found.lost(run)[s] for run in runs), 1) for s in sources}
    return table


def _seen(found: Results, out: Path) -> Rows:
    """General rows that a run saw, and their share of all labelled tokens."""
    table: Rows = {}
    for shift in found.shifts:
        for mode in MODES:
            row: dict[str, float | int | str] = {}
            for share in sorted(SHARES)[1:]:
                runs = [replay.read(out, run.name)["data"] for run in found.seeds(shift, share, mode)]
                rows = mean(data["general"]["rows"] for data in runs)
                tokens = mean(data["general"]["tokens"] / sum(d["tokens"] for d in data.values()) for data in runs)
                row[percent(share)] = f"{rows:.0f} ({100 * tokens:.1f} %)"
            table[f"seen: {SHIFTS[shift].title}, {mode}"] = row
    return table


def _fields(found: Results, out: Path) -> Rows:
    """The commands' share of right fields, beside those that are right as a whole."""
    if "commands" not in found.shifts:
        return {}
    rows = samples(replay.tasks(out, SHIFTS["commands"], "held-out"))

    def right(runs: Iterable[Run]) -> str:
        return spread([mean(replay.scores(replay.read(out, run.name), rows, "fields").values()) for run in runs])

    return {
        f"fields: robot commands, {mode}": {
            percent(share): right(found.seeds("commands", share, mode)) for share in sorted(SHARES)
        }
        for mode in MODES
    }


def _seeds(found: Results) -> Rows:
    """Every single run: what was forgotten, and the job."""
    return {
        f"seeds: {run.name}": {"forgotten": round(found.forgotten(run), 2), "job": round(found.job(run), 2)}
        for run in found.after
        if run.seed in SEEDS
    }


def _rows(found: Results) -> Rows:
    """How many rows were measured, and what the base answered right."""
    table: Rows = {}
    for key, count in found.rows.items():
        shift, source = key.split("/")
        table[f"rows: {SHIFTS[shift].title}, {source}"] = {
            "rows": count,
            "before": round(found.before[shift][source], 1),
        }
    return table
