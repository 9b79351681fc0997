"""One experiment: a base, a job, the same recipe with different mixes, and every mix measured against before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tarsia.adapter import Host, load, prove, put
from tarsia.data import Sample, Source, read
from tarsia.evaluate import Comparison, Report, compare, evaluate
from tarsia.train import Event, Finished, Recipe, fit

PLACE: Mapping[str, Any] = {"precision": "float32", "device": "cpu"}
"""Where an experiment trains and measures: the same everywhere, or before and after would not be of one model."""

Show = Callable[[str, Event | None], None]
"""Told the name of the mix, and each event of its training (None: it is being measured)."""


@dataclass(frozen=True, slots=True)
class Mix:
    """One adaptation that was trained, reloaded and measured."""

    name: str
    folder: Path
    report: Report
    change: Comparison
    drift: float
    """Largest relative difference of a logit between the day of saving and the reloaded adapter."""
    trained: int
    share: float
    seconds: float


def mixed(recipe: Mapping[str, Any], general: Sequence[Mapping[str, Any]], replay: float, out: Path) -> Recipe:
    """The recipe with a share of ``replay`` of its rows drawn from the ``general`` sources, by their weights (or 1)."""
    task = [{**source, "weight": (1 - replay) / len(recipe["data"]["train"])} for source in recipe["data"]["train"]]
    total = sum(source.get("weight", 1) for source in general)
    rest = [{**source, "weight": replay * source.get("weight", 1) / total} for source in general] if replay else []
    return Recipe.of({**PLACE, **recipe, "data": {**recipe["data"], "train": [*task, *rest]}, "out": str(out)})


def samples(files: Mapping[str, Path]) -> dict[str, Sequence[Sample]]:
    """Rows of Parquet files by source name."""
    return {name: read(Source(path=str(path), name=name)) for name, path in files.items()}


def measure(host: Host, files: Mapping[str, Path]) -> Report:
    """Every source, free and constrained to its own answers."""
    return evaluate(host, samples(files), batch=50, max_new_tokens=40)


def adapt(name: str, recipe: Recipe, files: Mapping[str, Path], before: Report, show: Show) -> Mix:
    """Train, reload the adapter from its files into a fresh base, prove it to be the same, and measure it."""
    finished, trained, share = None, 0, 0.0
    for event in fit(recipe):
        show(name, event)
        if isinstance(event, Finished):
            finished = event
        trained = getattr(event, "trained", trained)
        share = getattr(event, "share", share)
    assert finished is not None
    show(name, None)
    host = recipe.open()
    adapter = load(finished.folder)
    put(host, adapter, "adapted")
    assert adapter.probe is not None
    drift = prove(host, "adapted", adapter.probe)
    report = measure(host, files)
    return Mix(name, Path(finished.folder), report, compare(before, report), drift, trained, share, finished.seconds)


def forgotten(mix: Mix, general: Sequence[str]) -> float:
    """Points (percent of rows) lost on the mean of the general sources; a gain is negative."""
    lost = [change.forgetting for change in mix.change.changes if change.source in general]
    return sum(lost) / len(lost)


def shares(report: Report, sources: Sequence[str]) -> tuple[float, float]:
    """Mean of free and of constrained accuracy over these sources, 0..1."""
    held = [result for result in report.results if result.source in sources]
    constrained = [result.constrained.mean for result in held if result.constrained is not None]
    return sum(r.free.mean for r in held) / len(held), sum(constrained) / max(1, len(constrained))
