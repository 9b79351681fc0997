"""Where things are written before they are there, and thrown away after they are gone.

A stage is a folder in ``stages/`` that its process keeps locked; the system lifts the lock when the process
ends, however it ends. A stage that nobody has locked is dead, and whoever sees it may remove it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tarsia.library.places import Places


@contextmanager
def staged(places: Places) -> Iterator[Path]:
    """An empty folder that nobody else touches while this lasts; what is left of it then is removed."""
    while (made := _locked(places.stages / os.urandom(8).hex())) is None:
        pass
    fresh, handle = made
    try:
        yield fresh
    finally:
        if fresh.exists():
            remove(fresh)
        os.close(handle)


def _locked(fresh: Path) -> tuple[Path, int] | None:
    """Make a stage and lock it; None where a sweeper was between the two and took it for a dead one."""
    fresh.mkdir()
    try:
        handle = os.open(fresh, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(handle, fcntl.LOCK_EX)
    if fresh.exists():
        return fresh, handle
    os.close(handle)
    return None


def dead(places: Places) -> Iterator[Path]:
    """Stages whose process is gone, each locked by us until the next is asked for."""
    for path in sorted(places.stages.iterdir()) if places.stages.is_dir() else ():
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # its process has just finished with it
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists():
                yield path
        except BlockingIOError:
            continue
        finally:
            os.close(handle)


def shift(path: Path, stage: Path, name: str | None = None) -> None:
    """Take a file or a folder, which may be read-only, out of the library's sight, into a stage."""
    if path.is_dir():
        path.chmod(0o755)  # a folder that can not be written can not be given another parent
    os.rename(path, stage / (name or path.name))


def remove(folder: Path) -> None:
    """Remove a folder, or a file, that may be read-only."""
    if not folder.is_dir():
        folder.unlink()
        return
    folder.chmod(0o700)
    for inner in folder.iterdir():
        if inner.is_dir():
            inner.chmod(0o700)
    import shutil  # not at the top: with the compressors that it takes in it delays every command

    shutil.rmtree(folder)


def harden(folder: Path) -> None:
    """Make a folder's files read-only and flush them, and the folder, to the disk."""
    for path in folder.iterdir():
        path.chmod(0o444)
        flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """What is in a file, or in the list of a folder, is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path: Path, content: bytes, places: Places, mode: int = 0o444) -> None:
    """Write a file, whole or not at all, durably; its folder is made where it is not there."""
    if not path.parent.is_dir():
        path.parent.mkdir()
        flush(path.parent.parent)
    with staged(places) as fresh:
        draft = fresh / path.name
        draft.write_bytes(content)
        draft.chmod(mode)
        flush(draft)
        os.replace(draft, path)
    flush(path.parent)
