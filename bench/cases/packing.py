"""Rows a second of training steps on uneven rows: packed and grouped batches beside padded ones.

mini-1 with LoRA of rank 16 on its language model; rows of 20 to 400 tokens, log-normal (median 90, sigma 0.8), every
other one with a picture where it is long enough; steps of 4 micro-batches of 8 rows. A step is all of it: rows
encoded and laid out, forward, backward. The same steps in turn, the order rotating; ratios are medians over rounds.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Final

import torch
from PIL import Image

from bench.run import Values
from tarsia.train.recipe import Recipe
from tarsia.train.run import Run, prepare
from tarsia.train.step import backward

ROUNDS: Final = 7
BATCH, ACCUMULATE = 8, 4
PICTURE = 100
"""Tokens from which a row can hold a picture of mini-1 beside its text."""


def rows(folder: Path, count: int) -> Path:
    """Questions of uneven length with a short answer, as JSONL with pictures beside it."""
    chance = random.Random(0)
    Image.radial_gradient("L").convert("RGB").resize((64, 64)).save(folder / "picture.png")
    lines = []
    for row in range(count):
        length = int(min(400, max(20, chance.lognormvariate(4.5, 0.8))))
        seen = row % 2 == 0 and length >= PICTURE
        words = " ".join(chance.choices(("red", "green", "one", "two"), k=max(1, length - 20 - 66 * seen)))
        lines.append({"images": ["picture.png"] * seen, "question": words, "answer": "It is red, and there are two."})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf8")
    return path


def opened(path: Path, batching: str) -> Run:
    """A run on the rows that is ready for its first step."""
    values = {
        "model": "mini-1",
        "parts": [{"method": "lora", "select": "language", "lr": 1e-4, "rank": 16}],
        "data": {"train": [{"path": str(path)}]},
        "steps": ROUNDS + 1,
        "batch": BATCH,
        "accumulate": ACCUMULATE,
        "batching": batching,
        "precision": "float32",
        "device": "cpu",
        "out": str(path.parent / batching),
    }
    return prepare(Recipe.of(values), None, torch.get_num_threads())


def step(run: Run, number: int) -> tuple[float, float, int]:
    """Seconds of one step, its loss, and the positions that the language model computed."""
    run.step = number
    began = time.perf_counter()
    batches = run.batches()
    losses = backward(run.model, batches, number + 1)
    seconds = time.perf_counter() - began
    for parameter in run.model.parameters():
        parameter.grad = None
    return seconds, losses.loss, sum(batch.labels.numel() for batch in batches)


def measure() -> Values:
    """Each way of batching: rows a second, its ratio to plain, the positions computed for one step."""
    with tempfile.TemporaryDirectory() as folder:
        path = rows(Path(folder), (ROUNDS + 1) * BATCH * ACCUMULATE)
        runs = {name: opened(path, name) for name in ("plain", "grouped", "packed")}
        taken: dict[str, list[tuple[float, float, int]]] = {name: [] for name in runs}
        for number in range(ROUNDS + 1):
            names = list(runs)
            for name in names[number % 3 :] + names[: number % 3]:
                taken[name].append(step(runs[name], number))
    plain = taken["plain"][1:]
    values: dict[str, dict[str, float | int | str]] = {}
    for name, steps in taken.items():
        timed = steps[1:]
        values[name] = {
            "rows/s": round(BATCH * ACCUMULATE / median(s for s, _, _ in timed), 2),
            "rows/s / plain": round(median(a[0] / b[0] for a, b in zip(plain, timed, strict=True)), 3),
            "positions": round(sum(p for _, _, p in timed) / len(timed)),
            "loss differs by": f"{max(abs(a[1] - b[1]) for a, b in zip(plain, timed, strict=True)):.1e}",
            "threads": torch.get_num_threads(),
        }
    return values
