"""Every line that the library runs, as a place to be killed at: ``steps.py FOLDER STRIDE``.

Each kind of work is done in a copy of a library, in a process that SIGKILL ends before the n-th line of the
library's code, for every n (or every STRIDE-th). Then the state is judged, the same work is done again, and what was
left over is collected. Prints what was wrong, and how many kills there were of each work.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import tarsia.library
from bench.made import adapter
from tarsia.core.errors import LibraryError
from tarsia.library import Library
from tarsia.library.places import Places
from tarsia.library.repair import repair
from tarsia.library.sweep import contents, sweep
from tarsia.library.verify import verify

OURS = str(Path(tarsia.library.__file__).parent)
State = tuple[tuple[str, str, tuple[str, ...]], ...]


def prepared(folder: Path) -> Library:
    """Two names, three versions, a tag, and what a killed process leaves of each kind."""
    library = Library.make(folder / "library")
    for number, name in ((0, "ant"), (1, "ant"), (2, "bee")):
        library.publish(adapter(folder / f"made-{number}", number), name, who="test")
    library.tag("ant@2", "stable", who="test")
    adapter(folder / "next", 7)
    adapter(library.places.stages / "dead", 8)
    shutil.copytree(library.places.stages / "dead", library.places.object("f" * 64))
    library.places.record("bee", 2).write_text("{}")
    with library.places.journal.open("a") as file:
        file.write('{"id": 5, "at"')
    return library


def spoilt(folder: Path) -> Library:
    """The same without an index, and without the file that says what it is."""
    library = prepared(folder)
    library.places.index.write_bytes(b"no database" * 1000)
    library.places.marker.unlink()
    return library


WORK: dict[str, tuple[Callable[[Path], Library | None], Callable[[Path], object]]] = {
    "make": (lambda folder: None, lambda folder: Library.make(folder / "library")),
    "publish": (prepared, lambda f: Library.open(f / "library").publish(f / "next", "bee", tags=("good",))),
    "publish a new name": (prepared, lambda f: Library.open(f / "library").publish(f / "next", "cat")),
    "tag": (prepared, lambda f: Library.open(f / "library").tag("ant@1", "stable")),
    "rollback": (prepared, lambda f: Library.open(f / "library").rollback("ant", to=1)),
    "retire": (prepared, lambda f: Library.open(f / "library").retire("ant", 1)),
    "gc": (prepared, lambda f: sweep(Library.open(f / "library").places)),
    "repair": (spoilt, lambda f: repair(Places(f / "library"))),
}


def state(folder: Path) -> State:
    """What a reader sees: versions, hashes, tags."""
    return tuple((v.reference, v.hash, v.tags) for v in Library.open(folder / "library").search(every=True))


def killed(work: Callable[[Path], object], folder: Path, at: int) -> bool:
    """Do the work in a process that is killed before the line of this number; False where it ended before."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == signal.SIGKILL
    left = at

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event == "line":
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
        return trace

    sys.settrace(trace)
    try:
        work(folder)
    finally:
        error = sys.exc_info()[1]
        if error is not None:
            traceback.print_exception(error)
        os._exit(0 if error is None else 1)


def judged(kind: str, folder: Path, states: tuple[State | None, State]) -> list[str]:
    """What is wrong after a kill."""
    wrong = []
    work = WORK[kind][1]
    before, after = states
    if kind not in ("make", "repair"):
        if state(folder) not in states:
            wrong.append(f"half done: {state(folder)}")
        faults = verify(Library.open(folder / "library").places).faults
        wrong += [f"fault: {fault}" for fault in faults]
    undone = kind in ("make", "repair") or state(folder) == before
    if undone:
        try:
            work(folder)
        except LibraryError as error:
            wrong.append(f"can not be done again: {error}")
            return wrong
    if state(folder) != after:
        wrong.append(f"done again: {state(folder)}")
    places = Library.open(folder / "library").places
    sweep(places)
    found = verify(places)
    wrong += [f"after all: {text}" for text in (*found.faults, *found.garbage)]
    if {path.name for path in contents(places)} != {digest for _, digest, _ in after}:
        wrong.append("contents are lost or left")
    return wrong


def main(folder: Path, stride: int) -> None:
    """Kill each kind of work at its lines."""
    counted: dict[str, int] = {}
    wrong: list[str] = []
    for kind, (before, work) in WORK.items():
        sample, done = folder / "sample", folder / "done"
        sample.mkdir()
        library = before(sample)
        first = state(sample) if library is not None and kind != "repair" else None
        shutil.copytree(sample, done)
        work(done)
        last = state(done)
        at = counted[kind] = 0
        while True:
            place = folder / "place"
            shutil.copytree(sample, place)
            if not killed(work, place, at):
                shutil.rmtree(place)
                break
            wrong += [f"{kind} killed before line {at}: {text}" for text in judged(kind, place, (first, last))]
            counted[kind] += 1
            shutil.rmtree(place)
            at += stride
        for used in (sample, done):
            shutil.rmtree(used)
    print(json.dumps({"killed": counted, "wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
