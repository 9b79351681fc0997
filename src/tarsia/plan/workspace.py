"""Memory that an operation takes inside itself on a processor: what no dispatcher sees.

A table of the kernels that take more than what they give: torch's (ATen, oneDNN) and those for weights in 4 bits. Each
entry says what the kernel allocates, beside its outputs and at its worst moment, from shapes, strides and dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from math import prod
from typing import Final

import torch

from tarsia.plan.ghost import Op, Spec, gapless, size_of
from tarsia.plan.ledger import Category, Ledger
from tarsia.quant import cpu, native, tiles

BLOCK: Final = 60
"""Numbers each way of the squares that ATen copies a transposed matrix in (BLOCK_SZ of Copy.cpp)."""
ALIGNED: Final = 128
"""Bytes that a product in half precision takes beside its sums."""
_HALF: Final = (torch.bfloat16, torch.float16)


class Workspace:
    """Bytes that an operation takes and gives back; what it takes and keeps is noted in ``ledger`` at its first use."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._arena: torch.Tensor | None = None
        self._known: dict[Op, int] = {}

    def __call__(self, op: Op) -> int:
        if op not in self._known:
            self._known[op] = taken(op)
        if self._arena is None and tiled(op):
            self._arena = torch.empty(tiles.ARENA, dtype=torch.uint8)
            self._ledger.see(self._arena, op.name, Category.KERNELS)
        return self._known[op]


def taken(op: Op) -> int:
    """Bytes that an operation takes beside its outputs and gives back before it ends; 0 where it is in no table."""
    name = op.name.partition(".")[0]
    formula = _FORMULAS.get(name)
    if formula is not None:
        return formula(op)
    return _converted(op) if _pointwise(op.name) else 0


def tiled(op: Op) -> bool:
    """Whether an operation unpacks weights in 4 bits into the buffer that stays (``tarsia.quant.tiles``)."""
    if native.library() is None or op.name not in ("tarsia::linear4", "tarsia::product4"):
        return False
    return op.name == "tarsia::product4" or _lines(op.inputs[0]) > cpu.FEW


def _pointwise(name: str) -> bool:
    if name not in _POINTWISE:
        space, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        found = getattr(getattr(getattr(torch.ops, space), packet), overload or "default")
        _POINTWISE[name] = torch.Tag.pointwise in found.tags
    return _POINTWISE[name]


_POINTWISE: Final[dict[str, bool]] = {}


def _numbers(spec: Spec) -> int:
    return prod(spec[0])


def _lines(spec: Spec) -> int:
    return prod(spec[0][:-1])


def _copies(specs: tuple[Spec, ...]) -> int:
    """What those take in a copy without gaps that have some."""
    return sum(0 if gapless(spec) else size_of(spec) for spec in specs)


def _converted(op: Op) -> int:
    """Operands in the dtype that all are computed in: TensorIterator makes them whole, and an output of another."""
    chosen = op.inputs[1:] if op.name.startswith(("aten::where", "aten::masked_fill")) else op.inputs
    wide = [spec for spec in chosen if spec[0]]
    if not wide:
        return 0
    common = reduce(torch.promote_types, (spec[2] for spec in wide))
    size = sum(_numbers(spec) * common.itemsize for spec in wide if spec[2] is not common)
    in_place = op.name.partition(".")[0].endswith("_")
    return size + (_numbers(wide[0]) * common.itemsize if in_place and wide[0][2] is not common else 0)


def _widened(dtype: torch.dtype) -> bool:
    """Whether products of ``dtype`` are summed in a float32 matrix beside the result: where there is no such unit."""
    return dtype in _HALF and tiles.working_dtype(dtype) is torch.float32


def _product(op: Op) -> int:
    """A matrix product [m, k] [k, n] in half precision: its sums in float32."""
    left, right = _factors(op)
    return 4 * left[0][-2] * right[0][-1] + ALIGNED if _widened(right[2]) else 0


def _factors(op: Op) -> tuple[Spec, Spec]:
    """Of a product, which may have what is added before them and where to write behind them."""
    first = 1 if "add" in op.name else 0
    return op.inputs[first], op.inputs[first + 1]


def _products(op: Op) -> int:
    """Products of batches: as one of them; half precision repeats what is shared by a batch."""
    factors = _factors(op)
    if not _widened(factors[1][2]):
        return 0
    return sum(size_of(spec) for spec in factors if _scattered(spec)) + _product(op)


def _scattered(batch: Spec) -> bool:
    """Whether matrices [batch, m, k] do not lie one behind the other without gaps, all by rows or all by columns."""
    _, m, k = batch[0]
    return batch[1] not in ((m * k, k, 1), (m * k, 1, m))


def _convolution(op: Op) -> int:
    """oneDNN: the weight in an order of its own beside the result in another, then that beside the result as it is."""
    weight = op.inputs[1]
    return max(_reordered(weight), sum(map(size_of, op.outputs))) + _copies(op.inputs[:1])


def _reordered(weight: Spec) -> int:
    """[out, in, ...]: in half precision the inputs are taken in fours, outputs in sixteens always."""
    outputs, inputs, *kernel = weight[0]
    by = 4 if weight[2] in _HALF else 1
    return -(-outputs // 16) * 16 * -(-inputs // by) * by * prod(kernel) * weight[2].itemsize


def _convolution_back(op: Op) -> int:
    """Gradient, input and weight in orders of oneDNN's own."""
    return 2 * _reordered(op.inputs[2]) + _copies(op.inputs[:2])


def _tile(queries: int) -> int:
    """Queries that flash attention on a processor takes at a time (FlashAttentionKernel.cpp)."""
    return min(256 if queries >= 768 else 64 if queries >= 192 else 32, queries)


def _attention(op: Op) -> int:
    """For each thread: tiles of scores and of results in float32, sums, maxima; scores in half precision too."""
    queries, head = op.inputs[0][0][-2:]
    rows, columns = _tile(queries), min(512, op.inputs[1][0][-2])
    numbers = rows * (columns + 2 + head)
    half = rows * columns * 2 if op.inputs[0][2] in _HALF else 0
    return torch.get_num_threads() * (4 * numbers + half)


def _attention_back(op: Op) -> int:
    """For each thread: tiles of scores and of their gradients, in half precision too, and one product's sums."""
    queries, head = op.inputs[1][0][-2:]
    rows, columns = _tile(queries), min(512, op.inputs[2][0][-2])
    size = 4 * (2 * rows * columns + rows)
    if op.inputs[1][2] in _HALF:
        size += 4 * rows * columns
        size += 4 * columns * head + ALIGNED if _widened(op.inputs[1][2]) else 0
    return torch.get_num_threads() * size


def _norm(op: Op) -> int:
    return _copies(op.inputs[:1])


def _norm_back(op: Op) -> int:
    return _copies(op.inputs[:2])


def _chosen_back(op: Op) -> int:
    """masked_select: each place of the mask, and the sum of those before it, as int64."""
    return 16 * _numbers(op.inputs[0])


def _truth(op: Op) -> int:
    return 0 if op.inputs[0][2] is torch.bool else _numbers(op.inputs[0])


def _eigen(op: Op) -> int:
    """LAPACK's syevd: 1 + 6 n + 2 n^2 numbers and 3 + 5 n integers."""
    n, size = op.inputs[0][0][-1], op.inputs[0][2].itemsize
    return size * (1 + 6 * n + 2 * n**2) + 4 * (3 + 5 * n)


def _linear4(op: Op) -> int:
    x, weight_rows = op.inputs[0], op.outputs[0][0][-1]
    m, columns = _lines(x), x[0][-1]
    if native.library() is None:
        return _reference4(weight_rows, columns, x[2])
    copied = _copies((x,))
    if m <= cpu.FEW:
        return copied
    work = tiles.working_dtype(x[2])
    if work is not x[2]:
        bias = op.inputs[-1]
        biased = bias[2] is x[2] and bias[0] == (weight_rows,)
        copied += work.itemsize * (m * (columns + weight_rows) + (weight_rows if biased else 0))
    return copied + _transposed4(m, columns, weight_rows, work)


def _transposed4(m: int, columns: int, rows: int, work: torch.dtype) -> int:
    """x^T, and y^T a stretch of rows at a time, where few lines meet a large weight."""
    if tiles.TRANSPOSITION * m * (columns + rows) > columns * rows:
        return 0
    width = tiles.WIDTH if work is torch.float32 else columns
    spans = tiles.forward_tiles(rows, columns, tiles.ARENA // work.itemsize, width)
    most = max(last - first for (first, last), _ in spans)
    return work.itemsize * (m * (columns + most) + BLOCK**2)


def _product4(op: Op) -> int:
    y, columns = op.inputs[0], op.outputs[0][0][-1]
    m, rows = _lines(y), y[0][-1]
    if native.library() is None:
        return _reference4(rows, columns, y[2])
    work = tiles.working_dtype(y[2])
    return _copies((y,)) + (work.itemsize * m * (columns + rows) if work is not y[2] else 0)


def _reference4(rows: int, columns: int, dtype: torch.dtype) -> int:
    """Without the compiled kernel: codes as int64, numbers in float32, and those in ``dtype``."""
    return rows * columns * (8 + 4 + dtype.itemsize)


def _pool_back(op: Op) -> int:
    return sum(map(size_of, op.outputs))


_FORMULAS: Final[Mapping[str, Callable[[Op], int]]] = {
    "aten::mm": _product,
    "aten::addmm": _product,
    "aten::addmm_": _product,
    "aten::bmm": _products,
    "aten::baddbmm": _products,
    "aten::baddbmm_": _products,
    "aten::convolution": _convolution,
    "aten::convolution_backward": _convolution_back,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_back,
    "aten::native_layer_norm": _norm,
    "aten::native_layer_norm_backward": _norm_back,
    "aten::masked_scatter_backward": _chosen_back,
    "aten::avg_pool2d_backward": _pool_back,
    "aten::any": _truth,
    "aten::all": _truth,
    "aten::_linalg_eigh": _eigen,
    "tarsia::linear4": _linear4,
    "tarsia::product4": _product4,
}
