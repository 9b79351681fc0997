"""Folders that are written whole or not at all."""

from __future__ import annotations

import ctypes
import fcntl
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tarsia.core.errors import AdapterError


def write_folder(
    folder: Path, write: Callable[[Path], None], mine: Callable[[Path], bool], what: str = "adapter"
) -> None:
    """Let ``write`` fill a temporary folder beside ``folder``, then put it in its place in one step.

    Whoever looks at ``folder``, at any moment and after any crash, sees what was there or all that is new. What
    is there already must be an empty folder or one that is ``mine``. ``what`` it is, is for messages. Raises
    AdapterError, with the old folder as it was, where the disk is full or the place can not be written.
    """
    if folder.is_symlink() or (folder.exists() and not _replaceable(folder, mine)):
        raise AdapterError(
            f"Something that is no {what} is there already.",
            given=str(folder),
            do="choose another folder, or remove it first",
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(folder) as fresh:
            write(fresh)
            for path in fresh.iterdir():
                if path.is_file() and not path.is_symlink():
                    # what writes tensors keeps them to its user; the folder has what this process gives
                    path.chmod(fresh.stat().st_mode & 0o666)
                _sync(path)
            _sync(fresh)
            if folder.exists():
                _exchange(fresh, folder)
            else:
                os.rename(fresh, folder)
            _sync(folder.parent)
    except OSError as error:
        raise AdapterError(
            f"The {what} can not be written; what was there before is as it was.",
            given=f"{folder}: {error.strerror or error}",
            do="make room or choose another folder, and save again",
        ) from error


def _replaceable(folder: Path, mine: Callable[[Path], bool]) -> bool:
    return folder.is_dir() and (mine(folder) or not any(folder.iterdir()))


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A fresh sibling, locked while its writer lives; those of dead writers are removed."""
    prefix = f".{folder.name}.saving-"
    for stale in folder.parent.glob(f"{glob_escape(prefix)}*"):
        with _opened(stale) as handle:
            if _lock(handle):
                shutil.rmtree(stale)
    fresh = folder.parent / f"{prefix}{secrets.token_hex(6)}"
    fresh.mkdir()
    with _opened(fresh) as handle:
        _lock(handle)
        try:
            yield fresh
        finally:
            # after an exchange this is the old folder; after a rename it is gone
            if fresh.exists():
                # what can not be removed now, the next save takes away
                shutil.rmtree(fresh, ignore_errors=True)


def glob_escape(text: str) -> str:
    """The text as a pattern that matches only itself."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sync(path: Path) -> None:
    with _opened(path) as handle:
        os.fsync(handle)


def _exchange(fresh: Path, folder: Path) -> None:
    """Swap two folders' names in one step (Linux: renameat2 RENAME_EXCHANGE; macOS: renamex_np RENAME_SWAP)."""
    libc = ctypes.CDLL(None, use_errno=True)
    a, b, swap = os.fsencode(fresh), os.fsencode(folder), 2
    if sys.platform == "darwin":
        failed = libc.renamex_np(a, b, swap)
    else:
        here = -100  # AT_FDCWD
        failed = libc.renameat2(here, a, here, b, swap)
    if failed:
        kept = folder.with_name(f"{folder.name}.new-{secrets.token_hex(4)}")
        os.rename(fresh, kept)
        raise AdapterError(
            "This file system can not replace a folder in one step, so the new adapter lies beside the old one.",
            given=f"{folder}: {os.strerror(ctypes.get_errno())}",
            do=f"it is whole in {kept}: remove the old folder and rename this one, or save under a new name",
        )
