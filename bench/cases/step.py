"""One whole training step, Tarsia beside PEFT + Transformers, and TRL's trainer where there is one.

SmolLM2-135M in a LLaVA with a small vision tower (``bench.smol``), LoRA of rank 16 on every linear layer of the
language model, 4 rows of 256 tokens of which 70 % carry no label, float32, 2 threads, the same first values. Each in a
process of its own, single steps in turn; the ratio is the median over 9 rounds. ``saved`` and ``flops`` are counts.
TRL takes part where ``TARSIA_TRL`` names the Python of an environment that has trl and greenlet.
"""

from __future__ import annotations

import os
import sys

from bench.race import Runner, race, table
from bench.run import Values
from bench.smol import folder

ROUNDS = 9


def measure() -> Values:
    """All contestants."""
    path = str(folder("small"))
    runners = [
        Runner("Tarsia", "bench.contestants:tarsia", {"folder": path}),
        Runner("PEFT", "bench.contestants:peft", {"folder": path}),
    ]
    if python := os.environ.get("TARSIA_TRL"):
        runners.append(Runner("TRL", "bench.contestants:trl", {"folder": path}, python))
    else:
        print("step: TRL is left out: TARSIA_TRL names no Python that has trl and greenlet", file=sys.stderr)
    return table(race(runners, ROUNDS), "PEFT")
