"""What a calibration times: single operations over a small grid of sizes, one list for all devices.

Weights come from a pool that is larger than a core's caches and are never the same twice in a row, as in a model
whose layers take turns; what one layer hands to the next is warm, as it is there.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from tarsia.plan.work import Kind
from tarsia.quant.codec import Scheme
from tarsia.quant.levels import levels
from tarsia.quant.ops import dequantise4, linear4, product4
from tarsia.quant.rounding import rounded

Call = Callable[[], Any]

_aten = torch.ops.aten
_FLOPS: Final = 2**31
"""The most in one product: larger ones are as fast as these are."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One operation of one size. ``make`` gives what is timed."""

    kind: Kind
    dtype: str
    size: tuple[int, ...]
    make: Callable[[], Call]


@dataclass(frozen=True, slots=True)
class Scale:
    """How fine the grid is."""

    rows: tuple[int, ...]
    depths: tuple[int, ...]
    lengths: tuple[int, ...]
    numbers: tuple[int, ...]
    pool: int
    """Numbers in the pool of weights."""


FULL: Final = Scale(
    (1, 4, 16, 64, 256, 1024),
    (4, 16, 64, 256, 1024, 4096),
    (16, 64, 256, 1024),
    (2**10, 2**14, 2**17, 2**20, 2**22),
    2**25,
)
QUICK: Final = Scale((1, 32), (4, 32), (16, 32), (2**9, 2**10), 2**14)
DTYPES: Final = ("float32", "bfloat16")


KINDS: Final = frozenset(Kind) - {Kind.NOTHING}
"""What every calibration has points of."""


class Pool:
    """Weights, one after the other from one long stretch of memory."""

    def __init__(self, numbers: int, dtype: torch.dtype, device: str) -> None:
        self._numbers = torch.full((numbers,), 0.01, dtype=dtype, device=device)
        self._next = 0

    def matrix(self, rows: int, columns: int) -> Tensor:
        """The next weight [rows, columns]."""
        count = rows * columns
        if self._next + count > len(self._numbers):
            self._next = 0
        held = self._numbers[self._next : self._next + count].view(rows, columns)
        self._next += count
        return held

    def spread(self, rows: int, columns: int) -> Iterator[Tensor]:
        """Weights without end, sixteen views at most that were made beforehand."""
        return itertools.cycle([self.matrix(rows, columns) for _ in range(16)])


def probes(scale: Scale, device: str, dtypes: Sequence[str] = DTYPES) -> Iterator[Probe]:
    """Every operation that is timed, kinds mixed only by their order here."""
    for name in dtypes:
        dtype = getattr(torch, name)
        pool = Pool(scale.pool, dtype, device)
        coarse = name != "float32"
        yield from _products(scale, name, pool, coarse)
        yield from _others(scale, name, pool)
        yield from _attention(scale, name, device)
        yield from _streams(scale, name, device)
        yield from _four_bits(scale, name, device)
    yield from _updates(scale, device)


def _like(pool: Pool, *sizes: int) -> Tensor:
    return pool._numbers.new_full(sizes, 0.01)


def _products(scale: Scale, name: str, pool: Pool, coarse: bool) -> Iterator[Probe]:
    rows, depths = (scale.rows[::2], scale.depths[1::2]) if coarse else (scale.rows, scale.depths)
    for m, n, k in itertools.product(rows, depths, depths):
        if 2 * m * n * k <= _FLOPS and n * k <= scale.pool:
            yield Probe(Kind.PRODUCT, name, (m, n, k), partial(_product, pool, m, n, k))


def _product(pool: Pool, m: int, n: int, k: int) -> Call:
    x, weights = _like(pool, m, k), pool.spread(n, k)
    return lambda: torch.mm(x, next(weights).t())


def _others(scale: Scale, name: str, pool: Pool) -> Iterator[Probe]:
    """Products of many small matrices, and convolutions whose windows lie beside each other."""
    few = (scale.rows[0] * 16, scale.rows[-1] // 2)
    for m, n, k in itertools.product(few, (16, 64), (16, 64)):
        yield Probe(Kind.BATCHED, name, (8, m, n, k), partial(_batched, pool, m, n, k))
    for side, n in itertools.product((2, max(3, scale.rows[-1] // 64)), (64, 256)):
        yield Probe(Kind.WINDOW, name, (side * side, n, 3 * 14 * 14), partial(_window, pool, side, n, 14))
        yield Probe(Kind.FILM, name, (side * side, n, 6 * 14 * 14), partial(_film, pool, side * side, n, 14))


def _batched(pool: Pool, m: int, n: int, k: int) -> Call:
    a, b = _like(pool, 8, m, k), _like(pool, 8, k, n)
    return lambda: torch.bmm(a, b)


def _window(pool: Pool, side: int, channels: int, window: int) -> Call:
    x, w = _like(pool, 1, 3, side * window, side * window), _like(pool, channels, 3, window, window)
    return lambda: F.conv2d(x, w, stride=window)


def _film(pool: Pool, places: int, channels: int, window: int) -> Call:
    # as Qwen-VL's towers cut patches: one window for each, of two pictures on top of each other
    x, w = _like(pool, places, 3, 2, window, window), _like(pool, channels, 3, 2, window, window)
    return lambda: F.conv3d(x, w, stride=(2, window, window))


def _attention(scale: Scale, name: str, device: str) -> Iterator[Probe]:
    for length, width in itertools.product(scale.lengths, (16, 64)):
        for kind in (Kind.ATTENTION, Kind.ATTENTION_BACK):
            size = (4, length * length, width)
            yield Probe(kind, name, size, partial(_attended, kind, name, device, length, width))


def _attended(kind: Kind, name: str, device: str, length: int, width: int) -> Call:
    q, k, v = (
        torch.full((1, 4, length, width), 0.1, dtype=getattr(torch, name), device=device).requires_grad_()
        for _ in range(3)
    )
    mask = torch.zeros(1, 1, length, length, dtype=q.dtype, device=device)
    if kind is Kind.ATTENTION:
        return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if device == "cpu":
        # past autograd's engine, which costs more than little heads do
        q, k, v = q.detach(), k.detach(), v.detach()
        out, sums = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)
        back, grad = _aten._scaled_dot_product_flash_attention_for_cpu_backward, torch.ones_like(out)
        return lambda: back(grad, q, k, v, out, sums, 0.0, False, attn_mask=mask)
    with torch.enable_grad():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return lambda: torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)


def _streams(scale: Scale, name: str, device: str) -> Iterator[Probe]:
    dtype = getattr(torch, name)
    for count in scale.numbers:
        x = torch.full((count // 256, 4, 64), 0.3, dtype=dtype, device=device)
        for kind, make in _STREAMS.items():
            yield Probe(kind, name, (count,), partial(_kept, make, x))


def _kept(make: Callable[[Tensor], Call], x: Tensor) -> Call:
    """The last results stay alive, as they do for a way back: each new one lies elsewhere in memory."""
    call, held = make(x), deque[Any](maxlen=max(1, min(64, _HELD // x.nbytes)))
    return lambda: held.append(call())


_HELD: Final = 2**25
"""Bytes of results that stay alive."""


def _strided(x: Tensor) -> Call:
    shared = x[:, :1].clone()  # by all heads
    return lambda: x * shared


def _in_place(x: Tensor) -> Call:
    y = torch.ones_like(x)
    return lambda: x.mul_(y)


def _gelu(x: Tensor) -> Call:
    # which of the two it is can not be told from shapes
    half = len(x) // 2
    return lambda: (F.gelu(x[:half]), F.gelu(x[half:], approximate="tanh"))


def _crossed(x: Tensor) -> Call:
    y = x.reshape(-1, 256).t().contiguous().t()
    return lambda: y.clone(memory_format=torch.contiguous_format)


def _converted(x: Tensor) -> Call:
    y = x.to(torch.bfloat16 if x.dtype == torch.float32 else torch.float32)
    return lambda: y.to(x.dtype)


def _chosen(x: Tensor) -> Call:
    seen = torch.ones(x.numel() // 64, 64, dtype=torch.bool, device=x.device).tril()
    zero, least = x.new_zeros(()), x.new_full((), -1e9)
    return lambda: torch.where(seen, zero, least)


def _joined(x: Tensor) -> Call:
    halves = x[..., 32:], x[..., :32]
    return lambda: torch.cat(halves, -1)


def _picked(x: Tensor) -> Call:
    table = x.view(-1, 64)
    places = torch.arange(len(table), device=x.device).flip(0)
    return lambda: table[places]


def _put(x: Tensor) -> Call:
    table = torch.zeros_like(x).view(-1, 64)
    places, values = torch.arange(len(table), device=x.device).flip(0), torch.ones_like(table)
    return lambda: table.index_put_((places,), values)


_STREAMS: Final[dict[Kind, Callable[[Tensor], Call]]] = {
    Kind.STREAM: lambda x: lambda: x + x,
    Kind.STRIDED: _strided,
    Kind.CROSSED: _crossed,
    Kind.IN_PLACE: _in_place,
    Kind.CONVERT: _converted,
    Kind.CHOOSE: _chosen,
    Kind.JOIN: _joined,
    Kind.CURVE: lambda x: lambda: F.silu(x),
    Kind.GELU: _gelu,
    Kind.RANDOM: lambda x: lambda: torch.empty_like(x).bernoulli_(0.9),
    Kind.REDUCE: lambda x: lambda: x.view(-1, 256).sum(-1),
    Kind.ACROSS: lambda x: lambda: x.sum(1),
    Kind.NORMALISE: lambda x: lambda: torch.softmax(x, -1),
    Kind.GATHER: _picked,
    Kind.SCATTER: _put,
    Kind.SORT: lambda x: lambda: torch.sort(x.flatten()),
}


def _four_bits(scale: Scale, name: str, device: str) -> Iterator[Probe]:
    rows = scale.rows[::2] if name != "float32" else (*scale.rows[::2], scale.rows[-1])
    sides = tuple(d for d in scale.depths if 32 <= d <= 2048)
    for n, k in itertools.product(sides, sides):
        for m in rows:
            for kind in (Kind.FOUR_BITS, Kind.FOUR_BITS_BACK):
                yield Probe(kind, name, (m, n, k), partial(_packed, kind, name, device, m, n, k))
        yield Probe(Kind.UNPACK, name, (n * k,), partial(_packed, Kind.UNPACK, name, device, 1, n, k))


def _packed(kind: Kind, name: str, device: str, m: int, n: int, k: int) -> Call:
    dtype, scheme = getattr(torch, name), Scheme("nf4", nested=True)
    value = rounded(torch.full((n, k), 0.01, device=device), scheme, dtype)
    table = levels("nf4").to(device)
    weight = (value.codes, value.scales, value.nested_scales, value.offset, table, scheme.block, n, k)
    x = torch.full((m, k if kind is Kind.FOUR_BITS else n), 0.1, dtype=dtype, device=device)
    if kind is Kind.FOUR_BITS:
        return lambda: linear4(x, *weight, None)
    return (lambda: dequantise4(*weight, dtype)) if kind is Kind.UNPACK else (lambda: product4(x, *weight))


def _updates(scale: Scale, device: str) -> Iterator[Probe]:
    for count in scale.numbers:
        # four tensors each: parameter, gradient and two states
        yield Probe(Kind.UPDATE, "float32", (4 * count,), partial(_update, count, device))


def _update(count: int, device: str) -> Call:
    parameter = torch.nn.Parameter(torch.full((count,), 0.1, device=device))
    parameter.grad = torch.full_like(parameter, 0.1)
    optimiser = torch.optim.AdamW([parameter], fused=True)
    return optimiser.step
