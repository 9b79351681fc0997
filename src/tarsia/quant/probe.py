"""Call every function of a kernel library with one instruction set: ``python probe.py LIBRARY NUMBER``.

Run in a process of its own, because an instruction that the processor does not have ends the process.
"""

from __future__ import annotations

import ctypes
import sys


class Weight(ctypes.Structure):
    """tarsia4_weight."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "levels", "absmax", "scale_codes", "scale_levels")),
        ("scale_absmax", ctypes.c_void_p),
        ("offset", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "block")),
    )


def main(path: str, number: int) -> int:
    """0 where every call succeeds."""
    library, size = ctypes.CDLL(path), ctypes.c_int64
    rows, columns, block = 8, 512, 64
    numbers = (ctypes.c_float * (rows * columns))(*([1.0] * rows * columns))
    levels = (ctypes.c_float * 16)(*(i / 15 for i in range(16)))
    codes, scales = (ctypes.c_uint8 * (rows * columns // 2))(), (ctypes.c_float * (rows * columns // block))()
    out = (ctypes.c_float * (rows * columns))()
    count = size(rows * columns)
    if library.tarsia4_quantise(number, numbers, 0, count, size(block), levels, codes, scales, None):
        return 1
    stored = [ctypes.cast(part, ctypes.c_void_p).value for part in (codes, levels, scales)]
    weight = ctypes.byref(Weight(*stored, rows=rows, columns=columns, block=block))
    whole = (size(0), size(rows), size(0), size(columns))
    for dtype in range(3):
        if library.tarsia4_dequantise(number, weight, *whole, out, dtype, size(columns), None):
            return 1
        if library.tarsia4_rows(number, weight, numbers, dtype, size(1), None, out, None):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
