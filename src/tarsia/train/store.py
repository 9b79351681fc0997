"""A bounded folder of tensors by key, shared by any number of processes; nothing in it has to be trusted.

One entry is one file, ``ab/abcd....features``: a header (magic, key, length, CRC-32) and a safetensors body.
Entries appear under their name whole (temporary file, then rename), and whatever is not whole when it is read,
after a power cut say, is seen, removed and told. Readers take no lock. Writers take the folder's lock, which the
system lifts with the process; the lock's file holds a number of bytes that is never below what the entries
take, so the bound holds at every moment, whoever is killed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tarsia.core.errors import ConfigError

_HEADER: Final = struct.Struct("<8s32sQI")
_MAGIC: Final = b"tarsia-1"
_SUFFIX: Final = ".features"
_LOCK: Final = ".lock"
_FRESH: Final = ".writing-"
_SPARE: Final = 0.1
"""Share of the bound that eviction frees at a time, for it reads the whole folder."""
_PATIENCE: Final = 2.0
"""Seconds to wait for a writer; one that was stopped in the middle must not stop all others."""


class Store:
    """A folder of entries; ``limit`` is in bytes, of files with their headers, and holds for what this process writes.

    Writing is given up, and told once, where the disk is full or the folder can only be read. ``told`` collects
    what the user must see. Raises ConfigError where the folder can neither be made nor read.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.told: list[str] = []
        self.damaged = self.evicted = self.unwritten = 0
        self._writes = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.scandir(folder).close()
        except OSError as error:
            raise ConfigError(
                "The folder of the features can not be used.",
                given=f"{folder}: {error.strerror or error}",
                do="choose another features.path",
            ) from None
        try:
            with self._locked() as handle:
                if handle is not None:
                    self._clear()
                    _note(handle, self._scan()[0])
        except OSError as error:
            self._give_up(error)

    def get(self, key: bytes) -> dict[str, Tensor] | None:
        """The tensors of ``key`` (32 bytes), bit for bit as they were put; None where there are none that are whole."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._tell_damage(f"{path}: {error.strerror or error}")
            return None
        try:
            found = _decode(key, content)
        except _DamagedError as error:
            self._remove_damaged(path, key, str(error))
            return None
        with suppress(OSError):  # a folder that is only read, or another process was faster to evict it
            os.utime(path, ns=(time.time_ns(),) * 2)
        return found

    def put(self, key: bytes, tensors: Mapping[str, Tensor]) -> None:
        """Keep ``tensors`` under ``key``, evicting those that were used longest ago where there is no room."""
        content = _encode(key, tensors)
        if len(content) > self.limit:
            self._tell_once("features: a picture takes more than the whole limit", f"{len(content)} bytes")
        if len(content) > self.limit or not self._writes:
            self.unwritten += 1
            return
        try:
            with self._locked() as handle:
                if handle is None:
                    self.unwritten += 1
                elif not self._path(key).exists():
                    self._place(handle, key, content)
        except OSError as error:
            self.unwritten += 1
            self._give_up(error)

    def size(self) -> tuple[int, int]:
        """Bytes and number of the entries, read from the folder; 0 and told where it can no longer be read."""
        try:
            total, entries = self._scan()
        except OSError as error:
            self._tell_once("features: the folder can no longer be read", f"{self.folder}: {error.strerror or error}")
            return 0, 0
        return total, len(entries)

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self.folder / name[:2] / f"{name}{_SUFFIX}"

    def _place(self, handle: int, key: bytes, content: bytes) -> None:
        path, fresh = self._path(key), self.folder / f"{_FRESH}{os.getpid()}"
        total = _noted(handle)
        if total is None or total + len(content) > self.limit:
            total = self._evict(self.limit - len(content))
        # first counted, then written: whoever is killed in between leaves a number that is too high
        _note(handle, total + len(content))
        try:
            with fresh.open("wb") as file:
                file.write(content)
            os.utime(fresh, ns=(time.time_ns(),) * 2)
            path.parent.mkdir(exist_ok=True)
            os.replace(fresh, path)
        except OSError:
            fresh.unlink(missing_ok=True)
            _note(handle, total)
            raise

    def _evict(self, room: int) -> int:
        """Remove the entries used longest ago until the rest takes at most ``room``. Returns what the rest takes."""
        self._clear()
        total, entries = self._scan()
        if total <= room:
            return total
        aim = max(0, min(room, int(self.limit * (1 - _SPARE))))
        for _, size, path in sorted(entries):
            if total <= aim:
                break
            path.unlink(missing_ok=True)
            total -= size
            self.evicted += 1
        return total

    def _scan(self) -> tuple[int, list[tuple[int, int, Path]]]:
        """Bytes of all entries, and of each its time of last use, bytes and path."""
        found = []
        for shard in os.scandir(self.folder):
            if len(shard.name) != 2 or not shard.is_dir(follow_symlinks=False):
                continue
            for entry in os.scandir(shard):
                with suppress(FileNotFoundError):  # a process that only reads removes nothing, but one that scans may
                    status = entry.stat(follow_symlinks=False)
                    found.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
        return sum(size for _, size, _ in found), found

    def _clear(self) -> None:
        """Remove what killed writers left: whoever holds the lock is the only one who may write."""
        for left in self.folder.glob(f"{_FRESH}*"):
            left.unlink(missing_ok=True)

    def _remove_damaged(self, path: Path, key: bytes, why: str) -> None:
        """Remove an entry that is not whole, unless another process has put a whole one in its place meanwhile."""
        self._tell_damage(f"{path}: {why}")
        with suppress(OSError), self._locked() as handle:  # what can not be removed is computed anew each time
            if handle is None:
                return
            try:
                _decode(key, path.read_bytes())
            except _DamagedError:
                path.unlink()  # and still counted: what it was counted as is not known

    @contextmanager
    def _locked(self) -> Iterator[int | None]:
        """The folder's lock as an open file, or None where another process keeps it too long."""
        handle = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            until = time.monotonic() + _PATIENCE
            while not _lock(handle):
                if time.monotonic() > until:
                    self._tell_once("features: another process has kept the folder locked", f"{_PATIENCE:g} s")
                    yield None
                    return
                time.sleep(0.001)
            yield handle
        finally:
            os.close(handle)

    def _give_up(self, error: OSError) -> None:
        self._writes = False
        why = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up"}
        reason = why.get(error.errno or 0, error.strerror or str(error))
        self._tell_once("features: nothing more is written", f"{self.folder}: {reason}")

    def _tell_damage(self, what: str) -> None:
        self.damaged += 1
        self._tell_once("features: an entry was damaged and is computed anew (further ones are counted)", what)

    def _tell_once(self, what: str, given: str) -> None:
        if not any(line.startswith(what) for line in self.told):
            self.told.append(f"{what}: {given}")


class _DamagedError(Exception):
    """Bytes that are not those that were written."""


def _encode(key: bytes, tensors: Mapping[str, Tensor]) -> bytes:
    body = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    return _HEADER.pack(_MAGIC, key, len(body), _sum(key, body)) + body


def _decode(key: bytes, content: bytes) -> dict[str, Tensor]:
    if len(content) < _HEADER.size:
        raise _DamagedError(f"{len(content)} bytes")
    magic, held, length, checksum = _HEADER.unpack_from(content)
    body = content[_HEADER.size :]
    if (magic, held, length) != (_MAGIC, key, len(body)):
        raise _DamagedError("its header is not that of this entry")
    if checksum != _sum(key, body):
        raise _DamagedError("its checksum is wrong")
    try:
        return load(body)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _DamagedError(str(error)) from None


def _sum(key: bytes, body: bytes) -> int:
    # sees every change of up to 32 neighbouring bits; SHA-256 would take longer than reading does
    return zlib.crc32(body, zlib.crc32(key))


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _noted(handle: int) -> int | None:
    """The number of bytes that the lock's file holds, or None where it holds none."""
    text = os.pread(handle, 32, 0)
    return int(text) if len(text) == 20 and text.isdigit() else None


def _note(handle: int, total: int) -> None:
    os.pwrite(handle, b"%020d" % total, 0)
