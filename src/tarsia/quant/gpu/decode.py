"""The weight unpacked: every number of it, or of some of its rows or columns."""

from __future__ import annotations

import torch
from torch import Tensor

from tarsia.quant.cpu import Packed4
from tarsia.quant.gpu import plan, tile
from tarsia.quant.gpu.lang import kernel, tl
from tarsia.quant.gpu.tile import narrow, scales_of, unpack


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
    WHOLE: tl.constexpr,
) -> None:
    """Lines of ``blocks`` blocks, ``stride`` blocks apart from block ``first`` on; the weight has ``count`` numbers.

    A program unpacks ``BLOCKS`` blocks of a line, of which there are ``tiles`` to the line. Where all blocks are
    ``WHOLE`` a mask is one for a block, and bytes are read 8 at a time; with a mask of their own they are read singly.
    """
    line = tl.program_id(0) // tiles
    block = tl.program_id(0) % tiles * BLOCKS + tl.arange(0, BLOCKS)
    index = first + line.to(tl.int64) * stride + block
    live = (block < blocks) & (index * BLOCK < count)
    pair = index[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    if WHOLE:
        inside = live[:, None]
        packed = tl.load(codes + pair, mask=inside, other=0)
    else:
        inside = live[:, None] & (index[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :] < count)
        packed = tl.load(codes + pair, mask=live[:, None] & (pair * 2 < count), other=0)
    found = scales_of(scales, nested_scales, offset, scale_levels, index, live)
    table = tl.load(levels + tl.arange(0, 16))
    numbers = unpack(packed[None, :, :], found[None, :], table, 1, BLOCKS, BLOCK)
    to = (line.to(tl.int64) * blocks + block)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + to, narrow(tl.reshape(numbers, (BLOCKS, BLOCK)), out.dtype.element_ty), mask=inside)


def whole(weight: Packed4, dtype: torch.dtype, numbers: int = plan.NUMBERS) -> Tensor:
    """All numbers, [rows, columns] in ``dtype``, some ``numbers`` a program; any shape, blocks of a power of two."""
    blocks = -(-weight.rows * weight.columns // weight.block)
    out = torch.empty((weight.rows, weight.columns), dtype=dtype, device=weight.codes.device)
    _run(weight, out, first=0, lines=1, blocks=blocks, stride=blocks, numbers=numbers)
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


def _run(
    weight: Packed4, out: Tensor, *, first: int, lines: int, blocks: int, stride: int, numbers: int = plan.NUMBERS
) -> None:
    """``lines`` runs of ``blocks`` blocks into ``out``, one behind the other."""
    held = max(1, numbers // weight.block)
    tiles = -(-blocks // held)
    count = weight.rows * weight.columns
    where = (count, first, stride, blocks, tiles)
    tile.start(
        _dequantise,
        (lines * tiles,),
        out.device,
        *(*tile.stored(weight), out, *where),
        BLOCK=weight.block,
        BLOCKS=held,
        WHOLE=not count % weight.block,
        num_warps=4,
    )
