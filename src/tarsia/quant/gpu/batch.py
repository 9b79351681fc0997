"""Some rows: x W^T + b and y W on the matrix units, from the packed weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tarsia.quant.cpu import Packed4
from tarsia.quant.gpu import tile
from tarsia.quant.gpu.lang import kernel, tl
from tarsia.quant.gpu.plan import Tiles
from tarsia.quant.gpu.tile import factor, multiply, narrow, scales_of, unpack
from tarsia.quant.gpu.update import Update, factors


@kernel("m", "scale")
def _forward(  # noqa: PLR0913  kernels take tensors one by one
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
    m: tl.tensor,
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
    BATCH: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    """out [splits, m, rows] of x [m, columns]; program (i, s, b) has the s-th ``part`` of each row's ``blocks`` blocks.

    The weight is the left factor: its tile fills the matrix units even where x has one row.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line = tl.program_id(2) * BATCH + tl.arange(0, BATCH)
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, blocks)
    table = tl.load(levels + tl.arange(0, 16))
    total = tl.zeros((ROWS, BATCH), tl.float32)
    for first in range(begin, end, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        live = (row < rows)[:, None] & (block < end)[None, :]
        index = row.to(tl.int64)[:, None] * blocks + block[None, :]
        pair = index[:, :, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, None, :]
        packed = tl.load(codes + pair, mask=live[:, :, None], other=0)
        found = scales_of(scales, nested_scales, offset, scale_levels, index, live)
        column = first * BLOCK + tl.arange(0, BLOCKS * BLOCK)
        at = line.to(tl.int64)[:, None] * (blocks * BLOCK) + column[None, :]
        some = tl.load(x + at, mask=(line < m)[:, None] & (column < end * BLOCK)[None, :], other=0.0)
        numbers = narrow(unpack(packed, found, table, ROWS, BLOCKS, BLOCK), x.dtype.element_ty)
        total = multiply(tl.reshape(numbers, (ROWS, BLOCKS * BLOCK)), tl.trans(some), total)
    first_part = tl.program_id(1) == 0  # which has what is added to the sum
    if bias is not None:
        here = row < tl.where(first_part, rows, 0)
        total += tl.load(bias + row, mask=here, other=0.0).to(tl.float32)[:, None]
    if low is not None:
        j = tl.arange(0, RANK)
        here = (j < tl.where(first_part, rank, 0))[:, None] & (line < m)[None, :]
        left = tl.load(low + line[None, :] * rank + j[:, None], mask=here, other=0.0)
        right = factor(up, row, rows, rank, up_row, up_column, RANK)
        total += scale * multiply(right, left, tl.zeros((ROWS, BATCH), tl.float32))
    to = (tl.program_id(1) * m + line).to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(out + to, narrow(total, out.dtype.element_ty), mask=(row < rows)[:, None] & (line < m)[None, :])


@kernel("m", "scale")
def _backward(  # noqa: PLR0913  kernels take tensors one by one
    y: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    nested_scales: tl.tensor,
    offset: tl.tensor,
    scale_levels: tl.tensor,
    levels: tl.tensor,
    low: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    m: tl.tensor,
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
    BATCH: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    """out [splits, m, columns] of y [m, rows]; program (i, s, b) has BLOCKS blocks of the s-th ``part`` of the rows."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    line = tl.program_id(2) * BATCH + tl.arange(0, BATCH)
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, rows)
    table = tl.load(levels + tl.arange(0, 16))
    total = tl.zeros((BATCH, BLOCKS * BLOCK), tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        live = (row < end)[:, None] & (block < blocks)[None, :]
        index = row.to(tl.int64)[:, None] * blocks + block[None, :]
        pair = index[:, :, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, None, :]
        packed = tl.load(codes + pair, mask=live[:, :, None], other=0)
        found = scales_of(scales, nested_scales, offset, scale_levels, index, live)
        at = line.to(tl.int64)[:, None] * rows + row[None, :]
        some = tl.load(y + at, mask=(line < m)[:, None] & (row < end)[None, :], other=0.0)
        numbers = narrow(unpack(packed, found, table, ROWS, BLOCKS, BLOCK), y.dtype.element_ty)
        total = multiply(some, tl.reshape(numbers, (ROWS, BLOCKS * BLOCK)), total)
    column = tl.program_id(0) * BLOCKS * BLOCK + tl.arange(0, BLOCKS * BLOCK)
    within = column < blocks * BLOCK
    if low is not None:
        j = tl.arange(0, RANK)
        # one part of the sum has what is added to it
        here = (line < m)[:, None] & (j < tl.where(tl.program_id(1) == 0, rank, 0))[None, :]
        left = tl.load(low + line[:, None] * rank + j[None, :], mask=here, other=0.0)
        right = tl.trans(factor(up, column, blocks * BLOCK, rank, up_row, up_column, RANK))
        total += scale * multiply(left, right, tl.zeros((BATCH, BLOCKS * BLOCK), tl.float32))
    to = (tl.program_id(1) * m + line).to(tl.int64)[:, None] * (blocks * BLOCK) + column[None, :]
    tl.store(out + to, narrow(total, out.dtype.element_ty), mask=(line < m)[:, None] & within[None, :])


def forward(x: Tensor, weight: Packed4, bias: Tensor | None, update: Update | None, tiles: Tiles) -> Tensor:
    """x W^T + b + update, [m, rows], for x [m, columns], contiguous; rows of the weight are whole blocks."""
    blocks = weight.columns // weight.block
    grid = -(-weight.rows // tiles.rows)
    return _run(_forward, (x, weight, (bias,), update), tiles, weight.rows, grid, (blocks, tiles.blocks))


def backward(y: Tensor, weight: Packed4, update: Update | None, tiles: Tiles) -> Tensor:
    """y W + update, [m, columns], for y [m, rows], contiguous; rows of the weight are whole blocks."""
    grid = -(-weight.columns // weight.block // tiles.blocks)
    return _run(_backward, (y, weight, (), update), tiles, weight.columns, grid, (weight.rows, tiles.rows))


def _run(
    run: Any,
    factors_: tuple[Tensor, Packed4, tuple[Tensor | None, ...], Update | None],
    tiles: Tiles,
    width: int,
    grid: int,
    steps: tuple[int, int],
) -> Tensor:
    """``run`` on ``grid`` tiles of a product of ``width``; its sum has ``steps``: how many, how many at a time."""
    x, weight, bias, update = factors_
    m = len(x)
    count, at_once = steps
    part = -(-count // tiles.splits // at_once) * at_once
    splits = -(-count // part)
    result = x.new_empty((m, width))
    out = result if splits == 1 else torch.empty((splits, m, width), dtype=torch.float32, device=x.device)
    low, up, numbers, rank = factors(update)
    shape = (m, weight.rows, weight.columns // weight.block, part)
    tile.start(
        run,
        (grid, splits, -(-m // tiles.batch)),
        x.device,
        *(x, *tile.stored(weight), *bias, low, up, out, *shape, *numbers),
        BLOCK=weight.block,
        ROWS=tiles.rows,
        BLOCKS=tiles.blocks,
        BATCH=tiles.batch,
        RANK=rank,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if splits > 1:
        tile.add_up(out, result)
    return result
