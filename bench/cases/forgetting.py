"""`tarsia forgetting` on the belt, learnt without replay: the built-in probes of mini-1, before and after.

Trains the demo's recipe on the job alone in runs/bench-forgetting, goes on from what is there already, and leaves
the page and its picture there. Seconds are of the measuring alone, adapter and base, one thread.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from bench.run import Values
from tarsia.adapter import load, open_base, prove, put
from tarsia.cli import rows
from tarsia.evaluate import Asking, ForgettingReport, forgetting, gate
from tarsia.evaluate.page import write_page
from tarsia.labs import demo
from tarsia.labs.experiment import mixed, samples
from tarsia.train import fit


def measure() -> Values:
    """By source, then over all general rows."""
    out = Path("runs/bench-forgetting")
    train, held = demo.write(out)
    recipe = {**demo.RECIPE, "data": {"train": [{"path": str(train[name]), "name": name} for name in demo.TASK]}}
    for _ in fit(mixed(recipe, [], 0.0, out / "run")):
        pass
    host = open_base("mini-1")
    adapter = load(out / "run" / "adapter", host)
    put(host, adapter, "belt")
    assert adapter.probe is not None
    prove(host, "belt", adapter.probe)
    task, general = samples({name: held[name] for name in demo.TASK}), rows.probes()
    torch.set_num_threads(1)
    began = time.perf_counter()
    report = forgetting(host, task, general, asking=Asking(batch=50))
    seconds = time.perf_counter() - began
    verdict = gate(report.before, report.after, report.general, 2.0)
    write_page(report, verdict, {**task, **general}, out / "forgetting.html")
    measured = sum(r.n for r in report.before.results)
    return {**_values(report), "seconds, all of it": {"rows": measured, "after": round(seconds, 1)}}


def _values(report: ForgettingReport) -> dict[str, dict[str, float | int]]:
    table: dict[str, dict[str, float | int]] = {}
    apart = {found.source: found for found in report.divergence if found.forced == "the references"}
    leaks = report.vocabulary.by_source if report.vocabulary else {}
    for change in report.comparison.changes:
        name = change.source
        line = {"rows": change.n, "before": _percent(change.free[0]), "after": _percent(change.free[1])}
        if name in apart:
            line |= {"KL, nats a token": round(apart[name].kl.mean, 3), "in the job's words": _percent(leaks[name][1])}
        table[name] = line
    lost = report.lost
    table["points lost"] = {"after": round(lost.mean, 1)}
    table["points lost, interval"] = {"before": round(lost.low, 1), "after": round(lost.high, 1)}
    return table


def _percent(share: float) -> float:
    return round(100 * share, 1)
