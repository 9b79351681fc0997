"""``python -m bench.grid SEED`` runs one configuration and keeps its files; ``development`` or ``held-out`` a whole set.

A set has a line for each of its seeds in a file of its name, and goes on from where it stopped. All of it lies in the
folder TARSIA_GRID.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from bench.grid.configurations import DEVELOPMENT, HELD_OUT
from bench.grid.runner import home, run, series

SETS = {"development": DEVELOPMENT, "held-out": HELD_OUT}


def main(words: Sequence[str]) -> int:
    """Returns 1 where a configuration failed."""
    if len(words) != 1 or (words[0] not in SETS and not words[0].isdecimal()):
        print(__doc__, file=sys.stderr)
        return 2
    place, word = home(), words[0]
    place.mkdir(parents=True, exist_ok=True)
    if word.isdecimal():
        lines = [run(int(word), place / f"{int(word):05d}")]
        print(json.dumps(lines[0], indent=1))
        print(f"files: {place / f'{int(word):05d}'}", file=sys.stderr)
        return int("error" in lines[0])
    failed = 0
    for line in series(SETS[word], place / f"{word}.jsonl"):
        failed += "error" in line
        print(json.dumps(line), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
