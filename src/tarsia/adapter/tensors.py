"""A safetensors file written tensor by tensor, without holding more than one of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

import torch
from torch import Tensor

_NAMES: Final[Mapping[torch.dtype, str]] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES: Final[Mapping[str, torch.dtype]] = {name: dtype for dtype, name in _NAMES.items()}
"""By the names that safetensors files have for them."""


class TensorFile:
    """Open while tensors are added; on leaving, all of it is in ``path``.

    Tensors of one size of element lie together, the largest first, so that each is aligned as its readers want it.
    Until the end they are in files beside it, one for each size.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self.path, self.metadata = path, dict(metadata)
        self._entries: dict[str, tuple[str, list[int], int, int, int]] = {}
        self._parts: dict[int, BinaryIO] = {}

    def add(self, name: str, tensor: Tensor) -> int:
        """Write ``tensor``; returns its bytes."""
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return self.add_bytes(name, _NAMES[tensor.dtype], list(tensor.shape), tensor.element_size(), raw)

    def add_bytes(self, name: str, dtype: str, shape: list[int], size: int, raw: Any) -> int:
        """Write what lies in a buffer already, of elements of ``size`` bytes."""
        part = self._parts.get(size)
        if part is None:
            part = self._parts[size] = self._beside(size).open("w+b")
        start = part.tell()
        part.write(memoryview(raw))
        self._entries[name] = (dtype, shape, size, start, part.tell())
        return part.tell() - start

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                self._assemble()
        finally:
            for size, part in self._parts.items():
                part.close()
                self._beside(size).unlink()

    def _beside(self, size: int) -> Path:
        return self.path.with_name(f".{self.path.name}.{size}")

    def _assemble(self) -> None:
        sizes = sorted(self._parts, reverse=True)
        starts, end = {}, 0
        for size in sizes:
            starts[size] = end
            end += self._parts[size].tell()
        table: dict[str, Any] = {"__metadata__": self.metadata}
        for name, (dtype, shape, size, first, last) in self._entries.items():
            place = starts[size]
            table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place + first, place + last]}
        header = json.dumps(table, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        with self.path.open("wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            for size in sizes:
                self._parts[size].seek(0)
                shutil.copyfileobj(self._parts[size], out, 1 << 20)
            out.flush()
            os.fsync(out.fileno())
