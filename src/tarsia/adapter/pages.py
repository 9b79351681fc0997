"""Pages of files that a process has read and needs no more: given back, so that they do not count as its memory."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

from torch import Tensor


def give_back(tensor: Tensor) -> int:
    """Let go of the pages of a file that ``tensor`` is a view of; returns their bytes.

    They are read again where somebody looks. Nothing is done for a tensor in memory of its own, nor where the
    system does not say which is which (it is Linux that does).
    """
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
    page = mmap.PAGESIZE
    first, last = -(-start // page) * page, end // page * page
    if tensor.device.type != "cpu" or first >= last or not _of_a_file(first, last):
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
    return 0 if failed else last - first


def _of_a_file(first: int, last: int) -> bool:
    """Whether all of this memory is one mapping of a safetensors file: memory of any other kind would be lost."""
    if not sys.platform.startswith("linux"):
        return False
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        low, high = (int(number, 16) for number in line.split(maxsplit=1)[0].split("-"))
        if low <= first < high:
            return last <= high and line.endswith(".safetensors")
    return False
