"""Configurations of the grid, run and measured; all files lie in the folder TARSIA_GRID.

python -m bench.grid SEED                      one, whose files are kept
python -m bench.grid development|held-out      a whole set: a line for each in a file of its name, from where it stopped
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from bench.grid.configurations import DEVELOPMENT, HELD_OUT
from bench.grid.runner import home, run, series

SETS = {"development": DEVELOPMENT, "held-out": HELD_OUT}


def main(words: Sequence[str]) -> int:
    """Returns 1 where a configuration failed, 2 where there is nothing such to run."""
    if len(words) != 1 or (words[0] not in SETS and not words[0].isdecimal()):
        print(__doc__, file=sys.stderr)
        return 2
    place, word = home(), words[0]
    place.mkdir(parents=True, exist_ok=True)
    if word.isdecimal():
        folder = place / f"{int(word):05d}"
        lines = [run(int(word), folder)]
        print(json.dumps(lines[0], indent=1))
        print(f"its files: {folder}", file=sys.stderr)
        return int("error" in lines[0])
    failed = 0
    for line in series(SETS[word], place / f"{word}.jsonl"):
        failed += "error" in line
        print(json.dumps(line), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
