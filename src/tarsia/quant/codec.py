"""Four bits a weight: the slow reference that every kernel is held to.

A weight of n numbers is cut into blocks of 64. Each block is divided by its largest magnitude, its scale, and each
number is rounded to the nearest of 16 levels. That costs 4 bits a number and 32 bits a block. Nested, the scales, less
their mean, are cut into blocks of 256 and rounded in the same way to 256 levels: 8 bits a block, and 32 bits for 256
blocks (arXiv:2305.14314, section 3, "double quantization"). In all 4 + 8/64 + 32/(64 * 256) = 4.127 bits.

Codes, scales and what they decode to are bitsandbytes' (0.50, on a CPU), bit for bit. The arithmetic is said operation
by operation below: all of it float32, each result rounded to nearest even, nothing fused, nothing flushed to zero.
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
from tarsia.quant.levels import KINDS, bounds, levels, scale_codes, scale_levels

BLOCK = 64
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SMALLEST = 1e-38  # what a block of smaller numbers, or of zeros, is divided by


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a weight is rounded: ``kind`` of levels, ``block`` numbers to a scale, scales ``nested`` or float32."""

    kind: str = "nf4"
    nested: bool = True
    block: int = BLOCK

    def __post_init__(self) -> None:
        levels(self.kind)
        if self.block not in BLOCKS:
            allowed = ", ".join(map(str, BLOCKS))
            raise ConfigError("Blocks of this size are not made.", given=self.block, allowed=allowed)


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
        parts: dict[str, Any] = {**tensors, **fields}
        return replace(self, **parts)

    @property
    def bits(self) -> float:
        """Bits a parameter, from the bytes of what is stored."""
        return 8 * sum(t.numel() * t.element_size() for t in self.tensors.values()) / max(1, math.prod(self.shape))


def encode(weight: Tensor, scheme: Scheme) -> Quantised:
    """Round ``weight`` (any shape, float32, bfloat16 or float16) to 4 bits.

    ``offset`` is torch's mean of the scales: its last bits follow the order in which torch adds, which depends on its
    threads from some 32,768 scales on (as it does for bitsandbytes).

    Raises QuantError for a weight that is empty, is of another dtype, holds what is no finite number, or numbers so
    large that the mean of their scales is none.
    """
    if weight.dtype not in DTYPES or not weight.numel():
        raise QuantError(
            "This is no weight to be quantised.",
            given=f"{weight.dtype} {tuple(weight.shape)}",
            allowed="float32, bfloat16 or float16, of at least one number",
        )
    return assembled(*quantise(weight, scheme), scheme, tuple(weight.shape), weight.dtype)


def assembled(codes: Tensor, scales: Tensor, scheme: Scheme, shape: tuple[int, ...], dtype: torch.dtype) -> Quantised:
    """The value of codes and float32 scales, which are rounded in their turn where the scheme nests them."""
    nested_scales = offset = None
    if scheme.nested:
        offset = scales.mean()
        if not offset.isfinite():
            raise QuantError(
                "The scales of this weight are too large to have a mean in float32.",
                given=f"scales up to {scales.max():.3g}",
                do="quantise it without nesting, or look at what the weight holds",
            )
        scales, nested_scales = nest(scales - offset)
    return Quantised(codes, scales, nested_scales, offset, scheme, shape, dtype)


def quantise(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes, uint8 [ceil(n / 2), 1], and the scale of each block, float32 [blocks], of any weight of n numbers.

    The scale of a block is its largest magnitude. With d = max(scale, 1e-38), a number w of a whole block is scaled to
    w * (1 / d), both operations rounded; a number of a last, shorter block to w / d, and there d is the scale. It gets
    the code of its place among ``bounds``: of the first bound that is not below it. A byte that the numbers leave half
    empty is filled with the code of zero. Raises QuantError for numbers that are not finite.
    """
    edges, order = (t.to(weight.device) for t in bounds(scheme.kind))
    numbers = weight.detach().reshape(-1).float()
    blocks, rest = numbers.tensor_split([len(numbers) - len(numbers) % scheme.block])
    blocks = blocks.view(-1, scheme.block)
    scales = blocks.abs().amax(1)
    scaled = (blocks * (1 / scales.clamp(min=_SMALLEST)).unsqueeze(1)).view(-1)
    if len(rest):
        last = rest.abs().amax().clamp(min=_SMALLEST)
        scales, scaled = torch.cat([scales, last.view(1)]), torch.cat([scaled, rest / last])
    if not scales.isfinite().all():
        raise QuantError(
            "The weight holds numbers that are not finite.",
            given=f"{int((~weight.isfinite()).sum())} of {weight.numel()}",
            do="fetch the checkpoint again, or leave this layer in 16 bits",
        )
    scaled = F.pad(scaled, (0, len(numbers) % 2))
    codes = order[torch.bucketize(scaled, edges)].to(torch.uint8)
    return (codes[::2] << 4 | codes[1::2]).unsqueeze(1), scales


def nest(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales less their mean in 8 bits, uint8 [blocks], and the scale of each 256 of them, float32 [blocks / 256].

    A nested scale is the largest magnitude a of its 256. A number s is scaled to u = s * (1 / a), both operations
    rounded, and clamped to [-1, 1]; its place is (u + 1) / 2 * 65535 + 0.5 cut to a whole number (each operation
    rounded; a fused one has the same places), and its code the one of that place in ``scale_codes``. Code 0 goes to
    all of a group whose a is zero, and to a zero in a group whose 1 / a overflows.

    This is bitsandbytes' C++ on the processor; its other paths take the level nearest to u, and differ near zero.
    """
    groups = F.pad(scales, (0, -len(scales) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = groups.abs().amax(1)
    scaled = groups * (1 / nested).unsqueeze(1)  # 0 * inf, no number, is the case of code 0
    place = ((scaled.clamp(-1, 1) + 1) / 2 * 65535 + 0.5).nan_to_num(0).long()
    return scale_codes().to(scales.device)[place.view(-1)[: len(scales)]], nested


def scales(value: Quantised, table: Tensor | None = None) -> Tensor:
    """The scale of each block, float32 [blocks]: as stored, or level * nested scale, rounded, + offset, rounded.

    ``table``: 256 levels in place of the usual ones.
    """
    if value.nested_scales is None or value.offset is None:
        return value.scales
    fine = (scale_levels() if table is None else table).to(value.scales.device)[value.scales.long()]
    by_group = value.nested_scales.repeat_interleave(NESTED_BLOCK)[: len(fine)]
    return fine * by_group + value.offset


def decode(value: Quantised, dtype: torch.dtype | None = None) -> Tensor:
    """The numbers that ``value`` stands for, [*shape] in ``dtype`` (None: the one that it stands for).

    A number is its level * the scale of its block, a float32 product, rounded once more, to nearest even, to ``dtype``.
    Block b holds the numbers from b * block on of the weight in row-major order, across the ends of rows.

    So do bitsandbytes' quantiser, CUDA kernels and all but one of its paths on a processor: the AVX-512 one takes a
    new block at every row, and so wrong scales where a row is a multiple of 16 but no multiple of the block. And where
    it converts to bfloat16 by the processor's own instruction, numbers below 1.2e-38 become zero; here they do not.
    FP4's second zero, code 8, is +0 here as in its table; the portable path has -0.
    """
    count = math.prod(value.shape)
    codes = torch.cat([value.codes >> 4, value.codes & 15], 1).view(-1)[:count]
    numbers = levels(value.scheme.kind).to(codes.device)[codes.long()]
    by_block = scales(value).repeat_interleave(value.scheme.block)[:count]
    return (numbers * by_block).view(value.shape).to(value.dtype if dtype is None else dtype)


def linear(x: Tensor, value: Quantised, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for x [..., in] and a value of shape (out, in), in the dtype of x."""
    return F.linear(x, decode(value, x.dtype), bias)


__all__ = [
    "BLOCK",
    "BLOCKS",
    "DTYPES",
    "KINDS",
    "NESTED_BLOCK",
    "Quantised",
    "Scheme",
    "assembled",
    "decode",
    "encode",
    "linear",
    "nest",
    "quantise",
    "scales",
]
