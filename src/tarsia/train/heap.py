"""Memory that a step has freed stays with the process, for the next step.

glibc gives large blocks back to the system and asks for them anew: each page is then faulted in and cleared again,
which can take longer than the arithmetic on it. While a run lasts it keeps what it has; afterwards all is given back.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

TRIM, MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
NEVER: Final = -1
LARGEST: Final = (2**30, 2**25)
"""Bytes from which a block of its own is mapped while memory is kept; older versions refuse more than the second."""
USUAL: Final = {MMAP: 2**25, TRIM: 2**26}
"""Where glibc's own thresholds end up in a process that has freed a large block."""


@contextmanager
def kept_heap() -> Iterator[bool]:
    """Keep freed memory inside. Gives whether the C library is one that can be told so (glibc), and was."""
    if platform.libc_ver()[0] != "glibc":
        yield False
        return
    library = ctypes.CDLL(None)
    largest = next((size for size in LARGEST if library.mallopt(MMAP, size)), None)
    kept = largest is not None and bool(library.mallopt(TRIM, NEVER))
    _thresholds.append(largest or USUAL[MMAP])
    try:
        yield kept
    finally:
        _thresholds.pop()
        for what, value in USUAL.items():
            library.mallopt(what, value)
        library.malloc_trim(0)


_thresholds: Final = [USUAL[MMAP]]
"""Bytes from which a block of its own is mapped now; the last one counts."""


@contextmanager
def apart(size: int = 2**16) -> Iterator[None]:
    """Blocks of at least ``size`` bytes get a mapping of their own inside: once freed they are the system's again.

    Also while memory is kept: between other blocks of the heap their room would be of use to this process alone.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    library.mallopt(MMAP, size)
    try:
        yield
    finally:
        library.mallopt(MMAP, _thresholds[-1])


def give_back(device: torch.device) -> None:
    """Return freed memory to the system, or to the GPU, while it is kept otherwise."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def out_of_memory(error: BaseException) -> bool:
    """Whether this is an allocator that had no memory, on a GPU or on a processor."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    told = str(error)
    return isinstance(error, RuntimeError) and any(words in told for words in _REFUSALS)


_REFUSALS: Final = (
    *("can't allocate memory", "not enough memory", "std::bad_alloc"),
    *("could not create a primitive", "could not create a memory"),
)
"""What torch's allocators for processors say, C++'s own, and oneDNN, which has no other words for it."""
