"""The compiled kernel of weights in 4 bits, called with addresses; `loader` finds it.

Where there is none, `library` gives None and the slow reference runs: that is said once, by a warning in the log, and
by ``tarsia doctor`` through `status`. The environment's TARSIA_KERNEL forces one of `CHOICES`.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
from functools import cache
from pathlib import Path

import torch

from tarsia.quant import build, loader
from tarsia.quant.loader import Status, Team

NOT_FINITE = -3
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
INTERFACE = loader.Interface(
    library=build.FOUR_BITS,
    abi=1,
    signatures={
        "quantise": [_I, _P, _I, _L, _L, _P, _P, _P, _P],
        "dequantise": [_I, _P, _L, _L, _L, _L, _P, _I, _L, _P],
        "rows": [_I, _P, _P, _I, _L, _P, _P, _P],
    },
    sets={"portable": 0, "avx2": 1, "avx512": 2, "avx512_bf16": 3, "neon": 4},
    best_first=("avx512_bf16", "avx512", "avx2", "neon", "portable"),
    variable="TARSIA_KERNEL",
    probe=Path(__file__).with_name("probe.py"),
)
VARIABLE, SETS, CHOICES = INTERFACE.variable, INTERFACE.sets, INTERFACE.choices
_WEIGHT = struct.Struct("6Pf4x3q")  # tarsia4_weight


class Kernel:
    """The library and one of its instruction sets. Tensors go in as addresses: who calls has looked at them.

    ``weight`` is what `pack` made. Each call returns the library's code, 0 where all is well.
    """

    def __init__(self, handle: ctypes.CDLL, name: str, parallel: int) -> None:
        self.name = name
        self._set = SETS[name]
        self._team = Team(parallel)
        self._quantise = handle.tarsia4_quantise
        self._dequantise = handle.tarsia4_dequantise
        self._rows = handle.tarsia4_rows

    def quantise(self, w: int, dtype: torch.dtype, n: int, block: int, levels: int, codes: int, absmax: int) -> int:
        """n numbers at ``w`` to codes and the scale of each block."""
        code: int = self._quantise(self._set, w, DTYPES[dtype], n, block, levels, codes, absmax, self._team())
        return code

    def dequantise(
        self, weight: bytes, rows: tuple[int, int], columns: tuple[int, int], out: int, dtype: torch.dtype, stride: int
    ) -> int:
        """The rectangle rows x columns (first, behind the last) to ``out``, whose rows are ``stride`` numbers apart."""
        code: int = self._dequantise(self._set, weight, *rows, *columns, out, DTYPES[dtype], stride, self._team())
        return code

    def rows(self, weight: bytes, x: int, dtype: torch.dtype, m: int, bias: int | None, out: int) -> int:
        """out [m, rows] = x [m, columns] W^T + bias, for few rows."""
        code: int = self._rows(self._set, weight, x, DTYPES[dtype], m, bias, out, self._team())
        return code


def pack(codes: int, levels: int, scales: tuple[int, int, int, int, float], shape: tuple[int, int, int]) -> bytes:
    """A weight for the library: addresses of absmax, or of scale codes, scale levels, their scales, and the offset;
    ``shape`` is rows, columns, block.
    """
    return _WEIGHT.pack(codes, levels, *scales, *shape)


@cache
def library() -> Kernel | None:
    """The kernel that runs here, or None where the reference does. Raises ConfigError where one is forced in vain."""
    kernel, status = _find(INTERFACE.library.path, os.environ.get(VARIABLE, ""))
    if status.do is not None:
        logging.getLogger(__name__).warning("4-bit products: %s; to do: %s", status.text, status.do)
    return kernel


def status() -> Status:
    """What runs here and why."""
    return loader.status(INTERFACE)


def _find(path: Path, forced: str) -> tuple[Kernel | None, Status]:
    found, status = loader.find(INTERFACE, path, forced)
    return (None if found is None else Kernel(found.handle, found.name, found.parallel)), status
