"""One whole training step, Tarsia beside PEFT + Transformers.

SmolLM2-135M in a LLaVA with a small vision tower (``bench.smol``), LoRA of rank 16 on every linear layer of the
language model, 4 rows of 256 tokens of which 70 % carry no label, float32, 2 threads, the same first values. Each in a
process of its own, single steps in turn; the ratio is the median over 11 rounds. ``saved`` and ``flops`` are counts.
"""

from __future__ import annotations

from bench.race import THREADS, Result, Runner, allocator, race
from bench.run import Values
from bench.smol import folder

ROUNDS = 11
MIB = 2**20


def rows(found: dict[str, Result], other: str = "PEFT") -> Values:
    """Each contestant's figures, and its shares of ``other``'s."""
    beside = found[other]
    values: dict[str, dict[str, float | int | str]] = {}
    for name, one in found.items():
        gap = max(abs(a - b) for a, b in zip(one.losses, beside.losses, strict=True))
        values[name] = {
            "s": round(sorted(one.seconds)[len(one.seconds) // 2], 4),
            "time / PEFT": round(one.over(beside), 3),
            "peak MiB": round(one.peak / MIB),
            "peak / PEFT": round(one.peak / beside.peak, 3),
            "above model MiB": round(one.above / MIB),
            "above / PEFT": round(one.above / beside.above, 3),
            "saved MiB": round(one.saved / MIB, 1),
            "GFLOP": round(one.flops / 1e9, 1),
            "loss differs by": f"{gap:.1e}",
            "threads": THREADS,
            "allocator": allocator(),
        }
    return values


def measure() -> Values:
    """Both contestants."""
    path = str(folder("small"))
    runners = [
        Runner("Tarsia", "bench.contestants:tarsia", {"folder": path}),
        Runner("PEFT", "bench.contestants:peft", {"folder": path}),
    ]
    return rows(race(runners, ROUNDS))
