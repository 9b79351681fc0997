"""Writing that is on the disk when it returns, and that says so clearly when the disk refuses."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tarsia.core.errors import TrainingError


@contextmanager
def writing(what: str, path: Path, do: str) -> Iterator[None]:
    """Turn the system's refusal to write ``what`` into a TrainingError that says what is lost and what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise TrainingError(
            f"{what} can not be written" + (": the disk is full." if full else "."),
            given=f"{path}: {error.strerror or error}",
            do=do,
        ) from error


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the disk has the folder's own entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
