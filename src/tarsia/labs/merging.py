"""Six adapters made one by every way that is shipped, each way's scale chosen alike on validation rows.

    python -m tarsia.labs.merging OUT [WAY ...]

Every way is tried at the same scales, and at each of its options in ``TRIED``, on validation rows with the first seed's
adapters; it goes on along the ladder until the best scale has a worse one on either side. What was best there is
measured on held-out rows with every seed's adapters. Each measurement has a file in OUT/results and is made once.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from tarsia.adapter import Adapter, Host
from tarsia.core.attach import Part, activate, attach, detach
from tarsia.core.errors import ConfigError
from tarsia.core.method import find
from tarsia.labs.merging_tasks import PARTS, SEEDS, TASKS, Learners
from tarsia.labs.runs import mean, score
from tarsia.merge.adapters import digest, merge
from tarsia.merge.delta import deltas
from tarsia.merge.ways import WAYS, Way
from tarsia.train.features import features
from tarsia.train.store import Store

SUM: Final = "task_arithmetic"
LADDER: Final = (0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 11.0)
"""Scales that a search may try."""
FIRST: Final = (0.2, 0.4, 0.6, 0.8, 1.0, 1.4)
"""Scales at which every way is tried."""
DENSITIES: Final = (0.2, 0.5, 0.8)
TRIED: Final[Mapping[str, Sequence[float]]] = {"density": DENSITIES, "ridge": (0.001, 0.01, 0.1), "common": (0.5, 0.8)}
"""Values of options that are tried where a way has them. All others stay as they are shipped."""
_FEATURES: Final = 2 * 10**9
_SAME: Final = 1e-6
"""Two changes whose directions differ by less (1 - cosine) are one, up to a factor."""

Changes = Mapping[str, Tensor]
"""What is added to the weights, float32 [out, in], by site path."""
Scores = Mapping[str, Mapping[str, Any]]
"""By task: ``loss``, nats a labelled token, and ``right``, 1 or 0 for each row."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A way with its options."""

    way: str
    options: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        return "-".join([self.way, *(f"{option}{value:g}" for option, value in self.options)])

    @property
    def taken(self) -> Way:
        return WAYS[self.way].taking(dict(self.options))


@dataclass(frozen=True, slots=True)
class Tuned:
    """What suits a way best, and normalised validation accuracy (percent) by choice and scale.

    ``like``: the way that makes the same change, and what this one's is multiplied with to be that; None for none.
    """

    choice: Choice
    scale: float
    curves: Mapping[Choice, Mapping[float, float]]
    like: tuple[str, float] | None = None


def choices(way: Way) -> list[Choice]:
    """The way with every combination of the values that are tried."""
    options = [name for name in TRIED if name in way.known]
    combinations = itertools.product(*(TRIED[option] for option in options))
    return [Choice(way.name, tuple(zip(options, values, strict=True))) for values in combinations]


class Merging:
    """Measures merges of the six adapters of each seed, in the memory of one base."""

    def __init__(self, out: Path, show: Callable[[str], None] | None = None, ways: Sequence[str] = tuple(WAYS)) -> None:
        self.learners, self.ways = Learners(out, show), ways
        self._parents: dict[int, Mapping[str, Adapter]] = {}
        self._digests: dict[int, list[str]] = {}
        self._alone: dict[tuple[int, str], Mapping[str, float]] = {}
        self._made: dict[tuple[Choice, int], Changes] = {}

    @property
    def host(self) -> Host:
        return self.learners.host

    @cached_property
    def base(self) -> Mapping[str, Mapping[str, Any]]:
        """What the base scores, by task and split."""
        return {task: self.learners.before(task) for task in TASKS}

    def alone(self, seed: int, split: str) -> Mapping[str, float]:
        """Accuracy of every adapter alone on its own task, 0..1."""
        if (seed, split) not in self._alone:
            found = {task: mean(self.learners.alone(task, seed)["splits"][split]["right"]) for task in TASKS}
            self._alone[seed, split] = found
        return self._alone[seed, split]

    def parents(self, seed: int) -> Mapping[str, Adapter]:
        """Adapters by task."""
        if seed not in self._parents:
            self._parents[seed] = {task: self.learners.adapter(task, seed) for task in TASKS}
            self._digests[seed] = [digest(adapter)[:16] for adapter in self._parents[seed].values()]
        return self._parents[seed]

    def changes(self, choice: Choice, seed: int) -> Changes:
        """What the merge adds at scale 1."""
        if (choice, seed) not in self._made:
            self._made[choice, seed] = merged(choice.taken, list(self.parents(seed).values()), self.host)
        return self._made[choice, seed]

    def scored(self, choice: Choice, seed: int, scale: float, split: str) -> Scores:
        """Every task's scores with a merge at a scale."""
        found = self.changes(choice, seed)
        told = self.told(choice.name, seed, split, found) | {"scale": scale, "way": _described(choice.taken)}
        name = f"seed-{seed}-{choice.name}-scale{scale:g}-{split}"
        return self.measured(name, told, lambda: self.scores(found, scale, split))

    def told(self, name: str, seed: int, split: str, changes: Changes) -> dict[str, Any]:
        """What a measurement was made with. The norm tells whether a way still computes the same."""
        return {"merge": name, "split": split, "adapters": self._digests[seed], "norm": f"{norm(changes):.5g}"}

    def measured(self, name: str, told: Mapping[str, Any], work: Callable[[], Scores]) -> Scores:
        """The scores of this name, made by ``work`` where there are none."""

        def timed() -> dict[str, Any]:
            began = time.monotonic()
            return {"tasks": work(), "seconds": round(time.monotonic() - began, 1)}

        found: Scores = self.learners.kept(name, {"settings": told}, timed)["tasks"]
        return found

    @contextmanager
    def sighted(self) -> Iterator[None]:
        """What the tower makes of each picture is looked up inside: no merge changes it.

        An adapter that does not act stands where the merges are put, so that nothing above the tower is looked up.
        """
        parts = [Part("lora", part["select"], find("lora").configure({"rank": 1})) for part in PARTS]
        attach(self.host.model, self.host.sites, parts, name="place")
        activate(self.host.model)
        try:
            with features(self.host, Store(self.learners.out / "features", _FEATURES)):
                yield
        finally:
            detach(self.host.model, "place")

    def scores(self, changes: Changes, scale: float, split: str, tasks: Sequence[str] = tuple(TASKS)) -> Scores:
        """Scores of these tasks while ``scale`` times the changes are added."""
        with changed(self.host, changes, scale):
            return {task: score(self.host, self.learners.encoded(task, split)) for task in tasks}

    def normalised(self, found: Scores, seed: int, split: str) -> float:
        """Percent: the mean over the tasks of the accuracy as a share of what the task's own adapter has alone."""
        alone = self.alone(seed, split)
        return 100 * mean([mean(scores["right"]) / alone[task] for task, scores in found.items()])

    def tuned(self) -> dict[str, Tuned]:
        """Every way at what suits it best by the first seed's validation rows; the plain sum comes before its like."""
        found: dict[str, Tuned] = {}
        for name in sorted(self.ways, key=lambda name: name != SUM):
            options = choices(WAYS[name])
            found[name] = self._tune(options, self._like(options, found))
        return found

    def _like(self, options: Sequence[Choice], found: Mapping[str, Tuned]) -> tuple[str, float] | None:
        """A way that is tuned already and makes the same changes, and the factor from these to those."""
        for name, other in found.items():
            if [choice.options for choice in other.curves] != [choice.options for choice in options]:
                continue
            pairs = [
                (self.changes(a, SEEDS[0]), self.changes(b, SEEDS[0]))
                for a, b in zip(options, other.curves, strict=True)
            ]
            if all(1 - cosine(mine, theirs) < _SAME for mine, theirs in pairs):
                return name, norm(pairs[0][1]) / norm(pairs[0][0])
        return None

    def _tune(self, options: Sequence[Choice], like: tuple[str, float] | None) -> Tuned:
        if like is not None:
            return Tuned(options[0], 1.0, {}, like)
        curves: dict[Choice, Mapping[float, float]] = {}
        ranks: dict[tuple[Choice, float], tuple[float, float]] = {}
        for choice in options:
            curves[choice], rank = self._curve(choice)
            ranks |= {(choice, scale): value for scale, value in rank.items()}
        choice, scale = max(ranks, key=lambda key: ranks[key])
        return Tuned(choice, scale, curves)

    def _curve(self, choice: Choice) -> tuple[dict[float, float], dict[float, tuple[float, float]]]:
        """Normalised validation accuracy by scale; and with it, to choose among equal ones, the loss below zero."""
        curve: dict[float, float] = {}
        ranks: dict[float, tuple[float, float]] = {}
        wanted = list(FIRST)
        while wanted:
            scale = wanted.pop(0)
            found = self.scored(choice, SEEDS[0], scale, "validation")
            curve[scale] = self.normalised(found, SEEDS[0], "validation")
            ranks[scale] = curve[scale], -mean([scores["loss"] for scores in found.values()])
            wanted = wanted or beside(ranks, choice.name)
        return dict(sorted(curve.items())), ranks

    def held_out(self, tuned: Tuned, seed: int) -> Scores:
        """Every task's held-out scores of a way as it was tuned."""
        return self.scored(tuned.choice, seed, tuned.scale, "held-out")


def beside(ranks: Mapping[float, tuple[float, float]], name: str) -> list[float]:
    """The ladder's next scale on a side of the best one on which none is worse. Raises ConfigError at its ends."""
    best = max(ranks, key=lambda scale: ranks[scale])
    for end, lower in ((min(ranks), True), (max(ranks), False)):
        if best != end:
            continue
        rungs = [rung for rung in LADDER if (rung < end if lower else rung > end)]
        if not rungs:
            raise ConfigError("The best scale may lie beyond the ladder.", given=f"{name}: {end:g}", do="lengthen it")
        return [rungs[-1] if lower else rungs[0]]
    return []


def merged(way: Way, adapters: Sequence[Adapter], host: Host) -> Changes:
    """What the merge of these adapters, each with weight 1, adds to each weight at scale 1. LoRAs change no bias."""
    made = merge(adapters, [1.0] * len(adapters), way, host).adapter
    found = deltas(made, host)
    assert all(delta.bias is None and not delta.still for delta in found.values())
    return {path: delta.weight().float() for path, delta in found.items()}


@contextmanager
def changed(host: Host, changes: Changes, scale: float) -> Iterator[None]:
    """Add ``scale`` times the changes to the weights inside; the base's own tensors stay and come back."""
    weights = {site.path: host.model.get_parameter(site.weight) for site in host.sites if site.path in changes}
    own = {path: weight.data for path, weight in weights.items()}
    try:
        for path, weight in weights.items():
            weight.data = torch.add(own[path], changes[path], alpha=scale)
        yield
    finally:
        for path, weight in weights.items():
            weight.data = own[path]


def norm(changes: Changes) -> float:
    """Frobenius norm over all sites."""
    return float(torch.stack([change.double().square().sum() for change in changes.values()]).sum().sqrt())


def cosine(a: Changes, b: Changes) -> float:
    """Between two changes over all sites."""
    inner = sum(float((a[path].double() * b[path].double()).sum()) for path in a.keys() & b.keys())
    return inner / (norm(a) * norm(b))


def _described(way: Way) -> dict[str, Any]:
    return {
        "sparsify": way.sparsify,
        "align": way.align,
        "combine": way.combine,
        "options": dict(way.options),
        "thin": way.thin,
    }


def drive(out: Path, ways: Sequence[str] = tuple(WAYS)) -> None:
    """Tune these ways where that is not done yet, with the first seed's adapters, and measure them on held-out rows."""
    desk = Merging(out, ways=ways)
    for task in TASKS:
        desk.learners.alone(task, SEEDS[0])
    with desk.sighted():
        for name, one in desk.tuned().items():
            if one.like is not None:
                print(f"  {name}: {one.like[1]:.3g} times it is {one.like[0]}", flush=True)
                continue
            found = desk.normalised(desk.held_out(one, SEEDS[0]), SEEDS[0], "held-out")
            print(f"  {one.choice.name} at {one.scale:g}: {found:.1f} % on held-out rows", flush=True)


if __name__ == "__main__":
    drive(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/merging"), sys.argv[2:] or tuple(WAYS))
