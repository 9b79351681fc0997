"""What every kernel does the same: unpack a tile, round, multiply; and how kernels are started.

Products and sums are never fused (``enable_fp_fusion``): a nested scale is a product, then a sum, each rounded, as the
reference has it. Where one rounding is meant, ``tl.fma`` says so.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tarsia.quant.cpu import Packed4
from tarsia.quant.gpu.lang import INTERPRETED, jit, kernel, tl
from tarsia.quant.levels import scale_levels


@jit
def scales_of(
    scales: tl.tensor,
    nested_scales: tl.tensor,
    offset: tl.tensor,
    scale_levels: tl.tensor,
    index: tl.tensor,
    live: tl.tensor,
) -> tl.tensor:
    """Float32 scales of the blocks ``index``, stored as such where there are no ``nested_scales``; not live: any."""
    if nested_scales is not None:
        code = tl.load(scales + index, mask=live, other=0).to(tl.int32)
        coarse = tl.load(nested_scales + index // 256, mask=live, other=0.0)
        fine = tl.load(scale_levels + code, mask=live, other=0.0)
        found = fine * coarse + tl.load(offset)
    else:
        found = tl.load(scales + index, mask=live, other=0.0)
    return found


@jit
def unpack(
    codes: tl.tensor, scales: tl.tensor, table: tl.tensor, ROWS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """Float32 numbers [ROWS, BLOCKS, BLOCK] of bytes [ROWS, BLOCKS, BLOCK / 2], scales [ROWS, BLOCKS] and 16 levels.

    The table is gathered from, not loaded from by pointer: in a loop of products Triton would stage such loads one
    number at a time.
    """
    pairs = tl.join(codes >> 4, codes & 15).to(tl.int32)
    numbers = tl.gather(table, tl.reshape(pairs, (ROWS * BLOCKS * BLOCK,)), 0)
    return tl.reshape(numbers, (ROWS, BLOCKS, BLOCK)) * scales[:, :, None]


@jit
def narrow(value: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Float32 rounded to ``DTYPE``, to nearest, halves to even. The interpreter alone would cut to bfloat16."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        found = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        found = value.to(DTYPE)
    return found


@jit
def factor(
    up: tl.tensor,
    line: tl.tensor,
    lines: tl.tensor,
    rank: tl.tensor,
    up_row: tl.tensor,
    up_column: tl.tensor,
    RANK: tl.constexpr,
) -> tl.tensor:
    """Lines of ``up`` [lines, rank], an update's second factor of strides ``up_row`` and ``up_column``; 0 beyond it."""
    j = tl.arange(0, RANK)
    at = line.to(tl.int64)[:, None] * up_row + j[None, :] * up_column
    return tl.load(up + at, mask=(line < lines)[:, None] & (j < rank)[None, :], other=0.0)


@jit
def multiply(a: tl.tensor, b: tl.tensor, total: tl.tensor) -> tl.tensor:
    """``total`` + a b, summed in float32, factors with all their bits. The interpreter has no product of bfloat16."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@kernel()
def _add_up(parts: tl.tensor, out: tl.tensor, count: tl.tensor, SPLITS: tl.constexpr, TILE: tl.constexpr) -> None:
    """out [count] = the sum of parts [SPLITS, count], from the first to the last."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    total = tl.load(parts + at, mask=at < count, other=0.0)
    for part in tl.static_range(1, SPLITS):
        total += tl.load(parts + part * count + at, mask=at < count, other=0.0)
    tl.store(out + at, narrow(total, out.dtype.element_ty), mask=at < count)


def start(run: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
    """Run a kernel on the GPU that holds its tensors."""
    place: AbstractContextManager[Any] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with place:
        run[grid](*args, **options, enable_fp_fusion=False)


def add_up(parts: Tensor, out: Tensor) -> None:
    """``out`` = ``parts`` [splits, *], float32, added up in their order."""
    count = out.numel()
    start(_add_up, (-(-count // 512),), out.device, parts, out, count, SPLITS=len(parts), TILE=512, num_warps=4)


@cache
def fine_levels(device: torch.device) -> Tensor:
    """The 256 levels of a nested scale, on ``device``."""
    return scale_levels().to(device)


def stored(weight: Packed4) -> tuple[Tensor | None, ...]:
    """The tensors of ``weight`` as every kernel takes them."""
    fine = None if weight.nested_scales is None else fine_levels(weight.codes.device)
    return weight.codes, weight.scales, weight.nested_scales, weight.offset, fine, weight.levels
