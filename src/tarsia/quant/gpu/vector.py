"""One row: y = W x + b, the packed weight read once."""

from __future__ import annotations

import torch
from torch import Tensor

from tarsia.quant.cpu import Packed4
from tarsia.quant.gpu import tile
from tarsia.quant.gpu.lang import kernel, tl
from tarsia.quant.gpu.plan import Tiles
from tarsia.quant.gpu.tile import factor, narrow, scales_of, unpack
from tarsia.quant.gpu.update import Update, factors


@kernel("scale")
def _vector(  # noqa: PLR0913  kernels take tensors one by one
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    nested_scales: tl.tensor,
    offset: tl.tensor,
    scale_levels: tl.tensor,
    levels: tl.tensor,
    bias: tl.tensor,
    low: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    blocks: tl.tensor,
    part: tl.tensor,
    scale: tl.tensor,
    rank: tl.tensor,
    up_row: tl.tensor,
    up_column: tl.tensor,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    """out [splits, rows] of x [columns]: program (i, s) has ROWS rows and the s-th ``part`` of their ``blocks`` blocks.

    Each weight is rounded to the dtype of x, as the unpacked weight is; products and sums are float32.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    within = row < rows
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, blocks)
    table = tl.load(levels + tl.arange(0, 16))
    total = tl.zeros((ROWS, BLOCKS, BLOCK), tl.float32)
    for first in range(begin, end, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        live = within[:, None] & (block < end)[None, :]
        index = row.to(tl.int64)[:, None] * blocks + block[None, :]
        pair = index[:, :, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, None, :]
        packed = tl.load(codes + pair, mask=live[:, :, None], other=0)
        found = scales_of(scales, nested_scales, offset, scale_levels, index, live)
        column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        some = tl.load(x + column, mask=(block < end)[:, None], other=0.0)
        numbers = narrow(unpack(packed, found, table, ROWS, BLOCKS, BLOCK), x.dtype.element_ty).to(tl.float32)
        spread = tl.broadcast_to(some.to(tl.float32)[None, :, :], (ROWS, BLOCKS, BLOCK))
        total = tl.fma(numbers, spread, total)
    y = tl.sum(tl.sum(total, 2), 1)
    here = row < tl.where(tl.program_id(1) == 0, rows, 0)  # one part of the sum has what is added to it
    if bias is not None:
        y += tl.load(bias + row, mask=here, other=0.0).to(tl.float32)
    if low is not None:
        j = tl.arange(0, RANK)
        left = tl.load(low + j, mask=j < tl.where(tl.program_id(1) == 0, rank, 0), other=0.0).to(tl.float32)
        right = factor(up, row, rows, rank, up_row, up_column, RANK).to(tl.float32)
        y += scale * tl.sum(right * left[None, :], 1)
    tl.store(out + tl.program_id(1) * rows + row, narrow(y, out.dtype.element_ty), mask=within)


def vector(x: Tensor, weight: Packed4, bias: Tensor | None, update: Update | None, tiles: Tiles) -> Tensor:
    """W x + b + update, [rows], for x [columns], contiguous; rows of the weight are whole blocks."""
    blocks = weight.columns // weight.block
    part = -(-blocks // tiles.splits // tiles.blocks) * tiles.blocks
    splits = -(-blocks // part)
    y = x.new_empty(weight.rows)
    out = y if splits == 1 else torch.empty((splits, weight.rows), dtype=torch.float32, device=x.device)
    low, up, numbers, rank = factors(update)
    scale, *strides = numbers
    tile.start(
        _vector,
        (-(-weight.rows // tiles.rows), splits),
        x.device,
        *(x, *tile.stored(weight), bias, low, up, out, weight.rows, blocks, part, scale, *strides),
        BLOCK=weight.block,
        ROWS=tiles.rows,
        BLOCKS=tiles.blocks,
        RANK=rank,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if splits > 1:
        tile.add_up(out, y)
    return y
