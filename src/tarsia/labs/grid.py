"""Short trainings of mini-1 that several chapters read: each setting at the learning rate that suits it.

    python -m tarsia.labs.grid OUT

Only language sites are trained; the tower's outputs, which nothing changes, are computed once for all runs. The same
run is never trained twice, whichever chapter asks for it.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from tarsia.core.errors import ConfigError
from tarsia.data import Batch
from tarsia.labs.parity import JOBS, TRAIN
from tarsia.labs.runs import BATCH, Runs, mean

LINEAR: Final = "language.*.{q,k,v,o,gate,up,down}"
SEEDS: Final = (1, 2)
STEPS: Final = 100
MEASURED: Final = {"validation": 200, "held-out": 400}
"""Rows that a run is measured on: rates are chosen on validation rows, and reported on held-out ones."""
KEPT: Final = (8, 64)
"""Ranks whose trained factors are kept."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is trained where. ``scale`` is of LoRA's B A, whichever rule it comes from; full training has neither."""

    job: str
    method: str = "lora"
    select: str = LINEAR
    rank: int = 8
    scale: float = 2.0

    @property
    def part(self) -> dict[str, Any]:
        if self.method == "full":
            return {"method": "full", "select": self.select}
        shape = {"rank": self.rank, "alpha": self.scale * self.rank}
        return {"method": self.method, "select": self.select, **shape}

    @property
    def name(self) -> str:
        roles = self.select.rpartition(".")[2].strip("{}").replace(",", "")
        shape = "" if self.method == "full" else f"-r{self.rank}-s{self.scale:.4g}"
        return f"{self.job}-{self.method}-{roles}{shape}"


@dataclass(frozen=True, slots=True)
class Run:
    """One training at the rate 1e-3 * 2 ** ``step``."""

    setting: Setting
    step: int
    seed: int

    @property
    def rate(self) -> float:
        return rate(self.step)

    @property
    def name(self) -> str:
        return f"{self.setting.name}-lr{self.rate:.3g}-seed-{self.seed}"


def rate(step: float) -> float:
    """The learning rate at a place of the grid, which doubles from one whole place to the next."""
    return float(1e-3 * 2.0**step)


@dataclass(frozen=True, slots=True)
class Curve:
    """A setting over the rates: by place of the grid, each seed's losses (nats a token) and shares of right answers.

    ``low`` is the place with the lowest mean loss on validation rows; it has a neighbour on either side.
    """

    setting: Setting
    found: Mapping[int, Sequence[Mapping[str, Any]]]

    def loss(self, step: int, split: str = "held-out") -> float:
        """Mean over the seeds."""
        return mean([run["splits"][split]["loss"] for run in self.found[step]])

    def rights(self, step: int, split: str = "held-out") -> list[float]:
        """For each row the share of the seeds that answered it right."""
        return [mean(row) for row in zip(*(run["splits"][split]["right"] for run in self.found[step]), strict=True)]

    @property
    def low(self) -> int:
        return min(self.found, key=lambda step: self.loss(step, "validation"))

    @property
    def best(self) -> float:
        """Place of the lowest loss between the grid's places: the vertex of the parabola through ``low`` and its two
        neighbours, in logarithms of the rate."""
        left, here, right = (self.loss(self.low + i, "validation") for i in (-1, 0, 1))
        bend = left - 2 * here + right
        return self.low + (0.5 * (left - right) / bend if bend > 0 else 0.0)

    @property
    def accuracy(self) -> float:
        """Percent of held-out rows answered right at ``low``, a mean of the seeds."""
        return 100 * mean(self.rights(self.low))

    @property
    def trained(self) -> int:
        """Numbers that are trained."""
        return int(self.found[self.low][0]["trained"])

    @property
    def bases(self) -> set[str]:
        return {str(run["base"]) for runs in self.found.values() for run in runs}


def bracket(loss: Callable[[int], float], start: int, reach: int = 8) -> dict[int, float]:
    """Walk down from ``start`` until the lowest place has a neighbour on either side.

    Raises ConfigError where there is no such place within ``reach`` of the start.
    """
    known = {step: loss(step) for step in (start - 1, start, start + 1)}
    while (low := min(known, key=lambda step: known[step])) in (min(known), max(known)):
        step = low + (1 if low == max(known) else -1)
        if abs(step - start) > reach:
            raise ConfigError(
                "The best learning rate is not on the grid.", given=f"still falling at {rate(low):.3g}", do="widen it"
            )
        known[step] = loss(step)
    return known


class Grid(Runs):
    """The runs of these settings."""

    def __init__(self, out: Path, show: Callable[[str], None] | None = None) -> None:
        super().__init__(out, JOBS, {"train": TRAIN, **MEASURED}, show)

    def first_batches(self, job: str, count: int) -> list[Batch]:
        """The job's first training rows, BATCH at a time."""
        return list(islice(self.batches(job, "train", BATCH), count))

    def base(self, curves: Iterable[Curve]) -> str:
        """The digest of the base that all stand on. Raises ConfigError where there are several."""
        bases = {base for curve in curves for base in curve.bases}
        if len(bases) > 1:
            raise ConfigError(
                "The runs stand on different bases.", given=", ".join(sorted(bases)), do=f"remove {self.out}"
            )
        return bases.pop()

    def perform(self, run: Run) -> dict[str, Any]:
        """Train and measure; the factors of a rank in KEPT stay."""
        setting = run.setting
        made = self.made(run.name, setting.job, [{**setting.part, "lr": run.rate}], STEPS, run.seed)
        stays = setting.method == "lora" and setting.rank in KEPT
        return self.train(made, setting.job, (lambda folder: self._keep(run, folder)) if stays else None)

    def _keep(self, run: Run, folder: Path) -> None:
        path = self.factors(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        shutil.copyfile(folder / "adapter_model.safetensors", partial)
        partial.replace(path)

    def factors(self, run: Run) -> Path:
        """Where the trained factors of a run of a rank in KEPT lie."""
        return self.out / "kept" / f"{run.name}.safetensors"

    def result(self, run: Run) -> dict[str, Any]:
        """A run's result; it is run where there is none. Raises ConfigError where it is of other settings."""
        return self.kept(run.name, {"run": asdict(run), "settings": SETTINGS}, lambda: self.perform(run))

    def curve(self, setting: Setting, seeds: Sequence[int] = SEEDS) -> Curve:
        """The setting over the rates around its best one."""
        found: dict[int, list[dict[str, Any]]] = {}

        def loss(step: int) -> float:
            found[step] = [self.result(Run(setting, step, seed)) for seed in seeds]
            return mean([run["splits"]["validation"]["loss"] for run in found[step]])

        bracket(loss, start(setting))
        return Curve(setting, {step: found[step] for step in sorted(found)})

    def sweep(self, job: str) -> dict[int, list[dict[str, Any]]]:
        """Results of every seed by rank, all at the rate that suits rank 8 (see the chapter on the scale)."""
        step = self.curve(swept(job, 8)).low
        return {rank: [self.result(Run(swept(job, rank), step, seed)) for seed in SEEDS] for rank in SWEPT}


SETTINGS: Final = {"steps": STEPS, "batch": BATCH, "measured": dict(MEASURED), "train": TRAIN}
"""What a result must have been made with."""

FIRST: Final = "infrared"
BOTH: Final = ("infrared", "commands")
ALPHA: Final = 16.0
RULES: Final[Mapping[str, Callable[[int], float]]] = {
    "alpha/r": lambda rank: ALPHA / rank,
    "alpha/sqrt(r)": lambda rank: ALPHA / math.sqrt(8 * rank),
    "none": lambda rank: ALPHA / 8,
}
"""The scale at a rank; all three agree at rank 8."""
SCALED: Final = (2, 8, 32)
SWEPT: Final = (1, 2, 4, 8, 16, 32, 64)
PLACES: Final[Mapping[str, tuple[str, int]]] = {
    "all linear": (LINEAR, 8),
    "attention": ("language.*.{q,k,v,o}", 21),
    "MLP": ("language.*.{gate,up,down}", 13),
}
"""Selections with the rank that gives each nearly the same number of parameters."""
PLACED: Final[Mapping[str, Sequence[str]]] = {
    "infrared": ("all linear", "attention", "MLP"),
    "commands": ("all linear", "attention"),
}
"""The selections that are trained on each job."""


def scaled(rule: str, rank: int) -> Setting:
    """A rank under a rule."""
    return Setting(FIRST, rank=rank, scale=RULES[rule](rank))


def swept(job: str, rank: int) -> Setting:
    """A rank under the paper's rule."""
    return Setting(job, rank=rank, scale=ALPHA / rank)


def placed(job: str, place: str) -> Setting:
    """A selection under the paper's rule."""
    select, rank = PLACES[place]
    return Setting(job, select=select, rank=rank, scale=ALPHA / rank)


def whole(job: str) -> Setting:
    """Full training of the same layers."""
    return Setting(job, "full")


def start(setting: Setting) -> int:
    """Where the search begins: LoRA the lower, the more its rank and scale multiply, full training lower still."""
    if setting.method == "full":
        return 0 if setting.job == FIRST else -1
    return round(2 + 0.3 * math.log2(ALPHA / (setting.scale * setting.rank)))


def searched() -> list[Setting]:
    """Settings whose best rate is looked for, what several chapters read first."""
    found = [scaled(rule, rank) for rank in SCALED for rule in RULES]
    found += [setting for job in BOTH for setting in (swept(job, 8), whole(job))]
    found += [placed(job, place) for job, places in PLACED.items() for place in places]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    desk = Grid(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/grid"))
    desk.sweep(FIRST)
    for setting in searched():
        curve = desk.curve(setting)
        print(f"  {setting.name}: best {rate(curve.best):.3g}, {curve.accuracy:.1f} %", flush=True)
