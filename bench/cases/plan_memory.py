"""The plan's peak memory against the measured one, over whole training runs of random configurations.

Random-weight checkpoints of twelve families, with their processors and tokenizers; all 20 methods, alone and together,
4 and 16 bits, 0 to 4 pictures a row of three resolutions, checkpointing, accumulation, plain, grouped and packed rows,
the cache of features: ``bench.grid``. Each of 94 configurations is drawn from a seed, 34 of them from seeds that nobody
looked at while the plan was built; draws that can not be run are made again and counted. Each is a fresh process with
one thread that trains three steps. *Live bytes* are the most bytes of tensors at once in a step, as torch's allocator
records them; *process* is the most resident memory (VmHWM) from the process's start to the run's end. An error is
what the plan is above the measured; percentiles and medians are of its size.
"""

from __future__ import annotations

import sys
from typing import Final

from bench.grid.configurations import DEVELOPMENT, HELD_OUT
from bench.grid.judged import summary
from bench.grid.runner import home, series
from bench.grid.runner import read as lines_of
from bench.run import Values, commit

SEEDS: Final = (*DEVELOPMENT[:60], *HELD_OUT[:34])


def measure() -> Values:
    """Every configuration; goes on where it stopped, if nothing of the sources has changed since."""
    measured = commit()
    results = home() / f"plan_memory-{measured.rstrip('+')}.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    if measured.endswith("+"):  # what these lines were measured of can not be told
        results.unlink(missing_ok=True)
    for line in series(SEEDS, results):
        print(line["seed"], line.get("error", "measured"), file=sys.stderr, flush=True)
    return summary(lines_of(results))
