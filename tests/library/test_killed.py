"""SIGKILL at any moment: in a crowd of four processes, and at every line of a single one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tarsia.library import Library
from tarsia.library.sweep import contents, sweep
from tarsia.library.verify import verify

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def script(name: str, *arguments: object) -> dict[str, Any]:
    path = os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests", ROOT)))
    done = subprocess.run(
        [sys.executable, str(HERE / name), *map(str, arguments)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def judge(folder: Path, found: dict[str, Any], kills: int) -> None:
    """Nothing acknowledged is lost, nothing else than the work in hand was done, everything is whole."""
    library = Library.open(folder / "library")
    before = {version.reference: version.hash for version in library.search(every=True)}
    assert verify(library.places).faults == ()  # a writer of it does what the journal's end says
    assert found["wrong"] == []
    assert [line["refused"] for line in found["acknowledged"] if "refused" in line] == []
    versions = {version.reference: version for version in library.search(every=True)}
    later = {reference for reference in versions if reference not in before}
    assert before == {key: versions[key].hash for key in before} and len(later) <= found["last"]
    published = [line for line in found["acknowledged"] if "publish" in line]
    for line in published:
        assert before[line["publish"]] == line["hash"]
    fresh = [line["publish"] for line in published if line["fresh"]]
    assert len(fresh) == len(set(fresh)), "a number was given twice"
    # each killed process may have done one thing more than it could tell
    ended = kills + found["last"]
    assert len(fresh) <= len(versions) <= len(fresh) + ended
    for name in {version.name for version in versions.values()}:
        numbers = [version.number for version in versions.values() if version.name == name]
        assert numbers == list(range(1, len(numbers) + 1))
    journal = library.history()
    moved = Counter((entry.who, entry.why) for entry in journal if entry.action != "publish" and entry.why)
    told = Counter(tuple(line["move"]) for line in found["acknowledged"] if "move" in line)
    assert max(moved.values(), default=1) == 1 and not told - moved, "an acknowledged move is lost"
    assert (moved - told).total() <= ended
    sweep(library.places)
    after = verify(library.places)
    assert (after.faults, after.garbage) == ((), ())
    assert len(list(contents(library.places))) == len({version.hash for version in versions.values()})
    assert list(library.places.stages.iterdir()) == []


def test_four_processes_killed_again_and_again(tmp_path: Path) -> None:
    found = script("crowd.py", tmp_path, 16, 1)
    judge(tmp_path, found, 16)
    assert min(found["killed"][kind] for kind in ("publish", "tag", "rollback", "gc")) >= 1, found["killed"]


@pytest.mark.slow
def test_a_hundred_kills(tmp_path: Path) -> None:
    found = script("crowd.py", tmp_path, 100, 2)
    judge(tmp_path, found, 100)
    assert min(found["killed"][kind] for kind in ("publish", "tag", "rollback", "gc")) >= 10, found["killed"]


def test_killed_at_lines_of_everything(tmp_path: Path) -> None:
    memory = Path("/dev/shm")  # what a killed process leaves is the same there, and flushing takes no time
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        found = script("steps.py", folder, 67)
    assert found["wrong"] == []
    assert min(found["killed"].values()) >= 2, found["killed"]


@pytest.mark.slow
def test_killed_at_every_line_of_everything(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        found = script("steps.py", folder, 1)
    assert found["wrong"] == []
    assert min(found["killed"].values()) >= 100, found["killed"]
