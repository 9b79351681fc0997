"""The plan's seconds of a step against the measured ones, on random configurations that nobody looked at before.

The first 20 seeds of the grid's second half that are held out and keep no features (``bench.grid``): random-weight
checkpoints of twelve families, methods alone and together, 4 and 16 bits, pictures, checkpointing, accumulation, packed
rows, each a process of its own with one thread. The machine is calibrated first. Then each configuration is planned
(its rows are read, a typical step is rehearsed) and measured: each of its three steps several times in turn, the median
of each, the median over the three; all of it twice, the second time in the other order, so that no busy moment meets
one alone. A step is all of it, the reading of rows too. An error is what the plan is above the measured one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any, Final

from bench.grid.configurations import HELD_OUT, configuration
from bench.run import Values

ROOT: Final = Path(__file__).parents[2]
RECIPES: Final = 20
REPEATS: Final = 7
BEGINS: Final = "measured: "

Line = dict[str, Any]


def seeds() -> tuple[int, ...]:
    """Those that are measured."""
    free = (seed for seed in HELD_OUT[len(HELD_OUT) // 2 :] if "features" not in configuration(seed).recipe)
    return tuple(seed for seed, _ in zip(free, range(RECIPES), strict=False))


def measure() -> Values:
    """All recipes, and how far off they are together."""
    with tempfile.TemporaryDirectory() as scratch:
        _apart("calibrate", scratch)
        chosen = seeds()
        rounds = [[_apart(str(seed), scratch) for seed in order] for order in (chosen, chosen[::-1])]
    both = list(zip(rounds[0], rounds[1][::-1], strict=True))
    lines = [{**first, "seconds": mean((first["seconds"], second["seconds"]))} for first, second in both]
    return {**{line["name"]: _row(line) for line in lines}, "all": summary(lines)}


def summary(lines: list[Line]) -> Mapping[str, float | int | str]:
    """How far the plan is off over all recipes, and on what it rests."""
    errors = sorted(abs(line["planned"] / line["seconds"] - 1) for line in lines)
    inside = sum(line["low"] <= line["seconds"] <= line["high"] for line in lines)
    return {
        "recipes": len(lines),
        "error, median": f"{median(errors):.1%}",
        "error, 9 of 10 at most": f"{errors[int(0.9 * (len(errors) - 1))]:.1%}",
        "error, most": f"{errors[-1]:.1%}",
        "planned / measured, median": round(median(line["planned"] / line["seconds"] for line in lines), 3),
        "within what was said": f"{inside} of {len(lines)}",
        "basis": lines[0]["basis"],
    }


def _row(line: Line) -> Mapping[str, float | int | str]:
    return {
        "planned ms": round(1e3 * line["planned"], 1),
        "measured ms": round(1e3 * line["seconds"], 1),
        "error": f"{line['planned'] / line['seconds'] - 1:+.1%}",
        "said, at most": f"{line['high'] / line['planned'] - 1:.0%}",
    }


def _apart(what: str, folder: str) -> Line:
    """What ``python -m bench.cases.plan_time WHAT FOLDER`` found, in a process of its own with one thread."""
    paths = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "bench.cases.plan_time", what, folder]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"{what}: {done.stderr.strip()[-2000:]}")
    line = next(text for text in done.stdout.splitlines() if text.startswith(BEGINS))
    print(f"plan_time {what}: {line}"[:300], file=sys.stderr, flush=True)
    found: Line = json.loads(line.removeprefix(BEGINS))
    return found


def _calibrated() -> Line:
    from tarsia.plan.calibrate import calibrate

    made = calibrate(anew=True).calibration
    return {"rounds": made.rounds, "spread": made.spread, "seconds": made.took}


def _one(seed: int, folder: Path) -> Line:
    """One configuration: its plan, and its steps' seconds."""
    from tarsia.plan import plan
    from tarsia.plan.calibrate import calibrate
    from tarsia.plan.time import Measured
    from tarsia.train import Recipe

    drawn = configuration(seed)
    recipe = Recipe.load(drawn.write(folder / str(seed)))
    found = plan(recipe).time(Measured(calibrate().calibration))
    seconds = _seconds(recipe)
    shutil.rmtree(folder / str(seed))
    kept = {name: getattr(found, name) for name in ("low", "high", "issuing", "update", "rows", "basis", "unknown")}
    name = f"{drawn.world.family}, {' + '.join(drawn.methods)} ({seed})"
    return {"name": name, "planned": found.seconds, "kernels": sum(found.kernels.values()), **kept, "seconds": seconds}


def _seconds(recipe: Any) -> float:
    """Median over the run's steps of the median of each."""
    from tarsia.train.loop import one_step, training
    from tarsia.train.run import prepare

    run = prepare(recipe, None, 1)
    seen: dict[int, list[float]] = {number: [] for number in range(run.schedule.steps)}
    with training(run):
        for turn in range(REPEATS + 1):
            for number, times in seen.items():
                run.step = number
                began = time.perf_counter()
                one_step(run)
                if turn:  # the first turn warms up
                    times.append(time.perf_counter() - began)
    return median(median(times) for times in seen.values())


if __name__ == "__main__":
    from bench.grid.worlds import speak

    speak()
    found = _calibrated() if sys.argv[1] == "calibrate" else _one(int(sys.argv[1]), Path(sys.argv[2]))
    print(BEGINS + json.dumps(found))
