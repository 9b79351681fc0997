"""The roofline of a mixed batch: what rows with an adapter each must add to a linear layer, and what they add."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from tarsia.core.errors import ConfigError
from tarsia.labs.frame.chapter import Bound, Chapter, Desk, Found
from tarsia.labs.frame.page import COLOURS, GREY
from tarsia.labs.frame.tables import Cell
from tarsia.quant.loader import REBUILD
from tarsia.serve import kernel
from tarsia.serve.forms import Thin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH: Final = 2048
RANK: Final = 16
ROWS: Final = (1, 2, 4, 8, 16, 32, 64)
ROUNDS: Final = 31
SIZE: Final = 320 * 2**20
"""Bytes of all weights, and of all adapters: together far more than a last cache holds."""
OVER: Final = 1.3
"""Times the roofline: what may be lost to starting a call, and to other processes of the machine."""

Step = Callable[[int], Tensor]


@dataclass(frozen=True, eq=False)
class Stock:
    """Weights [width, width], adapters [count, rank, width] and [count, width, rank] in bfloat16, and their order."""

    weights: Sequence[Tensor]
    downs: Tensor
    ups: Tensor
    order: Tensor

    def ids(self, turn: int, rows: int) -> Tensor:
        """Adapters of one batch: those of the next turn are others, until all have been used."""
        return self.order[torch.arange(turn * rows, (turn + 1) * rows) % len(self.order)]

    def forms(self, ids: Tensor) -> tuple[list[Thin], Tensor]:
        """The same as forms, and their entries."""
        forms = [Thin(self.downs[i], self.ups[i], 1.0) for i in ids.tolist()]
        return forms, torch.tensor([form.entry() for form in forms])


def stock() -> Stock:
    """All of one value each, at places of their own in memory."""
    chance = torch.Generator().manual_seed(0)
    weight = (torch.randn(WIDTH, WIDTH, generator=chance) / WIDTH**0.5).to(torch.bfloat16)
    count = SIZE // (4 * RANK * WIDTH)
    downs, ups = (torch.empty(count, *shape, dtype=torch.bfloat16) for shape in ((RANK, WIDTH), (WIDTH, RANK)))
    downs.copy_(torch.randn(RANK, WIDTH, generator=chance) / WIDTH**0.5)
    ups.copy_(torch.randn(WIDTH, RANK, generator=chance) / RANK**0.5)
    weights = [weight.clone() for _ in range(SIZE // weight.nbytes)]
    return Stock(weights, downs, ups, torch.randperm(count, generator=chance))


def steps(own: kernel.Kernel, of: Stock, x: Tensor) -> dict[str, Step]:
    """What is timed: the weight read once, and the adapters of all rows three ways, on an output that lies ready."""
    rows = len(x)
    starts, y = torch.arange(rows + 1, dtype=torch.int32), torch.zeros(rows, WIDTH, dtype=torch.bfloat16)
    ready = [of.forms(of.ids(turn, rows)) for turn in range(ROUNDS + 1)]

    def gathered(turn: int) -> Tensor:
        ids = of.ids(turn, rows)
        down, up = of.downs.index_select(0, ids), of.ups.index_select(0, ids)
        return y + torch.bmm(up, torch.bmm(down, x[:, :, None]))[:, :, 0]

    def apart(turn: int) -> Tensor:
        out = y.clone()
        for row, i in enumerate(of.ids(turn, rows).tolist()):
            out[row] += F.linear(F.linear(x[row], of.downs[i]), of.ups[i])
        return out

    return {
        "read": lambda turn: own.linear(x[:1], of.weights[turn % len(of.weights)]),
        "grouped": lambda turn: own.grouped(x, y.zero_(), starts, *ready[turn]),
        "gathered": gathered,
        "one by one": apart,
    }


def timed(steps: Mapping[str, Step]) -> dict[str, list[float]]:
    """Seconds of each by round, forwards and backwards in turn; the first round does not count."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(ROUNDS + 1):
        for name in steps if number % 2 else [*steps][::-1]:
            began = time.perf_counter()
            steps[name](number)
            found[name].append(time.perf_counter() - began)
    return {name: seconds[1:] for name, seconds in found.items()}


def ratio(read: Sequence[float], added: Sequence[float]) -> float:
    """(weight + adapters) over weight, the median over rounds."""
    return median((a + b) / a for a, b in zip(read, added, strict=True))


def differing(own: kernel.Kernel, of: Stock) -> int:
    """Rows of the largest batch whose numbers are not, to the bit, those that they have alone."""
    chance = torch.Generator().manual_seed(1)
    x, y = (torch.randn(ROWS[-1], WIDTH, generator=chance).to(torch.bfloat16) for _ in range(2))
    forms, entries = of.forms(of.ids(0, len(x)))
    together = own.grouped(x, y.clone(), torch.arange(len(x) + 1, dtype=torch.int32), forms, entries)
    one = torch.tensor([0, 1], dtype=torch.int32)
    rows = range(len(x))
    alone = [own.grouped(x[i : i + 1], y[i : i + 1].clone(), one, forms[i : i + 1], entries[i : i + 1]) for i in rows]
    return sum(not torch.equal(together[i], found[0]) for i, found in enumerate(alone))


def peak() -> float:
    """Multiply-adds a second that torch reaches in float32."""
    a, found = torch.randn(768, 768), []
    for _ in range(7):
        began = time.perf_counter()
        a @ a
        found.append(time.perf_counter() - began)
    return float(768**3 / median(found))


def measure(desk: Desk) -> Found:
    """Every size of batch on one thread, the weights and adapters of each turn from memory."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return _measure(desk)
    finally:
        torch.set_num_threads(before)


def _measure(desk: Desk) -> Found:
    own = kernel.library()
    if own is None:
        raise ConfigError("This chapter times the compiled kernel.", given=kernel.status().text, do=REBUILD)
    of, rows = stock(), {}
    series: dict[str, list[float]] = {"rows": [float(n) for n in ROWS]}
    read: list[float] = []
    for i, count in enumerate(ROWS):
        desk.show(i / len(ROWS), f"{count} rows, an adapter each")
        x = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(count)).to(torch.bfloat16)
        times = timed(steps(own, of, x))
        read += times["read"]
        row: dict[str, Cell] = {"1 + 2Ur/d": 1 + 2 * count * RANK / WIDTH}
        row |= {name: ratio(times["read"], times[name]) for name in times if name != "read"}
        row["grouped over the roofline"] = float(row["grouped"]) / float(row["1 + 2Ur/d"])
        row["adapters, ms"] = 1e3 * median(times["grouped"])
        rows[f"batch: {count}"] = row
        for name in ("1 + 2Ur/d", "grouped", "gathered", "one by one"):
            series.setdefault(name, []).append(float(row[name]))
    return Found(rows | _binds(rows, median(read)) | {"same: bits": {"rows that differ": differing(own, of)}}, series)


def _binds(rows: Mapping[str, Mapping[str, Cell]], read: float) -> dict[str, Mapping[str, Cell]]:
    """Rates, and how long bytes and multiply-adds of the largest batch take at them."""
    rate, macs, most = 2 * WIDTH**2 / read, peak(), ROWS[-1]
    adapters = most * 4 * RANK * WIDTH
    last = rows[f"batch: {most}"]
    return {
        "rate: machine": {"GB/s, weight": rate / 1e9, "1e9 multiply-adds/s": macs / 1e9},
        "rate: adapters": {"GB/s": adapters / (1e6 * float(last["adapters, ms"]))},
        "time: weight": {"bytes, ms": 1e3 * read, "multiply-adds, ms": 1e3 * most * WIDTH**2 / macs},
        "time: adapters": {"bytes, ms": 1e3 * adapters / rate, "multiply-adds, ms": 1e3 * adapters / 2 / macs},
        "gain: grouped": {"over gathering": (float(last["gathered"]) - 1) / (float(last["grouped"]) - 1)},
    }


def draw(found: Found, figure: Figure) -> None:
    """Time over the base's against the rows, and the roofline."""
    axes = figure.subplots()
    rows = found.series["rows"]
    axes.plot(rows, found.series["1 + 2Ur/d"], color=GREY, lw=1.2, ls="--", label="roofline, 1 + 2Ur/d")
    for name, colour in zip(("grouped", "gathered", "one by one"), COLOURS, strict=False):
        axes.plot(rows, found.series[name], "o-", ms=4, lw=1.4, color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(rows, [f"{int(n)}" for n in rows])
    axes.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.set_xlabel("rows, an adapter each")
    axes.set_title("time of weight and adapters over that of the weight")
    axes.legend(frameon=False)


TEXT: Final = f"""
A decode step multiplies few rows by a large weight, so it takes as long as reading the weight takes. U rows with an
adapter each have U low-rank updates to be read besides: for a weight of d x d and rank r that is 2Urd numbers beside
d^2, and no program that reads all of them can take less than 1 + 2Ur/d times as long as the weight alone. That is the
roofline. Here d = {WIDTH}, r = {RANK}, all in bfloat16, on one thread, and weights and adapters come in turn from
{2 * SIZE // 2**20} MiB, so from memory. *Grouped* is `tarsia.serve.kernel`: one call that reads each adapter where it
lies. *Gathered* copies the batch's adapters out of a stack and multiplies the copies (bmm); *one by one* is a loop over
adapters, as PEFT's `adapter_names` has it. All are added to the time of reading the weight once.

{{{{ table("batch", "rows") }}}}
At {ROWS[-1]} rows adapters are as many bytes as the weight. They come at
{{{{ value("rate: adapters", "GB/s", ".1f") }}}} GB/s, the weight at
{{{{ value("rate: machine", "GB/s, weight", ".1f") }}}} GB/s. Gathering adds
{{{{ value("gain: grouped", "over gathering", ".1f") }}}} times what grouping adds: it reads every adapter, writes a
copy, and reads that.

## What binds

For {ROWS[-1]} rows, at that rate of memory and at the {{{{ value("rate: machine", "1e9 multiply-adds/s", ".0f") }}}}e9
multiply-adds a second that torch reaches in float32:

{{{{ table("time") }}}}
Adapters are bound by bytes whatever U is, for each is used by one row: a multiply-add for every two bytes. The weight
is used by all rows, and from some row on the multiply-adds bind it instead; then adapters add a smaller part than the
roofline says, as it counts bytes alone.

A row's numbers do not depend on its neighbours: of {ROWS[-1]} rows of a batch
{{{{ value("same: bits", "rows that differ") }}}} differ from what they are alone.
"""

CHAPTER: Final = Chapter(
    name="roofline",
    title="The roofline of a mixed batch",
    question="What must a batch cost in which every row has an adapter of its own, and what does it cost?",
    claim=(
        f"With 8 to {ROWS[-1]} rows of rank {RANK} a {WIDTH} x {WIDTH} layer takes at most {OVER:g} times what the "
        "bytes of weight and adapters allow (1 + 2Ur/d of the weight alone); gathering adds at least 1.5 times as "
        "much; and every row is, to the bit, what it is alone."
    ),
    bounds=(
        *(Bound(f"over the roofline, {n} rows", f"batch: {n}", "grouped over the roofline", 0, OVER) for n in (8, 64)),
        Bound("what gathering adds over what grouping adds", "gain: grouped", "over gathering", 1.5),
        Bound("rows that differ from themselves alone", "same: bits", "rows that differ", 0, 0),
    ),
    measure=measure,
    draw=draw,
    picture="time of a layer with adapters over that of its weight, by the number of rows, three ways and the roofline",
    text=TEXT,
    order=170,
    minutes=0.3,
    size=(7.5, 4.2),
)
