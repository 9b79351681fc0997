"""Short trainings of mini-1: any parts on any job, each at the best of its rates, kept and gone on with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from tarsia.labs.runs import BATCH, Draw, Runs, Scores, mean
from tarsia.train import Recipe

COUNTS: Final[Mapping[str, int]] = {"train": 1200, "validation": 200, "held-out": 400}
"""Rows of each split: rates are chosen on validation rows, and reported on held-out ones."""

Part = Mapping[str, Any]
"""A recipe's part without its rate."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One training: ``kind`` is what its parts are called."""

    job: str
    kind: str
    rate: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.job}-{self.kind}-lr{self.rate:g}-seed-{self.seed}".replace(" ", "-")


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a kind reached at the rate that suits it best: one result a seed, and validation accuracy by rate."""

    rate: float
    results: tuple[Mapping[str, Any], ...]
    rates: Mapping[float, float]

    @property
    def rights(self) -> list[list[float]]:
        """For each seed 1 or 0 for each held-out row."""
        return [list(result["splits"]["held-out"]["right"]) for result in self.results]

    @property
    def accuracies(self) -> list[float]:
        """Percent of held-out rows, by seed."""
        return [100 * mean(right) for right in self.rights]

    @property
    def accuracy(self) -> float:
        """Percent of held-out rows, a mean over the seeds."""
        return mean(self.accuracies)

    @property
    def trained(self) -> int:
        """Numbers that are trained."""
        return int(self.results[0]["trained"])

    @property
    def bases(self) -> set[str]:
        return {str(result["base"]) for result in self.results}


class Trials(Runs):
    """The trials of these kinds, by name the parts that are trained."""

    def __init__(
        self,
        out: Path,
        jobs: Mapping[str, Draw],
        kinds: Mapping[str, Sequence[Part]],
        show: Callable[[str], None] | None = None,
        counts: Mapping[str, int] = COUNTS,
    ) -> None:
        super().__init__(out, jobs, counts, show)
        self.kinds = kinds

    def recipe(self, trial: Trial) -> Recipe:
        """What a trial trains."""
        parts = [{**part, "lr": trial.rate} for part in self.kinds[trial.kind]]
        return self.made(trial.name, trial.job, parts, trial.steps, trial.seed)

    def perform(self, trial: Trial) -> dict[str, Any]:
        """Train and measure."""
        return self.train(self.recipe(trial), trial.job)

    def settings(self, trial: Trial) -> dict[str, Any]:
        """What a result must have been made with."""
        parts = [dict(part) for part in self.kinds[trial.kind]]
        return {"trial": asdict(trial), "parts": parts, "counts": dict(self.counts), "batch": BATCH}

    def result(self, trial: Trial) -> Mapping[str, Any]:
        """A trial's result; it is run where there is none. Raises ConfigError where it is of other settings."""
        return self.kept(trial.name, {"settings": self.settings(trial)}, lambda: self.perform(trial))

    def chosen(self, trial: Trial, rates: Sequence[float], seeds: Sequence[int]) -> Chosen:
        """The trial at each rate with the first seed; then, at the rate with the most validation rows right (of
        equal ones that of the lower loss), with every seed."""
        first = {rate: self.result(replace(trial, rate=rate, seed=seeds[0])) for rate in rates}
        rate = max(rates, key=lambda rate: _rank(first[rate]["splits"]["validation"]))
        results = [self.result(replace(trial, rate=rate, seed=seed)) for seed in seeds]
        accuracies = {rate: 100 * mean(first[rate]["splits"]["validation"]["right"]) for rate in rates}
        return Chosen(rate, tuple(results), accuracies)

    def before(self, job: str) -> Scores:
        """What the base itself scores on a job."""
        told = {"settings": {"counts": dict(self.counts)}}
        found: Scores = self.kept(f"{job}-before", told, lambda: {"splits": self.measured(job)})["splits"]
        return found


def _rank(scores: Mapping[str, Any]) -> tuple[float, float]:
    return mean(scores["right"]), -float(scores["loss"])
