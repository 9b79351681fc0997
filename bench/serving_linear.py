"""Who takes part in ``bench/cases/mixed_linear.py``: one linear layer, and what a batch of adapters adds to it.

Weights and adapters are taken in turn from more than the last cache holds. All contestants are in one process and take
turns call by call, forwards and backwards, so that a busy moment of the machine touches all alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from tarsia.serve import kernel
from tarsia.serve.forms import Thin
from tarsia.serve.reference import Row

WIDTH, RANK, SCALE = 2048, 16, 2.0
CACHE = 640 * 2**20
"""Bytes that weights fill at least, and adapters once more: 2.5 times the last cache of the machine this ran on."""
SAME = 0.02
"""Results differ by no more, as a share of the largest: some roundings to bfloat16."""

Step = Callable[[int], Tensor]


@dataclass(frozen=True, eq=False)
class Batch:
    """``rows`` tokens, each with an adapter of its own: ``sets`` batches of adapters after one another."""

    x: Tensor
    weights: Sequence[Tensor]
    downs: Tensor
    """[adapters, rank, width], as a server of stacked adapters holds them; a batch's are ``ids``."""
    ups: Tensor
    ids: Sequence[Tensor]
    forms: Sequence[Sequence[Row]]
    entries: Sequence[Tensor]
    starts: Tensor


def weights() -> list[Tensor]:
    """As many [width, width] in bfloat16 as exceed the cache."""
    drawn = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)) / WIDTH**0.5
    first = drawn.to(torch.bfloat16)
    return [first.clone() for _ in range(CACHE // first.nbytes + 1)]


def batch(rows: int, dense: Sequence[Tensor]) -> Batch:
    """Adapters in bfloat16, each at places of its own in memory, in an order that is not that of the places."""
    chance = torch.Generator().manual_seed(rows)
    sets = CACHE // (rows * 4 * RANK * WIDTH) + 2
    downs, ups = (torch.empty(sets * rows, *shape, dtype=torch.bfloat16) for shape in ((RANK, WIDTH), (WIDTH, RANK)))
    downs.copy_(torch.randn(RANK, WIDTH, generator=chance) / WIDTH**0.5)
    ups.copy_(torch.randn(WIDTH, RANK, generator=chance) / RANK**0.5)
    ids = list(torch.randperm(sets * rows, generator=chance).view(sets, rows))
    forms: list[list[Row]] = [[Thin(downs[i], ups[i], SCALE) for i in some.tolist()] for some in ids]
    scale = int(torch.tensor(SCALE).view(torch.int32))
    entries = [
        torch.tensor([[downs[i].data_ptr(), ups[i].data_ptr(), RANK, scale, 0, 0, 0, 1, 0, 0, 0, 0] for i in some])
        for some in (part.tolist() for part in ids)
    ]
    x = torch.randn(rows, WIDTH, generator=chance).to(torch.bfloat16)
    return Batch(x, dense, downs, ups, ids, forms, entries, torch.arange(rows + 1, dtype=torch.int32))


def contestants(b: Batch) -> dict[str, Step]:
    """By name: a call on the weights and adapters of one turn."""
    own = kernel.library()
    if own is None:
        raise RuntimeError(f"mixed_linear: {kernel.status()}")

    def weight(turn: int) -> Tensor:
        return b.weights[turn % len(b.weights)]

    def base(turn: int) -> Tensor:
        return F.linear(b.x, weight(turn))

    def few(turn: int) -> Tensor:
        return own.linear(b.x, weight(turn))

    def read(turn: int) -> Tensor:
        return own.linear(b.x[:1], weight(turn))

    def grouped(turn: int, y: Tensor) -> Tensor:
        some = turn % len(b.ids)
        return kernel.grouped(b.x, y, b.starts, b.forms[some], b.entries[some])

    def loop(turn: int) -> Tensor:
        y = base(turn)
        for row, i in enumerate(b.ids[turn % len(b.ids)].tolist()):
            y[row : row + 1] += F.linear(F.linear(b.x[row : row + 1], b.downs[i]), b.ups[i]) * SCALE
        return y

    def gather(turn: int) -> Tensor:
        y, ids = base(turn), b.ids[turn % len(b.ids)]
        down, up = b.downs.index_select(0, ids), b.ups.index_select(0, ids)
        return y.add_(torch.bmm(up, torch.bmm(down, b.x[:, :, None]))[:, :, 0], alpha=SCALE)

    blank = torch.zeros(len(b.x), WIDTH, dtype=torch.bfloat16)
    return {
        "base, torch": base,
        "base, few rows": few,
        "weight read once": read,
        "adapters alone": lambda turn: grouped(turn, blank),
        "loop over adapters": loop,
        "gathered, bmm": gather,
        "grouped": lambda turn: grouped(turn, base(turn)),
        "grouped, base of few rows": lambda turn: grouped(turn, few(turn)),
    }


def agree(steps: Mapping[str, Step], b: Batch) -> None:
    """Raises RuntimeError where one of those with adapters has another result than the sum in float32."""
    forms = [form for form in b.forms[0] if isinstance(form, Thin)]
    x = b.x.float()
    rows = [
        x[i] @ f.down.float().T @ f.up.float().T for i, f in enumerate(forms) if f.down is not None and f.up is not None
    ]
    exact = x @ b.weights[0].float().T + SCALE * torch.stack(rows)
    for name in ("loop over adapters", "gathered, bmm", "grouped", "grouped, base of few rows"):
        off = float((steps[name](0).float() - exact).abs().max() / exact.abs().max())
        if not off < SAME:
            raise RuntimeError(f"mixed_linear: {name} is off by {off:.3f} of the largest number")


def times(steps: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in ``rounds`` rounds, forwards and backwards in turn, after a warm-up."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    names, turn = list(steps), 1
    for name in names:
        steps[name](0)
    for number in range(rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            turn += 1  # nobody finds what the one before has read
            began = time.perf_counter()
            steps[name](turn)
            found[name].append(time.perf_counter() - began)
    return found


def over(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over rounds of a's time as a share of b's."""
    return median(x / y for x, y in zip(a, b, strict=True))


def peak() -> float:
    """Multiply-adds a second of float32 that torch reaches here in a product of 1024 x 1024 matrices."""
    a = torch.randn(1024, 1024)
    found = []
    for _ in range(9):
        began = time.perf_counter()
        a @ a
        found.append(time.perf_counter() - began)
    return float(1024**3 / median(found))
