"""The four operators on the processor: checked, then by the compiled kernel, or by the slow reference.

A product with few rows reads the packed weight once and never unpacks it to memory; ``tiles`` has those with many.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from tarsia.core.errors import QuantError
from tarsia.quant import codec, native, tiles
from tarsia.quant.levels import KINDS, levels, scale_levels

FEW = 16
"""Up to how many rows a product reads the packed weight: measured, AVX-512 in float32 beside ``tiles``."""


class Packed4(NamedTuple):
    """A weight [rows, columns] as the operators take it: the tensors of `codec.Quantised`, its levels, its numbers."""

    codes: Tensor
    scales: Tensor
    nested_scales: Tensor | None
    offset: Tensor | None
    levels: Tensor
    block: int
    rows: int
    columns: int

    def check(self) -> None:
        """Raise QuantError where the parts do not belong together: the kernel reads where they say."""
        count = self.rows * self.columns
        if self.rows < 1 or self.columns < 1 or self.block < 2 or self.block % 2:
            raise QuantError("No weight has such numbers.", given=f"{self.rows}x{self.columns}, blocks of {self.block}")
        blocks = -(-count // self.block)
        _expect("codes", self.codes, torch.uint8, -(-count // 2))
        _expect("levels", self.levels, torch.float32, 16)
        if self.nested_scales is None:
            _expect("scales", self.scales, torch.float32, blocks)
            return
        if self.offset is None:
            raise QuantError("Scales that are nested have an offset.", do="give both, or neither")
        _expect("scales", self.scales, torch.uint8, blocks)
        _expect("nested_scales", self.nested_scales, torch.float32, -(-blocks // codec.NESTED_BLOCK))
        _expect("offset", self.offset, torch.float32, 1)

    def packed(self) -> bytes:
        """For the kernel; holds addresses, so the tensors are to outlive it. Raises QuantError as `check` does."""
        self.check()
        shape = (self.rows, self.columns, self.block)
        if self.nested_scales is None or self.offset is None:
            scales = (self.scales.data_ptr(), 0, 0, 0, 0.0)
        else:
            scales = (0, self.scales.data_ptr(), _scale_levels(), self.nested_scales.data_ptr(), self.offset.item())
        return native.pack(self.codes.data_ptr(), self.levels.data_ptr(), scales, shape)

    def value(self, dtype: torch.dtype) -> codec.Quantised:
        """For the reference, which knows levels by their name."""
        self.check()
        scheme = codec.Scheme(kind_of(self.levels), self.nested_scales is not None, self.block)
        parts = (self.codes, self.scales, self.nested_scales, self.offset)
        return codec.Quantised(*parts, scheme, (self.rows, self.columns), dtype)


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, count: int) -> None:
    if tensor.dtype is not dtype or tensor.numel() != count or not tensor.is_contiguous():
        given = (
            f"{name}: {tensor.dtype}, {tensor.numel()} numbers{'' if tensor.is_contiguous() else ', not contiguous'}"
        )
        raise QuantError("The parts of a 4-bit weight do not fit.", given=given, allowed=f"{dtype}, {count} numbers")


@cache
def _scale_levels() -> int:
    return scale_levels().data_ptr()  # the table itself is cached, so the address stays


def kind_of(table: Tensor) -> str:
    """The name of these 16 levels. Raises QuantError for levels that have none."""
    for kind in KINDS:
        if torch.equal(levels(kind), table.cpu()):
            return kind
    raise QuantError("The reference knows no type with these levels.", given=table.tolist(), allowed=", ".join(KINDS))


def quantise4(w: Tensor, levels: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes, uint8 [ceil(n / 2), 1], and scales, float32 [ceil(n / block)], of the n numbers of ``w``."""
    check_weight(w, levels, block)
    kernel = native.library()
    if kernel is None:
        return codec.quantise(w, codec.Scheme(kind_of(levels), nested=False, block=block))
    w, n = w.contiguous(), w.numel()
    codes = torch.empty((-(-n // 2), 1), dtype=torch.uint8)
    absmax = torch.empty(-(-n // block), dtype=torch.float32)
    done = kernel.quantise(w.data_ptr(), w.dtype, n, block, levels.data_ptr(), codes.data_ptr(), absmax.data_ptr())
    if done == native.NOT_FINITE:
        given = f"{int((~w.isfinite()).sum())} of {n}"
        do = "fetch the checkpoint again, or leave this layer in 16 bits"
        raise QuantError("The weight holds numbers that are not finite.", given=given, do=do)
    tiles.demand(done)
    return codes, absmax


def check_weight(w: Tensor, levels: Tensor, block: int) -> None:
    """Raise QuantError for what can not be quantised."""
    if w.dtype not in native.DTYPES or not w.numel():
        raise QuantError("This is no weight to be quantised.", given=f"{w.dtype}, {tuple(w.shape)}", allowed=_ALLOWED)
    if block < 2 or block % 2:
        raise QuantError("Blocks of this size are not made.", given=block, allowed="an even number")
    _expect("levels", levels, torch.float32, 16)


def dequantise4(weight: Packed4, dtype: torch.dtype) -> Tensor:
    """The whole weight, [rows, columns] in ``dtype``."""
    check_dtype(dtype, "the weight")
    if native.library() is None:
        return codec.decode(weight.value(dtype))
    out = torch.empty((weight.rows, weight.columns), dtype=dtype)
    unpack4(weight, out)
    return out


def unpack4(weight: Packed4, out: Tensor) -> None:
    """The whole weight into ``out`` [rows, columns]: into memory that is there, which is what large tensors cost."""
    check_dtype(out.dtype, "the weight")
    if out.shape != (weight.rows, weight.columns) or out.stride(1) != 1:
        given = f"{tuple(out.shape)}, strides {out.stride()}"
        allowed = f"({weight.rows}, {weight.columns}), each row without gaps"
        raise QuantError("The weight can not be unpacked into this tensor.", given=given, allowed=allowed)
    kernel = native.library()
    if kernel is None:
        out.copy_(codec.decode(weight.value(out.dtype)))
        return
    whole = ((0, weight.rows), (0, weight.columns))
    tiles.demand(kernel.dequantise(weight.packed(), *whole, out.data_ptr(), out.dtype, out.stride(0)))


def linear4(x: Tensor, weight: Packed4, bias: Tensor | None) -> Tensor:
    """x W^T + b, [..., rows] in the dtype of x [..., columns]."""
    fit(x, weight.columns, "x")
    fit_bias(bias, x.dtype, weight.rows)
    kernel = native.library()
    if kernel is None:
        return codec.linear(x, weight.value(x.dtype), bias)
    packed = weight.packed()
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], weight.rows), dtype=x.dtype)
    m = x.numel() // weight.columns
    if m > FEW:
        tiles.forward(kernel, packed, x.view(m, -1), bias, y.view(m, -1))
    elif m:
        if bias is not None:
            bias = bias.contiguous()
        address = None if bias is None else bias.data_ptr()
        tiles.demand(kernel.rows(packed, x.data_ptr(), x.dtype, m, address, y.data_ptr()))
    return y


def product4(y: Tensor, weight: Packed4) -> Tensor:
    """y W, [..., columns] in the dtype of y [..., rows]: the way back of `linear4`."""
    fit(y, weight.rows, "y")
    kernel = native.library()
    if kernel is None:
        return y @ codec.decode(weight.value(y.dtype))
    packed = weight.packed()
    x = torch.empty((*y.shape[:-1], weight.columns), dtype=y.dtype)
    m = y.numel() // weight.rows
    if m:
        tiles.backward(kernel, packed, y.reshape(m, -1), x.view(m, -1))
    return x


_ALLOWED = "float32, bfloat16 or float16"


def check_dtype(dtype: torch.dtype, name: str) -> None:
    """Raise QuantError for a dtype, that of ``name``, in which there is no 4-bit product."""
    if dtype not in native.DTYPES:
        raise QuantError(f"There is no 4-bit product in this dtype of {name}.", given=dtype, allowed=_ALLOWED)


def fit(x: Tensor, size: int, name: str) -> None:
    """Raise QuantError where ``x`` (called ``name``) can not be multiplied with a weight of ``size`` numbers a line."""
    check_dtype(x.dtype, name)
    if not x.ndim or x.shape[-1] != size:
        raise QuantError(f"{name} does not fit the 4-bit weight.", given=tuple(x.shape), allowed=f"(..., {size})")


def fit_bias(bias: Tensor | None, dtype: torch.dtype, rows: int) -> None:
    """Raise QuantError where ``bias`` can not be added to a product of ``rows`` numbers a line."""
    if bias is not None and (bias.dtype is not dtype or bias.shape != (rows,)):
        given = f"bias {bias.dtype} {tuple(bias.shape)}"
        raise QuantError("The bias does not fit.", given=given, allowed=f"{dtype} ({rows},)")
