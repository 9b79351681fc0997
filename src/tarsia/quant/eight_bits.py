"""An optimiser's states in 8 bits: arXiv:2110.02861's block-wise dynamic quantisation.

A state's numbers, in the order of memory, are cut into blocks of 256. Each block is divided by its largest magnitude,
its scale, and each number is rounded to the nearest of the 256 levels of the dynamic type (``levels.dynamic_levels``),
with both signs for a mean of gradients, without for a mean of their squares. That is 8 bits a number and 32 a block:
8.125.

Levels, codes, scales and what they decode to are bitsandbytes' (0.50), bit for bit, as it computes them where it has no
kernel of its own. On a processor it finds the level of a number by a table of 65,536 places, which are too few near
zero: there it takes another than the nearest level, and never most of the smallest ones. Codes here are the nearest.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tarsia.quant.levels import constant, dynamic_levels

BLOCK = 256
SMALLEST = 4096
"""Tensors of fewer numbers keep states in 32 bits, as in bitsandbytes: they take little room, and norms and biases
are where rounding harms most."""
_LEAST = 1e-38  # what a block of smaller numbers, or of zeros, is divided by


def blocks(count: int) -> int:
    """Blocks, and so scales, of ``count`` numbers."""
    return -(-count // BLOCK)


def encode(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes uint8 [n] and scales float32 [blocks] of float32 ``x`` [n]. Numbers must be finite, unsigned ones >= 0.

    All of it float32: scale s = max |x| of the block, each x times the rounded 1 / max(s, 1e-38), then the nearest
    level; between two levels lies the float32 half of their sum, and what lies on it has the level below.
    """
    count, whole = x.numel(), blocks(x.numel()) * BLOCK
    rows = (x if whole == count else torch.nn.functional.pad(x, (0, whole - count))).view(-1, BLOCK)
    scales = rows.abs().amax(dim=1)
    shares = (rows * scales.clamp(min=_LEAST).reciprocal().unsqueeze(1)).clamp_(-1, 1)
    return _nearest(shares.view(-1)[:count], signed), scales


def _nearest(shares: Tensor, signed: bool) -> Tensor:
    """How many bounds lie below each number: looked up by its first 16 bits, which at most one bound has in common."""
    device = shares.device
    low = starts(signed).to(device).index_select(0, (shares.view(torch.int32) >> 16) & 0xFFFF)
    edges = torch.nn.functional.pad(bounds(signed), (0, 1), value=torch.inf).to(device)
    return low + (shares > edges.index_select(0, low.to(torch.int32)))


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """Float32 [n] that uint8 ``codes`` [n] and ``scales`` [blocks] stand for: the level times its block's scale."""
    table = dynamic_levels(signed).to(codes.device)
    numbers = table.index_select(0, codes.to(torch.int32))
    count = numbers.numel()
    full = count - count % BLOCK
    numbers[:full].view(-1, BLOCK).mul_(scales[: full // BLOCK].unsqueeze(1))
    if full < count:
        numbers[full:].mul_(scales[-1])
    return numbers


@cache
@constant
def bounds(signed: bool) -> Tensor:
    """Where rounding changes from one level to the next, float32 [255]."""
    table = dynamic_levels(signed)
    return (table[:-1] + table[1:]) / 2


@cache
@constant
def starts(signed: bool) -> Tensor:
    """By the first 16 bits of a float32: the code of the least number that begins with them, uint8 [65536]."""
    first = torch.arange(1 << 16, dtype=torch.int64)
    # of those below zero the least has the most bits after them
    bits = (first << 16) | torch.where(first >= 1 << 15, 0xFFFF, 0)
    numbers = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)
    return torch.bucketize(numbers.nan_to_num(0.0), bounds(signed)).to(torch.uint8)


def encode_slowly(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """``encode``, number by number: what it is held to."""
    codes, scales = [], []
    edges = bounds(signed)
    for block in x.split(BLOCK) if len(x) else ():
        scale = block.abs().max()
        scales.append(scale)
        inverse = 1 / torch.maximum(scale, torch.tensor(_LEAST))
        for number in block:
            share = number * inverse
            codes.append(int((edges < share).sum()))
    return torch.tensor(codes, dtype=torch.uint8), torch.stack(scales) if scales else torch.empty(0)


def decode_slowly(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """``decode``, number by number: what it is held to."""
    table = dynamic_levels(signed)
    numbers = [table[int(code)] * scales[i // BLOCK] for i, code in enumerate(codes)]
    return torch.stack(numbers) if numbers else torch.empty(0)
