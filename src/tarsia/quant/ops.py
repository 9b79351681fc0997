"""The 4-bit operators of torch: a first version over the slow reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tarsia.quant.codec import Quantised, Scheme, decode

_WEIGHT = (
    "Tensor codes, Tensor scales, Tensor? nested_scales, Tensor? offset, Tensor levels, int block, int rows, "
    "int columns"
)
_library = torch.library.Library("tarsia", "DEF")
_library.define(f"dequantise4({_WEIGHT}, ScalarType dtype) -> Tensor")
_library.define(f"linear4(Tensor x, {_WEIGHT}, Tensor? bias) -> Tensor")
_library.define(f"product4(Tensor y, {_WEIGHT}) -> Tensor")


def _dense(weight: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    codes, scales, nested_scales, offset, table, block, rows, columns = weight
    from tarsia.quant.levels import KINDS, levels

    kind = next(kind for kind in KINDS if torch.equal(levels(kind), table))
    scheme = Scheme(kind, nested_scales is not None, block)
    return decode(Quantised(codes, scales, nested_scales, offset, scheme, (rows, columns), dtype))


_library.impl("dequantise4", lambda *a: _dense(a[:8], a[8]), "CPU")
_library.impl("linear4", lambda x, *a: F.linear(x, _dense(a[:8], x.dtype), a[8]), "CPU")
_library.impl("product4", lambda y, *a: y @ _dense(a[:8], y.dtype), "CPU")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *a: Any) -> Tensor:
        ctx.weight = a[:8]
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.tarsia.linear4(x, *a)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (torch.ops.tarsia.product4(grads[0], *ctx.weight), *(None,) * 9)


_library.impl("linear4", lambda *a: _Linear.apply(*a), "Autograd")
