"""Plans beside what their runs took: kept, so that anybody can see how far a plan is to be believed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tarsia.core.errors import PlanError
from tarsia.plan.ledger import Category

if TYPE_CHECKING:
    from tarsia.plan.foretell import Plan
    from tarsia.train.events import Memory

LARGE: Final = 0.05
"""From which difference on a run says that its plan was wrong, as a share of what was measured."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One quantity, planned and measured, in bytes."""

    name: str
    planned: int
    measured: int

    @property
    def off(self) -> float:
        """How far the plan is off, as a share of what was measured; below 0 where it is too low."""
        return self.planned / self.measured - 1 if self.measured else 0.0

    @property
    def said(self) -> str:
        """In words."""
        sizes = f"{self.planned / 1e6:,.1f} MB planned, {self.measured / 1e6:,.1f} MB measured"
        return f"{self.name}: {sizes} ({self.off:+.1%})"


@dataclass(frozen=True, slots=True)
class Entry:
    """One run: when, of what, and its pairs."""

    date: str
    model: str
    methods: tuple[str, ...]
    device: str
    recipe: str
    pairs: tuple[Pair, ...]

    @property
    def peak(self) -> Pair:
        """Of all tensors in the step that took most."""
        return self.pairs[0]

    @property
    def whole(self) -> Pair | None:
        """Of all that the device must have; None where the system did not tell."""
        return next((pair for pair in self.pairs if pair.name in PEAKS[1:]), None)

    @property
    def wrong(self) -> tuple[Pair, ...]:
        """What the plan must answer for: the peaks, where they are off by more than LARGE."""
        return tuple(pair for pair in self.pairs if pair.name in PEAKS and abs(pair.off) > LARGE)


PEAKS: Final = ("peak of a step", "whole process", "reserved on the device")


def compared(plan: Plan, memory: Memory) -> Entry | None:
    """The pairs of a run, its peak first; None where nothing was measured."""
    if memory.peak is None:
        return None
    held = plan.categories
    kernels = held.get(Category.KERNELS, 0)
    pairs = [
        # whatever else this process holds in tensors is not the run's
        Pair("peak of a step", plan.step.peak - kernels, memory.peak - memory.other),
        Pair("weights", held.get(Category.WEIGHTS, 0), memory.weights),
        Pair("quantised", held.get(Category.QUANTISED, 0), memory.quantised),
        Pair("patches", held.get(Category.PATCHES, 0), memory.patches),
        # the first step finds none
        Pair("states", held.get(Category.STATES, 0) if memory.number != 1 else 0, memory.states),
        Pair("gradients", plan.gradients, memory.gradients or 0),
        Pair("inputs", held.get(Category.INPUTS, 0), memory.inputs or 0),
    ]
    if memory.reserved is not None:
        pairs.append(Pair("reserved on the device", plan.total, memory.reserved))
    elif memory.process is not None:
        pairs.append(Pair("whole process", plan.total, memory.process))
    recipe = plan.recipe
    return Entry(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        model=recipe.model,
        methods=tuple(part.method for part in recipe.parts),
        device=memory.device,
        recipe=recipe.hash,
        pairs=tuple(pair for pair in pairs if pair.planned or pair.measured),
    )


def place() -> Path:
    """The file that holds them: below TARSIA_CACHE (default: ~/.cache/tarsia)."""
    return Path(os.environ.get("TARSIA_CACHE") or Path.home() / ".cache" / "tarsia") / "plans" / "history.jsonl"


def keep(entry: Entry) -> None:
    """Append an entry, whole or not at all. Raises PlanError where the disk refuses."""
    path, line = place(), json.dumps(asdict(entry)) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            _append(handle, line.encode())
        finally:
            os.close(handle)
    except OSError as error:
        raise PlanError(
            "What the run took can not be kept beside its plan.",
            given=f"{path}: {error.strerror or error}",
            do="set TARSIA_CACHE to a folder that can be written to",
        ) from None


def _append(handle: int, line: bytes) -> None:
    """Write a line at the end; where that fails nothing of it stays. Raises OSError."""
    fcntl.flock(handle, fcntl.LOCK_EX)  # else what is cut off could be another run's
    begin = os.fstat(handle).st_size
    try:
        written = os.write(handle, line)
        if written < len(line):  # a disk that has room for a part tells nothing else
            raise OSError(errno.ENOSPC, f"{written} of {len(line)} bytes could be written")
        os.fsync(handle)
    except OSError:
        os.ftruncate(handle, begin)
        raise


def read() -> Iterator[Entry]:
    """Every entry, the oldest first. Raises PlanError for a file that can not be read, or a line that is none."""
    path = place()
    try:
        content = path.read_bytes() if os.path.exists(path) else b""
    except OSError as error:
        raise PlanError(
            "The plans' history can not be read.",
            given=f"{path}: {error.strerror or error}",
            do="set TARSIA_CACHE to a folder of your own",
        ) from None
    for number, line in enumerate(content.splitlines(), 1):
        try:
            yield _entry(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(
                "A line of the plans' history can not be read.",
                given=f"{path}, line {number}: {error}",
                do="remove that line",
            ) from None


def _entry(values: Mapping[str, Any]) -> Entry:
    pairs = tuple(Pair(**pair) for pair in values["pairs"])
    if not pairs:
        raise ValueError("no pairs")
    if not all(isinstance(size, int) for pair in pairs for size in (pair.planned, pair.measured)):
        raise TypeError("a size is no number of bytes")
    return Entry(**{**values, "methods": tuple(values["methods"]), "pairs": pairs})
