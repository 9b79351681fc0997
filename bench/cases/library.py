"""A library of 5,000 adapters: whole commands, finding one, publishing, and what the same takes without an index.

The adapters are made up (``bench.made``: LoRA of rank 4 at 8 sites, 12 KiB with their descriptions), under 1,000 names
of 5 versions, on 20 bases. Everything is measured in turn, so that a busy moment touches every row. A command is all of
it, the interpreter's start included ("python -c pass" is the least that one takes); "every tarsia.json read" is a
listing without an index. ``publish`` of 42 MiB stands beside a copy of the same files that is flushed to the disk; its
row has the difference, whose bar is 0.3 s; the bar of ``list`` is 0.2 s.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median

from bench.made import adapter
from bench.race import MIB, ROOT
from bench.run import Values, spread
from tarsia.library import Library, Version, content, index, record, repair, verify
from tarsia.library.store import move, now

NAMES, EACH, BASES = 1000, 5, 20
RUNS = 15
LARGE = 42 * MIB
COMMANDS: Mapping[str, list[str]] = {
    "list (1,000 names)": ["list"],
    "list --all (5,000 versions)": ["list", "--all"],
    "list --all --json": ["list", "--all", "--json"],
    "list 'name-77*'": ["list", "name-77*"],
    "list --tag stable": ["list", "--tag", "stable"],
    "list --base base-7": ["list", "--base", "base-7"],
    "list --hash": ["list", "--hash", "HASH"],
    "show": ["show", "name-500@3"],
}


SCAN = """
import json, pathlib, sys
for path in pathlib.Path(sys.argv[1]).glob("*/*/tarsia.json"):
    json.loads(path.read_bytes())
"""


def measure() -> Values:
    """Fill a library, then measure everything in turn."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        library = fill(folder)
        digest = library.version("name-500@3").hash
        values: dict[str, Mapping[str, float | int | str]] = {}
        values |= commands(library, digest)
        values |= within(library, digest)
        values |= publishes(library, folder)
        values |= whole(library)
        return values


def fill(folder: Path) -> Library:
    """5,000 versions, and a tag ``stable`` on every tenth name, in one transaction and without flushing each."""
    library = Library.make(folder / "library")
    places = library.places
    with index.writing(places) as work:
        for number in range(NAMES * EACH):
            name = f"name-{number // EACH}"
            made = adapter(folder / "made", number, f"base-{number // EACH % BASES}")
            looked = content.look(made)
            version = Version.of(looked, name, number % EACH + 1, now(), "bench", "")
            for path in (places.object(looked.hash), places.record(name, version.number)):
                path.parent.mkdir(exist_ok=True)
            made.rename(places.object(looked.hash))
            places.record(name, version.number).write_bytes(record.write(version, looked.files))
            record.insert(work.db, version, looked.files)
            move(work, version, "current", "bench", "", "publish")
            if number % (10 * EACH) == 0:
                move(work, version, "stable", "bench", "", "tag")
    return library


def commands(library: Library, digest: str) -> dict[str, dict[str, float | int]]:
    """Whole commands."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TARSIA_LIBRARY": str(library.places.root)}
    start = [sys.executable, "-m", "tarsia", "library"]
    asked = {name: [*start, *(digest[:9] if a == "HASH" else a for a in given)] for name, given in COMMANDS.items()}
    asked["python -c pass"] = [sys.executable, "-c", "pass"]
    asked["every tarsia.json read"] = [sys.executable, "-c", SCAN, str(library.places.objects)]

    def do(command: list[str]) -> Callable[[], object]:
        return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)

    return timed({name: do(command) for name, command in asked.items()})


def within(library: Library, digest: str) -> dict[str, dict[str, float | int]]:
    """The same without the start of an interpreter."""
    return timed(
        {
            "in a process: name": lambda: library.version("name-500"),
            "in a process: name@stable": lambda: library.version("name-500@stable"),
            "in a process: name#hash": lambda: library.version(f"name-500#{digest[:9]}"),
            "in a process: search by hash": lambda: library.search(digest=digest[:9]),
            "in a process: search by base": lambda: library.search(base="base-7"),
            "in a process: search, all versions": lambda: library.search(every=True),
        }
    )


def publishes(library: Library, folder: Path) -> dict[str, dict[str, float | int]]:
    """Publishing a small adapter and one of 42 MiB, beside a copy of the latter's tensors; tags that move."""
    seeds = iter(range(10**6, 10**7))

    def make(large: bool) -> Path:
        place = adapter(folder / f"made-{next(seeds)}", next(seeds), "base-0")
        if large:
            grow(place)
        return place

    times: dict[str, list[float]] = {"publish 12 KiB": [], "publish 42 MiB": [], "copy 42 MiB, flushed": []}
    for _ in range(RUNS):
        small, large, copied = make(False), make(True), folder / "copied"
        for name, do in (
            ("publish 12 KiB", partial(library.publish, small, "published")),
            ("publish 42 MiB", partial(library.publish, large, "published")),
            ("copy 42 MiB, flushed", partial(copy, large, copied)),
        ):
            times[name].append(seconds(do))
        for place in (small, large, copied):
            shutil.rmtree(place)
    values = {name: spread(values) for name, values in times.items()}
    pairs = zip(times["publish 42 MiB"], times["copy 42 MiB, flushed"], strict=True)
    values["publish 42 MiB"]["over the copy s"] = round(median(a - b for a, b in pairs), 4)
    turn = iter(range(10**6))
    return values | timed(
        {
            "tag": lambda: library.tag(f"name-500@{next(turn) % EACH + 1}", "moving"),
            "rollback": lambda: library.rollback("name-500", to=next(turn) % 2 + 1 + 2 * (next(turn) % 2)),
        }
    )


def whole(library: Library) -> dict[str, dict[str, float | int]]:
    """Every byte looked at, and a lost index made anew, once each."""
    found = seconds(lambda: verify.verify(library.places))
    library.places.index.unlink()
    made = seconds(lambda: repair.repair(library.places))
    return {"verify, everything": spread([found]), "a lost index made anew": spread([made])}


def grow(place: Path) -> None:
    """Make the adapter's first tensor so large that the file has 42 MiB."""
    path = place / "adapter_model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    last = max((key for key in table if key != "__metadata__"), key=lambda key: table[key]["data_offsets"][1])
    more = (LARGE - len(raw)) // 2048 * 2048
    high, wide = table[last]["shape"]
    table[last]["shape"] = [high + more // 2 // wide, wide]
    table[last]["data_offsets"][1] += more
    head = json.dumps(table).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(len(head).to_bytes(8, "little") + head + body + b"\x12\x3c" * (more // 2))
    described = json.loads((place / "tarsia.json").read_bytes())
    described["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (place / "tarsia.json").write_text(json.dumps(described), encoding="utf8")


def copy(source: Path, target: Path) -> None:
    """Copy a folder's files, and flush them to the disk."""
    shutil.copytree(source, target)
    for path in [*target.iterdir(), target]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def timed(what: Mapping[str, Callable[[], object]]) -> dict[str, dict[str, float | int]]:
    """Seconds of each, all of them in turn."""
    times: dict[str, list[float]] = {name: [] for name in what}
    for _ in range(RUNS):
        for name, do in what.items():
            times[name].append(seconds(do))
    return {name: spread(values) for name, values in times.items()}


def seconds(do: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    do()
    return time.perf_counter() - began
