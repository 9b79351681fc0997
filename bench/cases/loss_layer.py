"""Head and loss alone: labelled positions by chunks, beside the logits of all positions, as Transformers makes them.

2,048 positions of which 70 % carry no label, width 576, vocabulary 49,152, float32, 2 threads, forward and backward.
Each in a process of its own, in turn; medians over 9 rounds. ``added`` is the peak above what stays between steps.
"""

from __future__ import annotations

from bench.race import Runner, race, table
from bench.run import Values

ROUNDS = 9


def measure() -> Values:
    """Both ways."""
    runners = [Runner(kind, "bench.contestants:loss_layer", {"kind": kind}) for kind in ("chunks", "all")]
    return table(race(runners, ROUNDS), "all")
