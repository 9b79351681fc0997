"""Four bits a weight: the slow reference that every kernel is held to.

A weight of n numbers is cut into blocks of 64. Each block is divided by its largest magnitude, its scale, and each number
is rounded to the nearest of 16 levels. That costs 4 bits a number and 32 bits a block. Nested, the scales, less
their mean, are cut into blocks of 256 and rounded in the same way to 256 levels: 8 bits a block, and 32 bits
for 256 blocks (arXiv:2305.14314, section 3, "double quantization"). In all 4 + 8/64 + 32/(64 * 256) = 4.127 bits.

Codes and scales are bitsandbytes' bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tarsia.core.errors import ConfigError, QuantError
from tarsia.quant.levels import KINDS, bounds, levels, scale_levels

BLOCK = 64
NESTED_BLOCK = 256
_SMALLEST = 1e-38  # what a block of zeros is divided by


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a weight is rounded: ``kind`` of levels, ``block`` numbers to a scale, scales ``nested`` or float32."""

    kind: str = "nf4"
    nested: bool = True
    block: int = BLOCK

    def __post_init__(self) -> None:
        levels(self.kind)
        if self.block not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            raise ConfigError("Blocks of this size are not made.", given=self.block, allowed="32, 64, 128, ... 4096")


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A weight of ``shape`` in 4 bits, which stands for numbers of ``dtype``.

    ``codes`` uint8 [ceil(n / 2), 1]: two a byte, the first in the high half. ``scales`` float32 [blocks], or uint8
    [blocks] where nested, with ``nested_scales`` float32 [ceil(blocks / 256)] and ``offset`` float32 [].
    """

    codes: Tensor
    scales: Tensor
    nested_scales: Tensor | None
    offset: Tensor | None
    scheme: Scheme
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is stored of the weight, by field."""
        every = {n: getattr(self, n) for n in ("codes", "scales", "nested_scales", "offset")}
        return {name: value for name, value in every.items() if value is not None}

    def having(self, tensors: Mapping[str, Tensor], **fields: Any) -> Quantised:
        """The same with other tensors in place of its own (moved to a device, say)."""
        return replace(self, **dict(tensors), **fields)

    @property
    def bits(self) -> float:
        """Bits a parameter, from the bytes of what is stored."""
        return 8 * sum(t.numel() * t.element_size() for t in self.tensors.values()) / max(1, math.prod(self.shape))


def encode(weight: Tensor, scheme: Scheme) -> Quantised:
    """Round ``weight`` (any shape, float32, bfloat16 or float16) to 4 bits.

    Raises QuantError for a weight that is empty, is of another dtype or holds what is no finite number.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not weight.numel():
        raise QuantError(
            "This is no weight to be quantised.",
            given=f"{weight.dtype} {tuple(weight.shape)}",
            allowed="float32, bfloat16 or float16, of at least one number",
        )
    codes, scales = quantise(weight, scheme)
    nested_scales = offset = None
    if scheme.nested:
        offset = scales.mean()
        scales, nested_scales = nest(scales - offset)
    return Quantised(codes, scales, nested_scales, offset, scheme, tuple(weight.shape), weight.dtype)


def quantise(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes, two a byte, and the float32 scale of each block."""
    edges, order = bounds(scheme.kind)
    numbers = weight.detach().reshape(-1).float()
    whole = len(numbers) - len(numbers) % scheme.block
    blocks, rest = numbers[:whole].view(-1, scheme.block), numbers[whole:]
    scales = blocks.abs().amax(1) if whole else numbers[:0]
    # a whole block is multiplied by its scale's inverse, a last short one divided by its scale: as bitsandbytes does
    scaled = [(blocks * (1.0 / scales.clamp(min=_SMALLEST)).unsqueeze(1)).view(-1)]
    if len(rest):
        last = rest.abs().amax().clamp(min=_SMALLEST)
        scales = torch.cat([scales, last.view(1)])
        scaled.append(rest / last)
    if not scales.isfinite().all():
        raise QuantError(
            "The weight holds numbers that are not finite.",
            given=f"{int((~numbers.isfinite()).sum())} of {len(numbers)}",
            do="fetch the checkpoint again, or leave this layer in 16 bits",
        )
    position = torch.bucketize(torch.cat(scaled).clamp(-1, 1), edges.to(weight.device))
    codes = F.pad(order.to(weight.device)[position], (0, len(numbers) % 2)).to(torch.uint8)
    if len(numbers) % 2:
        # the number that fills the last byte is a zero
        codes[-1] = order[torch.bucketize(torch.zeros(1), edges)].to(codes)
    return (codes[::2] << 4 | codes[1::2]).unsqueeze(1), scales


def nest(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales less their mean in 8 bits, uint8 [blocks], and the scale of each 256 of them, float32."""
    table = scale_levels().to(scales.device)
    rows = F.pad(scales, (0, -len(scales) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = rows.abs().amax(1)
    scaled = (rows * (1.0 / nested.clamp(min=_SMALLEST)).unsqueeze(1)).clamp(-1, 1)
    position = torch.bucketize(scaled.view(-1)[: len(scales)], (table[:-1] + table[1:]) / 2)
    return position.to(torch.uint8), nested


def scales(value: Quantised) -> Tensor:
    """The float32 scale of each block, [blocks]."""
    if value.nested_scales is None or value.offset is None:
        return value.scales
    fine = scale_levels().to(value.scales.device)[value.scales.long()]
    # a product, then a sum, each rounded: one fused operation has other bits
    return fine * value.nested_scales.repeat_interleave(NESTED_BLOCK)[: len(fine)] + value.offset


def decode(value: Quantised, dtype: torch.dtype | None = None) -> Tensor:
    """The numbers that ``value`` stands for, [*shape] in ``dtype`` (None: the one that it stands for)."""
    count = math.prod(value.shape)
    codes = torch.cat([value.codes >> 4, value.codes & 15], 1).view(-1)[:count]
    numbers = levels(value.scheme.kind).to(codes.device)[codes.long()]
    by_block = scales(value).repeat_interleave(value.scheme.block)[:count]
    return (numbers * by_block).view(value.shape).to(value.dtype if dtype is None else dtype)


def linear(x: Tensor, value: Quantised, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for x [..., in] and a value of shape (out, in), in the dtype of x."""
    return F.linear(x, decode(value, x.dtype), bias)


__all__ = ["BLOCK", "KINDS", "NESTED_BLOCK", "Quantised", "Scheme", "decode", "encode", "linear", "quantise", "scales"]
