"""Configurations, each in a fresh process, one after the other; a line of JSON for each, appended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any, Final

from bench.grid.configurations import Configuration, configuration
from bench.grid.measure import BEGINS, KIB

ROOT: Final = Path(__file__).parents[2]
LIMIT: Final = 600.0
"""Seconds that a configuration may take; alone on a core it takes about 15."""
BETWEEN: Final = 0.005
"""Seconds between two looks at the memory of a process."""

Line = dict[str, Any]


def home() -> Path:
    """Where worlds are built and lines are kept: TARSIA_GRID, or a folder for temporary files."""
    return Path(os.environ.get("TARSIA_GRID") or Path(tempfile.gettempdir(), "tarsia-grid"))


def run(seed: int, folder: Path) -> Line:
    """Run one seed in ``folder``, which keeps its world, rows and recipe. What fails is an ``error`` of the line."""
    for old in ("planned", "live", "process", "live-features", "process-features", "planned-features"):
        shutil.rmtree(folder / old, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    line: Line = {"seed": seed, "configuration": described(configuration(seed))}
    line |= _measured(seed, folder)
    return line | {"all seconds": round(time.perf_counter() - began, 2)}


def series(seeds: Iterable[int], results: Path) -> Iterator[Line]:
    """Run what ``results`` has no line of yet and append a line for each; worlds are removed once they were run."""
    done = {line["seed"] for line in read(results)}
    for seed in seeds:
        if seed not in done:
            folder = results.parent / f"{seed:05d}"
            line = run(seed, folder)
            with results.open("a", encoding="utf8") as file:
                file.write(json.dumps(line) + "\n")
            shutil.rmtree(folder)
            yield line


def read(results: Path) -> list[Line]:
    """The lines so far; none where there is no file."""
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf8").splitlines()]


def described(found: Configuration) -> Line:
    """A configuration as plain values, as a line holds it."""
    world, rows = found.world, found.rows
    return {
        "family": world.family,
        "methods": found.methods,
        "selections": [part["select"] for part in found.recipe["parts"]],
        "hidden": world.hidden,
        "layers": world.layers,
        "vocabulary": world.vocabulary,
        "resolution": world.resolution,
        "pictures": rows.pictures,
        "words": [rows.question, rows.answer],
        "four_bits": found.recipe.get("four_bits"),
        **{key: found.recipe[key] for key in ("precision", "batch", "accumulate", "batching", "checkpointing", "clip")},
        "features": "features" in found.recipe,
        "shrunk": found.recipe.get("resolution"),
        "work": round(found.work, 1),
        "redrawn": found.redrawn,
    }


def _measured(seed: int, folder: Path) -> Line:
    paths = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "bench.grid.measure", str(seed), str(folder)]
    with (folder / "log.txt").open("w", encoding="utf8") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=ROOT)
        with _Watch(process.pid) as watch:
            try:
                out, _ = process.communicate(timeout=LIMIT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                return {"error": f"it took more than {LIMIT:g} s"}
    line = next((text for text in out.splitlines() if text.startswith(BEGINS)), None)
    if line is None:
        last = (folder / "log.txt").read_text(encoding="utf8").strip().splitlines()[-1:] or ["nothing said"]
        return {"error": f"it ended with {process.returncode}: {last[0][:300]}"}
    found: Line = json.loads(line.removeprefix(BEGINS))
    if "error" not in found.get("process", {"error": ""}):
        found["process"] |= watch.found
    return found


class _Watch:
    """Looks at a process's memory from outside: the most that was anonymous, the most that was of files."""

    def __init__(self, pid: int) -> None:
        self.found: dict[str, int] = {}
        self._status = Path(f"/proc/{pid}/status")
        self._over = Event()
        self._thread = Thread(target=self._look)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        names = {"RssAnon:": "anonymous", "RssFile:": "files"}
        while not self._over.wait(BETWEEN):
            try:
                lines = [line.split() for line in self._status.read_text(encoding="utf8").splitlines()]
            except (FileNotFoundError, ProcessLookupError):
                return
            for words in lines:
                if words and words[0] in names:
                    name = names[words[0]]
                    self.found[name] = max(self.found.get(name, 0), int(words[1]) * KIB)
