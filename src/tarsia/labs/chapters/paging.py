"""What an optimiser does whose states may not all be in memory, and what 8 bits of them cost."""

from __future__ import annotations

import math
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from tarsia.labs.frame.chapter import Bound, Chapter, Desk, Found
from tarsia.labs.frame.page import COLOURS, GREY
from tarsia.labs.frame.tables import Cell
from tarsia.train.optimiser import Schedule, adamw, set_rates
from tarsia.train.paged import Form, PagedAdamW
from tarsia.train.pages import FilePages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS: Final = 150
WIDTH: Final = 128
ROWS: Final = 256
SEEDS: Final = 3
BUDGETS: Final = (1.0, 0.75, 0.5, 0.25, 0.1)
"""Of the states' bytes."""


class Counted(FilePages):
    """Counts the bytes that come and go."""

    moved = 0

    def write(self, page: int, source: Tensor) -> object:  # type: ignore[override]
        self.moved += 4 * source.numel()
        return super().write(page, source)

    def read(self, page: int, into: Tensor) -> object:  # type: ignore[override]
        self.moved += 4 * into.numel() if page in self._sums else 0
        return super().read(page, into)


def trained(seed: int, form: Form | None) -> tuple[list[float], dict[str, Tensor], PagedAdamW | None, int]:
    """A network of two layers that learns another one's outputs: its losses, weights, optimiser, and bytes moved."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)

    teacher = matrix(2 * WIDTH, WIDTH), matrix(WIDTH, 2 * WIDTH)
    names = {"up": matrix(4 * WIDTH, WIDTH), "down": matrix(WIDTH, 4 * WIDTH)}
    student = {name: nn.Parameter(value) for name, value in names.items()}
    optimiser = adamw([student], [3e-3], (0.9, 0.999), 0.0, {}, form)
    paged = optimiser if isinstance(optimiser, PagedAdamW) else None
    counted = Counted(Path("." if form is None else form.folder))
    if paged is not None and form is not None and form.paged:
        paged.store = counted
    schedule = Schedule(STEPS, 10, "cosine")
    losses = []
    try:
        for step in range(STEPS):
            x = torch.randn(ROWS, WIDTH, generator=generator)
            wanted = torch.relu(x @ teacher[0].t()) @ teacher[1].t()
            loss = (torch.relu(x @ student["up"].t()) @ student["down"].t() - wanted).square().mean()
            loss.backward()
            set_rates(optimiser, schedule.share(step))
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
    finally:
        counted.close()
    return losses, {name: value.detach() for name, value in student.items()}, paged, counted.moved // STEPS


def latest(pages: int, room: int, rounds: int = 10) -> float:
    """Pages that a cache of the ``room`` latest ones reads in a round of all, on average after the first."""
    held: OrderedDict[int, None] = OrderedDict()
    reads = 0
    for turn in range(rounds + 1):
        for page in range(pages):
            if page not in held:
                reads += turn > 0
                if len(held) >= room:
                    held.popitem(last=False)
            held[page] = None
            held.move_to_end(page)
    return reads / rounds


def measure(desk: Desk) -> Found:
    """Train the same network under each budget, and with states in 8 bits."""
    rows: dict[str, Mapping[str, Cell]] = {}
    plain, weights, _, _ = trained(0, None)
    whole = 8 * sum(value.numel() for value in weights.values())
    for at, share in enumerate(BUDGETS):
        desk.show(at / (len(BUDGETS) + 2 * SEEDS), f"{share:.0%} of the states in memory")
        with tempfile.TemporaryDirectory() as folder:
            found = trained(0, Form(32, True, int(share * whole), Path(folder)))
        assert found[2] is not None
        pages = len(found[2].pages)
        stay = round(found[2].resident / (4 * found[2].pages[0].size))
        rows[f"budget: {share:.0%}"] = {
            "bytes between steps": found[2].resident,
            "bytes moved a step": found[3],
            "pages": pages,
            "read a step": pages - stay,
            "read by a cache of the latest": latest(pages, pages) if stay == pages else latest(pages, stay + 2),
            "largest difference": max(float((weights[k] - found[1][k]).abs().max()) for k in weights),
        }
    ends: dict[int, list[float]] = {32: [], 8: []}
    series: dict[str, list[float]] = {"32": plain}
    for seed in range(SEEDS):
        for bits in (32, 8):
            desk.show((len(BUDGETS) + 2 * seed) / (len(BUDGETS) + 2 * SEEDS), f"states in {bits} bits, seed {seed}")
            losses, _, optimiser, _ = trained(seed, Form(8) if bits == 8 else None)
            ends[bits].append(sum(losses[-10:]) / 10)
            if optimiser is not None:
                rows["bytes: 8 bits"] = {"a parameter": 8 * optimiser.bytes / whole}
                series["8"] = series.get("8", losses)
    rows["bytes: 32 bits"] = {"a parameter": 8.0}
    for seed in range(SEEDS):
        rows[f"loss: seed {seed}"] = {
            "32 bits": ends[32][seed],
            "8 bits": ends[8][seed],
            "8 bits / 32 bits": ends[8][seed] / ends[32][seed],
        }
    worst = max(float(rows[f"loss: seed {seed}"]["8 bits / 32 bits"]) for seed in range(SEEDS))
    rows["worst: of all"] = {
        "8 bits / 32 bits": worst,
        "largest difference": max(float(rows[f"budget: {share:.0%}"]["largest difference"]) for share in BUDGETS),
        "read by a cache of the latest at 50%": float(rows["budget: 50%"]["read by a cache of the latest"])
        / float(rows["budget: 50%"]["pages"]),
    }
    return Found(rows, series)


def draw(found: Found, figure: Figure) -> None:
    """Bytes moved against the budget, and both curves of the loss."""
    moved, curve = figure.subplots(1, 2)
    shares = [100 * share for share in BUDGETS]
    rows = [found.rows[f"budget: {share:.0%}"] for share in BUDGETS]
    moved.plot(shares, [float(row["bytes moved a step"]) / 1e6 for row in rows], "o-", color=COLOURS[0])
    moved.axvline(100, color=GREY, lw=0.8, ls=":")
    moved.set_xlabel("budget, % of the states")
    moved.set_title("MB read and written at each step")
    for bits, colour in (("32", COLOURS[1]), ("8", COLOURS[0])):
        curve.plot(found.series[bits], color=colour, lw=1.2, label=f"{bits} bits")
    curve.set_yscale("log")
    curve.set_xlabel("step")
    curve.set_title("loss")
    curve.legend(frameon=False)


TEXT: Final = """
AdamW keeps two numbers for each trained parameter, and needs them once a step. Here a network of two layers learns
another one's outputs, and its states may take so much memory, in percent of all. The first pages stay; the others are
read from a file and written back while others are computed on:

{{ table("budget", "budget") }}
*Largest difference* is that of any weight after all steps to a run whose states were never paged: none. A cache that
keeps the pages that were used last reads every page at every step, however much room it has short of room for all: what
was used longest ago is, in a circle, what comes next.

## What 8 bits cost

Rounded in blocks of 256 (arXiv:2110.02861) the states take {{ value("bytes: 8 bits", "a parameter", ".3f") }} bytes a
parameter in place of {{ value("bytes: 32 bits", "a parameter", ".0f") }}. The mean loss of the last ten steps:

{{ table("loss", "") }}
"""

CHAPTER: Final = Chapter(
    name="paging",
    title="Paged optimiser states",
    question="What does it cost to keep an optimiser's states elsewhere, or in 8 bits?",
    claim=(
        "Under any budget down to 10 % of their bytes the weights are those of the unpaged AdamW to the bit, where a "
        "cache of the latest pages would read all of them at each step; 8 bits take 2.03 bytes a parameter in place of "
        "8 and end with at most 1.1 times the loss."
    ),
    bounds=(
        Bound("difference of any weight", "worst: of all", "largest difference", 0, 0),
        Bound("bytes a parameter in 8 bits", "bytes: 8 bits", "a parameter", 2.03, 2.04),
        Bound("loss in 8 bits / in 32", "worst: of all", "8 bits / 32 bits", 0.5, 1.1),
        Bound("share that a cache reads", "worst: of all", "read by a cache of the latest at 50%", 1, 1),
        Bound("bytes moved without need", "budget: 100%", "bytes moved a step", 0, 0),
    ),
    measure=measure,
    draw=draw,
    picture="bytes moved at each step against the budget; loss with states in 32 and in 8 bits",
    text=TEXT,
    order=65,
    minutes=0.5,
    size=(10, 3.6),
)  # fmt: skip
