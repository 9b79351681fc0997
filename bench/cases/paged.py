"""Paged optimiser states beside unpaged ones: seconds of an update, and of whole steps, in turn.

The update alone is where paging costs anything: AdamW over 16 million numbers (128 MB of states in 32 bits), as eight
matrices of 1,024 x 2,048, gradients in place. A whole step is mini-1 with LoRA of rank 16 on its language model, in
batches of 8 rows with a picture. Each form takes one step in turn, the order rotating; ratios to the unpaged one are
medians over rounds. Pages go to the folder of temporary files, whose disk or memory is what the tight budgets measure.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Final

import torch
from PIL import Image
from torch import nn

from bench.run import Values
from tarsia.train.optimiser import adamw
from tarsia.train.paged import Form, PagedAdamW
from tarsia.train.recipe import Recipe
from tarsia.train.run import Run, prepare
from tarsia.train.step import backward

ROUNDS: Final = 15
SHAPES: Final = ((1024, 2048),) * 8
STATES: Final = 8 * sum(a * b for a, b in SHAPES)
BATCH: Final = 8
FORMS: Final[Mapping[str, Form | None]] = {
    "32 bits": None,
    "32 bits, paged": Form(32, True),
    "32 bits, paged, half in memory": Form(32, True, STATES // 2),
    "32 bits, paged, an eighth in memory": Form(32, True, STATES // 8),
    "8 bits": Form(8),
    "8 bits, paged": Form(8, True),
    "8 bits, paged, an eighth of their bytes in memory": Form(8, True, STATES // 32),
}


def placed(form: Form | None, folder: Path) -> Form | None:
    """The form with its pages in ``folder``."""
    return None if form is None else Form(form.bits, form.paged, form.budget, folder)


@contextmanager
def updates(folder: Path) -> Iterator[dict[str, Callable[[], float]]]:
    """For each form what takes one update and gives a number of its parameters."""
    with ExitStack() as stack:
        found = {}
        for at, (name, form) in enumerate(FORMS.items()):
            generator = torch.Generator().manual_seed(0)
            tensors = {f"t{i}/w": nn.Parameter(torch.randn(s, generator=generator)) for i, s in enumerate(SHAPES)}
            for parameter in tensors.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimiser = adamw([tensors], [1e-3], (0.9, 0.999), 0.0, {}, placed(form, folder / str(at)))
            if isinstance(optimiser, PagedAdamW):
                stack.enter_context(optimiser.opened())
            found[name] = _update(optimiser, next(iter(tensors.values())))
        yield found


def _update(optimiser: torch.optim.Optimizer, parameter: nn.Parameter) -> Callable[[], float]:
    def update() -> float:
        optimiser.step()
        return float(parameter.detach().sum())

    return update


@contextmanager
def steps(folder: Path) -> Iterator[dict[str, Callable[[], float]]]:
    """For each of the forms without a budget what takes one whole step and gives its loss."""
    Image.radial_gradient("L").convert("RGB").resize((64, 64)).save(folder / "picture.png")
    row = {"images": ["picture.png"], "question": "What is this?", "answer": "It is red, and there are two."}
    (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * BATCH * (ROUNDS + 1), encoding="utf8")
    with ExitStack() as stack:
        found = {}
        for name, form in FORMS.items():
            if form is not None and form.budget is not None:
                continue
            values = {
                "model": "mini-1",
                "parts": [{"method": "lora", "select": "language", "lr": 1e-4, "rank": 16}],
                "data": {"train": [{"path": str(folder / "rows.jsonl")}]},
                "steps": ROUNDS + 1,
                "batch": BATCH,
                "precision": "float32",
                "device": "cpu",
                "optimiser": None if form is None else {"bits": form.bits, "paged": form.paged},
                "out": str(folder / name),
            }
            run = prepare(Recipe.of(values), None, torch.get_num_threads())
            run.model.train()
            if isinstance(run.optimiser, PagedAdamW):
                stack.enter_context(run.optimiser.opened())

            found[name] = _whole(run)
        yield found


def _whole(run: Run) -> Callable[[], float]:
    def step() -> float:
        loss = backward(run.model, run.batches(), run.step + 1).loss
        run.optimiser.step()
        run.optimiser.zero_grad(set_to_none=True)
        run.step += 1
        return loss

    return step


def race(contestants: Mapping[str, Callable[[], float]]) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds and results of every round but the first, in turn."""
    names = list(contestants)
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    for turn in range(ROUNDS + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.perf_counter()
            result = contestants[name]()
            seconds = time.perf_counter() - began
            if turn:
                found[name][0].append(seconds)
                found[name][1].append(result)
    return found


def measure() -> Values:
    """Each form: median milliseconds, the ratio to unpaged 32 bits, and whether its numbers are those to the bit."""
    values: dict[str, dict[str, float | int | str]] = {}
    for part, contest in (("update", updates), ("step", steps)):
        with tempfile.TemporaryDirectory() as folder, contest(Path(folder)) as contestants:
            found = race(contestants)
        plain, exact = found["32 bits"]
        for name, (seconds, results) in found.items():
            values[f"{part}: {name}"] = {
                "ms": round(1e3 * median(seconds), 2),
                "ratio": round(median(a / b for a, b in zip(seconds, plain, strict=True)), 3),
                "same bits": "yes" if results == exact else "no",
                "threads": torch.get_num_threads(),
            }
    return values
