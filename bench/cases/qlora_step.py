"""One whole QLoRA step, Tarsia beside PEFT + bitsandbytes, and beside Tarsia's LoRA step over the model in float32.

The model, batch and updates of the case ``step`` (1,024 tokens a weight pass), with the language model's linear layers
in NF4, scales nested; float32 is computed in. Single steps in turn, each contestant in a process of its own; ratios are
medians over 9 rounds.
"""

from __future__ import annotations

from bench.race import Runner, race, table
from bench.run import Values
from bench.smol import folder

ROUNDS = 9
PEER = "PEFT + bitsandbytes"


def measure() -> Values:
    """All three, against the peer and against LoRA."""
    path = str(folder("small"))
    runners = [
        Runner("QLoRA", "bench.contestants:tarsia", {"folder": path, "four_bits": "nf4"}),
        Runner("LoRA", "bench.contestants:tarsia", {"folder": path}),
        Runner(PEER, "bench.contestants:peft", {"folder": path, "four_bits": "nf4"}),
    ]
    found = race(runners, ROUNDS)
    beside = table(found, PEER)
    return {name: {**row, "time / LoRA": round(found[name].over(found["LoRA"]), 3)} for name, row in beside.items()}
