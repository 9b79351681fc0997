"""A linear layer 2048 x 2048 under 8, 32 and 64 rows, each with an adapter of its own: rank 16, bfloat16.

The roofline is 1 + 2 U r / d: the bytes of the weight and of U adapters over those of the weight alone. Contestants
share one process and take turns call by call; weights and adapters come in turn from 2.5 times the last cache; medians
over 41 rounds, shares are medians of pairs. Three things are called the base, for none alone is fair where the
processor only emulates bfloat16: torch's own product; the product of few rows of `serve.kernel`, the fastest bfloat16
base here; and the weight read once (that product for one row), which is what memory allows: *over the roofline* is
(that + adapters) / that, over 1 + 2 U r / d, where adapters alone are timed on an output that lies ready.

*What binds*: bytes at the rate at which the weight is read once, and multiply-adds at the rate that torch reaches in
float32, in milliseconds, of the base and of the adapters. The larger of the two is the least that a call can take.
Results are compared with the sum in float32, and the run fails where one is another.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from bench.run import Values
from bench.serving_linear import RANK, WIDTH, agree, batch, contestants, over, peak, times, weights
from tarsia.serve import kernel

ROWS, ROUNDS = (8, 32, 64), 41
ADAPTERS = ("loop over adapters", "gathered, bmm", "grouped", "grouped, base of few rows")

Row = dict[str, float | int | str]


def measure() -> Values:
    """Every row."""
    values: dict[str, Row] = {}
    dense = weights()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            macs = peak()
            for rows in ROWS:
                for name, row in _rows(rows, dense, macs).items():
                    values[f"{rows} rows, {threads} thread{'s' * (threads > 1)}: {name}"] = row
    finally:
        torch.set_num_threads(before)
    return values


def _rows(rows: int, dense: Sequence[Tensor], macs: float) -> dict[str, Row]:
    b = batch(rows, dense)
    steps = contestants(b)
    agree(steps, b)
    found = times(steps, ROUNDS)
    roof = 1 + 2 * rows * RANK / WIDTH
    values: dict[str, Row] = {}
    for name, seconds in found.items():
        row: Row = {"ms": round(1e3 * median(seconds), 3), "roofline": round(roof, 3)}
        if name in ADAPTERS:
            base = found["base, few rows" if name.endswith("few rows") else "base, torch"]
            row["time / its base's"] = round(over(seconds, base), 3)
            row["time / fastest base's"] = round(over(seconds, found["base, few rows"]), 3)
        values[name] = row
    read, added = found["weight read once"], found["adapters alone"]
    least = [(x + y) / x for x, y in zip(read, added, strict=True)]
    rate = 2 * WIDTH**2 / median(read)
    values["adapters alone"] |= {
        "(weight read once + this) / weight read once": round(median(least), 3),
        "over the roofline": round(median(least) / roof, 3),
        "kernel": str(kernel.status()).partition(" ")[0],
    }
    values["what binds"] = {
        "GB/s, weight read once": round(rate / 1e9, 1),
        "1e9 multiply-adds/s": round(macs / 1e9, 1),
        "base: bytes, ms": round(1e3 * 2 * WIDTH**2 / rate, 3),
        "base: multiply-adds, ms": round(1e3 * rows * WIDTH**2 / macs, 3),
        "adapters: bytes, ms": round(1e3 * rows * 4 * RANK * WIDTH / rate, 3),
        "adapters: multiply-adds, ms": round(1e3 * rows * 2 * RANK * WIDTH / macs, 3),
        "base is bound by": "multiply-adds" if rows * WIDTH**2 / macs > 2 * WIDTH**2 / rate else "bytes",
        "adapters are bound by": "bytes" if 4 / rate > 2 / macs else "multiply-adds",
    }
    return values
