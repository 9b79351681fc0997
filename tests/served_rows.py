"""Rows, forms and caches of random numbers, for the tests of what serving computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tarsia.serve import kernel, reference
from tarsia.serve.forms import Neck, Thin
from tarsia.serve.reference import Row

ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
FLOATS = (torch.float32, torch.bfloat16)


def entries(forms: list[Row]) -> Tensor:
    return torch.tensor([form.entry() if form else [0] * 12 for form in forms], dtype=torch.int64).view(-1, 12)


@dataclass
class Drawn:
    """Random numbers of one seed."""

    seed: int

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32, by: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * by).to(dtype)

    def maybe(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return self(*shape, dtype=dtype) if torch.rand((), generator=self.generator) < 0.5 else None


def thin(draw: Drawn, rank: int, within: int, out: int, dtype: torch.dtype) -> Thin:
    down, up = draw(rank, within, dtype=dtype, by=within**-0.5), draw(out, rank, dtype=dtype, by=max(rank, 1) ** -0.5)
    rest = draw.maybe(out), draw.maybe(out), draw.maybe(within)
    return Thin(*((down, up) if rank else (None, None)), 0.7, *rest)


def neck(draw: Drawn, rank: int, width: int, dtype: torch.dtype, activation: str, of_input: bool) -> Neck:
    """Of a stream ``width`` wide, as its input is where the neck reads that."""
    down, up = draw(rank, width, dtype=dtype, by=width**-0.5), draw(width, rank, dtype=dtype, by=rank**-0.5)
    norm, norm_bias = draw.maybe(width, dtype=dtype), draw(width, dtype=dtype)
    biases = draw.maybe(rank, dtype=dtype), draw.maybe(width, dtype=dtype)
    return Neck(down, up, *biases, norm, None if norm is None else norm_bias, activation, of_input, 1.5)


@dataclass
class Line:
    x: Tensor
    y: Tensor
    starts: Tensor
    forms: list[Row]

    def run(self, by: kernel.Kernel) -> Tensor:
        return by.grouped(self.x, self.y.clone(), self.starts, self.forms, entries(self.forms))

    def row(self, i: int) -> Line:
        first, last = self.starts[i : i + 2].tolist()
        starts = torch.tensor([0, last - first], dtype=torch.int32)
        return Line(self.x[first:last], self.y[first:last], starts, [self.forms[i]])


def near(found: Tensor, expected: Tensor) -> None:
    """Within float32's rounding of sums, or one rounding to bfloat16 of it."""
    if found.dtype == torch.float32:
        size = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(1.0, size))
    else:
        torch.testing.assert_close(found.float(), expected.float(), rtol=2**-7, atol=1e-5)


@dataclass
class Cache:
    """Rows of some lengths in a pool whose blocks lie in any order; what no row wrote is no number."""

    q: Tensor
    keys: Tensor
    values: Tensor
    tables: Tensor
    starts: Tensor
    before: Tensor

    def rest(self) -> tuple[Tensor, ...]:
        return self.keys, self.values, self.tables, self.starts, self.before


def cache(
    draw: Drawn, rows: list[tuple[int, int]], heads: int, kv: int, dim: int, block: int, dtype: torch.dtype
) -> Cache:
    totals = [before + count for before, count in rows]
    need = [-(-total // block) for total in totals]
    order = torch.randperm(sum(need) + 3, generator=draw.generator)
    pools = [torch.full((len(order), block, kv, dim), float("nan"), dtype=dtype) for _ in range(2)]
    tables, used = torch.zeros(len(rows), max(need, default=0) + 1, dtype=torch.int32), 0
    for i, (total, some) in enumerate(zip(totals, need, strict=True)):
        tables[i, :some] = order[used : used + some]
        used += some
        places = torch.arange(total)
        slots = tables[i].long()[places // block] * block + places % block
        reference.store(draw(total, kv, dim, dtype=dtype), draw(total, kv, dim, dtype=dtype), *pools, slots)
    counts = [count for _, count in rows]
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    before = torch.tensor([had for had, _ in rows], dtype=torch.int32)
    return Cache(draw(sum(counts), heads, dim, dtype=dtype), *pools, tables, starts, before)
