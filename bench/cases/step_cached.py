"""The step of ``step`` with a vision tower as large as the language model, and Tarsia's cache of features on.

135 million parameters in the tower, 144 tokens a picture. The warm-up fills the cache, so that every step that counts
is one of a second epoch. Beside it Tarsia without the cache. Medians over 3 rounds, single steps in turn.
"""

from __future__ import annotations

import tempfile

from bench.race import Runner, race, table
from bench.run import Values
from bench.smol import folder

ROUNDS = 3


def measure() -> Values:
    """Tarsia with and without the cache, and PEFT."""
    path = str(folder("large"))
    with tempfile.TemporaryDirectory() as cache:
        runners = [
            Runner("Tarsia, cached", "bench.contestants:tarsia", {"folder": path, "cache": cache}),
            Runner("Tarsia", "bench.contestants:tarsia", {"folder": path}),
            Runner("PEFT", "bench.contestants:peft", {"folder": path}),
        ]
        return table(race(runners, ROUNDS), "PEFT")
