"""The replay curve: what a job costs the base's knowledge, against the share of the loss or rows that replays it.

    TARSIA_DATA=FOLDER python -m tarsia.labs.replay OUT

Trains every run of ``RUNS`` that has no result in OUT/results yet and measures it; several processes may share the
work. FOLDER holds bccd-*.parquet and cifar10-*.parquet.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.console import Console

from tarsia.adapter import Host, load, open_base, prove, put
from tarsia.core.errors import ConfigError
from tarsia.data import Sample
from tarsia.evaluate import find, generate
from tarsia.labs import blood, replay_rows, sources
from tarsia.labs.experiment import PLACE, samples
from tarsia.labs.shifts import SHIFTS, Shift
from tarsia.train import Finished, Recipe, fit

SHARES = (0.0, 0.1, 0.01, 0.02, 0.05, 0.2)
"""Of the general rows, in the order of the runs: the two ends of the claim come first."""
MODES = ("sampled", "weighted")
SEEDS = (1, 2, 3)
_BATCH = 75

Said = Mapping[str, Sequence[str]]
"""What a model answers, by source."""


@dataclass(frozen=True, slots=True)
class Run:
    """One training. Without replay there is nothing to mix, so its ``mode`` is "none"."""

    shift: str
    share: float
    mode: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.shift}-{self.mode}-{round(100 * self.share):02}-seed-{self.seed}"


RUNS = tuple(
    Run(shift, share, mode, seed)
    for seed in SEEDS
    for share in SHARES
    for shift in SHIFTS
    for mode in (MODES if share else ("none",))
)


def folder(needed: bool) -> Path | None:
    """The folder in TARSIA_DATA; None where the variable is not set and nothing is ``needed`` from it.

    Raises ConfigError where files are missing.
    """
    return blood.data() if needed or "TARSIA_DATA" in os.environ else None


def write(out: Path, shifts: Iterable[Shift], split: str, data: Path | None) -> None:
    """Write the rows of a split to ``out/SPLIT``: all general ones also as one source; a file is kept."""
    wanted: dict[str, Iterable[sources.Asked]] = {
        f"{shift.name}-{name}": rows for shift in shifts for name, rows in shift.rows(split, data).items()
    }
    if not (out / split / "general.parquet").exists():
        known = replay_rows.general(split, data)
        wanted |= {**known, "general": [row for rows in known.values() for row in rows]}
    for name, rows in wanted.items():
        if not (path := out / split / f"{name}.parquet").exists():
            sources.write(path, rows)


def tasks(out: Path, shift: Shift, split: str) -> dict[str, Path]:
    """Files of a shift's own sources by name."""
    found = sorted((out / split).glob(f"{shift.name}-*.parquet"))
    return {path.stem.removeprefix(f"{shift.name}-"): path for path in found}


def held_out(out: Path, shift: Shift) -> dict[str, Path]:
    """Files that a run of this shift is measured on, by source: its own and every general one."""
    return tasks(out, shift, "held-out") | general(out)


def general(out: Path) -> dict[str, Path]:
    """Held-out files of the general sources by name."""
    found = {path.stem: path for path in sorted((out / "held-out").glob("*.parquet"))}
    return {name: found[name] for name in replay_rows.REPLAYED if name in found}


def recipe(run: Run, out: Path, **changed: Any) -> Recipe:
    """What a run trains: the shift's recipe, its rows and its share of the general ones."""
    shift = SHIFTS[run.shift]
    own = tasks(out, shift, "train")
    train = [
        {"path": str(path), "name": name, "weight": (1 - run.share) / len(own)} for name, path in sorted(own.items())
    ]
    data: dict[str, Any] = {"train": train}
    if run.share:
        train.append({"path": str(out / "train" / "general.parquet"), "name": "general", "weight": run.share})
        data["mix"] = run.mode
    kept = {"features": {"path": str(out / "features")}} if frozen(shift) else {}
    place = str(out / "training" / run.name)
    return Recipe.of({**PLACE, **shift.recipe, **kept, **changed, "data": data, "seed": run.seed, "out": place})


def frozen(shift: Shift) -> bool:
    """Whether the recipe leaves the vision tower as it is, so that its outputs can be kept."""
    return not any(part["select"].startswith("vision") for part in shift.recipe["parts"])


def answers(host: Host, rows: Mapping[str, Sequence[Sample]], longest: Mapping[str, int]) -> dict[str, list[str]]:
    """What the host says to every row, greedily, by source; ``longest`` where an answer has not 32 tokens at most."""
    return {name: list(generate(host, some, longest.get(name, 32), _BATCH)) for name, some in rows.items()}


def trained(made: Recipe, measured: Mapping[str, Path], longest: Mapping[str, int]) -> dict[str, Any]:
    """Train, reload the adapter from its files into a fresh base, prove it to be the same, and let it answer."""
    began = time.monotonic()
    finished = None
    for event in fit(made):
        if isinstance(event, Finished):
            finished = event
    assert finished is not None
    host = made.open()
    adapter = load(Path(finished.folder))
    put(host, adapter, "adapted")
    assert adapter.probe is not None
    drift = prove(host, "adapted", adapter.probe)
    seconds = time.monotonic() - began
    said = answers(host, samples(measured), longest)
    card = adapter.card
    return {
        "said": said,
        "drift": drift,
        "seconds to train": round(seconds, 1),
        "seconds": round(time.monotonic() - began, 1),
        "loss": card["loss"],
        "data": card["data"],
    }


def perform(run: Run, out: Path) -> dict[str, Any]:
    """One run, trained and measured; its training folder is removed, its result holds every answer."""
    shift = SHIFTS[run.shift]
    made = recipe(run, out)
    longest = dict.fromkeys(tasks(out, shift, "held-out"), shift.longest)
    found = trained(made, held_out(out, shift), longest)
    shutil.rmtree(made.out)
    return {"run": asdict(run), "recipe": _plain(shift.recipe), **found}


def before(shift: Shift, out: Path) -> dict[str, Any]:
    """What the base itself answers to all that a shift's runs are measured on."""
    host = open_base(shift.recipe["model"], dtype=PLACE["precision"], device=PLACE["device"])
    longest = dict.fromkeys(tasks(out, shift, "held-out"), shift.longest)
    return {"recipe": _plain(shift.recipe), "said": answers(host, samples(held_out(out, shift)), longest)}


def drive(out: Path, console: Console, runs: Sequence[Run] = RUNS) -> None:
    """Do what has no result yet and no other process is at. Raises ConfigError for a result of another recipe."""
    shifts = [SHIFTS[name] for name in dict.fromkeys(run.shift for run in runs)]
    data = folder(any(shift.needs_data for shift in shifts))
    with claimed(out / "rows", wait=True):
        for split in ("train", "held-out"):
            write(out, shifts, split, data)
    for shift in shifts:
        once(out, f"{shift.name}-before", lambda shift=shift: before(shift, out))
    for i, run in enumerate(runs):
        done = once(out, run.name, lambda run=run: perform(run, out))
        if done is not None:
            console.print(f"{time.strftime('%H:%M:%S')} {i + 1}/{len(runs)} {run.name}: {done['seconds']} s")


def once(out: Path, name: str, work: Any) -> dict[str, Any] | None:
    """The result of ``work()``, written whole to ``out/results``; None where it is there or another is at it."""
    path = result(out, name)
    with claimed(out / "claims" / name) as mine:
        if path.exists() or not mine:
            return None
        found: dict[str, Any] = work()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".partial-{os.getpid()}-{uuid4().hex}")
        partial.write_text(json.dumps(found, ensure_ascii=False, allow_nan=False), encoding="utf8")
        os.replace(partial, path)
        return found


def result(out: Path, name: str) -> Path:
    """Where a run's result lies."""
    return out / "results" / f"{name}.json"


@contextmanager
def claimed(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone holds ``path`` inside; the system lets go of it when the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def read(out: Path, name: str) -> dict[str, Any]:
    """A result. Raises ConfigError where it is missing or was trained with another recipe than the present one."""
    found = stored(out, name)
    wanted = _plain(SHIFTS[name.split("-")[0]].recipe)
    if found["recipe"] != wanted:
        raise ConfigError("A result is of another recipe.", given=str(result(out, name)), do="remove it and run again")
    return found


def stored(out: Path, name: str) -> dict[str, Any]:
    """A result as it was written. Raises ConfigError where it is missing."""
    path = result(out, name)
    if not path.exists():
        raise ConfigError("A run has no result yet.", given=str(path), do=f"run what writes it, with {out}")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf8"))
    return found


def scores(found: Mapping[str, Any], rows: Mapping[str, Sequence[Sample]], metric: str = "exact") -> dict[str, float]:
    """Percent of rows answered right, by source, for the sources in ``rows``."""
    judge = find(metric)
    values = {}
    for name, some in rows.items():
        said = found["said"][name]
        marks = [judge(text, row.messages[-1].text) for text, row in zip(said, some, strict=True)]
        values[name] = 100 * sum(marks) / len(marks)
    return values


@dataclass(frozen=True, slots=True)
class Results:
    """What was measured, in percent of rows: by source before, and by source after each run."""

    before: Mapping[str, Mapping[str, float]]
    """By shift, then by source."""
    after: Mapping[Run, Mapping[str, float]]
    own: Mapping[str, tuple[str, ...]]
    """The job's own sources, by shift."""
    rows: Mapping[str, int]
    """Rows measured, by "shift/source"."""

    @classmethod
    def read(cls, out: Path, runs: Sequence[Run] = RUNS) -> Results:
        """Every run's result in ``out``. Raises ConfigError where one is missing or of another recipe."""
        first: dict[str, dict[str, float]] = {}
        after: dict[Run, dict[str, float]] = {}
        own: dict[str, tuple[str, ...]] = {}
        counts: dict[str, int] = {}
        for name in dict.fromkeys(run.shift for run in runs):
            shift = SHIFTS[name]
            rows = samples(held_out(out, shift))
            own[name] = tuple(tasks(out, shift, "held-out"))
            counts |= {f"{name}/{source}": len(some) for source, some in rows.items()}
            first[name] = scores(read(out, f"{name}-before"), rows)
            after |= {run: scores(read(out, run.name), rows) for run in runs if run.shift == name}
        return cls(first, after, own, counts)

    @property
    def shifts(self) -> tuple[str, ...]:
        return tuple(self.before)

    def job(self, run: Run) -> float:
        """Mean over the job's own sources."""
        return _mean([self.after[run][source] for source in self.own[run.shift]])

    def lost(self, run: Run) -> dict[str, float]:
        """Points lost by each general source; a gain is negative."""
        known = self.before[run.shift]
        return {s: known[s] - now for s, now in self.after[run].items() if s not in self.own[run.shift]}

    def forgotten(self, run: Run) -> float:
        """Points lost on the mean of the general sources."""
        return _mean(list(self.lost(run).values()))

    def seeds(self, shift: str, share: float, mode: str) -> list[Run]:
        """The runs that differ in their seed alone; without replay both modes are the same runs."""
        wanted = mode if share else "none"
        return [run for run in self.after if (run.shift, run.share, run.mode) == (shift, share, wanted)]

    def curves(self, shift: str) -> dict[str, dict[str, dict[float, list[float]]]]:
        """ "forgotten" and "job", by mode, then by share: a value of every seed."""
        values = {"forgotten": self.forgotten, "job": self.job}
        return {
            what: {
                mode: {share: [value(run) for run in self.seeds(shift, share, mode)] for share in sorted(SHARES)}
                for mode in MODES
            }
            for what, value in values.items()
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _plain(values: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(values))


if __name__ == "__main__":
    drive(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/replay"), Console())
