"""Folding against copying the same bytes, and against PEFT: a whole folder, one site, and a model in memory.

SmolLM2-135M in a LLaVA (``bench.smol``) with a LoRA of rank 16 at every linear layer of the language model. Each
contestant is in a process of its own and takes turns; medians over 7 rounds. ``cp`` copies the base's folder, into the
page cache as all do. *written* is the streamed fold of the files alone, *proved* all of ``tarsia fold``: the live
adapter run, the files written and synced to the disk, the result loaded by plain Transformers and compared. PEFT loads
the base, merges and saves, and compares nothing. ``added MiB`` is the highest resident memory less what is resident
between steps. One site: a weight of 2048 x 2048, of so many in turn that none is in the cache, milliseconds a fold. In
memory: ``merge`` and ``unmerge`` once each; Tarsia restores every bit, PEFT subtracts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from bench import folding, smol
from bench.race import MIB, Result, Runner, race
from bench.run import Values

ROUNDS = 7
BASES = ("float32", "bfloat16")
FOLDERS = ("cp", "Tarsia, written", "Tarsia, proved", "PEFT")
SITES = ("copy", "Tarsia, in place", "Tarsia", "PEFT")


def measure() -> Values:
    """Every row."""
    values: dict[str, Mapping[str, float | int | str]] = {}
    with tempfile.TemporaryDirectory(prefix="tarsia-fold-") as scratch:
        for dtype in BASES:
            made = folding.prepare(smol.folder("small"), dtype, Path(scratch))
            values |= _folders(dtype, made, Path(scratch) / "out")
            values |= _memory(dtype, made)
    for dtype in BASES:
        values |= _sites(dtype)
    return values


def _seconds(one: Result) -> tuple[float, ...]:
    """What the steps say that they took, without the two that warm up."""
    return one.losses[2:]


def _over(one: Result, other: Result) -> float:
    return round(median(a / b for a, b in zip(_seconds(one), _seconds(other), strict=True)), 2)


def _folders(dtype: str, made: dict[str, str], out: Path) -> Values:
    def runner(who: str) -> Runner:
        return Runner(who, "bench.folding:folder", {"who": who, "out": f"{out}-{who.split()[-1]}", **made})

    found = race([runner(who) for who in FOLDERS], rounds=ROUNDS, counted=False)
    size = folding.size(Path(made["base"]))
    return {
        f"folder, {dtype}: {who}": {
            "s": round(median(_seconds(one)), 3),
            "time / cp": _over(one, found["cp"]),
            "added MiB": round(one.above / MIB),
            "files MiB": round(size / MIB),
        }
        for who, one in found.items()
    }


def _memory(dtype: str, made: dict[str, str]) -> Values:
    who = ("Tarsia", "PEFT")
    found = race([Runner(w, "bench.folding:memory", {"who": w, **made}) for w in who], rounds=ROUNDS, counted=False)
    return {
        f"in memory, {dtype}: {name}": {
            "s": round(median(_seconds(one)), 3),
            "time / PEFT": _over(one, found["PEFT"]),
            "added MiB": round(one.above / MIB),
        }
        for name, one in found.items()
    }


def _sites(dtype: str) -> Values:
    arguments: dict[str, Any] = {"size": 2048, "dtype": dtype}
    runners = [
        Runner(who, "bench.folding:site", {"who": who, **arguments}, environment={"OMP_NUM_THREADS": "1"})
        for who in SITES
    ]
    found = race(runners, rounds=2 * ROUNDS, counted=False)
    return {
        f"2048x2048, rank 16, {dtype}: {who}": {
            "ms": round(1e3 * median(_seconds(one)), 3),
            "time / copy": _over(one, found["copy"]),
        }
        for who, one in found.items()
    }
