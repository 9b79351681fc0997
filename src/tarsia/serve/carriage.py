"""How the bytes of adapters come to where the model computes: for a processor they lie there, to a GPU they go."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

from tarsia.serve.tiers import Tier

_POPULATE: Final = 22  # madvise's MADV_POPULATE_READ, of Linux 5.14 and later


@dataclass(frozen=True, eq=False)
class Laid:
    """A file's bytes, uint8 [size], where the model computes, as soon as they are ``ready``."""

    whole: Tensor
    ready: Callable[[], bool]


class Ground(Protocol):
    """Where the model computes, and the way there. ``digest`` is of the content that a file is of."""

    device: torch.device

    def read(self, digest: bytes, path: Path) -> Tensor:
        """The file's bytes on this side, uint8 [size], read now. For any thread."""
        ...

    def here(self, digest: bytes, path: Path) -> Tensor | None:
        """The same where nobody has to wait for a disk, else None."""
        ...

    def laid(self, whole: Tensor) -> Laid:
        """These bytes where the model computes, for the thread that runs it."""
        ...


class Mapped:
    """A processor: a file is mapped, nothing is copied, and the system's own cache of files is the tier below."""

    device = torch.device("cpu")

    def read(self, digest: bytes, path: Path) -> Tensor:
        whole = mapped(path)
        if sys.platform == "linux":  # what can not be read ahead is read when somebody looks
            ctypes.CDLL(None).madvise(ctypes.c_void_p(whole.data_ptr()), ctypes.c_size_t(whole.numel()), _POPULATE)
        return whole

    def here(self, digest: bytes, path: Path) -> Tensor | None:
        whole = mapped(path)
        return whole if in_memory(whole) and said_of(path) else None

    def laid(self, whole: Tensor) -> Laid:
        return Laid(whole, lambda: True)


class Carried:
    """A GPU: files are kept in pinned memory, at most ``budget`` bytes, and copied on a stream of their own.

    A file that has no room in the budget is pinned for as long as it is copied. ``hold`` and ``copy`` are how; others
    than a GPU's are given by tests.
    """

    def __init__(
        self,
        device: torch.device,
        budget: int,
        hold: Callable[[int], Tensor] | None = None,
        copy: Callable[[Tensor], Laid] | None = None,
    ) -> None:
        self.device = device
        self._hold = hold or (lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True))
        self._copy = copy or _Stream(device).copy
        self._tier: Tier[bytes, Tensor] = Tier(budget)
        self._lock = threading.Lock()

    @property
    def pinned(self) -> int:
        """Bytes of all that is kept."""
        return self._tier.bytes

    def read(self, digest: bytes, path: Path) -> Tensor:
        kept = self.here(digest, path)
        if kept is not None:
            return kept
        size = path.stat().st_size
        with self._lock:
            roomy = digest not in self._tier and self._tier.reserve(digest, size)
        try:
            whole = self._hold(size)
            with path.open("rb") as file:
                count = file.readinto(whole.numpy().data)
            if count != size:
                raise OSError(f"{path} has {count} bytes, not {size}")
        except BaseException:
            if roomy:
                with self._lock:
                    self._tier.take(digest)
            raise
        if roomy:
            with self._lock:
                self._tier.put(digest, whole, size)
                self._tier.release(digest)
        return whole

    def here(self, digest: bytes, path: Path) -> Tensor | None:
        with self._lock:
            return self._tier.get(digest)

    def laid(self, whole: Tensor) -> Laid:
        return self._copy(whole)


class _Stream:
    """Copies beside what the GPU computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    def copy(self, whole: Tensor) -> Laid:
        """Begin to copy; the pinned bytes are held until it is done."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        there = torch.empty(whole.shape, dtype=whole.dtype, device=self._device)
        # the memory may have been a page's that a pass which is on its way still reads
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            there.copy_(whole, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        there.record_stream(self._stream)
        held = [whole]

        def ready() -> bool:
            if held and done.query():
                torch.cuda.current_stream(self._device).wait_event(done)
                held.clear()
            return not held

        return Laid(there, ready)


def ground(device: torch.device, budget: int) -> Ground:
    """That of a device, with ``budget`` bytes on this side of it."""
    return Carried(device, budget) if device.type == "cuda" else Mapped()


def mapped(path: Path) -> Tensor:
    """The bytes of a file, uint8 [size], of which nothing is copied."""
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def said_of(path: Path) -> bool:
    """Whether the system says what of a file is in memory: of others' files, Linux says that all of it is."""
    try:
        return os.stat(path).st_uid == os.geteuid() or os.access(
            path, os.W_OK, effective_ids=os.access in os.supports_effective_ids
        )
    except OSError:
        return False


def in_memory(whole: Tensor) -> bool:
    """Whether the system has all of the mapped bytes in memory; False where it does not say. See ``said_of``."""
    if sys.platform != "linux" or not whole.numel():
        return False
    said = torch.zeros(-(-whole.numel() // mmap.PAGESIZE), dtype=torch.uint8)
    place, size = ctypes.c_void_p(whole.data_ptr()), ctypes.c_size_t(whole.numel())
    failed = ctypes.CDLL(None).mincore(place, size, ctypes.c_void_p(said.data_ptr()))
    return not failed and bool((said & 1).all())
