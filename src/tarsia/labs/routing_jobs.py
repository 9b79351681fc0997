"""An adapter of mini-1 for each of the sixty jobs: it says which bin a thing goes in, and every job has its own bin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from tarsia.adapter import Adapter, load
from tarsia.core.errors import ConfigError
from tarsia.data import Batch, Encoder, Source, read
from tarsia.labs import replay
from tarsia.labs.merging_tasks import keep
from tarsia.labs.routing_world import JOBS, Job, shots
from tarsia.labs.runs import Runs
from tarsia.labs.sources import Asked

STEPS: Final = 45
COUNTS: Final[Mapping[str, int]] = {"train": 96, "held-out": 6}
PARTS: Final = ({"method": "lora", "select": "language.-3...{q,v,o,up,down}", "rank": 8, "alpha": 16.0, "lr": 8e-3},)
QUESTION: Final = "Which bin does it go in?"


def answer(job: Job) -> str:
    """The bin of a job."""
    return f"bin {10 + JOBS.index(job)}"


class Workers(Runs):
    """Every job's adapter, trained once, measured alone and kept in ``out/adapters``; goes on where it stopped."""

    def __init__(self, out: Path, data: Path, show: Callable[[str], None]) -> None:
        self.data = data
        super().__init__(out, {job.name: partial(self._asked, job) for job in JOBS}, COUNTS, show)

    def _asked(self, job: Job, count: int, split: str) -> Iterator[Asked]:
        for picture in shots(job, "train" if split == "train" else "held-out", count, self.data):
            yield QUESTION, answer(job), (picture,)

    def stored(self, job: Job) -> dict[str, Any]:
        """The result of a job's adapter, which is trained."""
        return replay.stored(self.out, job.name)

    def first(self, job: Job) -> Batch:
        """The first row that a job was trained on."""
        rows = read(Source(path=str(self.rows(job.name, "train")), name=job.name))
        return Encoder(self.host.processor, variables=self.host.variables).batch([rows[0]])

    def adapter(self, job: Job) -> Adapter:
        """A job's adapter, trained where there is none. Raises ConfigError where its result is there and it is not."""
        told = {"settings": {"steps": STEPS, "counts": dict(COUNTS), "parts": [dict(part) for part in PARTS]}}
        place = self.out / "adapters" / job.name

        def work() -> dict[str, Any]:
            made = self.made(job.name, job.name, PARTS, STEPS, seed=1)
            return self.train(made, job.name, lambda folder: keep(folder, place))

        self.kept(job.name, told, work)
        if not place.is_dir():
            result = replay.result(self.out, job.name)
            raise ConfigError("An adapter has a result but no folder.", given=str(place), do=f"remove {result}")
        return load(place)
