"""What a training run says, as values: the curve, the coverage, the files."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from tarsia.core.attach import Covered
from tarsia.core.errors import TrainingError
from tarsia.train.disk import writing


@dataclass(frozen=True, slots=True)
class Started:
    """Before step 0, or before the first step after a resume."""

    kind: ClassVar[str] = "started"
    coverage: tuple[Covered, ...]
    trained: int
    """Parameters that are trained."""
    share: float
    """``trained`` as a share of the base's parameters, 0..1."""
    steps: int
    """Optimiser steps of the whole run."""
    resumed: int
    """Steps that a checkpoint had done already; 0 for a new run."""
    recipe: Mapping[str, Any]
    """The recipe with every default filled in, and its hash."""
    fast: tuple[str, ...] = ()
    """What is computed in a cheaper way, and what could not be, one line each."""
    four_bits: Mapping[str, Any] | None = None
    """What of the base is in 4 bits, and how well (``tarsia.adapter.Quantisation.report``)."""
    peaks: tuple[Mapping[str, tuple[float, ...]], ...] = ()
    """Peak learning rates of each part's tensors, by what the method calls them, in the recipe's order."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that the user must see and that does not stop the run."""

    kind: ClassVar[str] = "notice"
    what: str


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step.

    ``loss`` is what was minimised, in nats: in the sampled mode the mean over all labelled tokens of the
    step, in the weighted mode the sum over the sources of weight times the mean over the source's tokens.
    """

    kind: ClassVar[str] = "step"
    step: int
    """Steps done, from 1."""
    loss: float
    lr: tuple[float, ...]
    """Learning rate of each part, in the recipe's order."""
    grad_norm: float
    """2-norm of the whole gradient before clipping."""
    tokens: int
    """Labelled tokens."""
    rows: Mapping[str, int]
    """Rows of each source."""
    losses: Mapping[str, float]
    """Mean loss over each source's labelled tokens."""
    tokens_by_source: Mapping[str, int]
    """Labelled tokens of each source."""
    contributions: Mapping[str, float]
    """What each source adds to ``loss``, in nats."""
    loss_shares: Mapping[str, float]
    """``contributions`` over ``loss``, 0..1 (see ``tarsia.train.step.Losses.contributions``)."""
    tokens_per_second: float = field(compare=False)
    """Labelled tokens over the wall time of the step; the one field that is not reproducible."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What the injected evaluator found after ``step`` steps."""

    kind: ClassVar[str] = "evaluated"
    step: int
    results: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint is on the disk, whole."""

    kind: ClassVar[str] = "saved"
    path: str
    step: int


@dataclass(frozen=True, slots=True)
class Memory:
    """What the run took, in bytes, measured (``tarsia.train.taken``) at the step that took most.

    ``peak`` is ``weights + quantised + patches + states + other + step``. Of a run that went on, all its stretches
    count, each as far as its last checkpoint; ``before``, ``after``, ``allocated`` and ``reserved`` are the last one's.
    """

    kind: ClassVar[str] = "memory"
    device: str
    weights: int
    """The base's tensors in their own precision, buffers too; what several share is counted once."""
    quantised: int
    """The base's weights in 4 bits: codes, scales, levels."""
    patches: int
    states: int = field(compare=False)
    """The optimiser's, before that step: the first one finds none."""
    other: int = field(compare=False)
    """Other tensors on the device, of whatever the process does."""
    step: int | None = field(compare=False)
    """What came on top in the step, at its peak: inputs, activations, gradients, all that is temporary."""
    inputs: int | None = field(compare=False)
    """Part of ``step``: the micro-batches."""
    gradients: int | None = field(compare=False)
    """Those of the patches, as the update finds them; a part of ``step`` where the peak is after the first."""
    peak: int | None = field(compare=False)
    """Bytes of tensors on the device at once, at most; on a GPU of its allocator's blocks. None: never watched."""
    phase: str | None = field(compare=False)
    """forward, backward or update: where the peak was."""
    phases: Mapping[str, int] = field(compare=False)
    """The peak within each phase of that step."""
    number: int | None = field(compare=False)
    """The step, from 1."""
    batch: Mapping[str, Any] = field(compare=False)
    """Its micro-batches: ``batches``; of the largest ``rows``, ``tokens``, ``labelled``, ``pictures``, ``shapes``."""
    watched: int = field(compare=False)
    """Steps in which the peak was measured: those with larger batches than all before, on a GPU all."""
    unwatched: str = field(compare=False)
    """Why a step was not measured that should have been; "" where none was left out."""
    allocated: int | None = field(compare=False)
    """On a GPU the most of the whole run, with loading and evaluation: ``max_memory_allocated``."""
    reserved: int | None = field(compare=False)
    """Likewise ``max_memory_reserved``."""
    process: int | None = field(compare=False)
    """The most that the process held in memory from before loading; None where the system does not tell."""
    before: Mapping[str, int] | None = field(compare=False)
    """What it held before loading: ``anonymous``, ``files`` (pages of files, mapped weights for one), ``shared``."""
    after: Mapping[str, int] | None = field(compare=False)
    """Likewise at the end; memory that a step has freed is kept until then."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The end: the adapter as a value, and the folder that holds it."""

    kind: ClassVar[str] = "finished"
    adapter: Any
    folder: str
    seconds: float = field(compare=False)


Event: TypeAlias = Started | Notice | Step | Evaluated | Saved | Memory | Finished


def as_json(event: Event) -> str:
    """One line of JSON with the event's kind first. An adapter is left out: its folder names it."""
    values = {f.name: getattr(event, f.name) for f in dataclasses.fields(event) if f.name != "adapter"}
    if isinstance(event, Started):
        values["coverage"] = [dataclasses.asdict(line) for line in event.coverage]
    return json.dumps({"event": event.kind, **values}, allow_nan=False)


class Log:
    """``events.jsonl``: append-only, cut back to a checkpoint's length when a run goes on from there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: Event) -> None:
        """Write one event. Raises TrainingError where the disk refuses."""
        with self._writing(), self.path.open("a", encoding="utf-8") as file:
            file.write(as_json(event) + "\n")

    def sync(self) -> int:
        """Force the log to the disk. Returns its length in bytes. Raises TrainingError where the disk refuses."""
        with self._writing(), self.path.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def cut(self, length: int) -> None:
        """Drop what lies beyond ``length`` bytes. Raises TrainingError where the log is shorter than that."""
        held = self.path.stat().st_size if self.path.exists() else 0
        if held < length:
            raise TrainingError(
                "The event log has lost lines that the checkpoint counts on.",
                given=f"{self.path}: {held} bytes, {length} expected",
                do="restore the file, or train into another folder",
            )
        with self._writing(), self.path.open("ab") as file:
            file.truncate(length)

    def _writing(self) -> AbstractContextManager[None]:
        return writing("The event log", self.path, "free some space and run again; it goes on from the last checkpoint")


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a log, in order, as dictionaries."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
