"""The main job in a few minutes: teach the embedded base a recycling belt, with and without replay, and look."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tarsia.adapter import open_base
from tarsia.evaluate import Report
from tarsia.labs import sources
from tarsia.labs.draw import panels
from tarsia.labs.experiment import Mix, adapt, forgotten, measure, mixed, samples, shares
from tarsia.train import Event, Started, Step

TASK = ("materials", "bins")
GENERAL = tuple(sources.WORLD)
MIXES: Mapping[str, float] = {"no replay": 0.0, "10 % replay": 0.1}
RECIPE: Mapping[str, Any] = {
    "model": "mini-1",
    "parts": [
        {"method": "full", "select": "projector", "lr": 5e-4},
        {"method": "lora", "select": "language.*.{q,k,v,o,gate,up,down}", "rank": 8, "alpha": 16.0, "lr": 2e-3},
    ],
    "steps": 160,
    "batch": 16,
    "warmup": 10,
    "save_every": 80,
    "seed": 1,
}


def write(out: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Draw and write the rows to train on and the rows to measure on. Returns both by source name."""
    train, held = {}, {}
    makers = {"materials": sources.materials, "bins": sources.bins, **sources.WORLD}
    for name, rows in makers.items():
        train[name], held[name] = out / "data" / f"{name}.parquet", out / "data" / f"{name}-held-out.parquet"
        few = name in ("words", "refusals", "talk")
        for path, count, split in ((train[name], 800, "train"), (held[name], 60 if few else 120, "held-out")):
            sources.write(path, rows(count, split))
    return train, held


def run(out: Path, console: Console) -> tuple[Report, list[Mix]]:
    """Everything from drawing the rows to the picture; training goes on from a checkpoint in ``out``."""
    began = time.monotonic()
    with Progress(
        TextColumn("{task.description:38}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        bar = progress.add_task("drawing the rows", total=None, note="")
        train, held = write(out)
        progress.update(bar, total=1, completed=1)
        bar = progress.add_task("measuring mini-1 as it is", total=None, note="")
        before = measure(open_base(RECIPE["model"]), held)
        progress.update(bar, total=1, completed=1)
        mixes = []
        for name, replay in MIXES.items():
            bar = progress.add_task(f"training, {name}", total=RECIPE["steps"], note="")
            recipe = {**RECIPE, "data": {"train": [{"path": str(train[s]), "name": s} for s in TASK]}}
            general = [{"path": str(train[s]), "name": s} for s in GENERAL]

            def show(name: str, event: Event | None, bar: Any = bar) -> None:
                if isinstance(event, Step):
                    progress.update(bar, completed=event.step, note=f"loss {event.loss:.3f}")
                elif event is None:
                    progress.update(bar, description=f"reloading and measuring, {name}")
                elif isinstance(event, Started):
                    progress.update(bar, completed=event.resumed)

            mixes.append(
                adapt(name, mixed(recipe, general, replay, out / f"replay-{round(100 * replay)}"), held, before, show)
            )
    console.print(_table(before, mixes))
    _coverage(console, mixes[-1])
    picture = out / "demo.png"
    panels(picture, samples({s: held[s] for s in ("bins", "scenes")}), before, {m.name: m.report for m in mixes})
    _next(console, out, mixes[-1], time.monotonic() - began)
    return before, mixes


def _table(before: Report, mixes: Sequence[Mix]) -> Table:
    table = Table("held-out rows answered right", title="mini-1, before and after", title_justify="left", box=None)
    reports = {"before": before, **{mix.name: mix.report for mix in mixes}}
    for name in reports:
        table.add_column(name, justify="right")
    for source in (*TASK, *GENERAL):
        cells = [shares(report, [source]) for report in reports.values()]
        table.add_row(source, *(f"{free:.0%}" for free, _ in cells))
    for label, names in (("the job", TASK), ("what it knew", GENERAL)):
        pairs = [shares(report, names) for report in reports.values()]
        table.add_row(f"[bold]{label}, free", *(f"[bold]{free:.1%}" for free, _ in pairs))
        table.add_row(f"[bold]{label}, choosing among the answers", *(f"[bold]{chosen:.1%}" for _, chosen in pairs))
    table.add_row("[bold]points forgotten", "", *(f"[bold]{forgotten(mix, GENERAL):.1f}" for mix in mixes))
    return table


def values(before: Report, mixes: Sequence[Mix]) -> dict[str, dict[str, float]]:
    """What a line of results holds: the job and what was known, percent of rows answered right."""
    reports = {"before": before, **{mix.name: mix.report for mix in mixes}}
    table: dict[str, dict[str, float]] = {}
    for label, names in (("the job", TASK), ("what it knew", GENERAL)):
        pairs = {name: shares(report, names) for name, report in reports.items()}
        table[f"{label}, free"] = {name: round(100 * free, 1) for name, (free, _) in pairs.items()}
        table[f"{label}, choosing"] = {name: round(100 * chosen, 1) for name, (_, chosen) in pairs.items()}
    table["points forgotten"] = {mix.name: round(forgotten(mix, GENERAL), 1) for mix in mixes}
    table["parameters trained, % of base"] = {mix.name: round(100 * mix.share, 2) for mix in mixes}
    return table


def _coverage(console: Console, mix: Mix) -> None:
    size = sum(file.stat().st_size for file in mix.folder.iterdir()) / 1e6
    console.print(
        f"\nTrained {mix.trained:,} parameters, {mix.share:.1%} of the base, in {mix.seconds:.0f} s; the adapter is "
        f"{size:.1f} MB. Reloaded from its files into a fresh base, its logits are those of the day it was saved, "
        f"to {mix.drift:.1e}."
    )


def _next(console: Console, out: Path, mix: Mix, seconds: float) -> None:
    console.print(f"All of it took {seconds:.0f} s. The picture is {out / 'demo.png'}.", highlight=False)
    console.print("\nWhat to try next:")
    for line in (
        "tarsia sites mini-1",
        f'tarsia ask mini-1 --adapter "{mix.folder}" --image YOUR.png "What material is on the belt?"',
        f'tarsia eval mini-1 --adapter "{mix.folder}" --data {out}/data/scenes-held-out.parquet --before',
        "tarsia train recipes/belt.yaml parts.1.rank=2",
    ):
        console.print(f"  {line}", highlight=False, soft_wrap=True)
