"""The weight unpacked: every number of it, or of some of its rows or columns."""

from __future__ import annotations

import torch
from torch import Tensor

from tarsia.quant.cpu import Packed4
from tarsia.quant.gpu import tile
from tarsia.quant.gpu.lang import kernel, tl
from tarsia.quant.gpu.tile import narrow, scales_of, unpack

NUMBERS = 2048
"""That one program unpacks."""


@kernel()
def _dequantise(  # noqa: PLR0913  kernels take tensors one by one
    codes: tl.tensor,
    scales: tl.tensor,
    nested_scales: tl.tensor,
    offset: tl.tensor,
    scale_levels: tl.tensor,
    levels: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    first: tl.tensor,
    stride: tl.tensor,
    blocks: tl.tensor,
    tiles: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Lines of ``blocks`` blocks, ``stride`` blocks apart from block ``first`` on; the weight has ``count`` numbers.

    A program unpacks ``BLOCKS`` blocks of a line, of which there are ``tiles`` to the line.
    """
    line = tl.program_id(0) // tiles
    block = tl.program_id(0) % tiles * BLOCKS + tl.arange(0, BLOCKS)
    index = first + line.to(tl.int64) * stride + block
    live = (block < blocks) & (index * BLOCK < count)
    pair = index[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    packed = tl.load(codes + pair, mask=live[:, None] & (pair * 2 < count), other=0)
    found = scales_of(scales, nested_scales, offset, scale_levels, index, live)
    table = tl.load(levels + tl.arange(0, 16))
    numbers = unpack(packed[None, :, :], found[None, :], table, 1, BLOCKS, BLOCK)
    at = tl.arange(0, BLOCK)[None, :]
    behind = out + (line.to(tl.int64) * blocks + block)[:, None] * BLOCK + at
    inside = live[:, None] & (index[:, None] * BLOCK + at < count)
    rounded = narrow(tl.reshape(numbers, (BLOCKS, BLOCK)), out.dtype.element_ty)
    tl.store(behind, rounded, mask=inside)


def whole(weight: Packed4, dtype: torch.dtype) -> Tensor:
    """All numbers, [rows, columns] in ``dtype``; any shape, any block that is a power of two."""
    blocks = -(-weight.rows * weight.columns // weight.block)
    out = torch.empty((weight.rows, weight.columns), dtype=dtype, device=weight.codes.device)
    _run(weight, out, first=0, lines=1, blocks=blocks, stride=blocks)
    return out


def rows(weight: Packed4, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """The rows from ``first`` to before ``last``, [last - first, columns]. Rows are whole blocks."""
    to_row = weight.columns // weight.block
    out = torch.empty((last - first, weight.columns), dtype=dtype, device=weight.codes.device)
    blocks = (last - first) * to_row
    _run(weight, out, first=first * to_row, lines=1, blocks=blocks, stride=blocks)
    return out


def columns(weight: Packed4, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """The columns from ``first`` to before ``last``, [rows, last - first]: rows and both ends are of whole blocks."""
    block = weight.block
    out = torch.empty((weight.rows, last - first), dtype=dtype, device=weight.codes.device)
    blocks = (last - first) // block
    _run(weight, out, first=first // block, lines=weight.rows, blocks=blocks, stride=weight.columns // block)
    return out


def _run(weight: Packed4, out: Tensor, *, first: int, lines: int, blocks: int, stride: int) -> None:
    """``lines`` runs of ``blocks`` blocks into ``out``, one behind the other."""
    held = max(1, NUMBERS // weight.block)
    tiles = -(-blocks // held)
    count = weight.rows * weight.columns
    numbers = (count, first, stride, blocks, tiles)
    grid = (lines * tiles,)
    tile.start(
        _dequantise, grid, out.device, *tile.stored(weight), out, *numbers, BLOCK=weight.block, BLOCKS=held, num_warps=4
    )
