"""Where pages of an optimiser's states go when they leave the device's memory, and how they come back.

A store is all that touches a file or a second memory; the optimiser computes on what ``room`` gives. Orders to a store
are carried out one after the other, beside what the device computes meanwhile.

On a processor pages go to one file, read and written past the process's own memory. A crash needs nothing of it: what
a run goes on from are checkpoints. On a GPU they go to pinned memory of the host over a stream of their own. Managed
memory, which the driver moves by faults, is not used: it would need no order, and gives none.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import weakref
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from tarsia.core.errors import TrainingError
from tarsia.train.disk import writing
from tarsia.train.heap import apart

SUFFIX: Final = ".pages"
_OURS: Final = re.compile(rf"states-[0-9]+-[0-9]+{re.escape(SUFFIX)}")
"""A file of pages: the process, and which of its files it is."""


class Store(Protocol):
    """Takes pages and gives them back. A page is known by its number; a ticket is what ``wait`` is asked about."""

    def open(self, sizes: Sequence[int], leaving: int) -> None:
        """Get ready for pages of so many float32 numbers, of which those from number ``leaving`` on will come."""

    def room(self, numbers: int) -> Tensor:
        """Memory of the device for a page, float32 [numbers], of any content.

        Raises what the device's allocator does where there is none.
        """

    def write(self, page: int, source: Tensor) -> Any:
        """Take a page. Whoever gave it may not write to ``source`` until the ticket was waited for."""

    def read(self, page: int, into: Tensor) -> Any:
        """Give a page; zeros where it was never taken."""

    def wait(self, ticket: Any) -> None:
        """Return when the order is carried out. Raises TrainingError where it could not be."""

    def close(self) -> None:
        """Forget all pages and leave nothing behind."""


class FilePages:
    """Pages in a file of its own in ``folder``; each is checked when it comes back.

    The file is locked while its process lives: at the start what killed processes left there is removed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path: Path | None = None
        self._handle = -1
        self._sizes: tuple[int, ...] = ()
        self._sums: dict[int, int] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._end: Callable[[], Any] = int

    def open(self, sizes: Sequence[int], leaving: int) -> None:
        """Make the file and reserve what will surely be written. Raises TrainingError where the disk refuses."""
        if self.path is not None:
            return
        self._sizes = tuple(4 * size for size in sizes)
        with self._writing():
            made = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_left(self.folder)
            self.path, self._handle = _fresh(self.folder)
            self._end = weakref.finalize(self, _remove, self.path, self._handle, made)
            begin = self._place(leaving)
            if begin < sum(self._sizes):
                _reserve(self._handle, begin, sum(self._sizes) - begin)
        self._thread = ThreadPoolExecutor(1, "pages")

    def room(self, numbers: int) -> Tensor:
        with apart():
            return torch.empty(numbers, dtype=torch.float32)

    def write(self, page: int, source: Tensor) -> Future[None]:
        return self._order(self._write, page, source)

    def read(self, page: int, into: Tensor) -> Future[None]:
        return self._order(self._read, page, into)

    def wait(self, ticket: Future[None]) -> None:
        ticket.result()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
        self._end()
        self.path, self._handle, self._sums, self._thread = None, -1, {}, None

    def _order(self, do: Callable[[int, Tensor], None], page: int, tensor: Tensor) -> Future[None]:
        assert self._thread is not None, "a store is opened first"
        given = [tensor]
        # taken out of the list: when the order is done the thread no longer holds what may have to go
        return self._thread.submit(lambda: do(page, given.pop()))

    def _place(self, page: int) -> int:
        return sum(self._sizes[:page])

    def _write(self, page: int, source: Tensor) -> None:
        content, place = _bytes(source), self._place(page)
        with self._writing():
            done = 0
            while done < len(content):
                done += os.pwrite(self._handle, content[done:], place + done)
        self._sums[page] = zlib.crc32(content)

    def _read(self, page: int, into: Tensor) -> None:
        if page not in self._sums:
            into.zero_()
            return
        content, place, done = _bytes(into), self._place(page), 0
        try:
            while done < len(content) and (got := os.preadv(self._handle, [content[done:]], place + done)):
                done += got
            wrong = f"{done} of its {len(content)} bytes are there" if done < len(content) else ""
            if not wrong and zlib.crc32(content) != self._sums[page]:
                wrong = "its bytes are not those that were written"
        except OSError as error:
            wrong = str(error.strerror)
        if wrong:
            raise TrainingError(
                "A page of the optimiser's states is lost.",
                given=f"page {page} in {self.path}: {wrong}",
                do="see to the disk and run again; it goes on from the last checkpoint",
            )

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        whole = sum(self._sizes) / 1e6
        do = f"free {whole:.1f} MB or set optimiser.path to another disk, and run again; checkpoints are as they were"
        return writing("A page of the optimiser's states", self.folder, do)


class PinnedPages:
    """Pages in pinned memory of the host, copied on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = None
        self._held: dict[int, Tensor] = {}
        self._known: set[int] = set()

    def open(self, sizes: Sequence[int], leaving: int) -> None:
        """Take the memory that will surely be needed. Raises TrainingError where the host has none."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
            for page in range(leaving, len(sizes)):
                self._pinned(page, sizes[page])

    def room(self, numbers: int) -> Tensor:
        return torch.empty(numbers, dtype=torch.float32, device=self.device)

    def write(self, page: int, source: Tensor) -> Any:
        held = self._pinned(page, source.numel())
        self._known.add(page)
        return self._copy(source, held, source)

    def read(self, page: int, into: Tensor) -> Any:
        if page not in self._known:
            into.zero_()
            return self._event()
        return self._copy(self._held[page], into, into)

    def wait(self, ticket: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(ticket)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
        self._stream, self._held, self._known = None, {}, set()

    def _copy(self, source: Tensor, into: Tensor, on_device: Tensor) -> Any:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)
        on_device.record_stream(self._stream)
        return self._stream.record_event()

    def _event(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def _pinned(self, page: int, numbers: int) -> Tensor:
        if page not in self._held:
            try:
                self._held[page] = torch.empty(numbers, dtype=torch.float32, pin_memory=True)
            except RuntimeError as error:
                raise TrainingError(
                    "The host has no pinned memory for a page of the optimiser's states.",
                    given=f"{4 * numbers} bytes, {len(self._held)} pages before: {str(error).splitlines()[0]}",
                    do="free memory of the host, or raise optimiser.budget so that fewer states leave the GPU",
                ) from error
        return self._held[page]


class Held:
    """No second place: pages stay where they are (``paged: false``)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def open(self, sizes: Sequence[int], leaving: int) -> None:
        assert leaving >= len(sizes), "nothing leaves"

    def room(self, numbers: int) -> Tensor:
        return torch.empty(numbers, dtype=torch.float32, device=self.device)

    def write(self, page: int, source: Tensor) -> None:
        raise AssertionError("nothing leaves")

    def read(self, page: int, into: Tensor) -> None:
        into.zero_()

    def wait(self, ticket: None) -> None:
        pass

    def close(self) -> None:
        pass


def store_for(device: torch.device, paged: bool, folder: Path) -> Store:
    """Where pages go from a device; ``folder`` is for those of a processor."""
    if not paged:
        return Held(device)
    return PinnedPages(device) if device.type == "cuda" else FilePages(folder)


def remove_left(folder: Path) -> tuple[Path, ...]:
    """Remove files of pages whose process has ended, as ``_fresh`` names them and no others. Returns them."""
    gone = []
    for path in sorted(path for path in folder.iterdir() if _OURS.fullmatch(path.name)):
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                continue
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except (FileNotFoundError, PermissionError):  # its process has ended meanwhile, or it is another user's
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            gone.append(path)
        except (BlockingIOError, PermissionError):
            pass  # of a run that goes on, or in a folder where others' files can not be removed
        finally:
            os.close(handle)
    return tuple(gone)


def _fresh(folder: Path) -> tuple[Path, int]:
    """A new file that is locked. One that somebody took for a killed run's, before it was, is made again."""
    count = 0
    while True:
        path = folder / f"states-{os.getpid()}-{count}{SUFFIX}"
        count += 1
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            continue
        if os.fstat(handle).st_nlink:
            return path, handle
        os.close(handle)


def _reserve(handle: int, place: int, size: int) -> None:
    """Let a full disk be known now, where the file system can tell."""
    try:
        os.posix_fallocate(handle, place, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _remove(path: Path, handle: int, folder: bool) -> None:
    path.unlink(missing_ok=True)
    os.close(handle)
    if folder:
        with contextlib.suppress(OSError):  # others have put something there
            path.parent.rmdir()


def _bytes(tensor: Tensor) -> memoryview:
    numbers: Any = tensor.numpy()
    return memoryview(numbers).cast("B")
