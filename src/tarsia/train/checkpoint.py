"""Checkpoints that are whole or not there, and the lock that keeps two runs out of one folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from tarsia.core.errors import ConfigError, TrainingError
from tarsia.train.disk import sync_folder, write_synced, writing
from tarsia.train.spread import Spread, Stored, Whole, write_tensors

KEEP = 2
"""Checkpoints that stay: the newest, and one to fall back on."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All that a run needs to go on: tensors, and plain values as JSON.

    ``spread`` are tensors that are brought together only in the file; one that was read has none.
    """

    step: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    spread: tuple[Spread, ...] = field(default=(), kw_only=True)


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write ``folder/step-000123`` and drop what is older than the last two. Returns its path.

    The folder appears under its name only when every byte is on the disk. Raises TrainingError where the
    disk refuses; the older checkpoints are then as they were.
    """
    final = folder / f"step-{checkpoint.step:06d}"
    partial = folder / f".partial-{checkpoint.step:06d}"
    sources = (Whole(checkpoint.tensors), *checkpoint.spread)
    size = sum(math.prod(shape) * dtype.itemsize for s in sources for dtype, shape in s.specs().values())
    values = {"step": checkpoint.step, **checkpoint.values}
    kept = ", ".join(path.name for path in found(folder)) or "none"
    do = f"free {size / 1e6:.1f} MB and run again; it goes on from the last checkpoint ({kept})"
    with writing(f"The checkpoint of step {checkpoint.step}", final, do):
        try:
            _place(partial, final, sources, values)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    for old in found(folder)[KEEP:]:
        shutil.rmtree(old)
    return final


def _place(partial: Path, final: Path, sources: Sequence[Spread], values: Mapping[str, Any]) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = partial / "tensors.safetensors"
    with tensors.open("wb") as file:
        write_tensors(file, sources)
        file.flush()
        os.fsync(file.fileno())
    values = {**values, "sha256": _digest(values, tensors)}
    write_synced(partial / "state.json", json.dumps(values, indent=1).encode())
    sync_folder(partial)
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    sync_folder(final.parent)


def _digest(values: Mapping[str, Any], tensors: Path) -> str:
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    with tensors.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def found(folder: Path) -> list[Path]:
    """Checkpoints in ``folder``, the newest first, readable or not."""
    # by number: step-1000000 comes after step-999999
    return sorted(folder.glob("step-*"), key=lambda path: (len(path.name), path.name), reverse=True)


def read(path: Path) -> Checkpoint:
    """Read one checkpoint. Raises TrainingError where a byte is wrong or a file is missing."""
    try:
        values = json.loads((path / "state.json").read_bytes())
        tensors = path / "tensors.safetensors"
        if values.pop("sha256") != _digest(values, tensors):
            raise ValueError("its bytes are not those that were written")
        return Checkpoint(values.pop("step"), Stored(tensors), values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise TrainingError(
            "A checkpoint is damaged.", given=f"{path}: {error}", do="remove it to go on from the one before"
        ) from error


def newest(folder: Path) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """The newest checkpoint that is whole, and what to tell the user about damaged ones.

    Raises TrainingError where there are checkpoints and none can be read.
    """
    told: list[str] = []
    for path in found(folder):
        try:
            return read(path), tuple(told)
        except TrainingError as error:
            told.append(f"{error.what} {error.given}")
    if told:
        raise TrainingError(
            "No checkpoint can be read.", given="; ".join(told), do=f"remove {folder} to start from step 0"
        )
    return None, ()


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other runs out of ``out``. The system lifts the lock with the process, however it ends.

    Raises ConfigError where another run holds it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            "The run's folder can not be written.", given=f"{out}: {error.strerror}", do="choose another out"
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 64, 0).decode() or "unknown"
            raise ConfigError(
                "Another run is writing to this folder.",
                given=f"{out} (process {owner})",
                do="wait, or choose another out",
            ) from None
        with writing("The run's lock", out, "free some space, or choose another out"):
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)
