"""Four processes at work in one library, killed in the middle of what they do: ``crowd.py FOLDER KILLS SEED``.

Each writes what was acknowledged to it into its log and goes on. Whoever is to be killed is waited for until it is in
the middle of one kind of work, and is killed a random moment later. Prints one JSON object: how many were killed at
which work, what a reader saw that was not whole, and the acknowledged work.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from random import Random

from bench.made import adapter
from tarsia.core.errors import LibraryError
from tarsia.library import Library, content
from tarsia.library.sweep import sweep

WORKERS = 4
NAMES = ("ant", "bee", "cat")
WORK = ("publish", "tag", "rollback", "gc")
IDLE = len(WORK)


def work(library: Library, folder: Path, state: mmap.mmap, slot: int, seed: int) -> None:
    """Publish, tag, roll back and collect garbage for ever; each acknowledgement becomes a line of the log."""
    random = Random(seed)
    scratch = folder / "made" / str(seed)
    log = os.open(folder / f"acknowledged-{slot}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def told(**values: object) -> None:
        os.write(log, (json.dumps(values) + "\n").encode())

    parent = os.getppid()
    turn = 0
    while os.getppid() == parent:
        turn += 1
        kind = random.choice((0, 0, 0, 1, 1, 2, 2, 3))
        name = random.choice(NAMES)
        if kind == 0:
            # some contents come again, under another name too
            number = random.randrange(12) if random.random() < 0.25 else seed * 1000 + turn
            adapter(scratch, number)
        state[slot] = kind
        try:
            if kind == 0:
                made = library.publish(scratch, name, tags=("fresh",) if turn % 2 else (), who=f"worker {seed}")
                told(publish=made.version.reference, hash=made.version.hash, fresh=made.fresh)
            elif kind == 1:
                library.tag(name, random.choice(("stable", "old")), who=f"worker {seed}", why=f"turn {turn}")
                told(move=[f"worker {seed}", f"turn {turn}"])
            elif kind == 2:
                library.rollback(name, to=None, who=f"worker {seed}", why=f"turn {turn}")
                told(move=[f"worker {seed}", f"turn {turn}"])
            else:
                sweep(library.places)
        except LibraryError as error:
            # a name that is not there yet, or has nowhere to go back to
            if kind in (0, 3) or not any(t in error.what for t in ("no adapter of this name", "never anywhere else")):
                told(refused=str(error))
                raise
        finally:
            state[slot] = IDLE
            shutil.rmtree(scratch, ignore_errors=True)


def start(library: Library, folder: Path, state: mmap.mmap, slot: int, seed: int) -> int:
    """A worker of its own; its number."""
    child = os.fork()
    if child == 0:
        try:
            work(library, folder, state, slot, seed)
        finally:
            os._exit(1)
    return child


def busy(state: mmap.mmap, kind: int, slot: int) -> int:
    """A worker that is in the middle of this kind of work; any, where none is within 5 seconds."""
    until = time.monotonic() + 5
    while state[slot] != kind and time.monotonic() < until:
        slot = (slot + 1) % WORKERS
        time.sleep(0)
    return slot


def seen(library: Library, known: set[str]) -> list[str]:
    """What a reader finds that is not whole, of what it has not looked at before."""
    wrong = []
    for version in library.search(every=True):
        if version.reference not in known:
            known.add(version.reference)
            try:
                content.look(library.whole(version.reference)[1])
            except LibraryError as error:
                wrong.append(str(error))
    return wrong


def main(folder: Path, kills: int, seed: int) -> None:
    """Start the workers, kill one after the other, and say what came of it."""
    random = Random(seed)
    library = Library.make(folder / "library")
    state = mmap.mmap(-1, WORKERS)
    state[:] = bytes([IDLE] * WORKERS)
    living = [start(library, folder, state, slot, slot + 1) for slot in range(WORKERS)]
    counted = dict.fromkeys((*WORK, "between"), 0)
    known: set[str] = set()
    wrong: list[str] = []
    try:
        for number in range(kills):
            slot = busy(state, number % len(WORK), number % WORKERS)
            time.sleep(random.random() * (0.03 if number % len(WORK) == 0 else 0.01))
            os.kill(living[slot], signal.SIGKILL)
            if os.waitpid(living[slot], 0)[1] != signal.SIGKILL:
                wrong.append(f"worker {slot} ended by itself")
            counted[(*WORK, "between")[state[slot]]] += 1
            state[slot] = IDLE
            living[slot] = start(library, folder, state, slot, number + WORKERS + 1)
            wrong += seen(library, known)
    finally:
        for child in living:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    acknowledged = [
        json.loads(line) for path in sorted(folder.glob("acknowledged-*")) for line in path.read_text().splitlines()
    ]
    print(json.dumps({"killed": counted, "wrong": wrong, "acknowledged": acknowledged, "last": WORKERS}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
