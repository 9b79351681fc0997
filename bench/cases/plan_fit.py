"""Every proposal of ``tarsia plan --fit`` at three budgets, run: the process's peak memory against the budget.

Configurations of ``bench.grid`` (random-weight checkpoints of many families, their methods, rows and recipes), each
with its micro-batches laid together, so that there is something to split: ``batch`` is all rows of a step. A budget is
a share of the way from what the base and the program alone take, as planned, to what the recipe takes as it is. Each
proposal is written as a file, read back and trained for three steps in a fresh process with one thread; *held* is the
most resident memory (VmHWM) of that process. *free* is the budget less that, as a share of the budget: below 0 a
proposal did not stay within. *lost* is the planned time of a step as a multiple of the recipe's own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, Final

from bench.grid.configurations import HELD_OUT
from bench.grid.runner import ROOT, home
from bench.run import Values

SEEDS: Final = tuple(HELD_OUT[30:34])
SHARES: Final = (0.75, 0.5, 0.25)
"""Of the way from the least that any change can reach to the recipe as it is."""
LIMIT: Final = 900.0
"""Seconds that a search, or a run, may take."""
BEGINS: Final = "found: "


def measure() -> Values:
    """Every proposal of every configuration; a line of each search and of each run is printed as it comes."""
    lines = []
    for seed in SEEDS:
        for line in _lines(seed):
            print(json.dumps(line), file=sys.stderr, flush=True)
            lines.append(line)
    return summary(lines)


def summary(lines: list[dict[str, Any]]) -> Values:
    """What the lines come to: by share, and all together."""
    rows: dict[str, dict[str, float | int | str]] = {}
    for share in (*SHARES, None):
        some = [line for line in lines if share in (None, line["share"])]
        runs = [run for line in some for run in line["runs"]]
        free = [run["free"] for run in runs if "error" not in run]
        rows["all" if share is None else f"share {share:g}"] = {
            "searches": len(some),
            "searches failed": sum("error" in line for line in some),
            "nothing fits": sum(not line["runs"] and "error" not in line for line in some),
            "proposals": len(runs),
            "failed": sum("error" in run for run in runs),
            "stay within": sum(value >= 0 for value in free),
            "least free %": round(100 * min(free, default=0.0), 1),
            "median free %": round(100 * median(free), 1) if free else 0.0,
            "change no number": sum(not run["weight"] for run in runs),
            "median lost": round(median([run["lost"] for run in runs]), 2) if runs else 0.0,
            "rehearsals": sum(line["tried"] for line in some),
            "median search s": round(median([line["seconds"] for line in some]), 1) if some else 0.0,
        }
    return rows


def _lines(seed: int) -> Iterator[dict[str, Any]]:
    folder = home() / f"fit-{seed:05d}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    known = _process(["whole", str(seed), str(folder)], folder)
    for share in SHARES if "error" not in known else ():
        budget = int(known["least"] + share * (known["total"] - known["least"]))
        found = _process(["search", str(budget), str(folder)], folder)
        if "error" in found:
            yield {"seed": seed, "share": share, "runs": [], "tried": 0, "seconds": 0.0, **found}
            continue
        for run in found["runs"]:
            held = _process(["run", run["file"]], folder)
            run |= held if "error" in held else {**held, "free": round(1 - held["peak"] / found["budget"], 4)}
        yield {"seed": seed, "share": share, **found}
    if "error" in known:
        yield from ({"seed": seed, "share": share, "runs": [], "tried": 0, "seconds": 0.0, **known} for share in SHARES)
    shutil.rmtree(folder)


def _process(words: list[str], folder: Path) -> dict[str, Any]:
    paths = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "bench.cases.plan_fit", *words]
    with (folder / "log.txt").open("a", encoding="utf8") as log:
        try:
            out = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=ROOT, timeout=LIMIT
            )
        except subprocess.TimeoutExpired:
            return {"error": f"it took more than {LIMIT:g} s"}
    line = next((text for text in out.stdout.splitlines() if text.startswith(BEGINS)), None)
    if line is None:
        last = (folder / "log.txt").read_text(encoding="utf8").strip().splitlines()[-1:] or ["nothing said"]
        return {"error": f"it ended with {out.returncode}: {last[0][:300]}"}
    found: dict[str, Any] = json.loads(line.removeprefix(BEGINS))
    return found


def _imports() -> None:
    """What any run imports, so that a plan begins where a run does."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: F401

    import tarsia.train  # noqa: F401
    from bench.grid.worlds import speak

    speak()
    torch.set_num_threads(1)


def whole(seed: int, folder: Path) -> dict[str, Any]:
    """Write a configuration's files. Returns what the recipe takes as it is, and the least that any change leaves.

    In a process of its own: a plan begins from what its process holds, and this leaves its traces there.
    """
    from bench.grid.configurations import configuration
    from bench.grid.measure import apart
    from tarsia.plan.fit import fitting

    _imports()
    apart(lambda: {"written": str(configuration(seed).write(folder))})
    figures = fitting(_recipe(folder), 10**15).as_it_is.figures
    return {"total": figures.total, "least": figures.parts.get("before the run", 0) + figures.parts.get("weights", 0)}


def _recipe(folder: Path) -> Any:
    """The configuration's recipe with all rows of a step in one micro-batch."""
    from tarsia.train import Recipe

    path = folder / "recipe.yaml"
    recipe = Recipe.load(path)
    together = [f"batch={recipe.batch * recipe.accumulate}", "accumulate=1"]
    return Recipe.load(path, together + ([] if recipe.batching == "packed" else ["batching=plain"]))


def search(budget: int, folder: Path) -> dict[str, Any]:
    """Search for what fits into the budget, and write the proposals."""
    import time

    from tarsia.plan.fit import fitting
    from tarsia.plan.proposal import write

    _imports()
    began = time.perf_counter()
    found = fitting(_recipe(folder), budget)
    files = write(found.proposals, folder / f"fits-{budget}", budget, found.basis)
    runs = [
        {"file": str(file), "planned": p.figures.total, "lost": round(p.lost, 3), "weight": p.weight, "text": p.text}
        for file, p in zip(files, found.proposals, strict=True)
    ]
    return {
        "budget": budget,
        "as it is": found.as_it_is.figures.total,
        "missing": max(0, found.missing),
        "tried": found.tried,
        "all": found.all,
        "stopped": found.stopped,
        "seconds": round(time.perf_counter() - began, 1),
        "runs": runs,
    }


def run(file: Path) -> dict[str, Any]:
    """Train a proposal. Returns the most memory that this process ever held."""
    from bench.grid.measure import _status
    from tarsia.train import Recipe, fit

    _imports()
    for _ in fit(Recipe.load(file)):
        pass
    return {"peak": _status()["VmHWM"]}


def main(words: list[str]) -> None:
    """One search, or one run, in this process."""
    found = (
        whole(int(words[1]), Path(words[2]))
        if words[0] == "whole"
        else search(int(words[1]), Path(words[2]))
        if words[0] == "search"
        else run(Path(words[1]))
    )
    print(BEGINS + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
