"""How fast this machine is: single operations timed for about a minute, and kept.

    calibration = calibrate()        # from the file where there is one of this machine, else measured

The file lies below TARSIA_CACHE (default: ~/.cache/tarsia). It holds for one machine, device, number of threads,
version of torch and 4-bit kernel; for any other it is made anew.
"""

from __future__ import annotations

import json
import mmap
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Final, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tarsia.core.errors import PlanError
from tarsia.plan.overhead import Overhead, opened, overhead
from tarsia.plan.probes import DTYPES, FULL, KINDS, QUICK, Call, Probe, Scale, probes
from tarsia.plan.speeds import Kernels, Point
from tarsia.quant import cuda, native
from tarsia.train.disk import write_synced
from tarsia.train.exact import deterministic
from tarsia.train.heap import kept_heap

FORMAT: Final = 1
SAMPLE: Final = 1e-3
"""Seconds that one sample takes at least: an operation is repeated until then."""
ROUNDS: Final = 3
"""Rounds at least, however long they take."""
FRESH: Final = 2**26
"""Bytes of fresh memory that are touched to see what its pages cost."""

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Progress = Callable[[str, float], None]
"""Is told what is measured, and which share of the time is gone."""


class Key(BaseModel):
    """What a calibration holds for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    machine: str
    device: str
    threads: int
    torch: str
    kernel: str

    @property
    def name(self) -> str:
        """As a file is named after it."""
        return sha256(self.model_dump_json().encode()).hexdigest()[:24]


class Calibration(BaseModel):
    """What was measured, when and on what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1]
    key: Key
    date: Annotated[str, Field(min_length=10)]
    took: Seconds
    rounds: Annotated[int, Field(gt=0)]
    points: Annotated[tuple[Point, ...], Field(min_length=1)]
    overhead: Overhead
    page: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Seconds for a byte of memory that was never touched before."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        missing = KINDS - {point.kind for point in self.points}
        if missing:
            raise ValueError(f"nothing was measured of {', '.join(sorted(missing))}")
        return self

    @property
    def spread(self) -> float:
        """How far samples of one operation lay from each other: the median over all, as a share."""
        return median(point.spread for point in self.points)


@dataclass(frozen=True, slots=True)
class Found:
    """A calibration, and what is to be said of how it was come by ("" where it was there and whole)."""

    calibration: Calibration
    notice: str = ""


def here(device: str = "cpu") -> Key:
    """What a calibration that is made now holds for."""
    gpu = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if gpu else f"{_processor()}, {os.cpu_count()} cores"
    status = cuda.status() if gpu else native.status()
    # the sentence names threads and files too, which say nothing of speed here
    kernel = re.split(r"[ (,:]", str(status), maxsplit=1)[0]
    return Key(
        machine=f"{platform.node()}: {name}", device=device, threads=torch.get_num_threads(), torch=torch.__version__,
        kernel=kernel,
    )  # fmt: skip


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf8") if path.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def folder() -> Path:
    """Where calibrations are kept."""
    return Path(os.environ.get("TARSIA_CACHE") or Path.home() / ".cache" / "tarsia") / "calibration"


def load(path: Path, key: Key) -> Calibration:
    """The calibration in a file. Raises PlanError where it is damaged, of another version, or of something else."""
    try:
        text = path.read_text(encoding="utf8")
        version = json.loads(text).get("format")
    except (OSError, ValueError, AttributeError) as error:
        raise PlanError("The calibration can not be read.", given=f"{path}: {error}", do=_ANEW) from None
    if version != FORMAT:
        raise PlanError(
            "The calibration is of another version of Tarsia.", given=f"format {version}", allowed=str(FORMAT), do=_ANEW
        )
    try:
        found = Calibration.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise PlanError("The calibration is damaged.", given=f"{path}: {where} {first['msg']}", do=_ANEW) from None
    if found.key != key:
        other = [n for n in Key.model_fields if getattr(found.key, n) != getattr(key, n)]
        changed = ", ".join(f"{n} {getattr(found.key, n)}" for n in other)
        raise PlanError("The calibration is of something else.", given=changed, do=_ANEW)
    return found


_ANEW: Final = "tarsia plan --calibrate measures this machine anew"


def kept(device: str = "cpu") -> Calibration | None:
    """The calibration of this machine, where one is kept. Raises PlanError where the file can not be used."""
    key = here(device)
    path = folder() / f"{key.name}.json"
    return load(path, key) if os.path.exists(path) else None  # no error where the folder can not be read


def calibrate(
    seconds: float = 60,
    quick: bool = False,
    *,
    device: str = "cpu",
    anew: bool = False,
    progress: Progress = lambda what, share: None,
) -> Found:
    """The calibration of this machine: what is kept, or, where nothing can be used or ``anew``, measured and kept.

    ``quick`` takes a few small sizes alone, and keeps nothing. Why it was measured anew, or could not be kept, is in
    the notice.
    """
    notice = ""
    if not anew and not quick:
        try:
            found = kept(device)
        except PlanError as error:
            found, notice = None, f"Measured anew: {error.what} ({error.given})"
        if found is not None:
            return Found(found)
    made = measure(QUICK if quick else FULL, seconds, device, progress)
    if not quick:
        try:
            _write(folder() / f"{made.key.name}.json", made)
        except OSError as error:
            notice = " ".join(filter(None, (notice, f"It can not be kept: {error}. Set TARSIA_CACHE elsewhere.")))
    return Found(made, notice)


def _write(path: Path, calibration: Calibration) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        write_synced(part, calibration.model_dump_json(indent=1).encode())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def measure(
    scale: Scale, seconds: float, device: str, progress: Progress, dtypes: Sequence[str] = DTYPES
) -> Calibration:
    """Time every operation, round after round through all of them, so that a busy moment touches all alike."""
    began = time.perf_counter()
    rounds = 0
    with opened(device) as tiny, torch.no_grad(), kept_heap(), deterministic(torch.device(device)):
        calls = _prepared(probes(scale, device, dtypes), seconds, device, progress)
        samples: dict[Probe, list[float]] = {probe: [] for probe in calls}
        while rounds < ROUNDS or time.perf_counter() - began < seconds * 0.95:
            for probe, (call, repeats) in calls.items():
                samples[probe].append(_timed(call, repeats, device))
            for run in tiny:
                run.sample()
            rounds += 1
            progress(f"round {rounds}", min(0.95, (time.perf_counter() - began) / seconds))
        del calls
        points = tuple(_point(probe, values) for probe, values in samples.items())
        with torch.enable_grad():
            found = overhead(*tiny, Kernels.of(points))
    progress("fresh memory", 0.98)
    page = _page() if device == "cpu" else 0.0
    return Calibration(
        format=FORMAT, key=here(device), date=datetime.now(UTC).isoformat(timespec="seconds"),
        took=time.perf_counter() - began, rounds=rounds, points=points, overhead=found, page=page,
    )  # fmt: skip


def _prepared(
    wanted: Iterable[Probe], seconds: float, device: str, progress: Progress
) -> dict[Probe, tuple[Call, int]]:
    """Each operation, called once, and how often a sample repeats it.

    What is too slow for the time is left out, but for the first, and so least, of each kind.
    """
    calls: dict[Probe, tuple[Call, int]] = {}
    there: set[tuple[str, str]] = set()
    for probe in wanted:
        progress(f"{probe.kind} {'x'.join(map(str, probe.size))} {probe.dtype}", 0.0)
        call = probe.make()
        call()
        once = min(_timed(call, 1, device) for _ in range(3))
        if once < seconds / 100 or (probe.kind, probe.dtype) not in there:
            calls[probe] = (call, max(1, round(SAMPLE / once)))
            there.add((probe.kind, probe.dtype))
    return calls


def _timed(call: Call, repeats: int, device: str) -> float:
    """Seconds of one call, over ``repeats`` of them."""
    gpu = device.startswith("cuda")
    if gpu:
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    if gpu:
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / repeats


def _point(probe: Probe, samples: Sequence[float]) -> Point:
    middle = median(samples)
    low, _, high = quantiles(samples, n=4)
    return Point(
        kind=probe.kind, dtype=probe.dtype, size=probe.size, seconds=middle, spread=(high - low) / 2 / middle
    )  # fmt: skip


def _page() -> float:
    """Seconds for a byte of memory that the system has to find and clear first."""
    with mmap.mmap(-1, FRESH) as fresh:
        began = time.perf_counter()
        for place in range(0, FRESH, mmap.PAGESIZE):
            fresh[place] = 1
        first = time.perf_counter() - began
        began = time.perf_counter()
        for place in range(0, FRESH, mmap.PAGESIZE):
            fresh[place] = 1
        return max(0.0, first - (time.perf_counter() - began)) / FRESH
