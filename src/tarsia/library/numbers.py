"""Whether a file's tensors hold nothing but numbers, found from the bits and without torch."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

EXPONENTS: Final[Mapping[str, tuple[str, int]]] = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
"""Of each dtype that trains: whole numbers of its size, and the bits that are all set where it is no finite number."""

_PIECE = 1 << 20


def unreal(path: Path, table: Mapping[str, Mapping[str, Any]], start: int) -> str | None:
    """The first tensor with a value that is infinite or no number; None where there is none.

    ``table`` is that of the safetensors file, held to it, and ``start`` where its data begin. Raises KeyError for a
    dtype that is not among ``EXPONENTS``.
    """
    import numpy as np

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        for name, entry in table.items():
            kind, bits = EXPONENTS[entry["dtype"]]
            first, last = entry["data_offsets"]
            size = np.dtype(kind).itemsize
            for place in range(first, last, _PIECE):
                count = min(_PIECE, last - place) // size
                # looked at as a copy: a view would keep the mapping from being closed
                piece = np.frombuffer(whole[start + place : start + place + count * size], dtype=kind)
                if int((piece & piece.dtype.type(bits)).max()) == bits:
                    return name
    return None
