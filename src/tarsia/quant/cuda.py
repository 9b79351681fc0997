"""The four operators on a GPU: Triton's kernels, or the slow reference, which is said once.

Quantising has no kernel: torch's own operations do it, bit for bit as on the processor.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from tarsia.quant import codec, cpu
from tarsia.quant.cpu import Packed4
from tarsia.quant.loader import Status
from tarsia.quant.native import VARIABLE


@cache
def kernels() -> ModuleType | None:
    """Triton's kernels (`tarsia.quant.gpu.linear`), or None where the reference runs; why is in the log."""
    found, said = _find(os.environ.get(VARIABLE, ""))
    if said.do is not None:
        logging.getLogger(__name__).warning("4-bit products: %s; to do: %s", said.text, said.do)
    return found


def status() -> Status:
    """What runs on a GPU and why."""
    return _find(os.environ.get(VARIABLE, ""))[1]


def _find(forced: str) -> tuple[ModuleType | None, Status]:
    if forced == "reference":
        return None, Status(f"on a GPU the slow reference: {VARIABLE} asks for it")
    try:
        from tarsia.quant.gpu import lang, linear
    except ImportError as error:
        return None, Status(f"on a GPU the slow reference, for there is no Triton ({error})", "pip install triton")
    return linear, Status(f"on a GPU the kernels of Triton {lang.VERSION}")


def quantise4(w: Tensor, levels: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes, uint8 [ceil(n / 2), 1], and scales, float32 [ceil(n / block)], of the n numbers of ``w``."""
    cpu.check_weight(w, levels, block)
    return codec.quantise(w, codec.Scheme(cpu.kind_of(levels), nested=False, block=block))


def dequantise4(weight: Packed4, dtype: torch.dtype) -> Tensor:
    """The whole weight, [rows, columns] in ``dtype``."""
    triton = kernels()
    if triton is None:
        cpu.check_dtype(dtype, "the weight")
        return codec.decode(weight.value(dtype))
    return triton.dequantise4(weight, dtype)  # type: ignore[no-any-return]


def linear4(x: Tensor, weight: Packed4, bias: Tensor | None) -> Tensor:
    """x W^T + b, [..., rows] in the dtype of x [..., columns]."""
    triton = kernels()
    if triton is None:
        cpu.fit(x, weight.columns, "x")
        cpu.fit_bias(bias, x.dtype, weight.rows)
        return codec.linear(x, weight.value(x.dtype), bias)
    return triton.linear4(x, weight, bias)  # type: ignore[no-any-return]


def product4(y: Tensor, weight: Packed4) -> Tensor:
    """y W, [..., columns] in the dtype of y [..., rows]: the way back of `linear4`."""
    triton = kernels()
    if triton is None:
        cpu.fit(y, weight.rows, "y")
        return y @ codec.decode(weight.value(y.dtype))
    return triton.product4(y, weight)  # type: ignore[no-any-return]
