"""Eight rank-16 adapters of a 2048 x 2048 weight made one: by TIES, by a sum, by DARE, and aligned (KnOTS).

Beside plain torch, PEFT's functions and mergekit's methods in the same run: each contestant is in a process of its own,
on two threads, and takes turns; medians over 9 rounds, shares are medians of pairs. All but Tarsia take dense changes
that lie ready; Tarsia does too, or makes them of the factors that adapters hold. *Processor ms* is the time of all
threads, which other processes disturb less. *Added MiB* is what a step holds beyond its inputs at most, the result too.
``limit`` is what memory allows: every dense change read as often as must be (twice for TIES, which needs a threshold
first) and the result written, at the bandwidth of a copy. Who computes the same gives the same sample of the result,
and the run fails where that is not so. mergekit takes part where TARSIA_MERGEKIT is the Python of an environment that
has it.
"""

from __future__ import annotations

import os
import sys
from statistics import median

from bench.cases.quant_kernels import bandwidth
from bench.merging import COUNT, FROM_FACTORS, MERGEKIT, SIZE, VARIABLE, taking_part
from bench.race import MIB, THREADS, Result, Runner, race
from bench.run import Values
from tarsia.merge import kernel

READS = {"ties": 2, "sum": 1, "dare": 1}
SAME = 1e-4
"""Samples of results differ by no more, as a share: 1,024 sums of eight float32 numbers."""


def measure() -> Values:
    """Every row."""
    if not os.environ.get(VARIABLE):
        print(f"merge: no row of mergekit: {VARIABLE} names no Python that has it", file=sys.stderr)
    rate = bandwidth()
    values: dict[str, dict[str, float | int | str]] = {}
    for what in ("ties", "sum", "dare", "knots"):
        values |= _rows(what, rate)
    return values


def _rows(what: str, rate: float) -> dict[str, dict[str, float | int | str]]:
    found = race([_runner(what, who) for who in taking_part(what)], counted=False)
    if what in ("ties", "sum"):
        _agree(what, found)
    ours, values = found[FROM_FACTORS], {}
    for who, one in found.items():
        row: dict[str, float | int | str] = {
            "ms": round(1e3 * median(one.seconds), 1),
            "processor ms": round(1e3 * median(one.work), 1),
            "time / Tarsia's": round(one.over(ours), 2),
            "processor time / Tarsia's": round(one.work_over(ours), 2),
            "added MiB": round(one.above / MIB, 1),
        }
        if what in READS:
            row["limit, ms"] = round(1e3 * (READS[what] * COUNT + 1) * 4 * SIZE**2 / rate, 1)
        if who.startswith("Tarsia") and what in ("ties", "dare"):
            row["kernel"] = str(kernel.status()).partition(" ")[0]
        values[f"{what}: {who}"] = row | {"threads": THREADS}
    return values


def _runner(what: str, who: str) -> Runner:
    python = os.environ[VARIABLE] if who == MERGEKIT else sys.executable
    return Runner(who, "bench.merging:call", {"who": who, "what": what}, python)


def _agree(what: str, found: dict[str, Result]) -> None:
    """Raises RuntimeError where one contestant has another result."""
    samples = {who: one.losses[0] for who, one in found.items()}
    first = next(iter(samples.values()))
    if any(abs(sample - first) > SAME * abs(first) for sample in samples.values()):
        raise RuntimeError(f"merge: {what} is not the same for all: {samples}")
