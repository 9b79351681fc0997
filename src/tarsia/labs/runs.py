"""Short trainings of mini-1 on jobs that are drawn: rows, scores and results, each made once and kept."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from tarsia.adapter import Host, open_base
from tarsia.core.errors import ConfigError
from tarsia.data import IGNORED, Batch, Encoder, Source, read
from tarsia.labs import replay, sources
from tarsia.labs.experiment import PLACE
from tarsia.labs.sources import Asked
from tarsia.train import Evaluated, Finished, Recipe, fit
from tarsia.train.step import learnt, only_predicting

BATCH: Final = 4
_ROWS: Final = 50

Draw = Callable[[int, str], Iterable[Asked]]
"""Draws a job's rows, from how many and the split."""
Scores = Mapping[str, Mapping[str, Any]]
"""By split: ``loss``, nats a labelled token, and ``right``, 1 or 0 for each row."""


class Runs:
    """Runs what is asked for and has no result yet in ``out``, with one base for all.

    ``jobs`` draw the rows, ``counts`` says how many of each split: "train", and those that are measured.
    """

    def __init__(
        self, out: Path, jobs: Mapping[str, Draw], counts: Mapping[str, int], show: Callable[[str], None] | None = None
    ) -> None:
        self.out, self.jobs, self.counts, self._show = out, jobs, counts, show
        self._encoded: dict[tuple[str, str], list[Batch]] = {}

    @cached_property
    def host(self) -> Host:
        return open_base("mini-1", dtype=PLACE["precision"], device=PLACE["device"])

    def rows(self, job: str, split: str) -> Path:
        """The file of a job's rows, which is written where it is not there."""
        path = self.out / split / f"{job}.parquet"
        with replay.claimed(self.out / "claims" / f"{split}-{job}", wait=True):
            if not path.exists():
                sources.write(path, self.jobs[job](self.counts[split], split))
        return path

    def batches(self, job: str, split: str, size: int = _ROWS) -> Iterator[Batch]:
        """A job's rows, ``size`` at a time."""
        rows = read(Source(path=str(self.rows(job, split)), name=job))
        encoder = Encoder(self.host.processor, variables=self.host.variables)
        for first in range(0, len(rows), size):
            yield encoder.batch([rows[i] for i in range(first, min(first + size, len(rows)))])

    def made(self, name: str, job: str, parts: Sequence[Mapping[str, Any]], steps: int, seed: int) -> Recipe:
        """A run's recipe. The outputs of a tower that it leaves alone are computed once for all runs."""
        frozen = all(part["select"].startswith(("language", "projector")) for part in parts)
        values = {
            "model": "mini-1",
            "parts": parts,
            "data": {"train": [{"path": str(self.rows(job, "train")), "name": job}]},
            "out": str(self.out / "training" / name),
            "steps": steps,
            "batch": BATCH,
            "warmup": 0.06,
            "save_every": 10_000,
            "seed": seed,
            "threads": 1,
            **({"features": {"path": str(self.out / "features")}} if frozen else {}),
        }
        return Recipe.of({**PLACE, **values})

    def measured(self, job: str) -> Scores:
        """What the model, as it is, scores on every split that is not trained on."""
        return {split: score(self.host, self.encoded(job, split)) for split in self.counts if split != "train"}

    def encoded(self, job: str, split: str) -> Sequence[Batch]:
        """All of a job's rows of a split, encoded once."""
        if (job, split) not in self._encoded:
            self._encoded[job, split] = list(self.batches(job, split))
        return self._encoded[job, split]

    def train(self, made: Recipe, job: str, keep: Callable[[Path], None] | None = None) -> dict[str, Any]:
        """Train, and measure what was trained before it leaves the model; ``keep`` is given the adapter's folder."""
        began, finished, splits = time.monotonic(), None, None
        for event in fit(made, lambda host, step: self.measured(job), host=self.host):
            if isinstance(event, Evaluated):
                splits = event.results
            finished = event if isinstance(event, Finished) else finished
        assert finished is not None and splits is not None
        if keep is not None:
            keep(Path(finished.folder))
        shutil.rmtree(made.out)
        return {
            "splits": splits,
            "trained": sum(line["trained"] for line in finished.adapter.card["coverage"]),
            "base": self.host.fingerprint.weights,
            "loss": finished.adapter.card["loss"],
            "seconds": round(time.monotonic() - began, 1),
        }

    def kept(self, name: str, told: Mapping[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of this name, made by ``work`` where there is none, and with what is ``told`` of it.

        Raises ConfigError where something else was told of the one that is there.
        """
        if self._show is not None:
            self._show(name)
        done = replay.once(self.out, name, lambda: {**told, **work()})
        if done is not None and self._show is None:
            splits = done.get("splits", {}).items()
            said = ", ".join(f"{split} {s['loss']:.4f} {100 * mean(s['right']):.1f} %" for split, s in splits)
            print(f"{time.strftime('%H:%M:%S')} {name}: {said}, {done.get('seconds', 0)} s", flush=True)
        found = replay.stored(self.out, name)
        if any(found[key] != value for key, value in told.items()):
            raise ConfigError(
                "A result is of another run.", given=str(replay.result(self.out, name)), do="remove it and run again"
            )
        return found


@torch.no_grad()
def score(host: Host, batches: Sequence[Batch]) -> dict[str, Any]:
    """Mean loss of the labelled tokens, and for each row 1 where each of them is the likeliest after those before.

    That is what greedy decoding would say: the first token that is not the answer's would be said in its place.
    """
    losses: list[Tensor] = []
    right: list[float] = []
    for batch in batches:
        with only_predicting(host.model, batch.labels):
            logits: Tensor = host.model(**batch.inputs, use_cache=False).logits[0]
        wanted = batch.labels[:, 1:][batch.labels[:, 1:] != IGNORED]
        losses.append(F.cross_entropy(logits.float(), wanted, reduction="none"))
        wrong = {
            row for row, same in zip(learnt(batch), (logits.argmax(-1) == wanted).tolist(), strict=True) if not same
        }
        right += [float(row not in wrong) for row in range(len(batch.rows))]
    return {"loss": float(torch.cat(losses).double().mean()), "right": right}


def mean(values: Sequence[float]) -> float:
    """The mean of one value or more."""
    return sum(values) / len(values)
