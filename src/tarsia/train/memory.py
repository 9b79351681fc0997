"""What was really in memory: instruments that change no number and ask nothing of the code they watch.

with live() as watched:
    phase(Phase.FORWARD)
    ...
watched.peak, watched.phase, watched.line
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from threading import get_ident
from typing import Any, Final

import torch
from torch import Tensor, UntypedStorage
from torch._C._autograd import _disable_profiler, _enable_profiler, _prepare_profiler, _profiler_enabled
from torch._C._profiler import (
    ProfilerActivity,
    ProfilerConfig,
    ProfilerState,
    RecordScope,
    _ExperimentalConfig,
    _ExtraFields_Allocation,
)

QUIET: Final = "99"
"""Above the lines that the profiler's library writes at each start and stop (KINETO_LOG_LEVEL)."""
ERROR: Final = 2
"""The level of torch's own log above warnings."""


class Phase(StrEnum):
    """The parts of a step."""

    FORWARD = "forward"
    BACKWARD = "backward"
    UPDATE = "update"


_listeners: list[Callable[[str], None]] = []


def phase(name: str) -> None:
    """Say that this phase begins, to all who listen; nobody mostly."""
    for listener in _listeners:
        listener(name)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """``listener`` hears inside of each phase as it begins."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class Live:
    """The bytes that torch's CPU allocator handed out, less those that came back, from one moment on."""

    def __init__(self) -> None:
        self.line: list[tuple[int, int]] = []
        """After each allocation and each free: nanoseconds since the start, live bytes above those at the start."""
        self.marks: list[tuple[int, str]] = []
        """Each mark: how many entries of ``line`` came before it, and its name."""
        self._signs: list[tuple[Tensor, str | int]] = []
        self._thread = get_ident()

    @property
    def peak(self) -> int:
        """The most bytes live at once above those at the start; 0 where there were never more."""
        return max((held for _, held in self.line), default=0)

    @property
    def phase(self) -> str:
        """The last mark before the peak was first reached; "" where there was none."""
        peak = self.peak
        return self.phase_at(next((n for n, (_, held) in enumerate(self.line) if held == peak), 0))

    @property
    def peaks(self) -> dict[str, int]:
        """The most bytes live at once after each mark and before the next, by its name; "" before any mark."""
        found: dict[str, int] = {}
        edges = [(0, ""), *self.marks, (len(self.line), "")]
        before = 0
        for (first, name), (end, _) in pairwise(edges):
            inside = [held for _, held in self.line[first:end]]
            # what was live as it was called so is live in it
            found[name] = max(found.get(name, 0), before, *inside)
            before = inside[-1] if inside else before
        return found

    def phase_at(self, entry: int) -> str:
        """The last mark before this entry of ``line``."""
        return next((name for before, name in reversed(self.marks) if before <= entry), "")

    def mark(self, name: str) -> None:
        """Put a name on this moment; what follows until the next one is called so."""
        self._sign(name)

    def _sign(self, what: str | int) -> None:
        if get_ident() != self._thread:  # as nothing of other threads is seen
            return
        # a byte of its own in the record: its place among the others is exact, which no clock's reading is
        self._signs.append((torch.empty(1, dtype=torch.uint8), what))

    def _read(self, record: list[tuple[int, int, int]], began: int) -> None:
        """Make the line from (moment, address, bytes) of all that was allocated (above 0) and freed (below 0)."""
        last = {address: n for n, (_, address, size) in enumerate(record) if size > 0}
        signs = {last[sign.data_ptr()]: what for sign, what in self._signs if sign.data_ptr() in last}
        sizes: dict[int, int] = {}
        held = 0
        for n, (moment, address, size) in enumerate(record):
            sign = signs.get(n)
            if isinstance(sign, str):
                self.marks.append((len(self.line), sign))
                continue
            if sign is not None:
                change = -sign
            elif size > 0:
                change = sizes[address] = size
            else:
                # torch remembers what an earlier record saw and nobody saw freed: that is not of this one
                change = -sizes.pop(address, 0)
            if change:
                held += change
                self.line.append((moment - began, held))
        self._signs.clear()


class OnDevice:
    """The most that a CUDA device's allocator had handed out at once, in each phase; its blocks are of 512 bytes."""

    def __init__(self, device: torch.device) -> None:
        self.reserved = 0
        """The most that it had taken from the device."""
        self.allocated = 0
        """The most that it had handed out at once, whenever it was."""
        self._device, self._name = device, ""
        self._peaks: dict[str, int] = {}

    def mark(self, name: str) -> None:
        """What follows until the next one is called so."""
        peak = torch.cuda.max_memory_allocated(self._device)
        self.allocated = max(self.allocated, peak)
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved(self._device))
        self._peaks[self._name] = max(self._peaks.get(self._name, 0), peak)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._name = name

    @contextmanager
    def step(self) -> Iterator[dict[str, int]]:
        """Gives the peak of each phase that is said inside, once it has ended."""
        self.mark("")
        self._peaks.clear()
        peaks: dict[str, int] = {}
        with listening(self.mark):
            yield peaks
        self.mark("")
        peaks |= self._peaks


def forget() -> None:
    """Forget the peaks that CUDA devices had up to now."""
    for device in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        torch.cuda.reset_peak_memory_stats(device)


def can_watch() -> bool:
    """Whether nothing else records this thread already (a profiler of the user's, another ``live``)."""
    return not _profiler_enabled()


@contextmanager
def live(standing: Iterable[UntypedStorage] = ()) -> Iterator[Live]:
    """Watch the live bytes of tensors on the CPU. What is given is filled in at the end.

    The record is that of torch's own allocator (the profiler's memory events, with none of the operators that it
    records else), so sizes are those asked for, to the byte, and a view or an operation in place adds nothing. What
    is alive at the start and freed inside is subtracted where it is in ``standing``; torch does not say the size of
    another one, which is then as if it had stayed. (Who keeps ``standing``, keeps them alive.) ``phase`` puts marks on
    the line.

    Seen is all that comes from torch's allocator in this thread, in the backward pass too (which a CPU computes in the
    thread that asked for it): also what operators take for themselves, as oneDNN's reordered weights (a convolution, a
    product in bfloat16) and attention's buffers for each thread. Not seen: numpy and Python; memory-mapped files; what
    MKL takes for itself; the arena of the kernels for weights in 4 bits; what other threads allocate.

    Raises RuntimeError where this thread is recorded already (``can_watch``).
    """
    if not can_watch():
        raise RuntimeError("this thread is profiled already")
    watched = Live()
    held = [weakref.ref(storage, _dying(watched, storage.nbytes())) for storage in standing]
    del standing  # else they would not die
    with listening(watched.mark), _hushed():
        _start()
        try:
            first = torch.empty(1, dtype=torch.uint8)
            yield watched
        finally:
            held.clear()
            record = _stop()
            began = next(n for n, (_, address, _) in enumerate(record) if address == first.data_ptr())
            watched._read(record[began + 1 :], record[began][0])


def _dying(watched: Live, size: int) -> Callable[[Any], None]:
    return lambda _: watched._sign(size)


def _config() -> ProfilerConfig:
    memory = True
    return ProfilerConfig(ProfilerState.KINETO, False, memory, False, False, False, _ExperimentalConfig())


def _start() -> None:
    activities = {ProfilerActivity.CPU}
    # the library reads it once, at its first start
    given = os.environ.get("KINETO_LOG_LEVEL")
    os.environ.setdefault("KINETO_LOG_LEVEL", QUIET)
    try:
        _prepare_profiler(_config(), activities)
        # of operators none is recorded: only those scopes are that users open
        enable: Any = _enable_profiler  # its stub lacks the scopes
        enable(_config(), activities, {RecordScope.USER_SCOPE})
    finally:
        if given is None:
            del os.environ["KINETO_LOG_LEVEL"]


def _stop() -> list[tuple[int, int, int]]:
    """End the record. Returns (nanoseconds, address, bytes) of each allocation and free, in order."""
    found: list[tuple[int, int, int]] = []
    rest = list(_disable_profiler().experimental_event_tree())
    while rest:
        event = rest.pop()
        rest += event.children
        fields = event.extra_fields
        if isinstance(fields, _ExtraFields_Allocation) and fields.device.type == "cpu":
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    return sorted(found, key=lambda entry: entry[0])


@contextmanager
def _hushed() -> Iterator[None]:
    """Inside, torch does not warn of each block that it did not see being allocated, where it can be told so."""
    level = _log_level()
    if level is None:
        yield
        return
    before = level.value
    level.value = max(before, ERROR)
    try:
        yield
    finally:
        level.value = before


def _log_level() -> ctypes.c_int | None:
    """The level of torch's own log; None where its library is elsewhere, or was built with another log."""
    path = next((Path(torch.__file__).parent / "lib").glob("libc10.*"), None)
    try:
        return None if path is None else ctypes.c_int.in_dll(ctypes.CDLL(str(path)), "FLAGS_caffe2_log_level")
    except ValueError:  # no such symbol
        return None
