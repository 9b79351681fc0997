"""The operators on a GPU, as ``tarsia.quant.cpu`` has them on the processor: which kernel, for what.

Rows of x up to `plan.few` are multiplied with the packed weight, one by `vector`, more by `batch`. Above, slices of the
weight are unpacked and torch multiplies; so too where a row of the weight is no whole number of blocks. All paths
multiply the same numbers: the weight rounded to the dtype of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tarsia.core.errors import QuantError
from tarsia.quant import cpu
from tarsia.quant.cpu import Packed4
from tarsia.quant.gpu import batch, decode, plan
from tarsia.quant.gpu.lang import INTERPRETED
from tarsia.quant.gpu.update import Update
from tarsia.quant.gpu.vector import vector


def dequantise4(weight: Packed4, dtype: torch.dtype) -> Tensor:
    """The whole weight, [rows, columns] in ``dtype``. Raises QuantError for parts that do not belong together."""
    _check(weight, weight.codes)
    cpu.check_dtype(dtype, "the weight")
    return decode.whole(weight, dtype)


def linear4(x: Tensor, weight: Packed4, bias: Tensor | None, update: Update | None = None) -> Tensor:
    """x W^T + b (+ update), [..., rows] in the dtype of x [..., columns]."""
    cpu.fit(x, weight.columns, "x")
    cpu.fit_bias(bias, x.dtype, weight.rows)
    _check(weight, x)
    lines = x.reshape(-1, weight.columns).contiguous()
    m = len(lines)
    _fit_update(update, lines, weight.rows)
    if not m:
        return x.new_empty((*x.shape[:-1], weight.rows))
    if not _takes(weight, m, x, update):
        y = _many(lines, weight, bias, update)
    elif m == 1:
        tiles = plan.vector(weight.rows, weight.columns // weight.block, weight.block, _processors(x.device))
        y = vector(lines[0], weight, bias, update, tiles)
    else:
        tiles = plan.forward(m, weight.rows, weight.columns // weight.block, weight.block, _processors(x.device))
        y = batch.forward(lines, weight, bias, update, tiles)
    return y.view(*x.shape[:-1], weight.rows)


def product4(y: Tensor, weight: Packed4, update: Update | None = None) -> Tensor:
    """y W (+ update), [..., columns] in the dtype of y [..., rows]: the way back of `linear4`."""
    cpu.fit(y, weight.rows, "y")
    _check(weight, y)
    lines = y.reshape(-1, weight.rows).contiguous()
    m = len(lines)
    _fit_update(update, lines, weight.columns)
    if not m:
        return y.new_empty((*y.shape[:-1], weight.columns))
    if not _takes(weight, m, y, update):
        x = _back(lines, weight, update)
    else:
        tiles = plan.backward(m, weight.rows, weight.columns // weight.block, weight.block, _processors(y.device))
        x = batch.backward(lines, weight, update, tiles)
    return x.view(*y.shape[:-1], weight.columns)


def _takes(weight: Packed4, m: int, x: Tensor, update: Update | None) -> bool:
    """Whether the packed weight itself is multiplied."""
    fits = weight.block in plan.BLOCKS and not weight.columns % weight.block
    held = update is None or update.low.shape[-1] <= plan.LONGEST_RANK
    return fits and held and m <= plan.few(x.dtype, _capability(x.device))


def _many(x: Tensor, weight: Packed4, bias: Tensor | None, update: Update | None) -> Tensor:
    """By slices of whole rows of W."""
    y = x.new_empty((len(x), weight.rows))
    for first, last in _slices(weight, weight.rows, weight.columns, x.element_size(), 1):
        some = last - first < weight.rows
        unpacked = decode.rows(weight, first, last, x.dtype) if some else decode.whole(weight, x.dtype)
        if bias is None:
            torch.mm(x, unpacked.t(), out=y[:, first:last])
        else:
            torch.addmm(bias[first:last], x, unpacked.t(), out=y[:, first:last])
    return y if update is None else y.addmm_(update.low, update.up.t(), alpha=update.scale)


def _back(y: Tensor, weight: Packed4, update: Update | None) -> Tensor:
    """By slices of columns of W: each sum is whole, and rounded once."""
    x = y.new_empty((len(y), weight.columns))
    for first, last in _slices(weight, weight.columns, weight.rows, y.element_size(), weight.block):
        some = last - first < weight.columns
        unpacked = decode.columns(weight, first, last, y.dtype) if some else decode.whole(weight, y.dtype)
        torch.mm(y, unpacked, out=x[:, first:last])
    return x if update is None else x.addmm_(update.low, update.up.t(), alpha=update.scale)


def _slices(weight: Packed4, lines: int, size: int, itemsize: int, step: int) -> tuple[tuple[int, int], ...]:
    """Where the weight is cut; not at all where its rows are no whole blocks."""
    return ((0, lines),) if weight.columns % weight.block else plan.slices(lines, size, itemsize, step)


def _check(weight: Packed4, x: Tensor) -> None:
    """Raise QuantError for a weight whose parts do not belong together, or are not where ``x`` is."""
    weight.check()
    if weight.block & (weight.block - 1):
        raise QuantError("No GPU kernel takes blocks of this size.", given=weight.block, allowed="a power of two")
    parts = (weight.scales, weight.nested_scales, weight.offset, weight.levels, weight.codes)
    places = {str(part.device) for part in parts if part is not None} | {str(x.device)}
    if len(places) > 1:
        raise QuantError("A 4-bit weight and its factor are on different devices.", given=sorted(places))
    if not x.is_cuda and not INTERPRETED.value:
        raise QuantError("The GPU's kernels were given a tensor elsewhere.", given=x.device, allowed="cuda")


def _fit_update(update: Update | None, x: Tensor, lines: int) -> None:
    """Raise QuantError for an update that is of another shape or dtype than the product."""
    if update is None:
        return
    low, up = update.low, update.up
    shapes = low.shape == (len(x), low.shape[-1]) and up.shape == (lines, low.shape[-1]) and low.is_contiguous()
    if not shapes or not low.dtype is up.dtype is x.dtype or not low.device == up.device == x.device:
        given = f"low {low.dtype} {tuple(low.shape)}, up {up.dtype} {tuple(up.shape)}"
        allowed = f"{x.dtype} ({len(x)}, rank), contiguous, and ({lines}, rank), on {x.device}"
        raise QuantError("The low-rank update does not fit the product.", given=given, allowed=allowed)


def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; one in the interpreter, so that it need not run many programs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
