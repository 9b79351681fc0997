"""Whether the 4-bit operators on a GPU are right: bits of the unpacked weight, products within one rounding."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from bench.gpu_time import Row
from tarsia.quant import codec, cuda
from tarsia.quant.codec import KINDS, Scheme
from tarsia.quant.cpu import Packed4
from tarsia.quant.levels import levels

SHAPES: Final = ((4096, 4096), (67, 320), (3, 50), (7, 33), (1, 1), (513, 4096))
BATCHES: Final = (1, 4, 16, 64, 256)
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


def check(device: str, shapes: Sequence[tuple[int, int]]) -> Row:
    """Compare with the reference. Raises RuntimeError where a bit differs, or a product by more than one rounding."""
    # torch may add up parts of a long sum in 16 bits, which is more than one rounding
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    compared = 0
    worst = 0.0
    chance = torch.Generator().manual_seed(0)
    for shape, kind, nested in itertools.product(shapes, KINDS, (True, False)):
        value = codec.encode(torch.randn(shape, generator=chance) * 0.02, Scheme(kind, nested))
        there = {name: part.to(device) for name, part in value.tensors.items()}
        scales = (there["scales"], there.get("nested_scales"), there.get("offset"))
        weight = Packed4(there["codes"], *scales, levels(kind).to(device), 64, *shape)
        for dtype in DTYPES:
            right = codec.decode(value, dtype)
            found = cuda.dequantise4(weight, dtype).cpu()
            differ = int((found.view(torch.uint8) != right.view(torch.uint8)).sum())
            if differ:
                raise RuntimeError(
                    f"{differ} bytes of {kind} {shape} in {dtype}, nested {nested}, are not the reference's"
                )
            compared += right.numel()
            worst = max(worst, _products(weight, right.to(device).double(), dtype))
    if worst > 1:
        raise RuntimeError(f"a product is {worst:.1f} times one rounding from the exact one")
    return {"numbers compared": compared, "bits that differ": 0, "worst product, of one rounding": round(worst, 3)}


def _products(weight: Packed4, exact: Tensor, dtype: torch.dtype) -> float:
    """The largest error of products with some rows, as a share of what one rounding and float32 sums allow."""
    ways: tuple[tuple[int, Tensor, Callable[[Tensor], Tensor]], ...] = (
        (weight.columns, exact.t(), lambda x: cuda.linear4(x, weight, None)),
        (weight.rows, exact, lambda y: cuda.product4(y, weight)),
    )
    worst = 0.0
    for m in BATCHES[: 2 + 3 * exact.is_cuda]:
        for width, factor, product in ways:
            x = torch.randn(m, width, dtype=dtype, device=exact.device)
            right, size = x.double() @ factor, x.double().abs() @ factor.abs()
            allowed = torch.finfo(dtype).eps / 2 * 1.01 * right.abs() + 4e-6 * size + torch.finfo(dtype).smallest_normal
            worst = max(worst, float(((product(x).double() - right).abs() / allowed).max()))
    return worst
