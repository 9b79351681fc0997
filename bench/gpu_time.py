"""How calls are timed on a GPU: in CUDA graphs, in turn, beside the least that the GPU allows.

A graph holds all calls of one contestant, so that kernels are timed and not Python. Contestants take turns, round by
round; what is compared are medians over rounds of ratios within one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Final

import torch

ROUNDS: Final = 15

Call = Callable[[], object]
Row = dict[str, float | int | str]


def least(moved: float, operations: float, bandwidth: float, rate: float) -> float:
    """The fewest seconds for bytes ``moved`` at ``bandwidth`` and ``operations`` at ``rate``, which overlap."""
    return max(moved / bandwidth, operations / rate)


def summary(times: Mapping[str, Sequence[float]], limit: float) -> Row:
    """One row of contestants' seconds in turn, the first being ours: microseconds, ratios, the share of the limit."""
    ours = next(iter(times))
    row: Row = {"us": round(1e6 * median(times[ours]), 2), "limit us": round(1e6 * limit, 2)}
    row["of limit"] = round(limit / median(times[ours]), 3)
    for name, theirs in times.items():
        if name != ours:
            row[f"{name} us"] = round(1e6 * median(theirs), 2)
            row[f"{name} / ours"] = round(median(a / b for a, b in zip(theirs, times[ours], strict=True)), 3)
    return row


def turns(contestants: Sequence[str], number: int) -> Sequence[str]:
    """The order of a round: forwards, then backwards."""
    return contestants if number % 2 == 0 else contestants[::-1]


def graphed(calls: Sequence[Call]) -> Call:
    """All calls as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def race(contestants: Mapping[str, Sequence[Call]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds a call of each contestant in each round."""
    graphs = {name: graphed(calls) for name, calls in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(rounds + 1):
        for name in turns(list(graphs), number):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graphs[name]()
            end.record()
            end.synchronize()
            if number:
                seconds[name].append(begin.elapsed_time(end) / 1000 / len(contestants[name]))
    return seconds


def eager(calls: Sequence[Call]) -> float:
    """Seconds a call, as Python makes them one after another."""
    taken = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - began) / len(calls))
    return median(taken)


def limits() -> dict[str, float]:
    """Bytes a second of a copy on the GPU, read and written; operations a second of a large product in 16 bits."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    copy = race({"copy": [partial(target.copy_, source)] * 3}, 9)["copy"]
    product = race({"product": [partial(torch.mm, a, a)] * 3}, 9)["product"]
    return {"bandwidth": 2 * len(source) / median(copy), "rate": 2 * 8192**3 / median(product)}
