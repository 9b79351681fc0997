"""Products with many rows: tiles of the weight, unpacked one after another into one buffer, multiplied by torch.

What is large and new costs more in page faults than its arithmetic does, and what leaves the cache is read from memory
again. So the buffer, one for each thread of Python, is small and stays.
"""

from __future__ import annotations

import threading
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from tarsia.core.errors import QuantError
from tarsia.quant.native import Kernel

ARENA = 16 << 20
"""Bytes of the buffer. Measured with two threads among 2 to 32 MiB: products of small tiles lose more than a larger
buffer, which still lies in a processor's last cache, costs; most layers of a small model are one tile."""

WIDTH = 2048
"""About how many numbers of a sum a tile has."""

GRAIN = 64
"""Tiles begin at multiples of this many numbers: where blocks of scales do, and products are fast."""

VIEWS = 256
"""Shapes of tiles that are remembered."""

ROUNDINGS = 4
"""At most so many times a sum of half precision is rounded on its way."""

TRANSPOSITION = 16
"""A number of x or y that is brought to its other place costs as much as so many of the weight gain by it: measured."""

Span = tuple[int, int]
"""From the first to behind the last."""

_FLAGS = {torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"}, torch.float16: {"avx512_fp16", "amx_fp16", "asimdhp"}}
"""What a processor that multiplies in this dtype itself says of itself (Linux)."""

_local = threading.local()


@cache
def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype the products of ``dtype`` are made: its own, or float32 where the processor only emulates it."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text(encoding="utf8").split()) if cpuinfo.exists() else set()
    return dtype if flags & _FLAGS.get(dtype, flags) else torch.float32


def forward(kernel: Kernel, weight: bytes, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y [m, rows] = x [m, columns] W^T + bias, all of one dtype."""
    work = working_dtype(x.dtype)
    if work is not x.dtype:
        wide = torch.empty(y.shape, dtype=work)
        forward(kernel, weight, x.to(work), None if bias is None else bias.to(work), wide)
        y.copy_(wide)
        return
    (m, columns), n = x.shape, y.shape[1]
    if TRANSPOSITION * m * (columns + n) <= columns * n:
        _transposed(kernel, weight, x, bias, y)
        return
    # in half precision a sum is made whole, and rounded once
    width = WIDTH if work is torch.float32 else columns
    for rows, spans in forward_tiles(n, columns, _numbers(work), width):
        out = y[:, slice(*rows)]
        for span in spans:
            tile = _unpack(kernel, weight, rows, span, work).t()
            part = x[:, slice(*span)]
            if span[0]:
                out.addmm_(part, tile)
            elif bias is None:
                torch.mm(part, tile, out=out)
            else:
                torch.addmm(bias[slice(*rows)], part, tile, out=out)


def _transposed(kernel: Kernel, weight: bytes, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y^T = W x^T: the tile and x^T both run along their rows, which is what products are fastest at."""
    columnwise = x.t().contiguous()
    width = WIDTH if x.dtype is torch.float32 else x.shape[1]
    for rows, spans in forward_tiles(y.shape[1], x.shape[1], _numbers(x.dtype), width):
        out = torch.empty((rows[1] - rows[0], len(x)), dtype=x.dtype)
        for columns in spans:
            tile = _unpack(kernel, weight, rows, columns, x.dtype)
            part = columnwise[slice(*columns)]
            if columns[0]:
                out.addmm_(tile, part)
            else:
                torch.mm(tile, part, out=out)
        place = y[:, slice(*rows)]
        if bias is None:
            place.copy_(out.t())
        else:
            torch.add(out.t(), bias[slice(*rows)], out=place)


def backward(kernel: Kernel, weight: bytes, y: Tensor, x: Tensor) -> None:
    """x [m, columns] = y [m, rows] W, both of one dtype."""
    work = working_dtype(y.dtype)
    if work is not y.dtype:
        wide = torch.empty(x.shape, dtype=work)
        backward(kernel, weight, y.to(work), wide)
        x.copy_(wide)
        return
    n, width, numbers = y.shape[1], x.shape[1], _numbers(work)
    height = WIDTH if work is torch.float32 else max(1024, -(-n // ROUNDINGS))
    for columns, spans in backward_tiles(n, width, numbers, height):
        out = x[:, slice(*columns)]
        for rows in spans:
            tile = _unpack(kernel, weight, rows, columns, work)
            part = y[:, slice(*rows)]
            if rows[0]:
                out.addmm_(part, tile)
            else:
                torch.mm(part, tile, out=out)


def _numbers(dtype: torch.dtype) -> int:
    """How many numbers a tile may have."""
    return ARENA // dtype.itemsize


@lru_cache(maxsize=256)
def forward_tiles(rows: int, columns: int, numbers: int, width: int) -> list[tuple[Span, list[Span]]]:
    """Spans of rows, each with the spans of columns, of about ``width``, to sum; tiles of about ``numbers``."""
    spans = _cut(columns, width)
    return [(span, spans) for span in _cut(rows, numbers // (spans[0][1] - spans[0][0]))]


@lru_cache(maxsize=256)
def backward_tiles(rows: int, columns: int, numbers: int, height: int) -> list[tuple[Span, list[Span]]]:
    """Spans of columns, each with the spans of rows, of about ``height``, to sum; tiles of about ``numbers``."""
    spans = _cut(rows, height)
    return [(span, spans) for span in _cut(columns, numbers // (spans[0][1] - spans[0][0]))]


def _cut(count: int, most: int) -> list[Span]:
    """``count`` in pieces of ``most``, or up to half as much again, each beginning at a multiple of the grain."""
    pieces = max(1, round(count / max(most, GRAIN)))
    step = -(-count // (pieces * GRAIN)) * GRAIN
    return [(first, min(first + step, count)) for first in range(0, count, step)]


def _unpack(kernel: Kernel, weight: bytes, rows: Span, columns: Span, dtype: torch.dtype) -> Tensor:
    """The tile rows x columns of the weight, in this thread's buffer: until the next one."""
    height, width = rows[1] - rows[0], columns[1] - columns[0]
    tile, address = _view(height, width, dtype)
    demand(kernel.dequantise(weight, rows, columns, address, dtype, width))
    return tile


def _view(height: int, width: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """This thread's buffer as [height, width], made larger where it has not the room, and its address."""
    views: dict[tuple[int, int, torch.dtype], tuple[Tensor, int]] | None = getattr(_local, "views", None)
    if views is None or len(views) > VIEWS:
        views = _local.views = {}
    found = views.get((height, width, dtype))
    if found is None:
        room = height * width * dtype.itemsize
        arena: Tensor | None = getattr(_local, "arena", None)
        if arena is None or len(arena) < room:
            views.clear()  # they hold the old one
            arena = _local.arena = torch.empty(max(room, ARENA), dtype=torch.uint8)
        found = arena[:room].view(dtype).view(height, width), arena.data_ptr()
        views[height, width, dtype] = found
    return found


def demand(code: int) -> None:
    """Raise QuantError for what the kernel does not take."""
    if code:
        raise QuantError("The kernel refused its arguments.", given=f"code {code}", do="report this: they were checked")
