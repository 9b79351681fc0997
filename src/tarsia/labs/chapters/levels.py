"""Where NF4's sixteen levels lie: derived, compared with the table, and looked at on what they are used for."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from tarsia.labs.frame.chapter import Bound, Chapter, Desk, Found
from tarsia.labs.frame.page import COLOURS, GREY
from tarsia.labs.frame.tables import Cell, Rows
from tarsia.quant import codec
from tarsia.quant.levels import KINDS, OUTERMOST, bounds, levels, normal_float

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUMBERS: Final = 2**20
BLOCKS: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_ROUNDS: Final = 60
EXACT: Final = 1 - (1 / 32 + 1 / 30) / 2
"""The mean of half a step of 16 and half a step of 15, from the end: what ``OUTERMOST`` is a rounding of."""


def formula() -> list[float]:
    """arXiv:2305.14314, equation 4, as printed: (Q(i / 17) + Q((i + 1) / 17)) / 2 for i = 0 .. 15, over the largest."""

    def quantile(share: float) -> float:
        return NormalDist().inv_cdf(share) if share else float("-inf")

    values = [(quantile(i / 17) + quantile((i + 1) / 17)) / 2 for i in range(16)]
    return [value / max(values) for value in values]


def occupancy(numbers: Tensor, kind: str, block: int) -> Tensor:
    """The share of ``numbers`` that each level gets, [16], levels ascending, after absmax scaling by ``block``."""
    packed = codec.quantise(numbers, codec.Scheme(kind, False, block))[0].view(-1)
    counts = torch.bincount(torch.cat([packed >> 4, packed & 15]).long(), minlength=16)
    return counts[bounds(kind)[1]].double() / counts.sum()


def entropy(shares: Tensor) -> float:
    """Bits that a code holds; 4 if all sixteen are used alike."""
    used = shares[shares > 0]
    return float(-(used * used.log2()).sum())


def lloyd(numbers: Tensor, start: Tensor, block: int = codec.BLOCK) -> Tensor:
    """Levels of the least squared error for scaled blocks of ``numbers``: Lloyd's iteration from ``start``, [16]."""
    blocks = numbers.view(-1, block)
    scales = blocks.abs().amax(1, keepdim=True)
    scaled, weights = (blocks / scales).view(-1), scales.square().expand_as(blocks).reshape(-1).double()
    table = start.clone()
    for _ in range(_ROUNDS):
        nearest = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2)
        mass = torch.zeros(16, dtype=torch.float64).index_add_(0, nearest, weights)
        table = (torch.zeros(16, dtype=torch.float64).index_add_(0, nearest, weights * scaled) / mass).float()
    return table


def error(numbers: Tensor, table: Tensor, block: int = codec.BLOCK) -> float:
    """Mean squared error of blocks of ``numbers`` that are rounded to an ascending ``table``."""
    blocks = numbers.view(-1, block)
    scales = blocks.abs().amax(1, keepdim=True)
    near = table[torch.bucketize(blocks / scales, (table[:-1] + table[1:]) / 2)]
    return float((near * scales - blocks).square().mean(dtype=torch.float64))


def _same(table: Tensor, other: Tensor) -> dict[str, Cell]:
    return {"equal to the bit": int((table == other).sum()), "largest difference": float((table - other).abs().max())}


def measure(desk: Desk) -> Found:
    """Derive the levels in several ways, and count how the real ones are used on N(0, 1)."""
    desk.show(0.0, "deriving the levels")
    nf4 = levels("nf4")
    rows: dict[str, Mapping[str, Cell]] = {
        "way: steps in float32 from 0.9677083": _same(normal_float(OUTERMOST, torch.float32), nf4),
        "way: steps in float64 from 0.9677083": _same(normal_float(OUTERMOST, torch.float64), nf4),
        "way: steps in float32 from the exact mean": _same(normal_float(EXACT, torch.float32), nf4),
        "way: steps in float32 from 0.95": _same(normal_float(0.95, torch.float32), nf4),
        "offset: outermost": {"used": OUTERMOST, "exact": EXACT},
        "formula: as printed": {
            "finite levels": sum(abs(v) < float("inf") for v in formula()),
            "levels at zero": sum(v == 0 for v in formula()),
        },
        "shape: NF4": {
            "below zero": int((nf4 < 0).sum()),
            "zero": int((nf4 == 0).sum()),
            "above zero": int((nf4 > 0).sum()),
        },
    }
    drawn = torch.randn(2 * NUMBERS, generator=torch.Generator().manual_seed(0))
    seen, unseen = drawn[:NUMBERS], drawn[NUMBERS:]
    series = {}
    for i, kind in enumerate(KINDS):
        desk.show((1 + i) / 5, f"counting how {kind}'s levels are used")
        shares = occupancy(unseen, kind, codec.BLOCK)
        series[f"levels {kind}"] = levels(kind).sort().values.tolist()
        series[f"shares {kind}"] = shares.tolist()
        series[f"entropy {kind}"] = [entropy(occupancy(unseen, kind, block)) for block in BLOCKS]
        rows[f"use: {kind.upper()}"] = {
            "bits of entropy": entropy(shares),
            "least used, %": 100 * float(shares.min()),
            "most used, %": 100 * float(shares.max()),
            "most over least": float(shares.max() / shares.min()),
        }
    desk.show(0.8, "looking for better levels")
    better = lloyd(seen, nf4)
    series["levels best"] = better.tolist()
    rows |= _errors(unseen, nf4, better)
    return Found(rows, {**series, "blocks": BLOCKS})


def _errors(numbers: Tensor, nf4: Tensor, better: Tensor) -> Rows:
    errors = {"NF4": error(numbers, nf4), "levels of least error": error(numbers, better)}
    return {
        f"error: {name}": {"mean squared error": value, "of NF4's, %": 100 * value / errors["NF4"]}
        for name, value in errors.items()
    }


def draw(found: Found, figure: Figure) -> None:
    """The bell with its levels, how often each is used, and entropy by block."""
    bell, use, by_block = figure.subplots(1, 3, width_ratios=(1.25, 1.2, 1))
    _bell(bell, found)
    nf4, shares = found.series["levels nf4"], found.series["shares nf4"]
    use.bar(range(16), [100 * s for s in shares], color=COLOURS[0], width=0.8)
    use.axhline(100 / 16, color=COLOURS[1], lw=1.2)
    use.text(15.5, 100 / 16 + 0.12, "equal use", color=COLOURS[1], ha="right", va="bottom", fontsize=8)
    use.set_xticks(range(16), [f"{level:.2f}" for level in nf4], rotation=90, fontsize=7)
    use.set_title("how often each level is used, % (blocks of 64)")
    for kind, colour in zip(KINDS, (COLOURS[0], COLOURS[1], COLOURS[2]), strict=True):
        by_block.plot(
            found.series["blocks"], found.series[f"entropy {kind}"], "o-", ms=3, color=colour, label=kind.upper()
        )
    by_block.axhline(4, color=GREY, lw=1, ls=":")
    by_block.set_xscale("log", base=2)
    by_block.set_xlabel("numbers in a block")
    by_block.set_title("bits of entropy in a 4-bit code")
    by_block.legend(frameon=False)


def _bell(axes: Axes, found: Found) -> None:
    largest = NormalDist().inv_cdf(OUTERMOST)
    x = [i / 100 for i in range(-260, 261)]
    axes.plot([v / largest for v in x], [NormalDist().pdf(v) for v in x], color=GREY, lw=1)
    for level in found.series["levels nf4"]:
        colour = COLOURS[1] if level == 0 else COLOURS[0]
        axes.plot([level, level], [0, NormalDist().pdf(level * largest)], color=colour, lw=1.4)
    axes.plot(found.series["levels best"], [-0.025] * 16, "|", color=COLOURS[2], ms=8, mew=1.4)
    axes.text(-1.4, -0.025, "least error", color=COLOURS[2], fontsize=8, va="center", ha="center")
    axes.set_ylim(-0.05, 0.42)
    axes.set_yticks([])
    axes.spines[["left"]].set_visible(False)
    axes.set_title("NF4: quantiles of N(0, 1), over the largest")


TEXT: Final = """
## Where they come from

A weight is scaled by the largest magnitude of its block of 64 and rounded to the nearest of sixteen levels. NF4
(arXiv:2305.14314, section 3) takes quantiles of N(0, 1), because trained weights look normal: where more weights are,
the levels lie closer.

The paper's equation 4 alone does not give the table: as printed it has
{{ value("formula: as printed", "finite levels") }} finite levels of 16, for the outermost quantile is infinite. The
paper then asks for a level at exactly zero, and for two halves made apart: {{ value("shape: NF4", "below zero") }}
levels below zero, {{ value("shape: NF4", "above zero") }} above. The tail is cut by a constant that only the code has:
the outermost level stands at the share {{ value("offset: outermost", "used", ".7f") }} of the distribution, which is
1 - (1/32 + 1/30) / 2 = {{ value("offset: outermost", "exact", ".10f") }}, rounded: the mean of half a step of 16
and half a step of 15, from the end.

How each way of deriving the levels compares with the table that bitsandbytes ships (16 would be all):

{{ table("way") }}
One way alone has every bit. That the constant has seven digits and the steps are taken in float32 is part of the
format: whoever derives the levels more exactly writes other weights.

## What they are used for

If all sixteen levels were used alike, a code would hold 4 bits: that is what "information-theoretically optimal for
normal weights" promises. But weights are scaled by the largest of 64, which makes each block another distribution, with
one number of every block exactly at an end (arXiv:2306.06965 has the theory). Measured on draws of N(0, 1):

{{ table("use") }}
So the claim of optimality is loose. NF4 uses its levels more evenly than INT4 and FP4 do, but not equally, and
the larger the block the less so (right).

Equal use is not least error, either. Levels that Lloyd's iteration finds on other draws of the same distribution (blue
marks, left) have {{ value("error: levels of least error", "of NF4's, %", ".1f") }} % of NF4's squared error. They
give up both ends and the exact zero for it:

{{ table("error") }}
"""

CHAPTER: Final = Chapter(
    name="levels",
    title="Where the sixteen levels lie",
    question="What are NF4's sixteen numbers, and are they the best ones?",
    claim=(
        "NF4's 16 levels are normal quantiles to the last bit, 7 below zero, one at zero, 8 above; "
        "after absmax scaling they are used unequally (at most 3.95 bits of 4, the most used at least twice as often "
        "as the least) and other levels have at least 2 % less squared error."
    ),
    bounds=(
        Bound("levels equal to the bit", "way: steps in float32 from 0.9677083", "equal to the bit", 16, 16),
        Bound("the same with steps in float64", "way: steps in float64 from 0.9677083", "equal to the bit", high=15),
        Bound("levels below zero", "shape: NF4", "below zero", 7, 7),
        Bound("levels at zero", "shape: NF4", "zero", 1, 1),
        Bound("levels above zero", "shape: NF4", "above zero", 8, 8),
        Bound("entropy of a code, bits", "use: NF4", "bits of entropy", 3.8, 3.95),
        Bound("most used over least used", "use: NF4", "most over least", 2.0),
        Bound("least squared error, % of NF4's", "error: levels of least error", "of NF4's, %", high=98.0),
    ),
    measure=measure,
    draw=draw,
    picture="the normal density with NF4's levels; how often each is used; entropy of a code against the block's size",
    text=TEXT,
    order=10,
    minutes=0.2,
    size=(12.5, 3.8),
)  # fmt: skip
