"""Trimming, sign election and weighted sums of many changes in compiled C; `sparsify` and `combine` are its reference.

A change is a float32 matrix, or the two factors of one: of factors only tiles are made, so what is held besides the
result does not grow with the changes. Results are those of the reference to the bit where changes are matrices; a
product of factors is summed from the first rank to the last, fused, which is how it may differ from torch's.

Where nothing is compiled `library` gives None and the reference runs: said once by a warning in the log, and by
``tarsia doctor`` through `status`. The environment's TARSIA_MERGE_KERNEL forces an instruction set, or ``reference``.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tarsia.merge.draws import below
from tarsia.merge.sparsify import not_finite
from tarsia.quant import build, loader
from tarsia.quant.loader import Status, Team

Change = Tensor | tuple[Tensor, Tensor]
"""[rows, columns], or up [rows, rank] and down [rank, columns]: float32 on the processor."""

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
INTERFACE = loader.Interface(
    library=build.MERGING,
    abi=1,
    signatures={
        "thresholds": [_I, _P, _L, _L, _L, _L, _P, _P],
        "elect": [_I, _P, _L, _L, _L, _P, _P, _P, _P, _P, _P],
        "sum": [_I, _P, _L, _L, _L, _P, _P, _P, _P],
    },
    sets={"portable": 0, "avx2": 1, "avx512": 2},
    best_first=("avx512", "avx2", "portable"),
    variable="TARSIA_MERGE_KERNEL",
)
_DELTA = struct.Struct("3Pq")  # tarsia_merge_delta
_MASK = struct.Struct("3qIf")  # tarsia_merge_mask
_FLOAT = struct.Struct("f")
_INFINITE = 0x7F800000
_REFUSED = {-1: "it was called wrongly", -2: "it has not this instruction set", -4: "there is no memory left"}


@dataclass(frozen=True, slots=True)
class Mask:
    """Which numbers of a change stay: those above ``magnitude``, and those equal to it at places before ``cut``.

    With a ``density`` below 1 each of these stays only where its random number, that of its place under ``key``
    (`draws.philox`), is small enough, and is divided by it. A place is row * columns + column.
    """

    magnitude: float = 0.0
    cut: int = 2**62
    key: int = 0
    density: float = 1.0


EVERYTHING = Mask()


class Kernel:
    """The library and one of its instruction sets. A change that holds an infinity or a NaN raises MergeError."""

    def __init__(self, handle: ctypes.CDLL, name: str, parallel: int) -> None:
        self.name = name
        self._set = INTERFACE.sets[name]
        self._team = Team(parallel)
        self._thresholds, self._elect, self._sum = (
            loader.function(INTERFACE, handle, what) for what in ("thresholds", "elect", "sum")
        )

    def thresholds(self, changes: Sequence[Change], kept: int) -> list[Mask]:
        """The mask that leaves each change its ``kept`` numbers of largest magnitude, of equals the first ones.

        A magnitude of 0 leaves everything: zeros add nothing, kept or not. ``kept`` 0 leaves nothing.
        """
        held, deltas, shape = _packed(changes)
        masks = ctypes.create_string_buffer(_MASK.size * len(changes))
        call = self._thresholds(self._set, deltas, len(changes), *shape, kept, masks, self._team())
        del held
        _check(call)
        found = _MASK.iter_unpack(masks.raw)
        return [Mask(_FLOAT.unpack(bits.to_bytes(4, "little"))[0], cut) for cut, _, _, bits, _ in found]

    def elect(
        self,
        changes: Sequence[Change],
        masks: Sequence[Mask],
        votes: Sequence[float],
        weights: Sequence[float],
        shares: Sequence[float],
    ) -> Tensor:
        """The sum of weights[i] x_i over the sum of shares[i], both over the changes that agree, number by number.

        x_i is what the mask leaves of change i. The elected sign is that of the sum of votes[i] x_i, + where it is 0;
        those agree whose votes[i] x_i has it. Shares of no size (below 1e-8) do not divide. [rows, columns].
        """
        held, deltas, shape = _packed(changes)
        out = torch.empty(shape)
        numbers = [_floats(values, len(changes)) for values in (votes, weights, shares)]
        addresses = [values.data_ptr() for values in numbers]
        packed = _masks(masks, len(changes))
        call = self._elect(self._set, deltas, len(changes), *shape, packed, *addresses, out.data_ptr(), self._team())
        del held
        _check(call)
        return out

    def total(self, changes: Sequence[Change], masks: Sequence[Mask], weights: Sequence[float]) -> Tensor:
        """The sum of weights[i] x_i, where x_i is what the mask leaves of change i: [rows, columns]."""
        held, deltas, shape = _packed(changes)
        out = torch.empty(shape)
        numbers, packed = _floats(weights, len(changes)), _masks(masks, len(changes))
        call = self._sum(
            self._set, deltas, len(changes), *shape, packed, numbers.data_ptr(), out.data_ptr(), self._team()
        )
        del held
        _check(call)
        return out


def shape_of(change: Change) -> tuple[int, int]:
    """Rows and columns."""
    first, last = (change, change) if isinstance(change, Tensor) else change
    return first.shape[0], last.shape[1]


def suited(change: Change) -> bool:
    """Whether the kernel takes this: float32 in the processor's memory."""
    parts = (change,) if isinstance(change, Tensor) else change
    return all(part.dtype == torch.float32 and part.device.type == "cpu" for part in parts)


def _packed(changes: Sequence[Change]) -> tuple[list[Tensor], bytes, tuple[int, int]]:
    """The changes for the library, their common shape, and the tensors that must live until it has run."""
    held: list[Tensor] = []
    packed, shapes = b"", set()
    for change in changes:
        if not suited(change):
            raise TypeError("the kernel takes float32 on the processor")
        parts = (change,) if isinstance(change, Tensor) else change
        here = [part.detach().contiguous() for part in parts]
        held += here
        shapes.add(shape_of(change))
        addresses = [here[0].data_ptr(), 0, 0, 0]
        if len(here) == 2:
            if here[0].shape[1] != here[1].shape[0]:
                raise ValueError(f"factors of ranks {here[0].shape[1]} and {here[1].shape[0]}")
            addresses = [0, here[0].data_ptr(), here[1].data_ptr(), here[0].shape[1]]
        packed += _DELTA.pack(*addresses)
    if len(shapes) != 1:
        raise ValueError(f"changes of one shape, not of {sorted(shapes)}")
    return held, packed, shapes.pop()


def _masks(masks: Sequence[Mask], count: int) -> bytes:
    if len(masks) != count:
        raise ValueError(f"{len(masks)} masks for {count} changes")
    packed = b""
    for mask in masks:
        (bits,) = struct.unpack("I", _FLOAT.pack(mask.magnitude))
        packed += _MASK.pack(mask.cut, mask.key, below(mask.density), bits, mask.density)
    return packed


def _floats(values: Sequence[float], count: int) -> Tensor:
    if len(values) != count:
        raise ValueError(f"{len(values)} numbers for {count} changes")
    return torch.tensor([float(value) for value in values], dtype=torch.float32)


def _check(code: int) -> None:
    if code == -3:
        raise not_finite()
    if code:
        raise RuntimeError(f"the kernel refused: {_REFUSED.get(code, code)}")


@cache
def library() -> Kernel | None:
    """The kernel that runs here, or None where the reference does. Raises ConfigError where one is forced in vain."""
    kernel, status = _find(INTERFACE.library.path, os.environ.get(INTERFACE.variable, ""))
    if status.do is not None:
        logging.getLogger(__name__).warning("merging: %s; to do: %s", status.text, status.do)
    return kernel


def status() -> Status:
    """What runs here and why."""
    return loader.status(INTERFACE)


def _find(path: Path, forced: str) -> tuple[Kernel | None, Status]:
    found, status = loader.find(INTERFACE, path, forced)
    return (None if found is None else Kernel(found.handle, found.name, found.parallel)), status
