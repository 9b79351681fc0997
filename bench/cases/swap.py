"""Going from one adapter to another, and loading one, against PEFT in the same process, in turn (A B B A ...).

SmolLM2-135M in a LLaVA (``bench.smol``), float32, with ten adapters of rank 16 at all 210 linear layers of the language
model (18.7 MiB each), all attached; files in the page cache. *switch*: `activate` against `set_adapter`. *over one*: an
adapter over an attached one of its make (`swap`), from the library that has opened it before, or with every check from
a folder, against `hotswap_adapter`; *in memory*: `swap` alone, of a value that is loaded. *beside*: an eleventh, `load`
and `put` against `load_adapter`. *merge and unmerge*: in memory, there and back (Tarsia restores every bit, PEFT
subtracts). *merge*: `merge` against `merge_and_unload`, which consumes its model. Milliseconds, medians over the
rounds; the last column is the median of the ratios within a round. ``apart``: the largest difference of a logit between
the two, as a share of the largest; ``moved``: how far an adapter moves them from the base.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from bench import smol, swapping
from bench.run import Values

ADAPTERS = 10
ROUNDS = 15
FEW = 5
"""Rounds of what takes long."""
NAMED = {
    "switch": "activate / set_adapter",
    "over one": "open_adapter, swap / hotswap_adapter",
    "over one, from a folder": "load, swap / hotswap_adapter",
    "beside": "load, put / load_adapter",
    "merge and unmerge": "merge, unmerge / merge_adapter, unmerge_adapter",
    "merge": "merge / merge_and_unload",
}


def measure() -> Values:
    """Every operation."""
    with tempfile.TemporaryDirectory(prefix="tarsia-swap-") as scratch:
        model = smol.folder("small")
        adapters = swapping.folders(model, Path(scratch), ADAPTERS)
        ours, theirs = swapping.Tarsia(model, adapters, Path(scratch) / "library"), swapping.Peft(model, adapters)
        base, said = ours.said(None), {i: ours.said(i) for i in (1, ADAPTERS - 1)}
        apart = max(_apart(theirs.said(i), mine) for i, mine in said.items())
        moved = min(_apart(mine, base) for mine in said.values())
        mine, others = ours.ways(), theirs.ways()
        values: dict[str, dict[str, float | int | str]] = {}
        for name in NAMED:
            rounds = FEW if "merge" in name or name == "beside" else ROUNDS
            values[f"{name}: {NAMED[name]}"] = _raced(name, mine, others, rounds)
        alone = [_timed("over one, in memory", mine, i % ADAPTERS) for i in range(ROUNDS + 1)][1:]
        values["over one, in memory: swap"] = {"Tarsia, ms": _ms(alone), "rounds": ROUNDS}
        size = sum(file.stat().st_size for file in adapters[0].glob("adapter_model.safetensors"))
        values["measured"] = {
            "adapters": ADAPTERS,
            "MiB each": round(size / 2**20, 1),
            "apart": f"{apart:.1e}",
            "moved": f"{moved:.1e}",
        }
    return values


def _raced(name: str, mine: swapping.Ways, others: swapping.Ways, rounds: int) -> dict[str, float | int | str]:
    seconds: dict[str, list[float]] = {"Tarsia": [], "PEFT": []}
    for i in range(rounds + 1):
        both = [("Tarsia", mine), ("PEFT", others)]
        for who, ways in both if i % 2 else both[::-1]:
            seconds[who].append(_timed(name, ways, i % ADAPTERS))
    for ways in (mine, others):
        ways["before nothing"](0)
    first, second = seconds["Tarsia"][1:], seconds["PEFT"][1:]  # the first warms up
    return {
        "Tarsia, ms": _ms(first),
        "PEFT, ms": _ms(second),
        "PEFT / Tarsia": round(median(b / a for a, b in zip(first, second, strict=True)), 1),
        "rounds": rounds,
    }


def _timed(name: str, ways: swapping.Ways, i: int) -> float:
    before: Callable[[int], Any] | None = ways.get(f"before {name}")
    if before is not None:
        before(i)
    began = time.perf_counter()
    ways[name](i)
    return time.perf_counter() - began


def _ms(seconds: list[float]) -> float:
    return float(f"{1000 * median(seconds):.3g}")


def _apart(a: Any, b: Any) -> float:
    return float((a - b).abs().max() / b.abs().max())
