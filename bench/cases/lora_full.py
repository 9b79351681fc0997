"""A LoRA step beside a full step of the same linear layers, both Tarsia's, on the model and batch of ``step``.

Theory says 4 / 6: the full step also makes the gradient of every weight. Medians over 9 rounds, single steps in turn.
"""

from __future__ import annotations

from bench.race import Runner, race, table
from bench.run import Values
from bench.smol import folder

ROUNDS = 9


def measure() -> Values:
    """Both methods."""
    path = str(folder("small"))
    runners = [Runner(m, "bench.contestants:tarsia", {"folder": path, "method": m}) for m in ("lora", "full")]
    return table(race(runners, ROUNDS), "full")
