"""Call the kernels with every array against a page that may not be touched: ``python guard_pages.py LIBRARY SET [N]``.

A read or a write one byte outside of an array ends this process. N: how many bytes the codes are short of (0), to see
that it does.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
SIZES = (4, 2, 2)
SHAPES = ((1, 64), (3, 192), (5, 100), (7, 65), (2, 1104), (33, 128), (1, 2))


class Arrays:
    """Arrays that end (or begin) where a forbidden page begins (or ends); all of one call, freed together."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self.held: list[tuple[int, int]] = []

    def make(self, content: bytes) -> int:
        inner = -(-len(content) // mmap.PAGESIZE) * mmap.PAGESIZE or mmap.PAGESIZE
        whole = inner + 2 * mmap.PAGESIZE
        base = LIBC.mmap(None, whole, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        assert base not in (None, ctypes.c_void_p(-1).value)
        self.held.append((base, whole))
        for forbidden in (base, base + mmap.PAGESIZE + inner):
            assert LIBC.mprotect(forbidden, mmap.PAGESIZE, 0) == 0
        first: int = base + mmap.PAGESIZE + (inner - len(content) if self.at_end else 0)
        ctypes.memmove(first, content, len(content))
        return first

    def free(self) -> None:
        for base, size in self.held:
            LIBC.munmap(base, size)
        self.held.clear()


class Weight(ctypes.Structure):
    """tarsia4_weight."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "levels", "absmax", "scale_codes", "scale_levels")),
        ("scale_absmax", ctypes.c_void_p),
        ("offset", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "block")),
    )


def floats(count: int) -> bytes:
    return bytes((ctypes.c_float * count)(*(random.random() for _ in range(count))))


def call(library: ctypes.CDLL, which: int, shape: tuple[int, int], arrays: Arrays, nested: bool, short: int) -> None:
    size, make = ctypes.c_int64, arrays.make
    rows, columns = shape
    count = rows * columns
    blocks = -(-count // 64)
    weight = Weight(
        make(random.randbytes(-(-count // 2) - short)), make(floats(16)), rows=rows, columns=columns, block=64
    )
    if nested:
        weight.scale_codes, weight.scale_levels = make(random.randbytes(blocks)), make(floats(256))
        weight.scale_absmax = make(floats(-(-blocks // 256)))
    else:
        weight.absmax = make(floats(blocks))
    for dtype, each in enumerate(SIZES):
        for c0, c1 in ((0, columns), (columns // 3, columns), (0, columns - 1)):
            out = make(bytes(rows * (c1 - c0) * each))
            done = library.tarsia4_dequantise(
                which, ctypes.byref(weight), size(0), size(rows), size(c0), size(c1), ctypes.c_void_p(out), dtype,
                size(c1 - c0), None,
            )  # fmt: skip
            assert done == 0
        for m in (1, 2, 5, 17):
            x, bias, y = (ctypes.c_void_p(make(bytes(n * each))) for n in (m * columns, rows, m * rows))
            assert library.tarsia4_rows(which, ctypes.byref(weight), x, dtype, size(m), bias, y, None) == 0
        w, codes, absmax = (ctypes.c_void_p(make(bytes(n))) for n in (count * each, -(-count // 2), 4 * blocks))
        levels = ctypes.c_void_p(weight.levels)
        assert library.tarsia4_quantise(which, w, dtype, size(count), size(64), levels, codes, absmax, None) == 0


def main(path: str, which: int, short: int = 0) -> None:
    library = ctypes.CDLL(path)
    for at_end in (True, False):
        for shape in SHAPES:
            for nested in (False, True):
                arrays = Arrays(at_end)
                call(library, which, shape, arrays, nested, short)
                arrays.free()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
