"""One whole training step, Tarsia beside PEFT + Transformers.

SmolLM2-135M in a LLaVA with a small vision tower (``bench.smol``), LoRA of rank 16 on every linear layer of the
language model, 4 rows of 256 tokens of which 70 % carry no label, float32, 2 threads, the same first values. Each in a
process of its own, single steps in turn; the ratio is the median over 9 rounds. ``saved`` and ``flops`` are counts.
"""

from __future__ import annotations

from bench.race import Runner, race, table
from bench.run import Values
from bench.smol import folder

ROUNDS = 9


def measure() -> Values:
    """Both contestants."""
    path = str(folder("small"))
    runners = [
        Runner("Tarsia", "bench.contestants:tarsia", {"folder": path}),
        Runner("PEFT", "bench.contestants:peft", {"folder": path}),
    ]
    return table(race(runners, ROUNDS), "PEFT")
