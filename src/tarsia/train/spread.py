"""Tensors written piece by piece into a safetensors file, so that what is saved need never be there at once."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

Spec = tuple[torch.dtype, tuple[int, ...]]

NAMES: Final[Mapping[torch.dtype, str]] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls a dtype."""
CHUNK: Final = 1 << 22
"""Numbers that are brought to the processor at a time."""


class Spread(Protocol):
    """Tensors that are in pieces, or elsewhere."""

    def specs(self) -> Mapping[str, Spec]:
        """Dtype and shape of each, by name."""

    def parts(self) -> Iterator[tuple[str, int, Tensor]]:
        """Pieces [n] of each with its name and the place of its first number among the tensor's."""


class Whole:
    """Tensors as they are."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def specs(self) -> Mapping[str, Spec]:
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def parts(self) -> Iterator[tuple[str, int, Tensor]]:
        for name in self._tensors:
            yield name, 0, self._tensors[name].detach().contiguous().view(-1)


def write_tensors(file: BinaryIO, sources: Sequence[Spread]) -> None:
    """Write a safetensors file (its format is a length, a header in JSON, and the numbers)."""
    specs = {name: spec for source in sources for name, spec in source.specs().items()}
    header: dict[str, dict[str, Any]] = {}
    place = 0
    for name in sorted(specs, key=lambda name: (-specs[name][0].itemsize, name)):  # each lies as its dtype wants it
        dtype, shape = specs[name]
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    start = file.tell()
    file.truncate(start + place)
    for source in sources:
        for name, first, part in source.parts():
            size = specs[name][0].itemsize
            file.seek(start + header[name]["data_offsets"][0] + first * size)
            for piece in part.split(CHUNK):
                numbers: Any = piece.cpu().view(torch.uint8).numpy() if piece.numel() else b""
                file.write(numbers)


class Stored(Mapping[str, Tensor]):
    """The tensors of a safetensors file; each is read when it is asked for.

    Raises SafetensorError where the file is none.
    """

    def __init__(self, path: Path) -> None:
        opened: Any = safe_open
        self._file: Any = opened(path, framework="pt")
        names: Any = self._file.keys()
        self._names: tuple[str, ...] = tuple(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        found: Tensor = self._file.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Below(Mapping[str, Tensor]):
    """Those of ``tensors`` whose names begin with ``kind`` and a slash, without these."""

    def __init__(self, tensors: Mapping[str, Tensor], kind: str) -> None:
        self._tensors, self._kind = tensors, kind
        self._names = tuple(name.removeprefix(f"{kind}/") for name in tensors if name.startswith(f"{kind}/"))

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[f"{self._kind}/{name}"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
